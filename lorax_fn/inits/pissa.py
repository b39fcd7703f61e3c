"""PiSSA: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation".

https://arxiv.org/abs/2404.02948, equations (2) to (4):

W = U S V^T;   A = U_r sqrt(S_r / s),   B = sqrt(S_r / s) V_r^T,   W_res = W - s * A @ B
"""

import dataclasses

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, OVERSAMPLING
from lorax_fn.inits.base import Init
from lorax_fn.inits.moving import with_part_moved


def pissa(iterations: int | None = None) -> "PiSSA":
    """Trains the ``r`` largest singular directions of ``W``: ``A = U sqrt(S / s)``, ``B = sqrt(S / s) V^T``.

    Meng et al., "PiSSA" (https://arxiv.org/abs/2404.02948), equations (2) to (4), divided by the scale as in
    PEFT, so that ``s A @ B`` is exactly the part that is subtracted from ``W``. There is one SVD per stack
    entry, in float32. Train with the params that `lorax_fn.split` returns; `lorax_fn.ranks.to_plain` converts
    the adapters to ones of the original weights.

    Args:
      iterations: None for the exact SVD, else the number of subspace iterations of a randomized one.

    Returns:
      A value for ``split(params, init=...)``, for which ``"pissa"`` and ``"pissa:4"`` (four iterations) are
      short.

    Raises:
      LoraError: ``iterations`` is not an int of 0 or more.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> w = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> params, _ = lx.split({"kernel": w}, rank=1, init=lx.inits.pissa())
      >>> round(float(jnp.linalg.norm(params["kernel"], 2)), 4)
      2.0
    """
    counts = isinstance(iterations, int) and not isinstance(iterations, bool) and iterations >= 0
    if iterations is not None and not counts:
        raise error(
            "PiSSA's iterations are not a count.",
            got=f"iterations={iterations!r}",
            want="None for the exact SVD, or an int of 0 or more",
            do="lx.inits.pissa(iterations=4).",
        )
    return PiSSA(iterations)


@dataclasses.dataclass(frozen=True, repr=False)
class PiSSA(Init):
    """The init that `pissa` returns."""

    name = "pissa"
    moves_weight = True
    divides_by_scale = True

    iterations: int | None = None

    def __repr__(self) -> str:
        return (
            "lx.inits.pissa()" if self.iterations is None else f"lx.inits.pissa(iterations={self.iterations})"
        )

    def with_count(self, count: int) -> "PiSSA":
        return PiSSA(count)

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        def one(key, matrix, s, used):
            r = used.shape[0]
            if self.iterations is None:
                u, size, vt = jnp.linalg.svd(matrix, full_matrices=False)
            else:
                u, size, vt = randomized_svd(key, matrix, r, self.iterations)
            root = jnp.sqrt(size[:r] / s) * used
            return u[:, :r] * root[None, :], root[:, None] * vt[:r]

        return with_part_moved(one, key, w, layout, rank, scale, dtype)


def randomized_svd(key, matrix, rank: int, iterations: int):
    """The largest singular triplets by subspace iteration, algorithms 4.4 and 5.1 of Halko et al."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    draw = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    basis = jnp.linalg.qr(jnp.matmul(matrix, draw, precision=EXACT))[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(jnp.matmul(matrix.T, basis, precision=EXACT))[0]
        basis = jnp.linalg.qr(jnp.matmul(matrix, basis, precision=EXACT))[0]
    u, size, vt = jnp.linalg.svd(jnp.matmul(basis.T, matrix, precision=EXACT), full_matrices=False)
    return jnp.matmul(basis, u, precision=EXACT), size, vt
