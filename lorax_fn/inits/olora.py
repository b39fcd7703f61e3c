"""OLoRA: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation" (https://arxiv.org/abs/2406.01775).

W^T = Q R;   B^T = Q[:, :r],   A = R^T[:, :r],   W_res = W - scale * A @ B     algorithm 1; its W is (out, in)
"""

import dataclasses

import jax.numpy as jnp

from lorax_fn.core.layouts import Layout
from lorax_fn.inits.base import Init
from lorax_fn.inits.moving import with_part_moved


@dataclasses.dataclass(frozen=True, repr=False)
class OLoRA(Init):
    """``W^T = Q R``: ``B^T`` is the first ``r`` columns of Q, so that ``B B^T = I``; ``A`` those of ``R^T``.

    Algorithm 1 of Büyükakyüz (https://arxiv.org/abs/2406.01775), with one QR per stack entry, in float32.
    ``scale * A @ B`` is subtracted from the weight, so train with the params that `lorax_fn.split` returns.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> _, lora = lx.split({"kernel": w}, rank=2, init="olora")
      >>> b = lora["kernel"].b
      >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
      True
    """

    name = "olora"
    moves_weight = True

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        def one(key, matrix, s, used):
            del key, s
            r = used.shape[0]
            q, upper = jnp.linalg.qr(matrix.T)
            return upper.T[:, :r] * used[None, :], used[:, None] * q.T[:r]

        return with_part_moved(one, key, w, layout, rank, scale, dtype)


olora = OLoRA()
