"""What the low-rank methods share: ``W' = W + scale * A @ B`` from any pair of factors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, Factors
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import product
from lorax_fn.core.stored import dense

SCALINGS = {"lora": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / math.sqrt(rank)}


@dataclasses.dataclass(frozen=True)
class Start:
    """What a method is made from, every part of it checked by `lorax_fn.split`.

    ``init(key, w, layout, rank, scale, dtype) -> (a, b, w)`` gives the first factors, the weight to freeze.
    """

    key: Any
    layout: Layout
    rank: Any
    alpha: Any
    scaling: str
    init: Callable
    dtype: Any


def scale_of(alpha: Any, rank: Any, scaling: str, stack: tuple[int, ...]) -> float | np.ndarray:
    """The number before ``A @ B``; ``[*s]`` float32 where ranks differ along the stack, 0 for rank 0."""
    rule = SCALINGS[scaling]
    if not isinstance(rank, tuple):
        return rule(alpha, rank)
    alphas = alpha if isinstance(alpha, tuple) else (alpha,) * len(rank)
    scales = [rule(a, r) if r else 0.0 for a, r in zip(alphas, rank, strict=True)]
    return np.asarray(scales, np.float32).reshape(stack)


class LowRank(Adapter):
    """A method whose change is a product of two factors, whatever it stores.

    A subclass has a ``layout`` and `pair`; it says by `refuses` what it cannot serve, and by `create` how
    it starts.
    """

    adds: ClassVar[bool] = True  # W' = W + dW, with dW known without W
    takes_init: ClassVar[bool] = True  # starts from `init=`; else from its paper's own values
    layout: Layout  # a field of every subclass, in its own place

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple[Adapter, Any]:
        """The adapter of ``w``, and the weight to freeze: ``w`` itself unless the init moves some of it."""
        raise TypeError(f"{cls.__name__} must define create(w, start)")

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        """What this method cannot do for a weight of ``shape``, or None where it can."""
        del shape
        return f"one rank for the whole stack, not {start.rank}" if isinstance(start.rank, tuple) else None

    @classmethod
    def rank_limit(cls, n: int, m: int) -> int:
        """The largest rank that makes sense for ``n`` inputs and ``m`` outputs."""
        return min(n, m)

    def pair(self) -> Factors:
        """A, B and the scale of this method, as `Factors`."""
        raise TypeError(f"{type(self).__name__} must define pair()")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, as the factors and the layout tell it."""
        pair = jax.eval_shape(lambda adapter: (adapter.pair().a, adapter.pair().b), self)
        layout, a, b = self.layout, pair[0].shape[:-1], pair[1].shape
        whole = (*layout.stack, *layout.inputs)
        sizes = dict(zip(whole[len(whole) - len(a) :], a, strict=True))
        sizes.update(zip((*layout.stack, -1, *layout.outputs)[-len(b) :], b, strict=True))
        return tuple(sizes[i] for i in range(layout.ndim))

    def shape_of(self, a: Any, b: Any) -> tuple[int, ...]:
        """The shape of a weight that has these factors, neither of them shared along the stack."""
        down, up = self.factor_axes()
        sizes = dict(zip(up, np.shape(b), strict=True)) | dict(zip(down, np.shape(a), strict=True))
        return tuple(sizes[i] for i in range(self.layout.ndim))

    def factor_axes(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Along which axes of the weight A and B run, None for the rank."""
        stack, layout = self.layout.stack, self.layout
        return (*stack, *layout.inputs, None), (*stack, None, *layout.outputs)

    def delta(self) -> jax.Array:
        """``dW`` in float32 on the weight's own axes."""
        return product(self.pair(), self.shape)

    def weight(self, w: jax.Array) -> jax.Array:
        return (dense(w).astype(jnp.float32) + self.delta()).astype(w.dtype)

    def factors(self, w: jax.Array) -> Factors:
        del w
        return self.pair()

    def problem(self, w: Any) -> str | None:
        if len(w.shape) != self.layout.ndim or tuple(w.shape) != self.shape:
            return f"factors for a weight of shape {self.shape}"
        return None
