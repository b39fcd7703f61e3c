"""Products of a factored weight: ``x A`` first, then ``B``; the gradients of both over flattened tokens."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.dropping import Refused, dropped
from lorax_fn.transform.factored import RANK, Factored, Part, align
from lorax_fn.transform.lanes import Halves, by_lane
from lorax_fn.transform.meshes import axis_specs, explicit_mesh, may_be_sharded, result_sharding
from lorax_fn.transform.picks import chosen, picked
from lorax_fn.transform.stored import built
from lorax_fn.transform.taps import EXACT, echo, inputs_of_tap


def contract(
    x: Any,
    xs: Sequence[Any],
    y: Any,
    ys: Sequence[Any],
    out: Sequence[Any],
    *,
    dtype: Any,
    precision: Any = None,
    flat: bool = True,
) -> Any:
    """``einsum`` over named axes as one dot product; ``y`` is the small factor, where there is one.

    Names of ``out`` that neither operand has are broadcast by the caller.
    """
    # A name that only one operand has, and the result does not, is summed before the product. Otherwise it
    # would be a free axis of the product and make it larger than it has to be.
    x, xs = _sum_unshared(x, list(xs), ys, out)
    y, ys = _sum_unshared(y, list(ys), xs, out)
    wanted = [name for name in out if name in xs or name in ys]
    # The operand whose axes come first in the result goes on the left, which saves the transpose at the end.
    free = [name for name in wanted if (name in xs) != (name in ys)]
    swapped = bool(free) and free[0] in ys  # a product comes out with its left operand's axes first
    if swapped:
        x, xs, y, ys = y, ys, x, xs
    # Each name has one of four roles: a batch axis is in both operands and in the result, a summed axis is in
    # both but not in the result, and each operand has free axes of its own. dot_general returns
    # [*batch, *x_free, *y_free].
    batch = [name for name in wanted if name in xs and name in ys]
    # The order of the summed axes is free. Taking it from the larger operand saves transposing that one; the
    # small factor is transposed instead.
    large = ys if jx.surely(lambda: x.size < y.size) else xs
    summed = [name for name in large if name in xs and name in ys and name not in batch]
    x_free = [name for name in xs if name not in ys]
    y_free = [name for name in ys if name not in xs]
    axes = tuple(map(tuple, (xs, ys, batch, summed, x_free, y_free)))
    if flat and not may_be_sharded(x, y) and _can_be_flat(x, y, axes):
        result = _flat_in_gradient(x, y, axes, 0 if swapped else 1, dtype, precision)
    else:
        result = _plain_product(x, y, axes, dtype, precision)
    have = batch + x_free + y_free
    if have != wanted:
        result = lax.transpose(result, [have.index(name) for name in wanted])
    return result


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _flat_in_gradient(x: Any, y: Any, axes: tuple, factor: int, dtype: Any, precision: Any) -> Any:
    """The product over all axes as they are; operand number ``factor`` gets its gradient from flat arrays.

    That gradient sums over all tokens, and on a CPU a sum over two axes ``[B, T]`` copies the activation. On
    a TPU, the reshape of a flat product would keep it from being fused with what is added to it.
    """
    del factor
    return _plain_product(x, y, axes, dtype, precision)


def _plain_product(x: Any, y: Any, axes: tuple, dtype: Any, precision: Any) -> Any:
    xs, ys, batch, summed, x_free, y_free = axes
    return _dot(x, xs, y, ys, batch, summed, x_free + y_free, dtype, precision)


@partial(_flat_in_gradient.defjvp, symbolic_zeros=True)
def _tangent(axes, factor, dtype, precision, primals, tangents):
    # Plain products, because the policy of a checkpoint around this one asks for a dot_general.
    x, y = primals
    out, total = _plain_product(x, y, axes, dtype, precision), None
    for i, tangent in enumerate(tangents):
        if isinstance(tangent, SymbolicZero):
            continue
        if i == factor:
            # With the checkpoint, a loop keeps the activation itself, which other products share, and no flat
            # copy.
            flat = partial(_flat_product, axes=axes, factor=factor, dtype=dtype, precision=precision)
            term = jax.checkpoint(flat, prevent_cse=False)(primals[1 - i], tangent)
        elif i == 0:
            term = _plain_product(tangent, y, axes, dtype, precision)
        else:
            term = _plain_product(x, tangent, axes, dtype, precision)
        total = term if total is None else total + term
    return out, SymbolicZero(jax.typeof(out)) if total is None else total


def _flat_product(other: Any, tangent: Any, *, axes: tuple, factor: int, dtype: Any, precision: Any) -> Any:
    """The product of ``other`` and the tangent of a factor, both with one free and one summed axis."""
    xs, ys, batch, summed, x_free, y_free = axes
    x, y = (tangent, other) if factor == 0 else (other, tangent)
    sizes = {**dict(zip(ys, y.shape, strict=True)), **dict(zip(xs, x.shape, strict=True))}
    # Both are now [*batch, free, sum] or [*batch, sum, free], and the product is [*batch, x, y]. The last
    # reshape splits its merged axes x and y again.
    x, xs = _merged(x, xs, batch, summed, x_free, "x")
    y, ys = _merged(y, ys, batch, summed, y_free, "y")
    x, y = (_turned(x, y), y) if factor == 0 else (x, _turned(y, x))
    names = [n for n in (*xs, *ys) if n in ("x", "y")]
    result = _dot(x, xs, y, ys, batch, ["sum"] if summed else [], names, dtype, precision)
    return lax.reshape(result, [sizes[name] for name in (*batch, *x_free, *y_free)])


def _turned(tangent: Any, other: Any) -> Any:
    """The tangent ``[n, r]`` of a factor, transposed twice, so that its gradient is computed as ``[r, n]``.

    On a CPU, ``x^T @ dh`` with its ``r`` columns takes four to eight times as long as ``dh^T @ x`` with its
    ``r`` rows. XLA turns the second into the first when it sees the transpose, hence the barrier. Small or
    batched products are left alone: they gain nothing, and the XLA of JAX 0.10 aborts on some batched ones of
    3 tokens. On a GPU both take the same time, and outside of loops the barrier adds two copies.
    """
    if tangent.ndim != 2 or other.ndim != 2 or jax.default_backend() == "gpu":
        return tangent
    shape = tangent.shape
    tall = jx.surely(lambda: min(shape[0], *other.shape) >= 64 and shape[1] < shape[0])
    if not tall:
        return tangent
    return lax.transpose(lax.optimization_barrier(lax.transpose(tangent, (1, 0))), (1, 0))


def _can_be_flat(x: Any, y: Any, axes: tuple) -> bool:
    """Whether the larger operand can be flat without being moved; the smaller one may be transposed."""
    xs, ys, batch, summed, x_free, y_free = axes
    large, free = (ys, y_free) if jx.surely(lambda: x.size < y.size) else (xs, x_free)
    return large in (batch + summed + free, batch + free + summed)


def _sum_unshared(x: Any, xs: list, others: Sequence, out: Sequence) -> tuple[Any, list]:
    lonely = [i for i, name in enumerate(xs) if name not in others and name not in out]
    if not lonely:
        return x, xs
    return lax.reduce_sum(x, lonely), [name for i, name in enumerate(xs) if i not in lonely]


def _merged(x: Any, xs: tuple, batch: tuple, summed: tuple, free: tuple, side: str) -> tuple[Any, tuple]:
    """``x`` with its free axes merged into one and its contracted axes into one."""
    # All summed axes become one axis, and all free axes another: [B, T, n] -> [B * T, n] where B and T are
    # free and adjacent.
    orders = [batch + summed + free, batch + free + summed]
    if xs not in orders:
        x = lax.transpose(x, [xs.index(name) for name in orders[1]])
        xs = orders[1]
    sizes, groups = dict(zip(xs, x.shape, strict=True)), {"sum": summed, side: free}
    # An empty group gets no axis: a vector has no free axis, and an outer product has no summed one.
    order = tuple(group for group in (("sum", side) if xs == orders[0] else (side, "sum")) if groups[group])
    shape = [sizes[n] for n in batch] + [math.prod(sizes[n] for n in groups[group]) for group in order]
    return lax.reshape(x, shape), (*batch, *order)


def _dot(x, xs, y, ys, batch, summed, free, dtype, precision):
    dims = (
        ([xs.index(n) for n in summed], [ys.index(n) for n in summed]),
        ([xs.index(n) for n in batch], [ys.index(n) for n in batch]),
    )
    extra = {}
    # With Explicit mesh axes JAX asks how the result is sharded: like the operands' axes that it keeps.
    if explicit_mesh(x, y):
        specs = {**axis_specs(y, ys), **axis_specs(x, xs)}
        extra["out_sharding"] = result_sharding([specs[n] for n in batch + free], x, y)
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype, **extra)


def low_rank_product(
    w: Factored,
    x: Any,
    xs: Sequence[Any],
    out: Sequence[Any],
    *,
    dtype: Any,
    precision: Any = None,
    walk: Any = None,
) -> Any:
    """``scale * sum x * a @ b`` over named axes; each axis of the weight is named by its number.

    ``x @ A`` first where inputs are contracted, ``x @ B`` first where outputs are: the factor that
    shrinks ``x`` to the rank goes first, and neither ``a @ b`` nor anything of the weight's size is built.
    """
    arrays, facts = operands(w, x, xs, out, dtype=dtype, precision=precision, walk=walk)
    return _two_products(*arrays, **facts, tap=w.tap, lanes=w.lanes)


def operands(w: Factored, x: Any, xs: Sequence, out: Sequence, *, dtype, precision, walk) -> tuple:
    """``(x, first, second, scale)``, the factors in the order of their products, and the static facts."""
    w = picked(w, x)
    a, b = w.parts["a"], w.parts["b"]
    contracted = set(xs) - set(out)
    shrinks_by = {"a": 1, "b": 1}
    # W [n, m] contracted over n shrinks x by n in a; contracted over m, as in x @ W.T, by m in b.
    for name in contracted:
        for part, other in (("a", "b"), ("b", "a")):
            if w.has(part, name) and not w.has(other, name):
                shrinks_by[part] *= w.shape[name]
    first, second = (a, b) if shrinks_by["a"] >= shrinks_by["b"] else (b, a)
    # Dropout acts on the inputs of A, as in the paper: a product that meets B first (x @ W.T) has no such
    # inputs.
    if "key" in w.parts:
        if first is not a:
            raise Refused("dropout reached a use of the weight that does not contract A's inputs.", w.paths)
        x, xs = dropped(w, x, xs, walk.drawn(w))
    x, precision = (inputs_of_tap(x), EXACT) if w.tap else (x, precision)
    stacked = w.parts.get("scale")
    axes = tuple(xs), first.axes, second.axes, stacked.axes if stacked else (), tuple(out)
    facts = {"scale": w.scale, "axes": axes, "dtype": jnp.dtype(dtype), "precision": precision}
    return (x, first.array, second.array, stacked.array if stacked else None), facts


@partial(jax.jit, static_argnames=("scale", "axes", "dtype", "precision", "tap", "lanes"))
def _two_products(x, first, second, stacked, scale, axes, dtype, precision, tap, lanes):
    """``scale * (x @ first) @ second``, jitted so that equal uses share one trace and lowered function."""
    facts = {"dtype": dtype, "precision": precision, "tap": tap}
    product = partial(_product, scale=scale, axes=axes, **facts)
    if lanes is not None and stacked is not None:
        by_column = (*axes[:3], (*axes[3], RANK), axes[4])
        before, after = (partial(half, axes=by_column, **facts) for half in (_first, _second))
        halves = Halves(before, partial(_scaled, scale=scale, axes=by_column), after)
        product = by_lane(product, lanes, (axes[1].index(RANK), axes[2].index(RANK)), halves)
    return product(x, first, second, stacked)


@partial(jax.jit, static_argnames=("scale", "axes", "dtype", "precision", "flat"))
def first_product(x, first, stacked, scale, axes, dtype, precision, flat=True):
    """``h = scale * x @ first``, the first half of `low_rank_product`."""
    h = _first(x, first, axes=axes, dtype=dtype, precision=precision, tap=False, flat=flat)
    return _scaled(h, stacked, scale=scale, axes=axes)


@partial(jax.jit, static_argnames=("axes", "dtype", "precision", "flat"))
def second_product(h, second, axes, dtype, precision, flat=True):
    """``h @ second``, the other half."""
    return _second(h, second, axes=axes, dtype=dtype, precision=precision, flat=flat)


def _product(x, first, second, stacked, *, scale, axes, **facts):
    h = _scaled(_first(x, first, axes=axes, **facts), stacked, scale=scale, axes=axes)
    return _second(h, second, axes=axes, **facts)


def _axes_of_h(xs, first_axes, second_axes, stacked_axes, out):
    # h is [tokens, r], with the stack axes if there are any. First come the axes of x that the result or the
    # second factor needs, then those that only the first factor has (the rank, and what x does not contract).
    later = {*out, *second_axes, *stacked_axes}
    h_axes = [n for n in xs if n in later] + [n for n in first_axes if n in later and n not in xs]
    # If A is shared and x has no stack axis, h has none either; the scale then adds it.
    return [n for n in stacked_axes if n not in h_axes], h_axes


def _first(x, first, *, axes, dtype, precision, tap, flat=True):
    # In the dtype of the activations, as the base product; gradients of float32 factors are float32 again.
    compute, (_, h_axes) = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else dtype, _axes_of_h(*axes)
    arrays = x.astype(compute), axes[0], first.astype(compute), axes[1]
    h = contract(*arrays, h_axes, dtype=compute, precision=precision, flat=flat)
    return echo(h) if tap else h


def _scaled(h, stacked, own=None, *, scale, axes):
    # h [tokens, r] is the smallest array around, so the scale costs least here.
    if stacked is not None:
        missing, h_axes = _axes_of_h(*axes)
        h, h_axes = lax.expand_dims(h, range(len(missing))), [*missing, *h_axes]
        h = h * align(stacked.astype(h.dtype), axes[3], h_axes)
    h = h if scale == 1.0 else h * scale
    return h if own is None else jnp.where(align(own, (RANK,), h_axes), h, jnp.zeros((), h.dtype))


def _second(h, second, *, axes, dtype, precision, flat=True, **_):
    h_axes = [name for some in _axes_of_h(*axes) for name in some]
    arrays = h, h_axes, second.astype(h.dtype), axes[2]
    return contract(*arrays, axes[4], dtype=dtype, precision=precision, flat=flat)


def absorbed(w: Factored, dtype: Any) -> tuple[Part, Part]:
    """``a`` and ``b`` in ``dtype``, with the scale in ``b`` if ``b`` has all its axes, else in ``a``.

    If neither has all of them (VeRA shares A along a stack), ``a`` is repeated along those that it lacks.
    """
    a, b = (Part(w.parts[name].array.astype(dtype), w.parts[name].axes) for name in "ab")
    scale = w.parts.get("scale")
    # The scale is [*stack], [*stack, r] or a number: b [*stack, r, *outputs] has all these axes unless it is
    # shared.
    if scale is not None:
        by = scale.array.astype(dtype)
        if set(scale.axes) <= set(b.axes):
            b = Part(b.array * align(by, scale.axes, b.axes), b.axes)
        else:
            axes = (*(n for n in scale.axes if n not in a.axes), *a.axes)
            a = Part(align(a.array, a.axes, axes) * align(by, scale.axes, axes), axes)
    # The static scale goes into a, since one of the two has to take it.
    if w.scale != 1.0:
        a = Part(a.array * w.scale, a.axes)
    return a, b


def scale_absorbed(w: Factored) -> Factored:
    """The weight with an array scale multiplied into a factor."""
    if "scale" not in w.parts:
        return w
    a, b = absorbed(w, jnp.result_type(*(w.parts[name].array.dtype for name in ("a", "b", "scale"))))
    parts = {name: part for name, part in w.parts.items() if name != "scale"}
    return dataclasses.replace(w, parts={**parts, "a": a, "b": b}, scale=1.0)


def stack_into_rank(w: Factored, axis: int, side: str) -> Factored | None:
    """The same weight with a stack axis in one factor alone: its entries are side by side along the rank.

    For ``side="a"``, ``a'[s, n, (s', r)]`` is ``a[s, n, r]`` where ``s' = s`` and 0 elsewhere, and
    ``b'[(s', r), m]`` is ``b[s', r, m]``. None if that would take more memory than the weight itself, or if
    mesh axes would have to be split.
    """
    w = scale_absorbed(w)
    mine, other = w.parts[side], w.parts["b" if side == "a" else "a"]
    if explicit_mesh(mine.array, other.array):
        return None
    size, rank = w.shape[axis], mine.array.shape[mine.axes.index(RANK)]
    my_rest = [i for i in mine.axes if i not in (axis, RANK)]
    others = [i for i in other.axes if i not in (axis, RANK)]
    # My factor grows to [s, n, s * r] and the other one to [s * r, m]. If that is more than W has, building W
    # is the better choice.
    entries = size * math.prod(w.shape[i] for i in my_rest) + math.prod(w.shape[i] for i in others)
    if not jx.surely(lambda: entries * size * rank <= math.prod(w.shape)):
        return None
    # [s, n, 1, r] times the identity [s, 1, s', 1] is [s, n, s', r], of which the last two become the rank.
    array = lax.expand_dims(align(mine.array, mine.axes, [axis, *my_rest, RANK]), [len(my_rest) + 1])
    same = jnp.eye(size, dtype=array.dtype).reshape(size, *(1,) * len(my_rest), size, 1)
    array = (array * same).reshape(*array.shape[:-2], size * rank)
    flat = align(other.array, other.axes, [axis, RANK, *others])
    flat = flat.reshape(size * rank, *flat.shape[2:])
    mine, other = Part(array, (axis, *my_rest, RANK)), Part(flat, (RANK, *others))
    return dataclasses.replace(w, parts={"a": mine, "b": other} if side == "a" else {"a": other, "b": mine})


def build(w: Factored) -> Any:
    """The whole array: ``base + a @ b`` in float32 for a weight, in the base's dtype for looked-up rows."""
    if "key" in w.parts:
        what = "an embedding lookup" if w.lookup else "a use that builds the whole weight"
        raise Refused(f"dropout drops inputs of a product, and {what} has no such inputs.", w.paths)
    if not w.parts:
        return built(w.base)
    # A bfloat16 weight is built in float32 and rounded once, as in a merge. Looked-up rows are activations
    # and are computed in their own dtype.
    w = chosen(w)
    compute = w.dtype if w.lookup or w.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    a, b = absorbed(w, compute)
    # Axes that neither factor has are broadcast by the last align: the change is the same along them.
    out = [i for i in range(w.ndim) if i in a.axes or i in b.axes]
    precision = None if w.lookup else lax.Precision.HIGHEST
    change = contract(a.array, a.axes, b.array, b.axes, out, dtype=compute, precision=precision)
    whole = built(w.base).astype(compute) + align(change, out, range(w.ndim))
    column = w.parts.get("column")
    if column is not None:
        whole = whole * align(column.array.astype(compute), column.axes, range(w.ndim))
    return whole.astype(w.dtype)
