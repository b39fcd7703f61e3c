"""The rule for rows selected by an array of indices: experts, lookups in a table, entries of a stack."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.transform.factored import Part, align, is_factored
from lorax_fn.transform.rules import Rules, one, sliced
from lorax_fn.transform.stored import lookup

GATHERS = Rules()


@GATHERS.of(prims.gather_p)
def _gather(walk, eqn, values):
    """Gathers rows of a stack axis, of ``A`` (an embedding lookup) or of ``B``; the other stays whole."""
    w, indices = values
    if not is_factored(w) or is_factored(indices):
        return NotImplemented
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # Out of bounds, the base is the result: the change adds 0, and a column of the indexed axes is 1.
    column, fills = w.parts.get("column"), eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    outside = column is not None and not set(dims.start_index_map) <= set(column.axes)
    if outside and fills and eqn.params["fill_value"] not in (None, 0):
        return NotImplemented
    index_axes = indices.ndim - 1  # the last axis of indices is the index vector
    out_ndim = index_axes + len(dims.offset_dims)
    # The result has all axes of the indices but the last, and the operand's window at offset_dims.
    kept = [i for i in range(w.ndim) if i not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)]
    # int, because vmap writes numpy integers into equations, which compare elementwise with tuples.
    place = dict(zip(kept, map(int, sorted(dims.offset_dims)), strict=True))  # base axis -> result axis
    index_place = [i for i in range(out_ndim) if i not in dims.offset_dims]  # axis of indices -> result axis

    def gathered(part: Part) -> Part:
        # Each part has its own gather, which reads those columns of the index vector that index one of the
        # part's axes.
        where = {axis: i for i, axis in enumerate(part.axes) if axis >= 0}
        columns = [c for c, axis in enumerate(dims.start_index_map) if axis in where]
        batching = [c for c, axis in enumerate(dims.operand_batching_dims) if axis in where]
        batching.sort(key=lambda c: where[dims.operand_batching_dims[c]])  # a part has its own order of axes
        if not columns and not batching:
            cut = sliced(part, (0,) * w.ndim, sizes, (1,) * w.ndim)
            return cut.renamed(place.__getitem__)
        inner = [axis for axis in part.axes if axis in place or axis < 0]  # the window that each index takes
        offset = tuple(range(index_axes, index_axes + len(inner)))
        numbers = lax.GatherDimensionNumbers(
            offset_dims=offset,
            collapsed_slice_dims=tuple(sorted(where[i] for i in dims.collapsed_slice_dims if i in where)),
            start_index_map=tuple(where[dims.start_index_map[c]] for c in columns),
            operand_batching_dims=tuple(where[dims.operand_batching_dims[c]] for c in batching),
            start_indices_batching_dims=tuple(dims.start_indices_batching_dims[c] for c in batching),
        )
        window = [n if axis < 0 else sizes[axis] for axis, n in zip(part.axes, part.array.shape, strict=True)]
        rows = lax.gather(
            part.array,
            indices[..., jnp.asarray(columns, jnp.int32)] if len(columns) < indices.shape[-1] else indices,
            numbers,
            window,
            mode=eqn.params["mode"],
            fill_value=int(part is column) if fills else None,
        )
        axes = (*index_place, *(axis if axis < 0 else place[axis] for axis in inner))
        return Part(rows, axes)

    cut = [axis for axis in dims.start_index_map if sizes[axis] < w.shape[axis]]
    # Rows of a stack (expert i's weight) are still weights, however many are taken; rows of inputs or outputs
    # are an activation.
    stacked = all(w.has("a", axis) and w.has("b", axis) for axis in cut)
    base = one(eqn, w.base, indices) if stacked else lookup(eqn, [w.base, indices])[0]
    rows = w.with_parts(base, gathered, lookup=w.lookup or not stacked)
    return [_no_change_outside(w, rows, indices, dims.start_index_map, sizes, index_place) if fills else rows]


def _no_change_outside(w, rows, indices, indexed, sizes, index_place):
    """Zeros in ``a`` where an index is out of bounds along a repeated axis, which no factor has."""
    repeated = [(c, i) for c, i in enumerate(indexed) if not (w.has("a", i) or w.has("b", i))]
    if not repeated or "a" not in rows.parts:
        return rows
    most = jnp.iinfo(indices.dtype).max  # a bound above it would wrap
    inside = [
        (indices[..., c] >= 0) & (indices[..., c] <= min(w.shape[i] - sizes[i], most)) for c, i in repeated
    ]
    a = rows.parts["a"]
    axes = (*index_place, *(i for i in a.axes if i not in index_place))
    within = align(functools.reduce(jnp.logical_and, inside).astype(a.array.dtype), index_place, axes)
    return rows.with_part(rows.base, "a", Part(align(a.array, a.axes, axes) * within, axes))
