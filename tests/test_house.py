"""Rules of the house: versions agree, imports stay light, every public name is free and documented."""

import ast
import dataclasses
import importlib.metadata
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib

import house_map
import pytest

import lorax_fn

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "lorax_fn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINE_LIMIT = 400
# Namespaces that users reach by name, lx.checkpoint.save: what they hold is public too.
NAMESPACES = (
    "checkpoint",
    "data",
    "huggingface",
    "inits",
    "kohya",
    "mappings",
    "optim",
    "peft",
    "quantization",
    "ranks",
    "report",
    "sweeps",
)


def public_names(module):
    return {
        name: value
        for name in dir(module)
        for value in [getattr(module, name)]
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("lorax_fn")
    }


def all_public():
    names = {f"lorax_fn.{name}": value for name, value in public_names(lorax_fn).items()}
    for namespace in NAMESPACES:
        module = getattr(lorax_fn, namespace)
        for name, value in public_names(module).items():
            written_here = hasattr(module, "__path__") or value.__module__ == module.__name__
            if written_here and (inspect.isclass(value) or inspect.isroutine(value)):
                names[f"lorax_fn.{namespace}.{name}"] = value
    return names


def written_in(path):
    return [file for file in sorted(path.rglob("*.py")) if "__pycache__" not in file.parts]


def test_versions_agree_wherever_one_is_stated():
    version = PROJECT["version"]
    assert importlib.metadata.version("lorax_fn") == version
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version
    assert set(re.findall(r"lorax_fn (\d+\.\d+\.\d+)", (ROOT / "README.md").read_text())) <= {version}


def test_readme_states_the_floors_of_pyproject():
    readme = (ROOT / "README.md").read_text()
    floors = re.findall(r"Python (\d+\.\d+) or newer.{0,40}?JAX (\d+\.\d+) or newer", readme, re.S)
    python, jax = PROJECT["requires-python"].removeprefix(">="), PROJECT["dependencies"][0]
    assert floors and {(python, jax.removeprefix("jax>="))} == set(floors)


def test_only_public_jax_in_the_package():
    private = re.compile(r"\bjax\._src\b|\bjax\.core\b(?!\.Tracer\b)|from jax import (.*\b)?(_src|core)\b")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in written_in(PACKAGE)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert not found, "\n".join(found)


def test_import_loads_no_optional_or_heavy_module():
    script = """
        import sys
        import lorax_fn
        unwanted = {"orbax", "tqdm", "matplotlib", "safetensors", "torch", "equinox", "haiku"}
        unwanted |= {"typer", "rich", "huggingface_hub"}
        print(*sorted(unwanted & {name.split(".")[0] for name in sys.modules}))
    """
    run = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_public_name_is_also_a_folder():
    folders = {info.name for info in pkgutil.iter_modules([str(PACKAGE)])}
    assert "core" in folders
    assert not folders & set(public_names(lorax_fn))


def test_the_package_holds_folders_only_and_their_init_files_hand_names_on():
    files = [file.name for file in PACKAGE.glob("*.py")]
    assert set(files) <= {"__init__.py", "__main__.py"}
    for file in PACKAGE.rglob("__init__.py"):
        first, *rest = ast.parse(file.read_text()).body
        assert isinstance(first, ast.Expr), f"{file} does not say what the folder is for"
        rest = [ast.unparse(node) for node in rest if not isinstance(node, ast.Import | ast.ImportFrom)]
        # The top one has a version, and namespaces that load when they are first used.
        allowed = r"__version__ =|if _typing.TYPE_CHECKING|_LATER =|def __getattr__|def __dir__"
        assert not rest or file.parent == PACKAGE, (file, rest)
        assert all(re.match(allowed, text) for text in rest), (file, rest)


def test_files_stay_short():
    folders = ("lorax_fn", "tests", "examples", "benchmarks")
    files = [file for folder in folders for file in written_in(ROOT / folder)]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    too_long = {name: length for name, length in lengths.items() if length > LINE_LIMIT}
    assert lengths and not too_long, too_long


def test_the_map_in_contributing_is_that_of_the_code():
    assert house_map.PAGE.read_text() == house_map.page_with(house_map.table()), "python tests/house_map.py"


def wanted_sections(value):
    """The parts that a public name's docstring must have, as its code tells them."""
    if inspect.isclass(value):
        takes = dataclasses.is_dataclass(value) and dataclasses.fields(value)
        return ["Args:", "Example:"] if takes else ["Example:"]
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    returns_nothing = node.returns is not None and ast.unparse(node.returns) == "None"
    facts = {
        "Args:": bool(inspect.signature(value).parameters),
        "Returns:": not returns_nothing,
        "Raises:": any(isinstance(part, ast.Raise) for part in ast.walk(node)),
        "Example:": True,
    }
    return [section for section, wanted in facts.items() if wanted]


@pytest.mark.parametrize("name", sorted(all_public()))
def test_public_name_is_documented(name):
    value = all_public()[name]
    text = inspect.cleandoc(value.__doc__ or "")
    missing = [section for section in wanted_sections(value) if not re.search(rf"^{section}$", text, re.M)]
    assert text and not missing, f"{name} lacks a docstring with {missing or 'anything in it'}"
    assert ">>>" in text, f"the example of {name} does not run"
    first = text.splitlines()[0]
    assert first.endswith("."), f"{name}: the first line is a sentence of its own: {first!r}"


@pytest.mark.parametrize("name", sorted(n for n, value in all_public().items() if inspect.isroutine(value)))
def test_every_argument_is_annotated(name):
    parameters = inspect.signature(all_public()[name]).parameters.values()
    bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    assert not bare, f"{name} does not say the types of {bare}"


@pytest.mark.parametrize("name", sorted(n for n, value in all_public().items() if inspect.isroutine(value)))
def test_every_argument_is_explained(name):
    value = all_public()[name]
    arguments = (value.__doc__ or "").split("Args:\n")[-1].split("\n\n")[0]
    unsaid = [p for p in inspect.signature(value).parameters if not re.search(rf"\b{p}\b.*:", arguments)]
    assert not unsaid, f"{name} does not say what {unsaid} are"
