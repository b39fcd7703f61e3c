"""LoKr: a Kronecker product, from LyCORIS, Yeh et al. (https://arxiv.org/abs/2309.14859).

W' = W + scale * kron(W1, A @ B),   W1 small and full, A @ B of rank r, section 3.3
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.low_rank import LowRank, Start, scale_of

LARGEST = 8  # the longest side of W1; the transform contracts a product of a rank of at most this times r


@register
class LoKr(LowRank):
    """A Kronecker product of a small matrix and a low-rank one: ``dW = scale * kron(W1, A @ B)``.

    Section 3.3 of Yeh et al. (https://arxiv.org/abs/2309.14859); its rank is ``rank(W1) r``. The flattened
    ``n`` and ``m`` are factored as ``n1 n2`` and ``m1 m2``, where ``n1`` and ``m1`` are the largest divisors
    that exceed neither 8 nor the square root. The transform contracts it as an equal low-rank product of rank
    ``min(n1, m1) r``.

    Args:
      w1: ``[*s, n1, m1]``, starts at 0.
      a: ``[*s, n2, r]``.
      b: ``[*s, r, m2]``.
      alpha: numerator of the scale.
      rank: ``r``.
      scaling: ``"lora"`` or ``"rslora"``.
      layout: which axes of the weight are stack, inputs and outputs.
      sizes: the weight's shape.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: fraction of A's inputs to drop; set by `lorax_fn.dropout` only.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((512, 250))}, rank=4, method="lokr")
      >>> lora["kernel"].w1.shape, lora["kernel"].a.shape, lora["kernel"].b.shape
      ((8, 5), (64, 4), (4, 50))
    """

    up: ClassVar[tuple[str, ...]] = ("b",)
    takes: ClassVar[frozenset[str]] = frozenset({"alpha", "scaling"})
    w1: Any
    a: Any
    b: Any
    alpha: Any = number()
    rank: int = fact()
    scaling: str = fact()
    layout: Layout = fact()
    sizes: tuple[int, ...] = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["LoKr", Any]:
        stack, n, m = start.layout.shapes(w.shape)
        (n1, n2), (m1, m2), r = _split(math.prod(n)), _split(math.prod(m)), start.rank
        key_a, key_b = jax.random.split(start.key)
        a = jax.random.uniform(key_a, (*stack, n2, r), jnp.float32, -1.0, 1.0) / math.sqrt(n2)
        b = jax.random.uniform(key_b, (*stack, r, m2), jnp.float32, -1.0, 1.0) / math.sqrt(r)
        factors = jnp.zeros((*stack, n1, m1), start.dtype), a.astype(start.dtype), b.astype(start.dtype)
        return cls(*factors, start.alpha, r, start.scaling, start.layout, tuple(w.shape)), w

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        _, n, m = start.layout.shapes(shape)
        whole = [size for size in (math.prod(n), math.prod(m)) if size > 1 and _split(size)[0] == 1]
        if whole:
            return f"inputs and outputs that have a divisor from 2 to {LARGEST}, not {whole}"
        return super().refuses(shape, start)

    @classmethod
    def rank_limit(cls, n: int, m: int) -> int:
        return min(_split(n)[1], _split(m)[1])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def scale(self) -> Any:
        """The factor before the product."""
        return scale_of(self.alpha, self.rank, self.scaling, ())

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        # Inputs and outputs are each cut into two axes, so factors share only stack axes with the weight.
        return dict.fromkeys(("w1", "a", "b"), (*self.layout.stack, None, None))

    def pair(self) -> Factors:
        stack, n, m = self.layout.shapes(self.sizes)
        n1, m1 = self.w1.shape[-2:]
        # Indices: i in n1, j in n2, k in m1, l in m2, r in the rank. The shorter side of W1, i or k, joins r.
        if n1 <= m1:
            a = jnp.einsum("ik,...jr->...ijkr", jnp.eye(n1, dtype=self.a.dtype), self.a)
            b = jnp.einsum("...ik,...rl->...irkl", self.w1, self.b)
        else:
            a = jnp.einsum("...ik,...jr->...ijkr", self.w1, self.a)
            b = jnp.einsum("ik,...rl->...irkl", jnp.eye(m1, dtype=self.b.dtype), self.b)
        width = min(n1, m1) * self.rank
        return Factors(a.reshape(*stack, *n, width), b.reshape(*stack, width, *m), self.layout, self.scale)


def _split(size: int) -> tuple[int, int]:
    """Two factors of ``size``; the first is the largest divisor up to `LARGEST` and to the square root."""
    first = max((d for d in range(1, min(LARGEST, math.isqrt(size)) + 1) if size % d == 0), default=1)
    return first, size // first
