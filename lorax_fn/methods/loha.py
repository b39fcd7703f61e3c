"""LoHa: Hyeon-Woo et al., "FedPara" (https://arxiv.org/abs/2108.06098), as LyCORIS uses it.

W' = W + scale * (A1 @ B1) * (A2 @ B2),   * elementwise, proposition 1; rank up to r^2
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.low_rank import LowRank, Start, scale_of


@register
class LoHa(LowRank):
    """A Hadamard product of two low-rank products: ``dW = scale * (A1 @ B1) * (A2 @ B2)``.

    Proposition 1 of Hyeon-Woo et al. (https://arxiv.org/abs/2108.06098). The transform contracts it as an
    equal low-rank product of rank r^2, whose factors are the Khatri-Rao products of A1 and A2, B1 and B2.

    Args:
      a1: ``[*s, *n, r]``.
      b1: ``[*s, r, *m]``.
      a2: ``[*s, *n, r]``.
      b2: ``[*s, r, *m]``, starts at 0.
      alpha: numerator of the scale.
      rank: ``r``.
      scaling: ``"lora"`` or ``"rslora"``.
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: fraction of A's inputs to drop; set by `lorax_fn.dropout` only.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=2, method="loha")
      >>> float(abs(lx.delta(lora)["kernel"]).max())
      0.0
    """

    up: ClassVar[tuple[str, ...]] = ("b1", "b2")
    takes: ClassVar[frozenset[str]] = frozenset({"alpha", "scaling"})
    a1: Any
    b1: Any
    a2: Any
    b2: Any
    alpha: Any = number()
    rank: int = fact()
    scaling: str = fact()
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["LoHa", Any]:
        stack, n, m = start.layout.shapes(w.shape)
        at_a, at_b = (*stack, *n, start.rank), (*stack, start.rank, *m)
        k1, k2, k3 = jax.random.split(start.key, 3)
        a1 = jax.random.normal(k1, at_a, start.dtype)
        b1 = jax.random.normal(k2, at_b, start.dtype) * 0.1
        a2 = jax.random.normal(k3, at_a, start.dtype)
        b2 = jnp.zeros(at_b, start.dtype)
        return cls(a1, b1, a2, b2, start.alpha, start.rank, start.scaling, start.layout), w

    @property
    def scale(self) -> Any:
        """The factor before the products."""
        return scale_of(self.alpha, self.rank, self.scaling, ())

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        down, up = self.factor_axes()
        return {"a1": down, "b1": up, "a2": down, "b2": up}

    def pair(self) -> Factors:
        at = len(self.layout.stack)
        a = self.a1[..., :, None] * self.a2[..., None, :]  # [*s, *n, r, r]
        b = jnp.expand_dims(self.b1, at + 1) * jnp.expand_dims(self.b2, at)  # [*s, r, r, *m]
        r2 = self.rank * self.rank
        a = a.reshape(*a.shape[:-2], r2)
        b = b.reshape(*b.shape[:at], r2, *b.shape[at + 2 :])
        return Factors(a, b, self.layout, self.scale)
