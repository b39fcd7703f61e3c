"""Holes: entries that an operation filled in, such as the edges of a pad, where a weight has no change.

A factor holds zeros there, but a zero does not hide a NaN. If the gradient of such an entry is NaN, as that
of a square root at zero is, then its product with the zeros would reach the other factor, although no number
of the adapter is in that entry.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from lorax_fn.transform.factored import RANK, Factored, Part, align


def with_holes(w: Factored, names: Iterable[str]) -> Factored:
    """The same weight, in whose factors of these names entries with nothing but zeros are holes."""
    return dataclasses.replace(w, holes=tuple(sorted({*w.holes, *names} & {"a", "b"})))


def change_around(w: Factored, product: Callable, a: Part, b: Part, out: list[int]) -> jax.Array:
    """``product(a, b)`` over the axes ``out``, whose holes take part in no gradient of the other factor."""
    holes = w.holes
    if not holes:
        return product(a.array, b.array)

    @jax.custom_jvp
    def whole(a, b):
        return product(a, b)

    @whole.defjvp
    def _(primals, tangents):
        by_a, by_b = product(tangents[0], primals[1]), product(primals[0], tangents[1])
        if "b" in holes:
            by_a = _outside(by_a, primals[1], b.axes, out)
        if "a" in holes:
            by_b = _outside(by_b, primals[0], a.axes, out)
        return whole(*primals), by_a + by_b

    return whole(a.array, b.array)


def _outside(term: jax.Array, factor: jax.Array, axes: tuple[int, ...], out: list[int]) -> jax.Array:
    """A term of the tangent, zero in the holes of the factor that it was multiplied with."""
    filled = jnp.any(factor != 0, axes.index(RANK))
    kept = align(filled, [axis for axis in axes if axis != RANK], out)
    return jnp.where(kept, term, jnp.zeros((), term.dtype))
