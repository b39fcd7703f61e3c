"""LoftQ: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization" (https://arxiv.org/abs/2310.08659).

Q = quantize(W - scale * A @ B),   A @ B = rank-r part of (W - Q) / scale, in turns: algorithm 1
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, entry_scales, from_entries, used_ranks
from lorax_fn.core.matrices import entries as entries
from lorax_fn.core.stored import dense
from lorax_fn.inits.base import Init
from lorax_fn.quantization.blocks import encode
from lorax_fn.quantization.formats import check_options


def loftq(format: str = "nf4", *, block: int = 64, double: bool = True, iterations: int = 5) -> "LoftQ":
    """Quantizes ``W`` and starts the factors from the rounding error, in turns: ``Q + s A @ B ~ W``.

    Li et al., "LoftQ" (https://arxiv.org/abs/2310.08659), algorithm 1: ``Q <- quantize(W - s A B)``, then
    ``A B <-`` the best rank-r approximation of ``(W - Q) / s``. (PEFT does not divide by s, which is right
    only for ``s = 1``.) `lorax_fn.split` takes *float* params and returns the adapted weights `Quantized`.

    Args:
      format: as in `lorax_fn.quantize`.
      block: as in `lorax_fn.quantize`.
      double: as in `lorax_fn.quantize`.
      iterations: how many rounds the two steps take, 1 or more; 5 in the paper.

    Returns:
      A value for ``split(params, init=...)``. The strings ``"loftq"`` and ``"loftq:n"`` (``n`` iterations)
      stand for it with the other options at their defaults.

    Raises:
      LoraError: the format is unknown, the block is not an even number, or iterations is not 1 or more.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (128, 64))
      >>> params, lora = lx.split({"kernel": w}, rank=8, init=lx.inits.loftq("nf4"))
      >>> plain = lx.dequantize(lx.quantize({"kernel": w}))["kernel"]
      >>> bool(jnp.linalg.norm(lx.merge(params, lora)["kernel"] - w) < 0.9 * jnp.linalg.norm(plain - w))
      True
    """
    check_options(format, block)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise error(
            "LoftQ's iterations are not a count.",
            got=f"iterations={iterations!r}",
            want="an int of 1 or more",
            do="lx.inits.loftq(iterations=5).",
        )
    return LoftQ(format, int(block), bool(double), iterations)


@dataclasses.dataclass(frozen=True, repr=False)
class LoftQ(Init):
    """The init that `loftq` returns."""

    name = "loftq"
    moves_weight = True
    divides_by_scale = True

    format: str
    block: int
    double: bool
    iterations: int

    def __repr__(self) -> str:
        options = f"block={self.block}, double={self.double}, iterations={self.iterations}"
        return f"lx.inits.loftq({self.format!r}, {options})"

    def with_count(self, count: int) -> "LoftQ | None":
        return dataclasses.replace(self, iterations=count) if count else None

    def __call__(self, key: Any, w: Any, layout: Layout, rank: Any, scale: Any, dtype: Any):
        del key
        w = jnp.asarray(w)
        stack, n, m = layout.shapes(w.shape)
        count = math.prod(stack)
        used = jnp.asarray(used_ranks(rank, count))
        scales = jnp.asarray(entry_scales(scale, count))
        a = jnp.zeros((count, math.prod(n), used.shape[1]), dtype)
        b = jnp.zeros((count, used.shape[1], math.prod(m)), dtype)
        for _ in range(self.iterations):
            a, b, frozen = _turn(self, w, a, b, scales, used, layout)
        return a.reshape(*stack, *n, -1), b.reshape(*stack, -1, *m), frozen


@functools.partial(jax.jit, static_argnums=(0, 6))
def _turn(init: LoftQ, w: jax.Array, a: jax.Array, b: jax.Array, scales: Any, used: Any, layout: Layout):
    """One round: quantizes ``W - s A @ B``, and fits new factors to the rounding error.

    ``w`` has the weight's own axes; ``a`` is ``[s, n, r]`` and ``b`` is ``[s, r, m]``.
    """
    whole, dtype = entries(w, layout).astype(jnp.float32), a.dtype
    wide_a, wide_b = a.astype(jnp.float32), b.astype(jnp.float32)
    left = whole - scales[:, None, None] * jnp.matmul(wide_a, wide_b, precision=EXACT)
    left = from_entries(left, layout, w.shape)
    frozen = encode(left, layout, init.format, init.block, init.double)
    u, size, vt = jnp.linalg.svd(whole - entries(dense(frozen), layout), full_matrices=False)
    r = used.shape[1]
    root = jnp.sqrt(size[:, :r] / scales[:, None]) * used
    a, b = u[:, :, :r] * root[:, None, :], root[:, :, None] * vt[:, :r]
    return a.astype(dtype), b.astype(dtype), dataclasses.replace(frozen, dtype=w.dtype)
