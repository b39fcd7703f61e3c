"""Products of a factored weight: ``x A`` first, then ``B``, over flattened tokens."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_fn.core.errors import error
from lorax_fn.transform.factored import Factored
from lorax_fn.transform.meshes import axis_specs, explicit_mesh, result_sharding
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
) -> Any:
    """``einsum`` over named axes as one dot product, 2-D wherever a reshape is free.

    Skinny products are fast as plain ``[T, n] @ [n, r]``; the transposes that autodiff makes of a product
    with two token axes are not. Names of ``out`` that neither operand has are broadcast by the caller.
    ``y`` is the small factor, where there is one.
    """
    x, xs = _sum_unshared(x, list(xs), ys, out)
    y, ys = _sum_unshared(y, list(ys), xs, out)
    wanted = [name for name in out if name in xs or name in ys]
    free = [name for name in wanted if (name in xs) != (name in ys)]
    swapped = bool(free) and free[0] in ys  # a product comes out with its left operand's axes first
    if swapped:
        x, xs, y, ys = y, ys, x, xs
    batch = [name for name in wanted if name in xs and name in ys]
    large = xs if x.size >= y.size else ys
    summed = [name for name in large if name in xs and name in ys and name not in batch]
    x_free = [name for name in xs if name not in ys]
    y_free = [name for name in ys if name not in xs]
    merged = None
    if not explicit_mesh(x, y):
        merged = _merged_pair(x, xs, y, ys, batch, summed, x_free, y_free)
    if merged is None:
        result = _dot(x, xs, y, ys, batch, summed, x_free + y_free, dtype, precision)
    else:
        sizes = {**dict(zip(ys, y.shape, strict=True)), **dict(zip(xs, x.shape, strict=True))}
        (x, xs), (y, ys) = merged
        x, y = (_with_flat_gradient(x, y), y) if swapped else (x, _with_flat_gradient(y, x))
        names = [n for n in (*xs, *ys) if n in ("x", "y")]
        result = _dot(x, xs, y, ys, batch, ["sum"] if summed else [], names, dtype, precision)
        result = lax.reshape(result, [sizes[name] for name in batch + x_free + y_free])
    have = batch + x_free + y_free
    if have != wanted:
        result = lax.transpose(result, [have.index(name) for name in wanted])
    return result


@jax.custom_jvp
def _same(x: Any) -> Any:
    return x


@_same.defjvp
def _same_but_turned(primals, tangents):
    turned = lax.optimization_barrier(lax.transpose(tangents[0], (1, 0)))
    return _same(*primals), lax.transpose(turned, (1, 0))


def _with_flat_gradient(factor: Any, other: Any) -> Any:
    """``factor`` itself; if it is ``[n, r]``, its gradient is computed as ``[r, n]`` and then transposed.

    ``x^T @ dh`` with its ``r`` columns takes a CPU four to eight times as long as ``dh^T @ x`` with its
    ``r`` rows. XLA turns the second into the first when it sees the transpose, hence the barrier; it
    stands in the tangent alone, so that values, and residuals of the gradient, are as they were. Not for
    small or batched products: they gain nothing, and XLA of JAX 0.10 aborts on some batched ones of 3 tokens.
    """
    small = factor.ndim != 2 or other.ndim != 2 or min(factor.shape[0], *other.shape) < 64
    return factor if small or factor.shape[1] >= factor.shape[0] else _same(factor)


def _merged_pair(x, xs, y, ys, batch, summed, x_free, y_free):
    """Both operands with one free and one contracted axis each, or None where the larger would be moved."""
    x2 = _merged(x, xs, batch, summed, x_free, "x", move=x.size < y.size)
    y2 = _merged(y, ys, batch, summed, y_free, "y", move=y.size <= x.size)
    return None if x2 is None or y2 is None else (x2, y2)


def _sum_unshared(x: Any, xs: list, others: Sequence, out: Sequence) -> tuple[Any, list]:
    lonely = [i for i, name in enumerate(xs) if name not in others and name not in out]
    if not lonely:
        return x, xs
    return lax.reduce_sum(x, lonely), [name for i, name in enumerate(xs) if i not in lonely]


def _merged(x: Any, xs: list, batch: list, summed: list, free: list, side: str, move: bool = False):
    """``x`` with its free axes merged into one and its contracted axes into one.

    None where that would move data, unless ``move`` allows a transpose (right for the small factor only).
    """
    groups = {"sum": summed, side: free}
    orders = [batch + summed + free, batch + free + summed]
    if xs not in orders:
        if not move:
            return None
        x = lax.transpose(x, [xs.index(name) for name in orders[1]])
        xs = orders[1]
    sizes = dict(zip(xs, x.shape, strict=True))
    order = [group for group in (("sum", side) if xs == orders[0] else (side, "sum")) if groups[group]]
    shape = [sizes[n] for n in batch] + [math.prod(sizes[n] for n in groups[group]) for group in order]
    return lax.reshape(x, shape), batch + order


def _dot(x, xs, y, ys, batch, summed, free, dtype, precision):
    dims = (
        ([xs.index(n) for n in summed], [ys.index(n) for n in summed]),
        ([xs.index(n) for n in batch], [ys.index(n) for n in batch]),
    )
    extra = {}
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
    use: int = 0,
) -> Any:
    """``scale * sum x * a @ b`` over named axes, where names of the weight's axes are their numbers.

    ``x @ A`` first where inputs are contracted, ``x @ B`` first where outputs are: the factor that
    shrinks ``x`` to the rank goes first, and neither ``a @ b`` nor anything of the weight's size is built.
    """
    a, b = w.parts["a"], w.parts["b"]
    contracted = set(xs) - set(out)
    shrinks_by = {"a": 1, "b": 1}
    for name in contracted:
        for part, other in (("a", "b"), ("b", "a")):
            if w.has(part, name) and not w.has(other, name):
                shrinks_by[part] *= w.shape[name]
    first, second = (a, b) if shrinks_by["a"] >= shrinks_by["b"] else (b, a)
    if "key" in w.parts:
        if first is not a:
            raise error(
                "dropout reached a use of the weight that does not contract A's inputs.",
                path=list(w.paths),
                do="leave it out: lx.dropout of a part of the adapters, joined with the rest by |.",
            )
        x, xs = dropped(w, x, xs, use)
    x, precision = (inputs_of_tap(x), EXACT) if w.tap else (x, precision)
    stacked = w.parts.get("scale")
    axes = tuple(xs), first.axes, second.axes, stacked.axes if stacked else (), tuple(out)
    arrays = x, first.array, second.array, stacked.array if stacked else None
    facts = {"scale": w.scale, "axes": axes, "dtype": jnp.dtype(dtype), "precision": precision}
    return _two_products(*arrays, **facts, tap=w.tap)


@partial(jax.jit, static_argnames=("scale", "axes", "dtype", "precision", "tap"))
def _two_products(x, first, second, stacked, scale, axes, dtype, precision, tap):
    """``scale * (x @ first) @ second``, jitted: all uses alike share one trace and one lowered function."""
    xs, first_axes, second_axes, stacked_axes, out = axes
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else dtype
    x, xs, out, split = _tokens_merged(x, xs, {*first_axes, *second_axes, *stacked_axes}, out)
    later = {*out, *second_axes, *stacked_axes}
    h_axes = [n for n in xs if n in later] + [n for n in first_axes if n in later and n not in xs]
    x, first, second = x.astype(compute), first.astype(compute), second.astype(compute)
    h = contract(x, xs, first, first_axes, h_axes, dtype=compute, precision=precision)
    h = echo(h) if tap else h
    if stacked is not None:
        h = h * align(stacked.astype(compute), stacked_axes, h_axes)
    if scale != 1.0:
        h = h * scale
    return split(contract(h, h_axes, second, second_axes, out, dtype=dtype, precision=precision))


def _tokens_merged(
    x: Any, xs: Sequence, known: set, out: Sequence
) -> tuple[Any, Sequence, Sequence, Callable]:
    """``x`` with all axes that no factor has merged into one, if they are neighbors here and in ``out``.

    One reshape before both products and one after them. The last value undoes it on a result.
    """
    tokens = tuple(n for n in xs if n not in known)
    i, count = (xs.index(tokens[0]), len(tokens)) if tokens else (0, 0)
    j = out.index(tokens[0]) if tokens and tokens[0] in out else 0
    if count < 2 or xs[i : i + count] != tokens or out[j : j + count] != tokens or explicit_mesh(x):
        return x, xs, out, lambda y: y
    sizes = x.shape[i : i + count]
    x = lax.reshape(x, (*x.shape[:i], math.prod(sizes), *x.shape[i + count :]))

    def split(y: Any) -> Any:
        at = sum(n in known for n in out[:j])  # axes of `out` that no factor has are not in the result
        return lax.reshape(y, (*y.shape[:at], *sizes, *y.shape[at + 1 :]))

    return x, (*xs[:i], "tokens", *xs[i + count :]), (*out[:j], "tokens", *out[j + count :]), split


def align(x: Any, names: Sequence[Any], out: Sequence[Any]) -> Any:
    """``x`` transposed and expanded with axes of size 1, ready to broadcast over the axes ``out``."""
    order = [list(names).index(n) for n in out if n in names]
    if order != sorted(order):
        x = lax.transpose(x, order)
    return lax.expand_dims(x, [i for i, n in enumerate(out) if n not in names])


def dropped(w: Factored, x: Any, xs: Sequence[Any], use: int) -> tuple[Any, list]:
    """Drops entries of ``x`` with the weight's keys: one mask a stack entry, another at each use."""
    part = w.parts["key"]
    keys, names = part.array, list(part.axes)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, use))(keys.reshape(-1)).reshape(keys.shape)
    stack = [n for n in names if n in w.parts["a"].axes]
    xs = list(xs)
    missing = [n for n in stack if n not in xs]
    x = jnp.broadcast_to(x, (*[w.shape[n] for n in missing], *x.shape))
    xs = missing + xs
    rest = [n for n in xs if n not in stack]
    shape = tuple(x.shape[xs.index(n)] for n in rest)
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - w.rate, shape))(keys.reshape(-1))
    keep = align(keep.reshape(*keys.shape, *shape), names + rest, xs)
    return jnp.where(keep, x / (1.0 - w.rate), jnp.zeros((), x.dtype)), xs


def build(w: Factored) -> Any:
    """The whole array: ``base + a @ b`` in float32 for a weight, in the base's dtype for looked-up rows."""
    if "key" in w.parts and not w.lookup:
        raise error(
            "dropout cannot be applied where the weight has to be built in full.",
            path=list(w.paths),
            do="leave this weight out of lx.dropout, or train it without dropout.",
        )
    if not w.parts:
        return built(w.base)
    compute = w.dtype if w.lookup or w.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    a = w.parts["a"]
    rows, names = a.array.astype(compute), list(a.axes)
    if "key" in w.parts:
        raise error(
            "dropout of an embedding's lookups is not defined.",
            path=list(w.paths),
            do="leave it out of lx.dropout.",
        )
    scale = w.parts.get("scale")
    if scale is not None:
        rows = rows * align(scale.array.astype(compute), scale.axes, names)
    out = [i for i in range(w.ndim) if w.has("a", i) or w.has("b", i)]
    b = w.parts["b"]
    precision = None if w.lookup else lax.Precision.HIGHEST
    rows = rows * w.scale if w.scale != 1.0 else rows
    change = contract(rows, names, b.array.astype(compute), b.axes, out, dtype=compute, precision=precision)
    whole = built(w.base).astype(compute) + align(change, out, range(w.ndim))
    column = w.parts.get("column")
    if column is not None:
        whole = whole * align(column.array.astype(compute), column.axes, range(w.ndim))
    return whole.astype(w.dtype)
