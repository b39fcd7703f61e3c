"""Formats of 4 and 8 bits: code tables, and rounding to the nearest code."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error

GROUP = 256  # how many scales share one second-level scale


# Appendix E of QLoRA: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """The 256 values of QLoRA's second level: a sign, a decimal exponent, and a fraction in the other bits.

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861).
    """
    positive = []
    for bits in range(7):
        edges = np.linspace(0.1, 1.0, 2**bits + 1)
        positive.extend(10.0 ** (bits - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.sort(np.array([*positive, *(-x for x in positive), 0.0, 1.0])).astype(np.float32)


DYNAMIC = _dynamic_map()


@dataclasses.dataclass(frozen=True)
class Format:
    """How the numbers of a block, divided by its scale, become codes.

    Args:
      bits: 4, with two codes per byte, or 8.
      top: the value of the largest code, to which a block's largest number is scaled.
      encode: maps values from ``-top`` to ``top`` to codes.
      decode: maps codes to float32 values.
      minimum: whether a block's smallest number is subtracted first and stored, so that values begin at 0.
      scales: dtype of the scales and the minimum.
    """

    bits: int
    top: float
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    minimum: bool = False
    scales: Any = np.float32


def _nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """The index of the nearest entry of a sorted table; the lower one in case of a tie."""
    code = jnp.zeros_like(x, jnp.uint8)
    for edge in (table[:-1] + table[1:]) / np.float32(2):  # elementwise, so XLA fuses it into one loop
        code = code + (x > edge).astype(jnp.uint8)
    return code


def to_dynamic(x: jax.Array) -> jax.Array:
    """`_nearest` for `DYNAMIC`, in a loop because the table is too long to unroll."""
    edges = jnp.asarray((DYNAMIC[:-1] + DYNAMIC[1:]) / np.float32(2))
    count = len(DYNAMIC) - 1
    return jax.lax.fori_loop(
        0, count, lambda i, code: code + (x > edges[i]).astype(jnp.uint8), jnp.zeros_like(x, jnp.uint8)
    )


def _chosen(index: jax.Array, table: np.ndarray) -> jax.Array:
    """``table[index]`` by a tree of selections on the bits of the index: ``low ^ (on & (low ^ high))``.

    A gather would go element by element on TPU, and `jnp.where` would make arrays of the constants, which the
    gradient of a scan would keep.
    """
    values: list[Any] = list(table.view(np.int32))
    for bit in range(len(values).bit_length() - 1):
        on = -((index.astype(jnp.int32) >> bit) & 1)  # all bits or none
        values = [low ^ (on & (low ^ high)) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)


def _nibble(x: jax.Array) -> jax.Array:
    return (jnp.round(x) + 8.0).astype(jnp.uint8)


def code_as_float(code: jax.Array) -> jax.Array:
    return code.astype(jnp.float32)


FORMATS = {
    "nf4": Format(4, 1.0, lambda x: _nearest(x, NF4), lambda code: _chosen(code, NF4)),
    "int4": Format(4, 7.0, _nibble, lambda code: code_as_float(code) - 8.0),
    "int8": Format(8, 127.0, lambda x: jnp.round(x).astype(jnp.int8), code_as_float),
}


# The blocks of 32 weights in GGUF files. `quantize` does not create them, but they can be loaded and kept.
GGUF = {
    "q4_1": Format(4, 15.0, lambda x: jnp.round(x).astype(jnp.uint8), code_as_float, True, np.float16),
    "q8_0": Format(8, 127.0, FORMATS["int8"].encode, code_as_float, False, np.float16),
}


READ = {**FORMATS, **GGUF}


def check_options(format: Any, block: Any) -> None:
    """Raises a `LoraError` unless ``format`` is known and ``block`` is an even number."""
    if not (isinstance(format, str) and format in FORMATS):
        raise error(
            "unknown format.",
            got=repr(format),
            want=f"one of {sorted(FORMATS)}",
            do='lx.quantize(params, "nf4").',
        )
    whole = isinstance(block, int | np.integer) and not isinstance(block, bool)
    if not whole or block < 2 or block % 2:
        raise error(
            "a block is not an even number of weights.",
            got=f"block={block!r}",
            want="2, 4, 6, ...: two codes share a byte",
            do="block=64.",
        )


# The power of ten for the position of a code's highest bit. Codes stand for the middles of fractions, except
# the last, which stands for 1 itself, so its power is chosen to give 1.
POWERS = np.array([*(10.0 ** (bits - 6) for bits in range(7)), 1 / (0.1 + 0.9 * 0.5 / 128)], np.float32)


def from_dynamic(code: jax.Array) -> jax.Array:
    """``DYNAMIC[code]``."""
    index = code.astype(jnp.int32) - 127  # 0 is 0, 128 is 1
    size = jnp.maximum(jnp.abs(index), 1)
    bits = 31 - jax.lax.clz(size)
    edge = jnp.left_shift(jnp.ones_like(bits), bits)
    fraction = ((size - edge).astype(jnp.float32) + 0.5) / edge.astype(jnp.float32)
    return jnp.sign(index).astype(jnp.float32) * _chosen(bits, POWERS) * (0.1 + 0.9 * fraction)
