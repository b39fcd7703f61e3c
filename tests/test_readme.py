"""Every Python block of README.md and of each page below docs/ runs, top to bottom, in its own process."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Not strict dtype promotion: optax.adamw itself (decay**count, an int) raises under it.
STRICT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_NUMPY_RANK_PROMOTION": "raise"}


def python_blocks(text):
    """The blocks as one script, each on its line of the file, so that a traceback points into README.md."""
    lines, script, inside = text.splitlines(), [], False
    for line in lines:
        if line.startswith("```"):
            inside = line.strip() == "```python"
            script.append("")
        else:
            script.append(line if inside else "")
    return "\n".join(script) + "\n"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page):
    return str(page.relative_to(ROOT)).removeprefix("docs/")


# Tables of facts, and the reference: its examples are doctests of the package.
WITHOUT_BLOCKS = (
    "api.md",
    "benchmarks.md",
    "costs.md",
    "evidence.md",
    "notebooks.md",
    "peers.md",
    "releasing.md",
)


# Each page is a process of its own: those of docs/ run with -m slow, as CI does.
RUN = [pytest.param(page, marks=() if page == PAGES[0] else pytest.mark.slow) for page in PAGES]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_blocks_run_top_to_bottom(page, tmp_path):
    blocks = python_blocks(page.read_text())
    assert blocks.strip() or page.name in WITHOUT_BLOCKS
    script = tmp_path / page.name
    script.write_text(blocks)
    run = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(
        run, cwd=tmp_path, env={**os.environ, **STRICT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_is_short_and_has_blocks():
    assert README.count("```python\n") >= 5
    assert len(README.splitlines()) <= 210


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_blocks_keep_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```sh\nmake\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text).splitlines() == ["", "", "x = 1", "", "", "", "", "", "y = 2", ""]


def test_the_two_commands_come_first():
    first_block = re.search(r"```\w*\n(.*?)```", README, re.S).group(1)
    commands = [line.split("#")[0].strip() for line in first_block.strip().splitlines()]
    assert commands == ["make demo", "make test"]


NAMED = sorted(
    {
        name
        for page in PAGES
        for name in re.findall(r"`((?:tests|examples|benchmarks)/[\w/]+\.\w+)`", page.read_text())
    }
)


@pytest.mark.parametrize("name", NAMED)
def test_files_named_exist(name):
    assert (ROOT / name).is_file()
