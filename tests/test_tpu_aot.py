"""A small Llama compiled for eight TPU chips on a CPU: LoRA needs less, and gathers a layer at a time."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # a script, not a package

pytestmark = [
    pytest.mark.extra_env,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
    ),
]


def gathered(text):
    """Shapes of the results of all-gathers in an HLO text, asynchronous ones included."""
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    return [
        tuple(map(int, shape.split(","))) for line in lines for shape in re.findall(r"\w+\[([\d,]+)\]", line)
    ]


@pytest.fixture(scope="module")
def programs():
    import tpu_aot

    tiny = tpu_aot.MODELS["tiny"]
    case = tpu_aot.Case("lora", "tiny", tokens=128)
    ways = {way: dataclasses.replace(case, way=way) for way in ("lora", "full")}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam alone fails under strict
        return tiny, {way: tpu_aot.compiled(case, tiny) for way, case in ways.items()}


def test_lora_needs_less_of_a_chip_than_full_fine_tuning(programs):
    _, compiled = programs
    memory = {way: program.memory_analysis() for way, program in compiled.items()}
    both = {way: m.argument_size_in_bytes + m.temp_size_in_bytes for way, m in memory.items()}
    assert memory["lora"].argument_size_in_bytes < memory["full"].argument_size_in_bytes
    assert both["lora"] < both["full"]


def test_no_stack_of_weights_is_gathered_whole(programs):
    c, compiled = programs
    shapes = gathered(compiled["lora"].as_text())
    assert any(c.width in shape for shape in shapes), "the pattern finds no gather at all"
    assert not [shape for shape in shapes if len(shape) > 2 and shape[0] == c.layers]
