"""What the low-rank methods share: ``W' = W + scale * A @ B`` from any pair of factors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, Factors, is_number
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import accumulation_dtype, product
from lorax_fn.core.stored import dense
from lorax_fn.core.trees import is_concrete, run

# The divisor of alpha, as a function of the rank, which may be an array.
SCALINGS = {"lora": lambda rank: rank, "rslora": lambda rank: rank**0.5}


STACKED = "adapters without the leading axis that `lx.stack` makes: map over it, jax.vmap(f, in_axes=...)"


@dataclasses.dataclass(frozen=True)
class Start:
    """The facts from which `LowRank.create` starts a method, already checked by `lorax_fn.split`.

    ``key`` belongs to this weight; ``shared_key`` is the same for all weights, for what they share.
    ``init(key, w, layout, rank, scale, dtype)`` gives the first factors and the weight to freeze, (a, b, w).
    """

    key: Any
    shared_key: Any
    layout: Layout
    rank: Any
    alpha: Any
    scaling: str
    init: Callable
    dtype: Any


def scale_of(alpha: Any, rank: Any, scaling: str, stack: tuple[int, ...]) -> Any:
    """The factor before ``A @ B``: ``alpha / rank`` or ``alpha / sqrt(rank)``, and 0 for rank 0.

    It is a Python number if alpha and rank are; a float32 array ``[*s]`` if either is a tuple with one number
    per stack entry; and the broadcast of both if either is an array.
    """
    divisor = SCALINGS[scaling]
    if not isinstance(rank, tuple) and not isinstance(alpha, tuple) and is_number(alpha) and is_number(rank):
        return alpha / divisor(rank)
    if is_number(alpha) and is_number(rank):
        ranks = np.asarray(rank, np.float64)
        scales = np.where(ranks > 0, np.asarray(alpha, np.float64) / divisor(np.maximum(ranks, 1.0)), 0.0)
        return np.broadcast_to(scales, (math.prod(stack),)).astype(np.float32).reshape(stack)

    def on_stack(x):
        return (
            jnp.asarray(x, jnp.float32).reshape(stack)
            if isinstance(x, tuple)
            else jnp.asarray(x, jnp.float32)
        )

    def quotient(alpha, rank):
        alpha, rank = jnp.broadcast_arrays(on_stack(alpha), on_stack(rank))
        one = jnp.ones_like(rank)
        return jnp.where(rank > 0, alpha / divisor(jnp.maximum(rank, one)), jnp.zeros_like(alpha))

    return run(quotient, alpha, rank)


class LowRank(Adapter):
    """A method whose change can be written as a product of two factors.

    A subclass has a field ``layout`` and defines `pair`, which gives the factors, and `create`, which starts
    them; `refuses` says which weights it does not support. The fields ``key`` and ``rate`` hold dropout.
    """

    adds: ClassVar[bool] = True
    # The options of `split` that act on this method.
    takes: ClassVar[frozenset[str]] = frozenset({"alpha", "scaling", "init"})
    layout: Layout  # every subclass declares these three as fields, in its own order
    key: Any
    rate: Any

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple[Adapter, Any]:
        """The adapter of ``w``, and the weight to freeze: ``w`` itself unless the init moves a part of it."""
        raise TypeError(f"{cls.__name__} must define create(w, start)")

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        """What this method requires and a weight of ``shape`` lacks, as an error's ``want``, or None."""
        del shape
        return f"one rank for the whole stack, not {start.rank}" if isinstance(start.rank, tuple) else None

    @classmethod
    def rank_limit(cls, n: int, m: int) -> int:
        """The largest useful rank for ``n`` inputs and ``m`` outputs."""
        return min(n, m)

    def pair(self) -> Factors:
        """A, B and the scale of this method, as `Factors`."""
        raise TypeError(f"{type(self).__name__} must define pair()")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, from the factors and the layout."""
        pair = jax.eval_shape(lambda adapter: (adapter.pair().a, adapter.pair().b), self)
        # A is [*s, *n, r] and B is [*s, r, *m]. A factor that is shared along the stack lacks the axes *s, so
        # the axes are matched from the right.
        layout, a, b = self.layout, pair[0].shape[:-1], pair[1].shape
        whole = (*layout.stack, *layout.inputs)
        sizes = dict(zip(whole[len(whole) - len(a) :], a, strict=True))
        sizes.update(zip((*layout.stack, -1, *layout.outputs)[-len(b) :], b, strict=True))
        return tuple(sizes[i] for i in range(layout.ndim))

    def shape_of(self, a: Any, b: Any) -> tuple[int, ...]:
        """The shape of the weight of these factors, neither of which is shared along the stack."""
        down, up = self.factor_axes()
        sizes = dict(zip(up, np.shape(b), strict=True)) | dict(zip(down, np.shape(a), strict=True))
        return tuple(sizes[i] for i in range(self.layout.ndim))

    def factor_axes(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """The axes of the weight along which A and B run, None for the rank."""
        stack, layout = self.layout.stack, self.layout
        return (*stack, *layout.inputs, None), (*stack, None, *layout.outputs)

    def delta(self) -> jax.Array:
        """``dW`` in float32 on the weight's own axes."""
        return product(self.pair(), self.shape)

    def weight(self, w: jax.Array) -> jax.Array:
        wide = accumulation_dtype(w.dtype)
        return (dense(w).astype(wide) + product(self.pair(), self.shape, wide)).astype(w.dtype)

    def factors(self, w: jax.Array) -> Factors:
        del w
        return dataclasses.replace(self.pair(), key=self.key, rate=self.rate)

    def numbers(self) -> dict[str, Any]:
        # The scale of abstract or traced numbers is unknown, and computing it would add to the trace.
        known = is_concrete([getattr(self, name, None) for name in ("rank", "alpha")])
        names = ("rank", "alpha", "scaling", "scale") if known else ("rank", "alpha", "scaling")
        told = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if told.get("scaling") == "lora":
            del told["scaling"]
        return told

    def count(self) -> int:
        rank = getattr(self, "rank", None)
        if not isinstance(rank, tuple):
            return super().count()
        # In a stack of several ranks the padding holds zeros that never train, so only used ranks count.
        share = sum(rank) / (len(rank) * max(rank))
        axes = self.axes()
        sizes = {name: math.prod(getattr(self, name).shape) for name in self.trained() if name != "key"}
        return sum(round(size * share) if None in axes[name] else size for name, size in sizes.items())

    def with_dropout(self, rate: Any, key: jax.Array) -> Adapter:
        stack = self.layout.shapes(self.shape)[0]
        # One key per stack entry, so that each layer of a scanned model has its own mask. An unstacked weight
        # takes the key as it is, because splitting it would take as long to compile as the mask.
        if stack:
            keys = jax.random.split(key, math.prod(stack))
            key = keys.reshape(*stack, *keys.shape[1:])
        return dataclasses.replace(self, key=key, rate=rate)

    def problem(self, w: Any) -> str | None:
        if self.is_stacked:
            return STACKED
        if len(w.shape) != self.layout.ndim or tuple(w.shape) != self.shape:
            return f"factors for a weight of shape {self.shape}"
        return None
