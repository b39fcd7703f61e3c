"""Stored weights in the walk: unpacked where a product needs them, and never kept.

What the program does to a stored weight before a product (a cast, a transpose, a slice) is put off in a
`Later`. A product then unpacks, and its derivative unpacks again: the unpacked weight is not kept as a
residual.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.core.stored import Stored, dense, is_stored
from lorax_fn.transform import jaxpr as jx


class Step:
    """One result of one equation, equal to that of any other equation that does the same."""

    def __init__(self, eqn: Any, which: int):
        self.eqn, self.which = eqn, which
        # Parameters of an equation may be unhashable (arrays, jaxprs), so they are compared by their text.
        # Two layers that do the same to their weights then have the same tree structure, and one trace serves
        # both.
        self.key = (eqn.primitive.name, repr(eqn.params), which)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Later:
    """The result of an operation on stored weights that has not run yet."""

    operands: tuple[Any, ...]
    step: Step = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)


def is_unbuilt(x: object) -> bool:
    return isinstance(x, Stored | Later)


def built(x: Any) -> Any:
    """The array that a stored weight and the operations put off on it stand for; arrays as they are."""
    # The operations that were put off run now, on the unpacked array, from the innermost outward.
    if isinstance(x, Later):
        return jx.bind(x.step.eqn, [built(operand) for operand in x.operands])[x.step.which]
    return dense(x)


def abstract(x: Any) -> Any:
    """What to trace the program on: an array itself, or the type (with sharding) that ``x`` stands for."""
    return jax.eval_shape(built, x) if is_unbuilt(x) else x


def moved(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an operation that moves, cuts or casts a base; for stored weights it is put off."""
    if not any(map(is_unbuilt, values)):
        return jx.bind(eqn, values)
    # Slices, stacks and the like along stack axes can be applied to the codes themselves: entry i of
    # [L, n, m] is a stored weight [n, m]. Anything else is put off.
    shortcut = STACKS.get(eqn.primitive.name)
    result = None if shortcut is None or not is_unbuilt(values[0]) else shortcut(eqn, *values)
    return result or [
        Later(tuple(values), Step(eqn, i), tuple(var.aval.shape), var.aval.dtype)
        for i, var in enumerate(eqn.outvars)
    ]


def product(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an operation that consumes a base; a stored one is unpacked for it, and again for its gradient.

    The barrier ties the unpacking to the other operand. Without it a compiler would unpack every layer of an
    unrolled model ahead of time, or merge the unpacking in the backward pass with that in the forward pass
    and keep its result.
    """
    if not any(map(is_unbuilt, values)):
        return jx.bind(eqn, values)
    # With W stored, x @ W is x @ unpack(codes), and its gradient with respect to x needs W again. It is
    # unpacked a second time, since keeping it would cost what quantization saved.
    return _unpacked_twice(*_apart(eqn, values))


def lookup(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Takes rows of a base; of a stored one a compiler unpacks only those, as it fuses this into one loop.

    The barrier ties the unpacking to the indices: otherwise, for lookups inside a loop, the whole table would
    be unpacked ahead of the loop.
    """
    if not any(map(is_unbuilt, values)):
        return jx.bind(eqn, values)
    # Indices are integers, so there is no derivative with respect to the other operands, and no second
    # unpacking is needed.
    run, packed, others = _apart(eqn, values)
    return run(*lax.optimization_barrier((packed, others)))


def _apart(eqn: Any, values: Sequence[Any]) -> tuple[Callable, list, list]:
    """``run(packed, others)``, which unpacks stored operands and runs the operation; and its arguments."""
    # `values` may be weights with operations put off, each of which is a tree of stored leaves and arrays.
    leaves, treedef = jax.tree_util.tree_flatten(list(values), is_leaf=is_stored)
    packed = [x if is_stored(x) else None for x in leaves]
    others = [None if is_stored(x) else x for x in leaves]

    def run(packed: list, others: list) -> list[Any]:
        # Each position has its leaf in one of the two lists and None in the other.
        both = [o if p is None else p for p, o in zip(packed, others, strict=True)]
        return jx.bind(eqn, [built(v) for v in jax.tree_util.tree_unflatten(treedef, both)])

    return run, packed, others


def _unpacked_twice(run: Callable, packed: list, others: list) -> list[Any]:
    @jax.custom_jvp
    def forward(packed, others):
        return run(*lax.optimization_barrier((packed, others)))

    # Packed operands have no tangent (codes are integers); others do. The checkpoint makes JAX keep the codes
    # and run `turned` in the backward pass, with its own unpacking.
    @forward.defjvp
    def _(primals, tangents):
        def turned(packed, others, changes):
            return jax.jvp(lambda others: run(packed, others), (others,), (changes,))[1]

        return forward(*primals), jax.checkpoint(turned)(*primals, tangents[1])

    return forward(packed, others)


# Stack entries of a stored weight are stored weights.

ELEMENTWISE = {
    # These operations work entry by entry: a slice of the result is the result for a slice, so a loop can
    # take slices.
    p.name
    for p in (prims.convert_element_type_p, prims.copy_p, prims.neg_p, prims.name_p, prims.mul_p, prims.div_p)
}


def scanned(base: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """What a loop over axis 0 scans, and how an iteration makes its weight of it; None if that can't be."""
    if not is_unbuilt(base):
        return base, lambda piece: piece
    # The leading axis has to be a stack axis of the stored arrays: where blocks of codes reach across it, no
    # single entry can be taken.
    if is_stored(base):
        return None if base.entry(0) is None else (base, lambda piece: piece.entry(0))
    if base.step.eqn.primitive.name not in ELEMENTWISE:
        return None
    known = [_scanned_operand(x, base.shape[0]) for x in base.operands]
    if any(pair is None for pair in known):
        return None
    pairs: list[Any] = known
    return (
        [leaves for leaves, _ in pairs],
        lambda pieces: _elementwise(base, [f(piece) for (_, f), piece in zip(pairs, pieces, strict=True)]),
    )


def _scanned_operand(x: Any, length: int) -> tuple[Any, Callable[[Any], Any]] | None:
    """As `scanned`; an operand that is broadcast along the loop is the same in each iteration."""
    if not np.shape(x):  # a number, as in W * 0.5
        return None, lambda _: x
    pair = scanned(x)
    if pair is None or x.shape[0] == length:
        return pair
    # Of W [1, n, m] * s [L, 1, 1], which vmap writes, W has a single entry.
    leaves, piece_of = pair
    entry = piece_of(jax.tree.map(lambda leaf: leaf[0], leaves))
    return None, lambda _: entry


def _elementwise(later: Later, operands: Sequence[Any]) -> Later:
    shape = np.broadcast_shapes(*map(np.shape, operands))
    return dataclasses.replace(later, operands=tuple(operands), shape=shape)


def _through(base: Any, change: Callable[[Any], Any]) -> Any:
    """Applies ``change`` to the stored weight under casts and the like; None if there is more on it."""
    if not isinstance(base, Later):
        return change(base)
    # With a second operand (W * scale) the change would have to be made to that one as well.
    operand, *more = base.operands
    if more or base.step.eqn.primitive.name not in ELEMENTWISE:
        return None
    inner = _through(operand, change)
    return None if inner is None else _elementwise(base, [inner])


def _cut_stack(
    base: Any, axes: Sequence[int], shape: Sequence[int], cut: Callable[[Any, Sequence[int]], Any]
) -> Any:
    """Applies ``cut(array, sizes)`` to every array if it shortens only stack axes; else None.

    ``sizes`` are those of the result: from ``shape`` along ``axes``, the array's own elsewhere.
    """

    def each(array: Any) -> Any:
        return cut(array, [shape[i] if i in axes else n for i, n in enumerate(array.shape)])

    def change(stored: Any) -> Any:
        # Along inputs or outputs a block of codes could be cut in two, so the slice is put off until the
        # product.
        if any(stored.entry(axis) is None for axis in axes):
            return None
        return dataclasses.replace(jax.tree.map(each, stored), shape=tuple(shape))

    return _through(base, change)


def restacked(base: Any, length: int) -> Any:
    """A base whose arrays got a leading axis as results of a loop; None if it can't have one."""
    return _through(base, lambda stored: stored.stacked(0, length)) if is_unbuilt(base) else base


def _slice(eqn: Any, base: Any) -> list[Any] | None:
    start, shape = eqn.params["start_indices"], eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * base.ndim
    axes = [i for i in range(base.ndim) if shape[i] != base.shape[i] or strides[i] != 1]

    def cut(array, sizes):
        limit = [start[i] + (n - 1) * strides[i] + 1 if i in axes else n for i, n in enumerate(sizes)]
        return lax.slice(array, [start[i] if i in axes else 0 for i in range(base.ndim)], limit, strides)

    result = _cut_stack(base, axes, shape, cut)
    return None if result is None else [result]


def _dynamic_slice(eqn: Any, base: Any, *starts: Any) -> list[Any] | None:
    shape = eqn.params["slice_sizes"]
    axes = [i for i in range(base.ndim) if shape[i] != base.shape[i]]

    def cut(array, sizes):
        zero = jax.numpy.zeros((), starts[0].dtype)
        return lax.dynamic_slice(array, [s if i in axes else zero for i, s in enumerate(starts)], sizes)

    result = _cut_stack(base, axes, shape, cut)
    return None if result is None else [result]


def _squeeze(eqn: Any, base: Any) -> list[Any] | None:
    for axis in sorted((d % base.ndim for d in eqn.params["dimensions"]), reverse=True):
        base = _squeezed(base, axis)
    return None if base is None else [base]


def _squeezed(base: Any, axis: int) -> Any:
    def change(stored: Any) -> Any:
        if stored is None or stored.entry(axis) is None:
            return None
        return jax.tree.map(lambda array: lax.squeeze(array, [axis]), stored).entry(axis)

    return _through(base, change)


def _split(eqn: Any, base: Any) -> list[Any] | None:
    axis, results, start = eqn.params["axis"], [], 0
    for size, var in zip(eqn.params["sizes"], eqn.outvars, strict=True):

        def cut(array, sizes, start=start):
            return lax.slice_in_dim(array, start, start + sizes[axis], axis=axis)

        results.append(_cut_stack(base, [axis], var.aval.shape, cut))
        start += int(size)
    return None if results[0] is None else results


def _unstack(eqn: Any, base: Any) -> list[Any] | None:
    axis, results = eqn.params["axis"], []
    shape = [1 if i == axis else n for i, n in enumerate(base.shape)]
    for i in range(base.shape[axis]):

        def cut(array, sizes, i=i):
            return lax.slice_in_dim(array, i, i + 1, axis=axis)

        piece = _cut_stack(base, [axis], shape, cut)
        results.append(None if piece is None else _squeezed(piece, axis))
    return None if results[0] is None else results


def _broadcast(eqn: Any, base: Any, *sizes: Any) -> list[Any] | None:
    """Handles only what `jnp.expand_dims` does: one new axis of size 1."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [i for i in range(len(shape)) if i not in kept]
    if sizes or len(new) != 1 or shape[new[0]] != 1 or list(kept) != sorted(kept):
        return None
    if tuple(n for i, n in enumerate(shape) if i in kept) != base.shape:
        return None

    def change(stored: Any) -> Any:
        return jax.tree.map(lambda x: lax.expand_dims(x, new), stored).stacked(new[0], 1)

    result = _through(base, change)
    return None if result is None else [result]


def _concatenate(eqn: Any, *bases: Any) -> list[Any] | None:
    axis, shape = eqn.params["dimension"], tuple(eqn.outvars[0].aval.shape)
    if not all(is_stored(base) and base.entry(axis) is not None for base in bases):
        return None
    alike: list[Any] = [dataclasses.replace(base, shape=shape) for base in bases]
    if len({jax.tree.structure(base) for base in alike}) > 1:
        return None
    return [jax.tree.map(lambda *arrays: lax.concatenate(arrays, axis), *alike)]


def _stack(eqn: Any, *bases: Any) -> list[Any] | None:
    axis = eqn.params["axis"]
    if not all(map(is_stored, bases)) or len({jax.tree.structure(base) for base in bases}) > 1:
        return None
    return [jax.tree.map(lambda *arrays: jax.numpy.stack(arrays, axis), *bases).stacked(axis, len(bases))]


STACKS = {
    prims.slice_p.name: _slice,
    prims.dynamic_slice_p.name: _dynamic_slice,
    prims.squeeze_p.name: _squeeze,
    "split": _split,
    "unstack": _unstack,
    prims.broadcast_in_dim_p.name: _broadcast,
    prims.concatenate_p.name: _concatenate,
    "stack": _stack,
}


# Inside a shard_map, a stored weight holds a shard of each of its arrays.


def along_axes(base: Stored, entries: Sequence[Any]) -> Stored:
    """The spec of each array: that of the weight, except along axes on which the array has size 1."""

    def spec(array: Any) -> Any:
        return jax.P(*(None if n == 1 else entry for entry, n in zip(entries, array.shape, strict=True)))

    return jax.tree.map(spec, base)


def local(base: Any, aval: Any) -> Any:
    """A stored weight whose arrays are shards, with the shape that ``aval`` says."""
    return dataclasses.replace(base, shape=tuple(aval.shape)) if is_stored(base) else base  # pyright: ignore
