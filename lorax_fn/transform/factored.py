"""The factored weight: a base array, its low-rank parts, and where each axis of the weight lives.

    W' = column * (base + scale * sum_r a[..., r] b[r, ...])

Every part knows, for each of its own axes, which axis of the base it runs along (`RANK` for the rank).
An axis of the base that only ``a`` has is an input, one that only ``b`` has an output, one that both
have a stack axis; one that neither has is broadcast. So transposing a weight moves no factor at all:
it only renames axes.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_fn.core.adapters import Adapter, Factors
from lorax_fn.core.stored import is_stored

RANK = -1
PICK = -2  # the axis of a bank's many adapters, of which a number picks one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a factored weight; ``axes[i]`` is the base axis that its axis ``i`` runs along."""

    array: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        # vmap writes numpy integers into equations, and these compare elementwise with tuples.
        object.__setattr__(self, "axes", tuple(map(int, self.axes)))

    def renamed(self, new: Callable[[int], int]) -> "Part":
        return Part(self.array, tuple(i if i < 0 else new(i) for i in self.axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """A weight in the walk, kept in parts: ``column * (base + scale * a @ b)``.

    ``parts`` holds ``a`` and ``b``, and where they exist ``scale`` (an array along stack axes, the rank, or
    neither), ``column``, and for dropout ``key``, ``rate`` (if it is an array) and ``draws`` (how many
    products dropped inputs before the inner function that this weight entered). For a bank of adapters,
    ``a``, ``b`` and ``scale`` run along `PICK`, and ``pick`` is a number: see `transform/picks.py`. A stored
    weight without an adapter has no parts. ``lookup`` marks rows that were picked by an index: they are an
    activation as much as a weight, so nothing is lost by building them. ``tap`` is explained in
    `transform/taps.py`, ``lanes`` in `transform/lanes.py`.
    """

    base: Any
    parts: dict[str, Part]
    scale: float = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lookup: bool = dataclasses.field(default=False, metadata={"static": True})
    tap: bool = dataclasses.field(default=False, metadata={"static": True})
    lanes: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    def has(self, part: str, axis: int) -> bool:
        return part in self.parts and axis in self.parts[part].axes

    def with_parts(self, base: Any, change: Callable[[Part], Part], **facts: Any) -> "Factored":
        """The same weight after an operation on ``base`` that ``change`` repeats on every part."""
        parts = {name: change(part) for name, part in self.parts.items()}
        return dataclasses.replace(self, base=base, parts=parts, **facts)

    def with_part(self, base: Any, name: str, part: Part) -> "Factored":
        # `parts` may be shared with the weight before the operation, so a new dict is made.
        return dataclasses.replace(self, base=base, parts={**self.parts, name: part})


@dataclasses.dataclass(frozen=True)
class Sum:
    """``base + change`` of a product, not added yet: a bias that follows is added to ``base`` first.

    In this order XLA keeps one array for the gradient of what comes next, not both ``base`` and ``change``.
    """

    base: Any
    change: Any

    def added(self) -> Any:
        return self.base + self.change


def folded(keys: Part, number: Any) -> Part:
    """Each key of a part folded with a number."""
    if not keys.axes:
        return Part(jax.random.fold_in(keys.array, number), ())
    # There is one key per stack entry, and each is folded by itself.
    flat = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.array.reshape(-1))
    return Part(flat.reshape(keys.array.shape), keys.axes)


def align(x: Any, names: Sequence[Any], out: Sequence[Any]) -> Any:
    """``x`` transposed and expanded with axes of size 1, ready to broadcast over the axes ``out``."""
    order = [list(names).index(n) for n in out if n in names]
    if order != sorted(order):
        x = lax.transpose(x, order)
    return lax.expand_dims(x, [i for i, n in enumerate(out) if n not in names])


def is_factored(x: object) -> bool:
    return isinstance(x, Factored)


def factor(path: str, base: Any, factors: Factors) -> Factored:
    """Puts an adapter's factors beside its base weight."""
    layout, stack = factors.layout, factors.layout.stack
    # Each axis of a [*stack, *inputs, r] and b [*stack, r, *outputs] is named by the axis of W that it runs
    # along. VeRA shares a [n, r] along a stack, so it takes only the last names.
    parts = {
        "a": Part(factors.a, (*stack, *layout.inputs, RANK)[-factors.a.ndim :]),
        "b": Part(factors.b, (*stack, RANK, *layout.outputs)),
    }
    # A number is static. An array, traced or not, is a part, so that changing its values compiles nothing.
    scale, rate = factors.scale, factors.rate
    if factors.pick is not None:
        many, pick = (*stack, PICK), factors.pick
        if pick.ndim:  # a mixture: its weights go into the scale
            scale = scale * pick.reshape(*(1,) * len(stack), -1)
        parts = {
            "a": Part(factors.a, (*many, *layout.inputs, RANK)),
            "b": Part(factors.b, (*many, RANK, *layout.outputs)),
            "scale": Part(scale, many),
        }
        parts |= {} if pick.ndim else {"pick": Part(pick, ())}
        scale = 1.0
    if not isinstance(scale, numbers.Real):
        parts["scale"], scale = Part(jnp.asarray(scale), (*stack, RANK)[: np.ndim(scale)]), 1.0
    # DoRA's column [*stack, *outputs] multiplies W + s a b as a whole.
    if factors.column is not None:
        parts["column"] = Part(factors.column, (*stack, *layout.outputs))
    # Dropout has one key per stack entry, and a rate that is static unless it is an array.
    if factors.key is not None:
        parts["key"] = Part(factors.key, stack)
        if not isinstance(rate, numbers.Real):
            parts["rate"], rate = Part(jnp.asarray(rate), ()), 0.0
    return Factored(base, parts, float(scale), float(rate), (path,), tap=factors.tap, lanes=factors.lanes)


def wrap(path: str, base: Any, adapter: Adapter | None) -> Any:
    """A leaf as the walk sees it: factored where the adapter has factors, else the adapter's own weight.

    A stored leaf without an adapter is a weight without parts.
    """
    if adapter is None:
        return Factored(base, {}, 1.0, 0.0, (path,)) if is_stored(base) else base
    rest = adapter.base(base)
    factors = adapter.factors(rest)
    return adapter.weight(base) if factors is None else factor(path, rest, factors)
