"""What the studies found: records say what made them, and pages show figures that exist."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = sorted((ROOT / "examples" / "ablation" / "records").glob("*.json"))
PAGE = ROOT / "docs" / "evidence.md"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_say_what_made_them(path):
    held = json.loads(path.read_text("utf-8"))
    assert {"command", "date", "machine", "versions", "model", "data"} <= held.keys()
    assert (
        re.fullmatch(r"[\w ,.]*\d+ of \d+ CPU cores", held["machine"])
        and {"jax", "numpy"} <= held["versions"].keys()
    )
    assert (ROOT / held["command"].split()[1]).is_file()
    assert held["rows"] and all(len(row) == len(held["columns"]) for row in held["rows"])
    assert path.stat().st_size < 200_000


def test_the_page_shows_each_study():
    text = PAGE.read_text("utf-8")
    shown = re.findall(r"!\[[^]]+\]\(pictures/(\w+)\.svg\)", text)
    assert shown and all(
        (ROOT / "docs" / "pictures" / f"{name}.svg").stat().st_size < 200_000 for name in shown
    )
    assert {path.stem for path in RECORDS} <= {*shown, "table_costs"}
    commands = {json.loads(path.read_text("utf-8"))["command"] for path in RECORDS}
    assert set(re.findall(r"^    (python examples/.*?)(?:  +#.*)?$", text, re.MULTILINE)) == commands
