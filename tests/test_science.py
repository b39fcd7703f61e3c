"""Models of others, unchanged: each file of examples/science asserts that adapted is merged, no fallback.

`make test-science` runs those that live in the ordinary environment, `make test-extra` the others; a test is
skipped where its package is not installed.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

# The file, and the module that it wants.
LIGHT = {
    "esm2": "esm2quinox",
    "mamba2": "mamba2_jax",
    "nequix_forces": "nequix",
    "timesfm_forecast": "einshape",
    "vit_equimo": "equimo",
}
HEAVY = {
    "alphafold_blocks": "alphafold",
    "mace_forces": "mlip",
    "neuralgcm_weather": "neuralgcm",
    "tabfm_tables": "tabfm",
}
EXAMPLE = {**LIGHT, **HEAVY}


@pytest.fixture(autouse=True)
def conditions_of_others():
    """These models add ints to floats, and other ranks, which this repository's own code may not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.extra_env
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLE)
def test_a_model_of_others_is_adapted(name):
    if importlib.util.find_spec(EXAMPLE[name]) is None:
        pytest.skip(f"{EXAMPLE[name]} is not installed: make test-science or make test-extra")
    importlib.import_module(f"science.{name}").main()


def test_every_file_is_listed_and_says_what_it_needs():
    files = {file.stem: file for file in (EXAMPLES / "science").glob("*.py") if file.stem != "check"}
    assert set(files) == set(EXAMPLE)
    for name, file in files.items():
        text = file.read_text()
        wanted = "light" if name in LIGHT else name.split("_")[0].replace("mace", "mlip")
        assert f"examples/science/requirements-{wanted}.txt" in text
        assert f"python examples/science/{name}.py" in text
        assert (EXAMPLES / "science" / f"requirements-{wanted}.txt").is_file()
