"""Weights that are not stored as plain arrays, such as 4-bit codes."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lorax_fn.core.layouts import Layout


class Stored:
    """A weight that is not stored as a plain array, such as 4-bit codes.

    A subclass is a registered pytree of arrays, each with the weight's axes in the weight's order. It has the
    ``shape`` and ``dtype`` of the dense weight and names its ``format``. This library treats it as one leaf.
    """

    shape: tuple[int, ...]
    dtype: Any
    format: str
    layout: Layout

    @property
    def nbytes(self) -> int:
        """The number of bytes of all stored arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dense(self) -> jax.Array:
        """The weight as an array of ``shape`` and ``dtype``."""
        raise TypeError(f"{type(self).__name__} must define dense()")

    def store(self, w: jax.Array) -> "Stored":
        """Stores another weight of the same shape in the same form."""
        raise TypeError(f"{type(self).__name__} must define store(w)")

    def entry(self, axis: int) -> "Stored | None":
        """This object after its arrays lost stack axis ``axis``, as in a loop; None for any other axis."""
        raise TypeError(f"{type(self).__name__} must define entry(axis)")

    def stacked(self, axis: int, size: int) -> "Stored":
        """This object after its arrays got a stack axis ``axis`` of ``size``: the inverse of `entry`."""
        raise TypeError(f"{type(self).__name__} must define stacked(axis, size)")


def is_stored(x: object) -> bool:
    return isinstance(x, Stored)


def dense(x: Any) -> Any:
    """``x`` itself, or as a dense array if it is `Stored`."""
    return x.dense() if isinstance(x, Stored) else x


def by_entry(f: Callable, w: Any, layout: Layout, *factors: Any) -> Any:
    """``f(w, layout, *factors)`` for a dense ``w``; for a stored one, applied to one stack entry at a time.

    This way only one entry is dense at a time. ``factors`` and the result have leading stack axes ``*s``.
    """
    axis = layout.stack[0] if layout.stack else None
    if not isinstance(w, Stored) or axis is None or w.entry(axis) is None:
        return f(dense(w), layout, *factors)

    def one(parts):
        w, *factors = parts
        return by_entry(f, w.entry(axis), layout.without(axis), *factors)

    first = jax.tree.map(lambda x: jax.numpy.moveaxis(x, axis, 0), w)
    return jax.lax.map(one, (first, *factors))
