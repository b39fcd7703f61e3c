"""Inits that take a part of W into the factors: W' = W_res + scale * A @ B, with W_res = W - scale * A @ B.

They have the form of the inits in inits.py and return W_res as the weight to freeze. Factorisations and
residuals are float32, one stack entry at a time under `jax.vmap`, whatever the axes of the weight.
"""

import jax
import jax.numpy as jnp

from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, OVERSAMPLING
from lorax_fn.inits.moving import with_part_moved


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

    return with_part_moved(one, key, w, layout, rank, scale, dtype)


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
