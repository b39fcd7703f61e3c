"""Weights that are kept in another form than their own array, such as 4-bit codes."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lorax_fn.core.layouts import Layout


class Stored:
    """A weight kept in another form than its own array, such as 4-bit codes.

    A subclass is a registered pytree of arrays, each of which has the weight's axes in the weight's order. It
    has the ``shape`` and ``dtype`` of the weight, and names its ``format``. To everything in this library it
    is one leaf.
    """

    shape: tuple[int, ...]
    dtype: Any
    format: str
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dense(self) -> jax.Array:
        """The weight itself: an array of ``shape`` and ``dtype``."""
        raise TypeError(f"{type(self).__name__} must define dense()")

    def store(self, w: jax.Array) -> "Stored":
        """Another weight of this shape, stored as this one is."""
        raise TypeError(f"{type(self).__name__} must define store(w)")

    def entry(self, axis: int) -> "Stored | None":
        """This object for arrays that lost ``axis``, as those of a loop over it; None for a packed axis."""
        raise TypeError(f"{type(self).__name__} must define entry(axis)")

    def stacked(self, axis: int, size: int) -> "Stored":
        """This object for arrays that got a stack axis ``axis`` of ``size``: undoes `entry`."""
        raise TypeError(f"{type(self).__name__} must define stacked(axis, size)")


def is_stored(x: object) -> bool:
    return isinstance(x, Stored)


def dense(x: Any) -> Any:
    """``x`` itself, or the weight that it stores."""
    return x.dense() if isinstance(x, Stored) else x


def by_entry(f: Callable, w: Any, layout: Layout, *factors: Any) -> Any:
    """``f(w, layout, *factors)`` of a dense ``w``; where it is stored, one stack entry after the other.

    So no more than one entry is dense at a time. ``factors`` and the result have the stack ``*s`` in front.
    """
    axis = layout.stack[0] if layout.stack else None
    if not isinstance(w, Stored) or axis is None or w.entry(axis) is None:
        return f(dense(w), layout, *factors)

    def one(parts):
        w, *factors = parts
        return by_entry(f, w.entry(axis), layout.without(axis), *factors)

    first = jax.tree.map(lambda x: jax.numpy.moveaxis(x, axis, 0), w)
    return jax.lax.map(one, (first, *factors))
