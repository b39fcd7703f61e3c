"""What is shipped: the wheel holds the package and its types alone, and stated versions agree."""

import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_has_the_version_and_the_license():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [PROJECT["version"]]
    assert re.findall(r"^license: (.+)$", citation, re.M) == [PROJECT["license"]]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "lorax_fn" / "py.typed").is_file()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"lorax_fn-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in names} == {"lorax_fn", f"lorax_fn-{PROJECT['version']}.dist-info"}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "lorax_fn").rglob("*.py")}
    assert sources | {"lorax_fn/py.typed"} <= set(names)

    script = "import lorax_fn, sys; print(lorax_fn.__file__)"
    run = [sys.executable, "-W", "error", "-c", script]
    env = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
