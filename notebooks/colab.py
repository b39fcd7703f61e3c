"""Renews colab-constraints.txt: the versions that Colab has of what this repository installs.

python notebooks/colab.py                          # from the list that Colab publishes
python notebooks/colab.py pip-freeze.gpu.txt 2026-06-02    # from a copy of it, with its date

Colab publishes what its machines have as `pip freeze` (googlecolab/backend-info). A version that lorax_fn or one
of its dependencies cannot take stands in a comment: pip replaces it there, too, when the first cell of a notebook
installs lorax_fn.
"""

import datetime
import importlib.metadata
import pathlib
import re
import sys
import tomllib
import urllib.request

from packaging.requirements import Requirement

FOLDER = pathlib.Path(__file__).parent
EXTRAS = ("test", "cli", "hub", "plot", "pandas", "examples", "notebooks")  # test has the four after it
SOURCE = "https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.gpu.txt"
HEADER = """\
# Versions that Google Colab has, of the packages that this repository installs; Colab has Python {python}.
# From the list that Colab publishes (googlecolab/backend-info, pip-freeze.gpu.txt), as of {date}.
# Colab changes every few weeks: python notebooks/colab.py renews this file.
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wishes() -> list[tuple[str, Requirement]]:
    """What lorax_fn with the extras of the notebooks demands of others, and what these demand in turn."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = sum((extras[name] for name in EXTRAS), project["dependencies"])
    found = [("lorax_fn", wish) for wish in map(Requirement, lines) if wish.name != "lorax_fn"]
    seen, todo = set(), [(wish.name, extra) for _, wish in found for extra in ("", *wish.extras)]
    while todo:
        who, extra = todo.pop()
        if (plain(who), extra) in seen:
            continue
        seen.add((plain(who), extra))
        try:
            lines = importlib.metadata.requires(who) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for wish in map(Requirement, lines):
            if wish.marker is None or wish.marker.evaluate({"extra": extra}):
                found.append((who, wish))
                todo += [(wish.name, more) for more in ("", *wish.extras)]
    return found


def constraints(freeze: str, demands: list[tuple[str, Requirement]]) -> list[str]:
    """The lines of the file: pins, and as comments the versions that pip replaces."""
    pinned = re.findall(r"^([\w.-]+)==([\w.+-]+)$", freeze, re.M)
    wanted, lines = {plain(wish.name) for _, wish in demands}, []
    for name, version in sorted(pinned, key=lambda pair: plain(pair[0])):
        if plain(name) not in wanted:
            continue
        wants = [
            f"{wish.name}{wish.specifier} wanted by {who}"
            for who, wish in demands
            if plain(wish.name) == plain(name) and not wish.specifier.contains(version, prereleases=True)
        ]
        lines.append(f"# {name}=={version} there; {wants[0]}" if wants else f"{name}=={version}")
    return lines


def main() -> None:
    if len(sys.argv) > 1:
        freeze, date = pathlib.Path(sys.argv[1]).read_text(), sys.argv[2]
    else:
        freeze = urllib.request.urlopen(SOURCE, timeout=60).read().decode()
        date = datetime.date.today().isoformat()
    header = HEADER.format(date=date, python="3.12")
    (FOLDER / "colab-constraints.txt").write_text(header + "\n".join(constraints(freeze, wishes())) + "\n")


if __name__ == "__main__":
    main()
