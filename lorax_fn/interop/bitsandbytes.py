"""Weights that bitsandbytes stored in 4 bits, as `Quantized`: the same codes on our axes, no float copy.

Dettmers et al., "QLoRA" (https://arxiv.org/abs/2305.14314). Its blocks follow the rows of a torch weight, so
they lie along one input axis of ours. Its second level groups 256 consecutive blocks of a torch weight,
across rows, whereas `Quantized` groups 256 blocks along one output axis, so that the scales of one cannot be
those of the other. Each block therefore keeps the float32 number that its code stands for: 4.5 bits per
weight with blocks of 64, instead of 4.127, and every weight is exactly what bitsandbytes makes of it.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.quantization.blocks import Quantized
from lorax_fn.quantization.formats import NF4

_STATE = ".quant_state.bitsandbytes__"
_PARTS = re.compile(r"(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")


def is_stored_there(table: Any, name: str) -> bool:
    """Whether a tensor is the codes of a quantized weight."""
    return f"{name}.absmax" in table


def belongs(name: str, used: set[str]) -> bool:
    """Whether a tensor is a part of the quantization of one that is read."""
    owner, _, part = name.partition(".weight.")
    return f"{owner}.weight" in used and _PARTS.fullmatch(part) is not None


def stored(
    table: Any, name: str, layout: Layout | None, shape: tuple[int, ...], dtype: Any
) -> Quantized | None:
    """The weight ``name`` as `Quantized` on the axes of a leaf; None if it is an ordinary tensor.

    Raises:
      LoraError: it is of another format than nf4, or its blocks do not lie along one axis of the leaf.
    """
    if not is_stored_there(table, name):
        return None
    facts = _facts(table, name)
    block, theirs = facts.get("blocksize"), facts.get("shape")
    if facts.get("quant_type") != "nf4" or layout is None or not isinstance(block, int) or block < 2:
        raise _refused(
            name, f"quant_type={facts.get('quant_type')!r}, blocksize={block!r}", "nf4 of a linear weight"
        )
    stack, n, m = layout.shapes(shape)
    rows, columns = math.prod(m), math.prod(n)
    last = shape[layout.inputs[-1]]
    codes, scales = table[name].reshape(-1), _scales(table, name, facts)
    good = theirs == [rows, columns] and not stack and last % block == 0 and codes.size * 2 == rows * columns
    if not good or scales.size != rows * columns // block:
        raise _refused(
            name, f"shape {theirs} in blocks of {block}", f"({rows}, {columns}), blocks along one axis"
        )
    _check_map(table, name)
    order = (*layout.outputs, *layout.inputs)  # as torch has it, (out, in): with inputs last

    def ours(x: np.ndarray, width: int) -> Any:
        x = x.reshape([shape[i] for i in order[:-1]] + [width])
        return jnp.asarray(np.transpose(x, [order.index(i) for i in range(len(shape))]))

    return Quantized(
        codes=ours(codes, last // 2),
        scales=ours(scales, last // block),
        groups=None,
        offset=None,
        minimum=None,
        format="nf4",
        block=block,
        shape=shape,
        dtype=np.dtype(dtype),
        layout=layout,
        block_axis=layout.inputs[-1],
        group_axis=layout.outputs[-1],
    )


def _facts(table: Any, name: str) -> Mapping[str, Any]:
    found = [other for other in table if other.startswith(f"{name}{_STATE}")]
    try:
        facts = json.loads(table[found[0]].tobytes().decode("utf-8")) if found else {}
    except (ValueError, RecursionError) as failure:
        raise _refused(
            name, f"a state that is not JSON: {failure}", "the state that bitsandbytes writes"
        ) from failure
    return facts if isinstance(facts, dict) else {}


def _scales(table: Any, name: str, facts: Mapping[str, Any]) -> np.ndarray:
    """One float32 number for each block."""
    scales = table[f"{name}.absmax"].reshape(-1)
    if f"{name}.nested_absmax" not in table:
        return scales.astype(np.float32)
    values = table[f"{name}.nested_quant_map"].reshape(-1).astype(np.float32)
    groups = table[f"{name}.nested_absmax"].reshape(-1).astype(np.float32)
    size, offset = facts.get("nested_blocksize"), facts.get("nested_offset")
    good = isinstance(offset, float) and scales.dtype == np.uint8
    if (
        not isinstance(size, int)
        or size < 1
        or not good
        or len(values) != 256
        or len(groups) != -(-scales.size // size)
    ):
        raise _refused(
            name, f"nested_blocksize={size!r}, nested_offset={offset!r}", "a second level of 8-bit codes"
        )
    return values[scales] * np.repeat(groups, size)[: scales.size] + np.float32(offset)


def _check_map(table: Any, name: str) -> None:
    values = table[f"{name}.quant_map"].reshape(-1) if f"{name}.quant_map" in table else NF4
    if values.shape != NF4.shape or not np.allclose(values, NF4, atol=1e-6):
        raise _refused(name, "another table of values", "the values of nf4")


def _refused(name: str, got: str, want: str) -> Exception:
    return error(
        "this quantized weight cannot be held as it is.",
        path=name,
        got=got,
        want=want,
        do="dequantize it in transformers (model.dequantize()), save that, and load with quantize='nf4'.",
    )
