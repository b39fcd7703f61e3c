"""Inits that take a part of W into the factors: W' = W_res + scale * A @ B, with W_res = W - scale * A @ B.

They have the form of the inits in inits.py and return W_res as the weight to freeze. Factorisations and
residuals are float32, one stack entry at a time under `jax.vmap`, whatever the axes of the weight.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.trees import Layout, dense, error
from lorax_fn.methods.low_rank import entries as entries
from lorax_fn.quantization.blocks import check_options, encode

OVERSAMPLING = 8  # extra columns of a randomised SVD (Halko et al., https://arxiv.org/abs/0909.4061)
EXACT = jax.lax.Precision.HIGHEST


def pissa(key, w, layout: Layout, rank, scale, dtype, *, iterations: int | None = None):
    """The ``r`` largest singular directions of ``W`` train: ``A = U sqrt(S / s)``, ``B = sqrt(S / s) V^T``.

    Meng et al., "PiSSA" (https://arxiv.org/abs/2404.02948), equations (2) to (4), divided by the scale as
    PEFT does, so that ``s A @ B`` is exactly the part that leaves ``W``.

    Args:
      key: one PRNG key for the whole leaf; used by the randomised SVD only.
      w: the weight, read in float32.
      layout: its axes; each stack entry has an SVD of its own, ``[n, m]``.
      rank: ``r``, or one int a stack entry.
      scale: ``s``, above 0; one number or one a stack entry.
      dtype: dtype of A and B.
      iterations: None for the exact SVD (``"pissa"``), else subspace iterations of a randomised one
        (``"pissa:4"``: four).

    Returns:
      ``(a [*s, *n, r], b [*s, r, *m], w - s a @ b)``; the residual is of ``w``'s dtype.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> w = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> params, _ = lx.split({"kernel": w}, rank=1, init="pissa")
      >>> round(float(jnp.linalg.norm(params["kernel"], 2)), 4)
      2.0
    """

    def one(key, matrix, s, used):
        r = used.shape[0]
        if iterations is None:
            u, size, vt = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            u, size, vt = _randomised_svd(key, matrix, r, iterations)
        root = jnp.sqrt(size[:r] / s) * used
        return u[:, :r] * root[None, :], root[:, None] * vt[:r]

    return _moved(one, key, w, layout, rank, scale, dtype)


def olora(key, w, layout: Layout, rank, scale, dtype):
    """``W^T = Q R``: ``B^T`` is the first ``r`` columns of Q, so that ``B B^T = I``; ``A`` those of ``R^T``.

    Büyükakyüz, "OLoRA" (https://arxiv.org/abs/2406.01775), algorithm 1; its W is (out, in).

    Args:
      key: unused.
      w: the weight, read in float32.
      layout: its axes; each stack entry has a QR of its own.
      rank: ``r``, or one int a stack entry.
      scale: ``s``; the part ``s A @ B`` leaves ``W``.
      dtype: dtype of A and B.

    Returns:
      ``(a [*s, *n, r], b [*s, r, *m], w - s a @ b)``; the residual is of ``w``'s dtype.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> _, lora = lx.split({"kernel": w}, rank=2, init="olora")
      >>> b = lora["kernel"].b
      >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
      True
    """

    def one(key, matrix, s, used):
        del key, s
        r = used.shape[0]
        q, upper = jnp.linalg.qr(matrix.T)
        return upper.T[:, :r] * used[None, :], used[:, None] * q.T[:r]

    return _moved(one, key, w, layout, rank, scale, dtype)


def loftq(format: str = "nf4", *, block: int = 64, double: bool = True, iterations: int = 5) -> "LoftQ":
    """Quantises ``W`` and starts the factors from what that rounds off, in turns: ``Q + s A @ B ~ W``.

    Li et al., "LoftQ" (https://arxiv.org/abs/2310.08659), algorithm 1: ``Q <- quantise(W - s A B)``, then
    ``A B`` the best rank-r product near ``(W - Q) / s``; PEFT's does not divide, which is right for ``s = 1``
    only. `lorax_fn.split` takes *float* params for it, and returns them `Quantized` where adapters are.

    Args:
      format: as in `lorax_fn.quantize`.
      block: as in `lorax_fn.quantize`.
      double: as in `lorax_fn.quantize`.
      iterations: how often the two take turns, from 1; the paper's 5.

    Returns:
      An ``init`` for `lorax_fn.split`. The strings ``"loftq"`` and ``"loftq:n"`` (of ``n`` iterations) stand
      for its defaults.

    Raises:
      LoraError: an unknown format, an odd block, or no iteration.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (128, 64))
      >>> params, lora = lx.split({"kernel": w}, rank=8, init=lx.loftq("nf4"))
      >>> plain = lx.dequantize(lx.quantize({"kernel": w}))["kernel"]
      >>> bool(jnp.linalg.norm(lx.merge(params, lora)["kernel"] - w) < 0.9 * jnp.linalg.norm(plain - w))
      True
    """
    check_options(format, block)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise error("LoftQ takes turns.", got=f"iterations={iterations!r}", want="an int from 1", do="5.")
    return LoftQ(format, int(block), bool(double), iterations)


@dataclasses.dataclass(frozen=True)
class LoftQ:
    """The init that `loftq` makes."""

    format: str
    block: int
    double: bool
    iterations: int

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
    """Quantises what factors ``[s, n, r], [s, r, m]`` leave, and fits new ones to what that rounds off."""
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


def from_entries(matrices: jax.Array, layout: Layout, shape) -> jax.Array:
    """``[s, n, m]`` on the axes of a weight of ``shape``: the inverse of `entries`."""
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    on_axes = matrices.reshape([shape[i] for i in order])
    return jnp.transpose(on_axes, [order.index(i) for i in range(layout.ndim)])


def used_ranks(rank, count: int) -> np.ndarray:
    """``[s, r]`` float32: 1 where an entry uses that rank, 0 in the pad."""
    ranks = np.asarray(rank if isinstance(rank, tuple) else (rank,) * count)
    return (np.arange(ranks.max())[None, :] < ranks[:, None]).astype(np.float32)


def _moved(one, key, w, layout: Layout, rank, scale, dtype):
    """Runs ``one(key, matrix, s, used) -> (a, b)`` on each stack entry and takes ``s a @ b`` out of ``w``."""
    matrices = entries(w, layout)
    count = matrices.shape[0]
    used = jnp.asarray(used_ranks(rank, count), matrices.dtype)
    keys = jax.random.split(key, count)
    a, b = jax.vmap(one)(keys, matrices, entry_scales(scale, count).astype(matrices.dtype), used)
    return taken_out(a, b, w, layout, scale, dtype)


def entry_scales(scale, count: int) -> np.ndarray:
    """The scale of each stack entry, ``[s]`` float32; 1 for rank 0, where nothing is used, to divide by."""
    scales = np.broadcast_to(np.asarray(scale, np.float32).reshape(-1), (count,))
    return np.where(scales == 0, np.float32(1), scales)


def taken_out(a: jax.Array, b: jax.Array, w, layout: Layout, scale, dtype):
    """``(a, b, w - scale a @ b)`` from factors ``[s, n, r], [s, r, m]``, on the axes of `split`."""
    stack, n, m = layout.shapes(w.shape)
    matrices = entries(w, layout)
    scales = jnp.asarray(entry_scales(scale, matrices.shape[0]), matrices.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    # of the factors as they are stored: what rounding takes from them stays in the residual
    wide_a, wide_b = a.astype(matrices.dtype), b.astype(matrices.dtype)
    residual = matrices - scales[:, None, None] * jnp.matmul(wide_a, wide_b, precision=EXACT)
    r = a.shape[-1]
    frozen = from_entries(residual, layout, w.shape).astype(w.dtype)
    return a.reshape(*stack, *n, r), b.reshape(*stack, r, *m), frozen


def _randomised_svd(key, matrix, rank: int, iterations: int):
    """The largest singular triplets by subspace iteration, algorithms 4.4 and 5.1 of Halko et al."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    draw = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    basis = jnp.linalg.qr(jnp.matmul(matrix, draw, precision=EXACT))[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(jnp.matmul(matrix.T, basis, precision=EXACT))[0]
        basis = jnp.linalg.qr(jnp.matmul(matrix, basis, precision=EXACT))[0]
    u, size, vt = jnp.linalg.svd(jnp.matmul(basis.T, matrix, precision=EXACT), full_matrices=False)
    return jnp.matmul(basis, u, precision=EXACT), size, vt
