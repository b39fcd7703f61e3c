"""Weights and factors as stacks of matrices, ``[s, n, m]``, and back on their own axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Factors
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import dense


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype to accumulate in: float32, or the widest of ``dtypes`` if that is wider."""
    return max((jnp.dtype(jnp.float32), *map(jnp.dtype, dtypes)), key=lambda dtype: dtype.itemsize)


def product(factors: Factors, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """``scale * A @ B`` on the axes of a weight of ``shape``, in ``dtype``, or wider if the factors are."""
    wide = accumulation_dtype(dtype, factors.a.dtype, factors.b.dtype)
    layout = factors.layout
    stack, n, m = layout.shapes(shape)
    # a [s, n, r] (or [1, n, r] if all entries share it) @ b [s, r, m], with the scale multiplied into b.
    s, i, o = math.prod(stack), math.prod(n), math.prod(m)
    a = factors.a.astype(wide).reshape(-1, i, factors.a.shape[-1])
    b = factors.b.astype(wide).reshape(-1, a.shape[-1], o)
    scale = jnp.asarray(factors.scale, wide)
    if scale.ndim > len(stack):  # one number per rank
        b = b * scale.reshape(s, -1, 1)
    else:
        b = b * (scale.reshape(s, 1, 1) if scale.ndim else scale)
    dw = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(*stack, *n, *m)
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    return jnp.transpose(dw, [order.index(axis) for axis in range(layout.ndim)])


def entries(w, layout: Layout) -> jax.Array:
    """A weight as matrices ``[s, n, m]``, one per stack entry, in float32 or wider."""
    w = dense(w)
    stack, n, m = layout.shapes(w.shape)
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    wide = jnp.float32 if w.dtype.itemsize < 4 else w.dtype
    return jnp.transpose(jnp.asarray(w, wide), order).reshape(math.prod(stack), math.prod(n), math.prod(m))


OVERSAMPLING = 8  # extra columns of a randomized SVD (Halko et al., https://arxiv.org/abs/0909.4061)
EXACT = jax.lax.Precision.HIGHEST


def from_entries(matrices: jax.Array, layout: Layout, shape) -> jax.Array:
    """``[s, n, m]`` on the axes of a weight of ``shape``: the inverse of `entries`."""
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    on_axes = matrices.reshape([shape[i] for i in order])
    return jnp.transpose(on_axes, [order.index(i) for i in range(layout.ndim)])


def used_ranks(rank, count: int) -> np.ndarray:
    """``[s, r]`` float32: 1 for the ranks that a stack entry uses, 0 for its padding."""
    ranks = np.asarray(rank if isinstance(rank, tuple) else (rank,) * count)
    return (np.arange(ranks.max())[None, :] < ranks[:, None]).astype(np.float32)


def entry_scales(scale: Any, count: int) -> jax.Array:
    """The scale of each stack entry as a divisor, ``[s]`` float32: 1 where it is 0, as for rank 0."""
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32).reshape(-1), (count,))
    return jnp.where(scales == 0, jnp.ones_like(scales), scales)


def taken_out(a: jax.Array, b: jax.Array, w, layout: Layout, scale, dtype):
    """``(a, b, w - scale a @ b)`` from factors ``[s, n, r]`` and ``[s, r, m]``, as an `Init` returns them."""
    stack, n, m = layout.shapes(w.shape)
    matrices = entries(w, layout)
    scales = entry_scales(scale, matrices.shape[0]).astype(matrices.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    # Subtract the product of the rounded factors, so that their rounding error stays in the residual.
    wide_a, wide_b = a.astype(matrices.dtype), b.astype(matrices.dtype)
    residual = matrices - scales[:, None, None] * jnp.matmul(wide_a, wide_b, precision=EXACT)
    r = a.shape[-1]
    frozen = from_entries(residual, layout, w.shape).astype(w.dtype)
    return a.reshape(*stack, *n, r), b.reshape(*stack, r, *m), frozen


def factor_entries(adapter: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A ``[s, n, r]`` and B ``[s, r, m]`` in float32, and the scale as ``[s, r]``."""
    pair, stack = adapter.pair(), len(adapter.layout.stack)
    a, b = jnp.asarray(pair.a, jnp.float32), jnp.asarray(pair.b, jnp.float32)
    r = a.shape[-1]
    count = math.prod(b.shape[:stack])
    b = b.reshape(count, r, -1)
    # If all entries share A, it is [*n, r] and is repeated for each of them.
    shared = a.ndim == 1 + len(adapter.layout.inputs) and stack > 0
    a = jnp.broadcast_to(a.reshape(1, -1, r), (count, a.size // r, r)) if shared else a.reshape(count, -1, r)
    scale = jnp.asarray(pair.scale, jnp.float32)
    per_rank = scale.ndim > stack
    scale = scale.reshape(-1, r) if per_rank else scale.reshape(-1, 1)
    return a, b, jnp.broadcast_to(scale, (count, r))
