"""The map of the package in CONTRIBUTING.md, made from pyproject.toml and the first line of every module.

python tests/house_map.py    # writes it; test_house.py fails where it is out of date
"""

import ast
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "lorax_fn", ROOT / "CONTRIBUTING.md"
MARKS = "<!-- map: python tests/house_map.py -->\n", "<!-- end of map -->\n"


def layers(container):
    """The modules of a container from top to bottom, as import-linter holds them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (rows,) = [c["layers"] for c in contracts if c.get("containers") == [container]]
    return [re.sub(r"[() ]", "", name) for row in rows for name in row.split("|")]


def first_line(file):
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0].replace("|", "\\|")


def table():
    lines = ["| | job |", "|---|---|"]
    for folder in layers("lorax_fn"):
        if not (PACKAGE / folder).is_dir():
            file = PACKAGE / f"{folder}.py"
            lines += [f"| **`{folder}.py`** | {first_line(file)} |"] if file.is_file() else []
            continue
        lines.append(f"| **`{folder}/`** | **{first_line(PACKAGE / folder / '__init__.py')}** |")
        files = [PACKAGE / folder / f"{name}.py" for name in layers(f"lorax_fn.{folder}")]
        lines += [f"| `{folder}/{file.name}` | {first_line(file)} |" for file in files if file.is_file()]
    return "\n".join(lines) + "\n"


def page_with(map_):
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + map_ + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
