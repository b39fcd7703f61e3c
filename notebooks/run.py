"""Runs the notebooks and writes their outputs: every .py (percent format) has an .ipynb beside it.

python notebooks/run.py                # all of them, in place
python notebooks/run.py 01 04          # some
python notebooks/run.py --check 01     # runs them and writes nothing
python notebooks/run.py --repository org/name   # no run: badges and clones get another address

The .py is what people edit; the .ipynb is made of it and of what its cells print. Nothing of the machine stays in
it: no times, no paths, no warnings of the runtime.
"""

import argparse
import pathlib
import re
import sys

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
# Where the repository lives on GitHub: made up, until it is released. The option --repository sets it, here, in
# the notebooks and in the page of docs/ that lists them.
REPOSITORY = "lorax-fn/lorax_fn"
LIMIT = 600  # seconds of one cell, on a busy machine


def sources(names: list[str]) -> list[pathlib.Path]:
    """The .py files of the notebooks whose names begin with one of ``names``, or of all."""
    files = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [file for file in files if not names or file.name.startswith(tuple(names))]


def read(file: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a .py, without outputs; cells are named by their place, so that a second run is alike."""
    notebook = jupytext.read(file)
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Executes it, and keeps of each cell what it printed and drew."""
    client = NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = nbformat.from_dict({})
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get(
                    "data", {}
                ) else None
    return notebook


def machine_paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Paths of a machine in what a notebook shows."""
    shown = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    return re.findall(r"(?:/(?:home|root|tmp|work|usr|Users|content)/[\w./-]+)", "\n".join(shown))


def set_repository(new: str) -> None:
    """Writes another address wherever this one stands."""
    files = [
        *sources([]),
        *FOLDER.glob("*.ipynb"),
        FOLDER.parent / "docs" / "notebooks.md",
        pathlib.Path(__file__),
    ]
    for file in files:
        text = file.read_text()
        file.write_text(text.replace(REPOSITORY, new))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs notebooks and writes their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 01 (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--repository", metavar="ORG/NAME", help="write this address instead, and run nothing"
    )
    args = parser.parse_args()
    if args.repository:
        return set_repository(args.repository)
    files = sources(args.names)
    if not files:
        sys.exit(f"no notebook begins with any of {args.names}")
    for file in files:
        print(file.name, flush=True)
        notebook = run(read(file))
        if found := machine_paths(notebook):
            sys.exit(f"{file.name} shows paths of this machine: {found}")
        if not args.check:
            nbformat.write(notebook, file.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
