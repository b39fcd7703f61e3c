"""Q4_1 and Q8_0 blocks of a GGUF file as `lorax_fn.Quantized`: bytes are rearranged, no number changes.

A block is 32 neighbors along a weight's input axis. Q4_1 has a float16 scale and minimum, then 16 bytes,
where byte ``i`` has code ``i`` in its low and code ``i + 16`` in its high half. Q8_0 has a float16 scale and
32 int8 codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lx

BLOCK = 32
KINDS = {"Q4_1": "q4_1", "Q8_0": "q8_0"}  # GGUF's names and this library's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """The arrays of a `lorax_fn.Quantized`, which still change axes together: ``jax.tree.map`` each.

    Args:
      codes: ``[out, in]`` int8; or ``[out, in / 2]`` uint8, two neighbors a byte, the first high.
      scales: ``[out, in / 32]`` float16.
      minimum: ``[out, in / 32]`` float16, or None.
      format: the library's name of it.
    """

    codes: Any
    scales: Any
    minimum: Any
    format: str = dataclasses.field(metadata={"static": True})


def take_apart(data: np.ndarray, kind: str) -> Parts:
    """The codes, scales and minima of a tensor's blocks.

    Args:
      data: ``[out, bytes]`` uint8, as `gguf.GGUFReader` gives it.
      kind: ``"Q4_1"`` or ``"Q8_0"``.

    Returns:
      `Parts` of ``[out, ...]``.
    """
    rows, header = len(data), 4 if kind == "Q4_1" else 2
    blocks = data.reshape(rows, -1, header + (BLOCK // 2 if kind == "Q4_1" else BLOCK))
    floats = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    codes = blocks[..., header:]
    if kind == "Q8_0":
        return Parts(codes.view(np.int8).reshape(rows, -1), floats[..., 0], None, KINDS[kind])
    codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    codes = (codes[..., ::2] << 4) | codes[..., 1::2]
    return Parts(codes.reshape(rows, -1), floats[..., 0], floats[..., 1], KINDS[kind])


def put_together(parts: Parts, layout: lx.Layout) -> lx.Quantized:
    """A weight of `Parts` whose input axis is axis 1.

    Args:
      parts: the arrays, each with the weight's axes.
      layout: which axes of the weight are which; ``inputs`` is ``(1,)``.

    Returns:
      A float32 weight in blocks, of JAX arrays.
    """
    first, blocks, *rest = parts.scales.shape
    return lx.Quantized(
        codes=jnp.asarray(parts.codes),
        scales=jnp.asarray(parts.scales),
        groups=None,
        offset=None,
        minimum=None if parts.minimum is None else jnp.asarray(parts.minimum),
        format=parts.format,
        block=BLOCK,
        shape=(first, blocks * BLOCK, *rest),
        dtype=np.dtype(np.float32),
        layout=layout,
        block_axis=1,
        group_axis=layout.outputs[0],
    )
