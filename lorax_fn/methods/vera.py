"""VeRA: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (https://arxiv.org/abs/2310.11454).

W' = W + A diag(d) B diag(b),   A and B random, frozen and shared by all weights, equation (2)
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.frozen import frozen
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.low_rank import LowRank, Start


@register
class VeRA(LowRank):
    """Two trained vectors around frozen random factors: ``dW = A diag(d) B diag(b)``.

    Equation (2) of Kopiczko et al. (https://arxiv.org/abs/2310.11454); ``d`` starts at 0.1 and ``b`` at 0.
    A and B are corners of two random matrices that all weights share.

    Args:
      a: ``[*n, r]``, frozen.
      b: ``[r, *m]``, frozen.
      d: ``[*s, r]``.
      gain: ``[*s, *m]``, the paper's vector b.
      rank: ``r``; may exceed the weight's own rank.
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: fraction of A's inputs to drop; set by `lorax_fn.dropout` only.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=8, method="vera")
      >>> lora["kernel"].d.shape, lora["kernel"].gain
      ((8,), Array([0., 0.], dtype=float32))
    """

    frozen: ClassVar[tuple[str, ...]] = ("a", "b")
    takes: ClassVar[frozenset[str]] = frozenset()
    a: Any
    b: Any
    d: Any
    gain: Any
    rank: int = fact()
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["VeRA", Any]:
        stack, n, m = start.layout.shapes(w.shape)
        r = start.rank
        # The keys are shared, so that the factors of every weight are corners of the same two matrices.
        key_a, key_b = jax.random.split(jax.random.fold_in(start.shared_key, _SHARED))
        a = _corner(key_a, math.prod(n), r, math.sqrt(1.0 / math.prod(n))).reshape(*n, r)
        b = _corner(key_b, math.prod(m), r, math.sqrt(1.0 / r)).T.reshape(r, *m)
        d, gain = jnp.full((*stack, r), 0.1, start.dtype), jnp.zeros((*stack, *m), start.dtype)
        return cls(a.astype(start.dtype), b.astype(start.dtype), d, gain, r, start.layout), w

    @classmethod
    def rank_limit(cls, n: int, m: int) -> int:
        return 65536

    @property
    def shape(self) -> tuple[int, ...]:
        layout = self.layout
        sizes = dict(zip(layout.inputs, np.shape(self.a)[:-1], strict=True))
        sizes.update(zip((*layout.stack, *layout.outputs), np.shape(self.gain), strict=True))
        return tuple(sizes[i] for i in range(layout.ndim))

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        stack, layout = self.layout.stack, self.layout
        shared = {"a": (*layout.inputs, None), "b": (None, *layout.outputs)}
        return shared | {"d": (*stack, None), "gain": (*stack, *layout.outputs)}

    def pair(self) -> Factors:
        a, b = frozen((self.a, self.b), "VeRA")
        stack = len(self.layout.stack)
        # B diag(b) is [*s, r, *m], from B [r, *m] and the gain [*s, *m]. d [*s, r] is a scale of each rank.
        b = jnp.expand_dims(b, tuple(range(stack))) * jnp.expand_dims(self.gain, stack)
        return Factors(a, b, self.layout, self.d)


_SHARED = 20231011


def _corner(key: Any, rows: int, rank: int, bound: float) -> jax.Array:
    """``[rows, rank]`` uniform in +-sqrt(3) bound; row ``i`` does not depend on the number of rows."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows, dtype=jnp.uint32))
    draw = jax.vmap(lambda k: jax.random.uniform(k, (rank,), jnp.float32, -1.0, 1.0))
    return draw(keys) * (math.sqrt(3.0) * bound)
