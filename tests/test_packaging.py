"""What is shipped: a wheel with the package alone, which installs alone and is typed for its users."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from test_house import all_public

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Run in the new environment: what lorax_fn needs without extras, and what these need in turn; what is there.
NEEDED_AND_INSTALLED = """
import importlib.metadata, json, re
from pip._vendor.packaging.requirements import Requirement

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

there = {plain(package.metadata["Name"]): package for package in importlib.metadata.distributions()}
needed, todo = set(), [("lorax-fn", "")]
while todo:
    name, extra = todo.pop()
    needed.add((name, extra))
    for wish in map(Requirement, there[name].requires or []):
        if wish.marker is None or wish.marker.evaluate({"extra": extra}):
            for more in ("", *wish.extras):
                if (plain(wish.name), more) not in needed:
                    todo.append((plain(wish.name), more))
print(json.dumps([sorted({name for name, _ in needed}), sorted(set(there) - {"pip", "setuptools", "wheel"})]))
"""


def test_the_citation_has_the_version_and_the_license():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [PROJECT["version"]]
    assert re.findall(r"^license: (.+)$", citation, re.M) == [PROJECT["license"]]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "lorax_fn" / "py.typed").is_file()


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"lorax_fn-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"lorax_fn", f"lorax_fn-{PROJECT['version']}.dist-info"}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "lorax_fn").rglob("*.py")}
    assert sources | {"lorax_fn/py.typed"} <= set(names)


@pytest.mark.slow
def test_it_installs_alone_and_imports_quickly(wheel, tmp_path):
    """In an environment of its own, outside of the checkout: no extra comes along, and `import` is short."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    if not python.exists():  # on Windows
        python = tmp_path / "venv" / "Scripts" / "python.exe"
    run(python, "-m", "pip", "install", "-q", wheel)
    needed, installed = json.loads(run(python, "-c", NEEDED_AND_INSTALLED))
    assert installed == needed, "what is installed is what the dependencies of pyproject.toml need"

    script = (
        "import time, jax; start = time.process_time(); import lorax_fn; took = time.process_time() - start; "
        "import pathlib; assert (pathlib.Path(lorax_fn.__file__).parent / 'py.typed').is_file(); print(took)"
    )
    times = [float(run(python, "-W", "error", "-c", script, cwd=tmp_path)) for _ in range(4)]
    assert min(times) < 0.4, f"import lorax_fn takes {min(times):.2f} s beyond import jax"


@pytest.mark.slow
def test_a_users_file_that_calls_everything_is_typed(tmp_path):
    """Pyright in its strict mode on `typed_user.py`, as an editor shows it to somebody with the package."""
    pytest.importorskip("pyright", reason="the extra 'lint' is not in this environment")
    shutil.copy(ROOT / "tests" / "typed_user.py", tmp_path / "typed_user.py")
    config = {
        "include": ["typed_user.py"], "typeCheckingMode": "strict", "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
    }  # fmt: skip
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    run(sys.executable, "-m", "pyright", "-p", tmp_path, "--pythonpath", sys.executable)


def test_the_users_file_calls_every_public_name():
    text = (ROOT / "tests" / "typed_user.py").read_text()
    unused = [name for name in all_public() if f"lx.{name.removeprefix('lorax_fn.')}" not in text]
    assert not unused, f"tests/typed_user.py does not use {unused}"
