"""The notebooks: pairs are in step, outputs are small and hold no paths, and all cells run."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LARGEST = 200_000  # bytes of one .ipynb


@pytest.fixture(scope="module")
def runner():
    """The module notebooks/run.py, whose libraries are not needed for anything else."""
    import importlib.util
    import warnings

    pytest.importorskip("jupytext", reason="the extra 'notebooks' is not in this environment")

    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, when they are imported
        spec.loader.exec_module(module)
    return module


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_pair_is_in_step(file, runner):
    written = runner.nbformat.read(file.with_suffix(".ipynb"), as_version=4)
    assert cells(written) == cells(runner.read(file)), f"python notebooks/run.py {file.name[:2]}"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_small_clean_and_there(file, runner):
    paired = file.with_suffix(".ipynb")
    notebook = runner.nbformat.read(paired, as_version=4)
    assert paired.stat().st_size <= LARGEST
    assert runner.machine_paths(notebook) == []
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown and not [output for output in shown if output.output_type == "error"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_opens_in_colab_and_asserts_its_claims(file):
    text = file.read_text()
    assert f"notebooks/{file.stem}.ipynb)" in text.split("# %%")[1]
    first = text.split("\n# %%\n")[1]
    assert "find_spec" in first and "default_backend()" in first or "devices[0].platform" in first
    assert text.count("\nassert ") + text.count("    assert ") >= 3


def test_the_address_of_the_repository_is_one(runner):
    """That of run.py, which its option --repository changes everywhere."""
    pages = [*NOTEBOOKS, *FOLDER.glob("*.ipynb"), ROOT / "docs" / "notebooks.md"]
    found = set()
    for page in pages:
        found |= set(
            re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob", page.read_text())
        )
        found |= set(re.findall(r"REPOSITORY = ..?https://github\.com/([\w.-]+/[\w-]+)", page.read_text()))
    assert found == {runner.REPOSITORY}


def test_every_notebook_is_in_the_documentation():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert not [file.stem for file in NOTEBOOKS if f"notebooks/{file.stem}.ipynb" not in page]


def test_the_constraints_of_colab_say_where_they_come_from_and_leave_room(runner):
    """Pins that lorax_fn can take; what pip has to replace is a comment with the reason."""
    text = (FOLDER / "colab-constraints.txt").read_text()
    assert "googlecolab/backend-info" in text and "as of" in text
    pins = dict(re.findall(r"^([\w.-]+)==([\w.+-]+)$", text, re.M))
    assert "numpy" in pins and len(pins) > 30 and "jax" not in pins

    sys.path.insert(0, str(FOLDER))
    colab = pytest.importorskip("colab")
    demands = [("lorax_fn", colab.Requirement("jax>=0.10")), ("lorax_fn", colab.Requirement("numpy>=2.0"))]
    lines = colab.constraints("numpy==2.0.2\njax==0.7.2\nother==1.0\n", demands)
    assert lines == ["# jax==0.7.2 there; jax>=0.10 wanted by lorax_fn", "numpy==2.0.2"]


@pytest.mark.parametrize("path", ["/home/me/x.py", "/tmp/a/b.txt", "/root/.cache/x"])
def test_a_path_of_a_machine_is_found(path, runner):
    cell = runner.nbformat.v4.new_code_cell("f()")
    cell.outputs = [runner.nbformat.v4.new_output("stream", name="stdout", text=f"see {path}\n")]
    assert runner.machine_paths(runner.nbformat.v4.new_notebook(cells=[cell]))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file):
    pytest.importorskip("jupytext", reason="the extra 'notebooks' is not in this environment")
    if "fashion_mnist()" in file.read_text():
        sys.path.insert(0, str(ROOT / "examples"))
        import data

        try:
            data.fashion_mnist()
        except FileNotFoundError as missing:
            pytest.skip(f"its data is a package of Debian, and there is no apt that has it: {missing}")
    run = [sys.executable, str(FOLDER / "run.py"), "--check", file.name[:2]]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
