"""Rules for summing, padding, adding to or overwriting a weight, which stays low-rank where it can."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.factored import RANK, Factored, Part, align, is_factored
from lorax_fn.transform.low_rank_products import absorbed, scale_absorbed, stack_into_rank
from lorax_fn.transform.rules import Rules, looked_up, one, without_axes
from lorax_fn.transform.stored import is_unbuilt

EDITS = Rules()


def _plain(w: Factored) -> bool:
    """Whether a weight is only a base and factors: no column, no dropout, nothing stored."""
    return bool(w.parts) and not set(w.parts) - {"a", "b", "scale"} and not is_unbuilt(w.base)


@EDITS.of(prims.reduce_sum_p)
def _reduce_sum(walk, eqn, values):
    """A sum along an input or output axis sums one factor; along a stack axis, entries go into the rank.

    A sum over axes of size 1 only removes them: `jax.numpy.einsum` drops axes that way.
    """
    (w,) = values
    gone = [d % w.ndim for d in eqn.params["axes"]]
    many = [i for i in gone if w.shape[i] != 1]
    if not many:
        return [without_axes(w, one(eqn, w.base), gone)]
    # A column multiplies before the sum, and dropout needs the inputs that a sum would remove.
    if not _plain(w) or w.lookup:
        return NotImplemented
    for axis in many:
        # sum_s a[s] b[s] is one product of rank s * r. First a becomes [s, n, s * r], zero outside its own
        # block, and b [s * r, m]; the sum below then takes a to [n, s * r].
        if w.has("a", axis) and w.has("b", axis):
            w = stack_into_rank(w, axis, "a")
        if w is None:
            return NotImplemented
    whole, w = w, scale_absorbed(w)
    parts, times = dict(w.parts), 1
    for axis in many:
        names = [name for name in "ab" if w.has(name, axis)]
        if not names:  # the change is the same in each entry
            times *= w.shape[axis]
        for name in names:
            # sum_n a[n, r] b[r, m] = (sum_n a[n, r]) b[r, m]: the part [n, r] becomes [r].
            part = parts[name]
            at = part.axes.index(axis)
            parts[name] = Part(lax.reduce_sum(part.array, [at]), part.axes[:at] + part.axes[at + 1 :])
    summed = dataclasses.replace(w, parts=parts, scale=w.scale * times)
    return [looked_up(whole, without_axes(summed, one(eqn, w.base), gone))]


@EDITS.of(prims.add_p, prims.sub_p)
def _add(walk, eqn, values):
    """An array is added to the base of a weight; two weights have their factors put side by side."""
    weights = [v for v in values if is_factored(v)]
    # Looked-up rows are activations. A weight is also an activation if it is repeated along an axis that
    # neither factor has. Such a sum is better built once than kept apart.
    whole = all(w.has("a", i) or w.has("b", i) for w in weights for i in range(w.ndim) if w.shape[i] != 1)
    if not whole or any(not _plain(w) or w.lookup for w in weights):
        return NotImplemented
    # (W + a b) + C = (W + C) + a b: what is added joins the base.
    base = jx.bind(eqn, [v.base if is_factored(v) else v for v in values])[0]
    second = values[1]
    if is_factored(second) and eqn.primitive is prims.sub_p:
        second = dataclasses.replace(second, scale=-second.scale)
    if len(weights) == 1:
        return [dataclasses.replace(second if is_factored(second) else values[0], base=base)]
    first = values[0]
    # a1 b1 + a2 b2 = [a1 a2] [b1; b2], where an axis is an input of both weights or an output of both.
    if any(first.has(name, i) != second.has(name, i) for name in "ab" for i in range(first.ndim)):
        return NotImplemented
    dtype = jnp.result_type(*(w.parts[name].array.dtype for w in weights for name in "ab"))
    pairs = zip(absorbed(first, dtype), absorbed(second, dtype), strict=True)
    parts = {}
    for name, (one_part, other) in zip("ab", pairs, strict=True):
        array = align(other.array, other.axes, one_part.axes)
        parts[name] = Part(lax.concatenate([one_part.array, array], one_part.axes.index(RANK)), one_part.axes)
    paths = tuple(dict.fromkeys((*first.paths, *second.paths)))
    return [dataclasses.replace(first, base=base, parts=parts, scale=1.0, paths=paths)]


@EDITS.of(prims.pad_p)
def _pad(walk, eqn, values):
    w, fill = values
    if is_factored(fill) or not is_factored(w) or "key" in w.parts:
        return NotImplemented
    # W [n, m] padded to [n, m + 2]: b [r, m] gets two columns of zeros, a [n, r] stays.
    edges = eqn.params["padding_config"]
    padded = [i for i, edge in enumerate(edges) if tuple(edge) != (0, 0, 0)]
    # The padding has no low-rank change, so a factor that runs along the padded axis gets zeros there. A
    # column would multiply the fill too, so it gets ones there and must have every padded axis.
    column = w.parts.get("column")
    if w.parts and any(not (w.has("a", i) or w.has("b", i)) for i in padded):
        return NotImplemented
    if column is not None and not set(padded) <= set(column.axes):
        return NotImplemented

    def grown(part: Part) -> Part:
        value = jnp.asarray(1 if part is column else 0, part.array.dtype)
        return Part(lax.pad(part.array, value, _of(part, edges, (0, 0, 0))), part.axes)

    return [w.with_parts(one(eqn, w.base, fill), grown)]


def _of(part: Part, by_axis: Sequence[Any], of_rank: Any) -> list[Any]:
    """The entry of ``by_axis`` for each axis of a part, and ``of_rank`` for its rank."""
    return [of_rank if axis == RANK else by_axis[axis] for axis in part.axes]


@EDITS.of(prims.dynamic_update_slice_p)
def _dynamic_update_slice(walk, eqn, values):
    """Overwrites rows of a weight with an array, or writes a weight into an array; arrays have no change."""
    into, new, *starts = values
    if is_factored(into) and is_factored(new):
        return NotImplemented
    w = into if is_factored(into) else new
    # The axes along which only a part is written; along all others `new` is as long as `into`.
    cut = [i for i in range(w.ndim) if jnp.shape(new)[i] != jnp.shape(into)[i]]
    if not _plain(w):
        return NotImplemented
    base = jx.bind(eqn, [v.base if v is w else v for v in values])[0]
    zero = jnp.zeros((), starts[0].dtype) if starts else 0
    if w is new:  # each factor is written into zeros along the axes that it has
        if any(not (w.has("a", i) or w.has("b", i)) for i in cut):
            return NotImplemented

        def placed(part: Part) -> Part:
            # For a weight [k, m] written into rows of an array [n, m]: a [k, r] is written into zeros [n, r],
            # b [r, m] stays.
            whole = [
                into.shape[i] if i in cut else n for i, n in zip(part.axes, part.array.shape, strict=True)
            ]
            zeros = jnp.zeros(whole, part.array.dtype)
            at = [starts[i] if i in cut else zero for i in part.axes]
            return Part(lax.dynamic_update_slice(zeros, part.array, at), part.axes) if part.axes else part

        return [w.with_parts(base, placed)]
    # For rows [k, m] written into W [n, m]: those rows of a become zero, and W's own rows are replaced in the
    # base.
    for name in "ab":  # zeros over whole rows of one factor
        part = w.parts[name]
        if set(cut) <= set(part.axes):
            sizes = [
                new.shape[i] if i in cut else n for i, n in zip(part.axes, part.array.shape, strict=True)
            ]
            at = [starts[i] if i in cut else zero for i in part.axes]
            zeros = jnp.zeros(sizes, part.array.dtype)
            return [w.with_part(base, name, Part(lax.dynamic_update_slice(part.array, zeros, at), part.axes))]
    return NotImplemented
