"""Primitive -> rule: what each operation does to a factored weight.

A rule is ``rule(walk, eqn, values) -> list of results``, or NotImplemented where the weight has to be
built. ``values`` are the equation's operands, at least one of them `Factored`. The base always goes through
the very operation of the program; a rule adds what the low-rank parts need, which is mostly a renaming of
axes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.transform.factored import Factored, Part, align, is_factored
from lorax_fn.transform.low_rank_products import scale_absorbed, stack_into_rank
from lorax_fn.transform.picks import chosen
from lorax_fn.transform.stored import is_unbuilt, moved

Rule = Callable[[Any, Any, Sequence[Any]], Any]


class Rules(dict[str, Rule]):
    """A table of rules by the name of their primitive."""

    def of(self, *primitives: Any) -> Callable[[Rule], Rule]:
        """Registers a function for primitives, or for the names of primitives that are not public."""

        def register(fn: Rule) -> Rule:
            for primitive in primitives:
                self[primitive if isinstance(primitive, str) else primitive.name] = fn
            return fn

        return register


MOVES = Rules()


def one(eqn: Any, *values: Any) -> Any:
    # Most operations have one result; for a stored weight, `moved` decides whether it runs now or is put off.
    return moved(eqn, values)[0]


# Operations that leave every axis where it is.


@MOVES.of(prims.copy_p, prims.sharding_constraint_p, prims.name_p, "reshard")
def _same(walk, eqn, values):
    (w,) = values
    # No part changes: every axis stays where it is, so the factors of W are those of the result.
    return [dataclasses.replace(w, base=one(eqn, w.base))]


@MOVES.of(prims.stop_gradient_p, prims.device_put_p, "pvary", "pcast")
def _everywhere(walk, eqn, values):
    (w,) = values
    # What these do to a weight (stop its gradient, move it to a device) has to be done to the factors too:
    # otherwise a stopped weight would still be trained.
    return [w.with_parts(one(eqn, w.base), lambda part: Part(one(eqn, part.array), part.axes))]


@MOVES.of(prims.convert_element_type_p)
def _convert(walk, eqn, values):
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return NotImplemented
    # A weight cast to bfloat16 keeps its factors in their own dtype: the product casts them, once, to the
    # dtype of x.
    return _same(walk, eqn, values)


@MOVES.of("optimization_barrier")
def _barrier(walk, eqn, values):
    bases = lax.optimization_barrier([v.base if is_factored(v) else v for v in values])
    return [
        dataclasses.replace(v, base=base) if is_factored(v) else base
        for v, base in zip(values, bases, strict=True)
    ]


@MOVES.of(prims.neg_p)
def _negative(walk, eqn, values):
    (w,) = values
    # -(W + s a b) = (-W) + (-s) a b: the sign goes into the static scale, and no factor is touched.
    return [dataclasses.replace(w, base=one(eqn, w.base), scale=-w.scale)]


@MOVES.of(prims.mul_p, prims.div_p)
def _scaled(walk, eqn, values):
    left, right = values
    w, by = (left, right) if is_factored(left) else (right, left)
    if is_factored(by) or (w is right and eqn.primitive is prims.div_p):
        return NotImplemented
    bases = [v.base if v is w else v for v in values]
    # A stored weight without an adapter has no factors to scale: its base alone goes through the operation.
    if not w.parts:
        return [dataclasses.replace(w, base=one(eqn, *bases))]
    # ``by`` has as many axes as the weight, most of them of size 1: [1, m] scales columns, [1, 1] everything.
    operation = jnp.divide if eqn.primitive is prims.div_p else jnp.multiply
    # It may go into a factor if no axis along which ``by`` varies belongs to the other factor alone: what
    # varies along inputs goes into a, along outputs into b, along a stack or nowhere into either.
    varies = [i for i, size in enumerate(jnp.shape(by)) if size != 1]
    # The factor b is tried first: VeRA's a is shared along a stack, and would be copied for each entry.
    for name, other in (("b", "a"), ("a", "b")):
        part = w.parts[name]
        if not any(w.has(other, i) and not w.has(name, i) for i in varies):
            new = [i for i in varies if i not in part.axes]  # broadcast axes, as of a vmapped scale
            axes = (*new, *part.axes)
            # [1, m] becomes [m], and then [1, m] again on the axes of b, (rank, m).
            by_part = lax.squeeze(by, [i for i in range(by.ndim) if i not in varies])
            by_part = align(by_part, varies, axes).astype(part.array.dtype)
            return [
                w.with_part(
                    one(eqn, *bases),
                    name,
                    Part(operation(align(part.array, part.axes, axes), by_part), axes),
                )
            ]
    return NotImplemented


# Renaming, adding and removing axes.


@MOVES.of(prims.transpose_p)
def _transpose(walk, eqn, values):
    (w,) = values
    # The permutation says which old axis each new one is; parts need the inverse, old axis -> new axis. For
    # W [n, m] -> [m, n], the axes (0, RANK) of a become (1, RANK).
    place = {old: new for new, old in enumerate(eqn.params["permutation"])}
    return [w.with_parts(one(eqn, w.base), lambda part: part.renamed(place.__getitem__))]


def _without(part: Part, gone: Sequence[int]) -> Part:
    """The part with size-1 axes removed."""
    drop = [i for i, axis in enumerate(part.axes) if axis in gone]
    return Part(lax.squeeze(part.array, drop), tuple(axis for axis in part.axes if axis not in gone))


@MOVES.of(prims.squeeze_p)
def _squeeze(walk, eqn, values):
    (w,) = values
    return [without_axes(w, one(eqn, w.base), [d % w.ndim for d in eqn.params["dimensions"]])]


def without_axes(w: Factored, base: Any, gone: Sequence[int]) -> Factored:
    """The weight on a base that has lost the axes ``gone``, on which its parts have size 1 or do not run."""
    # For [1, n, m] -> [n, m] the places are {1: 0, 2: 1}; axis 0 has none, as no part runs along it anymore.
    place = {old: new for new, old in enumerate(i for i in range(w.ndim) if i not in gone)}
    return w.with_parts(base, lambda part: _without(part, gone).renamed(place.__getitem__))


@MOVES.of(prims.broadcast_in_dim_p)
def _broadcast(walk, eqn, values):
    w, *sizes = values
    shape, place = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    # Along an axis of size 1 that grows, every entry has the same change, so no part runs along it anymore.
    grown = [i for i in range(w.ndim) if shape[place[i]] != w.shape[i]]
    base = one(eqn, w.base, *sizes)
    return [w.with_parts(base, lambda part: _without(part, grown).renamed(place.__getitem__))]


@MOVES.of(prims.reshape_p)
def _reshape(walk, eqn, values):
    w: Any = values[0]
    if len(values) > 1 or eqn.params.get("dimensions") is not None:
        return NotImplemented
    # A part must have all the axes of a group or none: [n, h * k] -> [n, h, k] splits an output of b, while
    # [n, m] -> [n * m] would have to mix an axis of a with one of b.
    groups = reshape_groups(w.shape, eqn.params["new_sizes"])
    for old, _ in groups:
        if not _moves_together(w, old):  # a stack axis may merge with inputs or outputs, at a higher rank
            w = _stack_with(w, old)
            if w is None:
                return NotImplemented
    new = eqn.params["new_sizes"]
    return [w.with_parts(one(eqn, w.base), lambda part: _regrouped(part, groups, values[0].shape, new))]


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes that hold the same elements; axes of size 1 are left out."""
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [i for i, size in enumerate(new) if size != 1]
    groups = []
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        # Whichever side holds fewer elements takes its next axis, until both hold the same.
        while (a := math.prod(old[i] for i in left)) != (b := math.prod(new[i] for i in right)):
            (left if a < b else right).append((olds if a < b else news).pop(0))
        groups.append((left, right))
    return groups


def _moves_together(w: Factored, axes: Sequence[int]) -> bool:
    """Whether every part has either all of these axes or none."""
    return all(len(set(axes) & set(part.axes)) in (0, len(axes)) for part in w.parts.values())


def _stack_with(w: Factored, axes: Sequence[int]) -> Factored | None:
    """The weight with the stack axes among ``axes`` as inputs or outputs, like the others of ``axes``."""
    w = chosen(w)
    if not w.parts or set(w.parts) - {"a", "b", "scale"} or is_unbuilt(w.base):
        return None
    # For W [s, n, m] -> [s * n, m] with a [s, n, r] and b [s, r, m], n is an input, so s becomes one too: a
    # is [s, n, s * r] and b is [s * r, m].
    changed: Factored | None = scale_absorbed(w)
    stack = [i for i in axes if changed.has("a", i) and changed.has("b", i)]
    rest = [i for i in axes if i not in stack]
    side = next((name for name in "ab" if all(changed.has(name, i) for i in rest)), None)
    for axis in stack:
        changed = None if changed is None or side is None else stack_into_rank(changed, axis, side)
    return changed if changed is not None and _moves_together(changed, axes) else None


def _regrouped(part: Part, groups: list, old: Sequence[int], new: Sequence[int]) -> Part:
    # The examples below are for W [4, 6] -> [2, 2, 6] with a [4, r] and b [r, 6]. Axes of size 1 belong to no
    # group and are removed first.
    ones = [i for i, axis in enumerate(part.axes) if axis >= 0 and old[axis] == 1]
    array = lax.squeeze(part.array, ones)
    axes = [axis for i, axis in enumerate(part.axes) if i not in ones]
    # The runs are the groups whose axes this part has, such as ([0], [0, 1]) for a, in the order of its own
    # axes; the rank is a group by itself. Before the reshape, the axes of a group have to be adjacent and in
    # the base's order.
    runs = [(left, right) for left, right in groups if set(left) <= set(axes)]
    runs += [([axis], [axis]) for axis in axes if axis < 0]
    runs.sort(key=lambda run: axes.index(run[0][0]))
    order = [axis for left, _ in runs for axis in left]
    if order != axes:
        array = lax.transpose(array, [axes.index(axis) for axis in order])
    # Now one reshape of the part does what the program's reshape does to those groups: [4, r] -> [2, 2, r].
    sizes = dict(zip(order, array.shape, strict=True))
    shape = [sizes[i] if i < 0 else new[i] for _, right in runs for i in right]
    return Part(lax.reshape(array, shape), tuple(i for _, right in runs for i in right))


# Taking a part of a weight.


def sliced(part: Part, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]) -> Part:
    if not part.axes:
        return part
    # A part is sliced along each of its axes as the weight is along that axis; the rank is always kept whole.
    where = [(0, n, 1) if axis < 0 else (start[axis], limit[axis], strides[axis])
             for axis, n in zip(part.axes, part.array.shape, strict=True)]  # fmt: skip
    return Part(lax.slice(part.array, *zip(*where, strict=True)), part.axes)


@MOVES.of(prims.slice_p)
def _slice(walk, eqn, values):
    (w,) = values
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * w.ndim
    return [looked_up(w, w.with_parts(one(eqn, w.base), lambda part: sliced(part, start, limit, strides)))]


def looked_up(w: Factored, cut: Factored) -> Factored:
    """Marks one row or column, taken by its number, as a lookup, like rows taken by an array of numbers."""

    def entries(w: Factored, name: str) -> int:
        part = w.parts[name]
        return math.prod(n for n, axis in zip(part.array.shape, part.axes, strict=True) if axis >= 0)

    # For W[3] with W [n, m], the part a goes from [n, r] to [1, r]: n entries became one, so this is a row of
    # a table.
    row = any(entries(cut, name) == 1 < entries(w, name) for name in "ab" if name in w.parts)
    return dataclasses.replace(cut, lookup=w.lookup or row)


@MOVES.of("split")
def _split(walk, eqn, values):
    (w,) = values
    axis, results, start = eqn.params["axis"], [], 0
    for size, base in zip(eqn.params["sizes"], moved(eqn, [w.base]), strict=True):
        # Each piece is a slice of the weight along one axis, so each part is sliced, or shared if it does not
        # have that axis.
        begin = [start if i == axis else 0 for i in range(w.ndim)]
        end = [start + int(size) if i == axis else n for i, n in enumerate(w.shape)]
        piece = w.with_parts(base, lambda part, b=begin, e=end: sliced(part, b, e, (1,) * w.ndim))
        results.append(looked_up(w, piece))
        start += int(size)
    return results


@MOVES.of("unstack")
def _unstack(walk, eqn, values):
    (w,) = values
    axis = eqn.params["axis"]

    def entry(part: Part, i: int) -> Part:
        # Entry i is a slice of size 1 whose axis is then removed; the numbers of later axes decrease by one.
        begin = [i if j == axis else 0 for j in range(w.ndim)]
        end = [i + 1 if j == axis else n for j, n in enumerate(w.shape)]
        part = _without(sliced(part, begin, end, (1,) * w.ndim), [axis])
        return part.renamed(lambda j: j - 1 if j > axis else j)

    bases = enumerate(moved(eqn, [w.base]))
    return [looked_up(w, w.with_parts(base, partial(entry, i=i))) for i, base in bases]


@MOVES.of(prims.dynamic_slice_p)
def _dynamic_slice(walk, eqn, values):
    w, *starts = values
    sizes = eqn.params["slice_sizes"]

    def sliced(part: Part) -> Part:
        zero = jnp.zeros((), starts[0].dtype) if starts else 0
        # JAX clamps a start by the size of what it slices. A part has the weight's own size along each axis,
        # so both are clamped alike.
        begin = [zero if axis < 0 else starts[axis] for axis in part.axes]
        size = [n if axis < 0 else sizes[axis] for axis, n in zip(part.axes, part.array.shape, strict=True)]
        return Part(lax.dynamic_slice(part.array, begin, size), part.axes) if part.axes else part

    return [looked_up(w, w.with_parts(one(eqn, w.base, *starts), sliced))]


@MOVES.of("tile")
def _tile(walk, eqn, values):
    (w,) = values
    reps = eqn.params["reps"]

    def tiled(part: Part) -> Part:
        # [n, m] tiled by (1, 2) is [n, 2 m]: b [r, m] becomes [r, 2 m], and a, which has no such axis, serves
        # both copies.
        return Part(jnp.tile(part.array, [1 if axis < 0 else reps[axis] for axis in part.axes]), part.axes)

    return [w.with_parts(one(eqn, w.base), tiled)]


@MOVES.of(prims.rev_p)
def _reverse(walk, eqn, values):
    (w,) = values
    turned = eqn.params["dimensions"]

    def flip(part: Part) -> Part:
        return Part(lax.rev(part.array, [i for i, axis in enumerate(part.axes) if axis in turned]), part.axes)

    return [w.with_parts(one(eqn, w.base), flip)]
