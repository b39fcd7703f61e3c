"""OLoRA: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation" (https://arxiv.org/abs/2406.01775)."""

import jax.numpy as jnp

from lorax_fn.core.layouts import Layout
from lorax_fn.inits.moving import with_part_moved


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

    return with_part_moved(one, key, w, layout, rank, scale, dtype)
