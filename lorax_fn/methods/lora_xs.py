"""LoRA-XS: Bałazy et al., "LoRA-XS" (https://arxiv.org/abs/2405.17604).

W' = W + scale * A R B,   A = U_r S_r and B = V_r^T of W = U S V^T, frozen; R, r x r, trains: equation (2)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.frozen import frozen
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import entries
from lorax_fn.methods.low_rank import LowRank, Start, scale_of


@register
class LoRAXS(LowRank):
    """A small trained core between frozen singular vectors of the weight: ``dW = scale * A R B``.

    Equation (2) of Bałazy et al. (https://arxiv.org/abs/2405.17604): r^2 numbers per weight train. R starts
    at 0, where its gradient ``A^T G B^T`` is not zero; the paper starts it at noise of deviation 1e-5.

    Args:
      a: ``[*s, *n, r]``, frozen: left singular vectors times singular values.
      b: ``[*s, r, *m]``, frozen: right singular vectors.
      core: ``[*s, r, r]``, the paper's R.
      alpha: numerator of the scale.
      rank: ``r``.
      scaling: ``"lora"`` or ``"rslora"``.
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: fraction of A's inputs to drop; set by `lorax_fn.dropout` only.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.diag(jnp.array([3.0, 2.0]))}, rank=1, method="lora_xs")
      >>> abs(lora["kernel"].a[:, 0]), lora["kernel"].core
      (Array([3., 0.], dtype=float32), Array([[0.]], dtype=float32))
    """

    frozen: ClassVar[tuple[str, ...]] = ("a", "b")
    takes: ClassVar[frozenset[str]] = frozenset({"alpha", "scaling"})
    a: Any
    b: Any
    core: Any
    alpha: Any = number()
    rank: int = fact()
    scaling: str = fact()
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["LoRAXS", Any]:
        stack, n, m = start.layout.shapes(w.shape)
        r = start.rank
        # entries: [s, n, m], so u is [s, n, k] and vt [s, k, m] with k = min(n, m), of which r are kept.
        u, sizes, vt = jnp.linalg.svd(entries(w, start.layout), full_matrices=False)
        a = (u[:, :, :r] * sizes[:, None, :r]).reshape(*stack, *n, r)
        b = vt[:, :r].reshape(*stack, r, *m)
        core = jnp.zeros((*stack, r, r), start.dtype)
        facts = (start.alpha, r, start.scaling, start.layout)
        return cls(a.astype(start.dtype), b.astype(start.dtype), core, *facts), w

    @property
    def scale(self) -> Any:
        """The factor before the product."""
        return scale_of(self.alpha, self.rank, self.scaling, ())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_of(self.a, self.b)

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        a, b = self.factor_axes()
        return {"a": a, "b": b, "core": (*self.layout.stack, None, None)}

    def pair(self) -> Factors:
        a, b = frozen((self.a, self.b), "LoRAXS")
        s = len(self.layout.stack)
        flat = b.reshape(*b.shape[: s + 1], -1)  # [*s, r, m], so that R [*s, r, r] can be multiplied into it
        b = jnp.matmul(self.core, flat, precision=jax.lax.Precision.HIGHEST).reshape(b.shape)
        return Factors(a, b, self.layout, self.scale)
