"""Products whose outputs are scaled, as DoRA scales them: ``y = c * (x W) + s (x A) (c * B)``.

With ``u = c * dy``, the gradients are those of a plain product with the cotangent ``u``, and

    dc = (sum_t u * (x W) + sum_r B * (s x A)^T u) / c

Autodiff computes ``dc`` from ``dy`` instead, and XLA's CPU compiler then writes both ``dy`` and ``u``, and
reads both. On a TPU it makes no difference.

The ``c`` of ``dc`` cancels, so it has no derivative here. If it had one, second derivatives would be
differences of two terms that grow with ``1 / c``, and inexact where c is small.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lorax_fn.transform.factored import Factored, Part, Sum, align
from lorax_fn.transform.low_rank_products import first_product, operands, second_product
from lorax_fn.transform.meshes import may_be_sharded


class Form(NamedTuple):
    """The static facts of the two products, and the axes of B that the column runs along."""

    scale: float
    axes: tuple[tuple, ...]
    dtype: Any
    precision: Any
    along: tuple[int, ...]

    def first(self, x: Any, a: Any, scale: Any, flat: bool = True) -> Any:
        return first_product(x, a, scale, self.scale, self.axes, self.dtype, self.precision, flat)

    def second(self, h: Any, b: Any, flat: bool = True) -> Any:
        return second_product(h, b, self.axes, self.dtype, self.precision, flat)

    def on_b(self, b: Any, column: Any) -> Any:
        return b * align(column, self.along, range(b.ndim))


def pays(w: Factored, x: Any, out: Sequence, contracted: Sequence[int], base: Any) -> bool:
    """Whether these rules apply, and save time: all arrays of one wide dtype, on one CPU."""
    column, arrays = w.parts["column"], [x, base, *(w.parts[name].array for name in ("a", "b", "column"))]
    one_dtype = {array.dtype for array in arrays} in ({jnp.dtype("float32")}, {jnp.dtype("float64")})
    # The outputs come last, so that all axes before them are tokens.
    last = set(out[len(out) - len(column.axes) :]) == set(column.axes)
    whole = column.array.shape == tuple(w.shape[i] for i in column.axes)
    a_first = all(w.has("a", i) or not w.has("b", i) for i in contracted)
    plain = set(w.parts) <= {"a", "b", "scale", "column", "key", "rate", "draws"}
    plain &= not w.tap and w.lanes is None
    on_one_cpu = jax.default_backend() == "cpu" and not may_be_sharded(*arrays)
    return one_dtype and last and whole and a_first and plain and on_one_cpu


def scaled_product(
    w: Factored, x: Any, xs: Sequence, out: Sequence, base: Any, *, precision: Any, walk: Any
) -> Sum:
    """The product of ``x`` and the weight, whose column is not contracted; ``base`` is ``x @ W``."""
    column = w.parts["column"]
    names = out[len(out) - len(column.axes) :]
    array = align(column.array, column.axes, names)
    arrays, facts = operands(w, x, xs, out, dtype=base.dtype, precision=precision, walk=walk)
    form = Form(**facts, along=tuple(map(facts["axes"][2].index, names)))
    held = _nonzero(array)
    return Sum(_scaled_base(base, array, held), _scaled_change(*arrays, array, held, form))


@jax.custom_jvp
def _scaled_base(base, column, held):
    del held  # the column again, for the gradient
    return base * lax.expand_dims(column, range(base.ndim - column.ndim))


@partial(_scaled_base.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (base, column, held), (d_base, d_column, _) = primals, tangents
    y = base * lax.expand_dims(column, range(base.ndim - column.ndim))
    terms = [] if _still(d_base) else [_scaled(d_base, held)]
    if not _still(d_column):
        terms.append(_scaled_by_constant(_times(base, _rate(held, d_column)), held))
    return y, _total(terms, y)


@partial(jax.custom_jvp, nondiff_argnums=(6,))
def _scaled_change(x, a, b, scale, column, held, form):
    del held
    return form.second(form.first(x, a, scale), form.on_b(b, column))


@partial(_scaled_change.defjvp, symbolic_zeros=True)
def _(form, primals, tangents):
    x, a, b, scale, column, held = primals
    d_x, d_a, d_b, d_scale, d_column, _ = tangents
    h, d_h = _with_tangent(form.first, (x, a, scale), (d_x, d_a, d_scale))
    # A plain product, because the policy of a checkpoint around this one asks for a dot_general.
    y = form.second(h, form.on_b(b, column), flat=False)
    terms = []
    if not (_still(d_h) and _still(d_b)):
        terms.append(_scaled(_with_tangent(form.second, (h, b), (d_h, d_b))[1], held))
    if not _still(d_column):
        # c * h (dc / c * B): a change of the column is one of B.
        by_column = form.on_b(b, _rate(held, d_column))
        moved = _with_tangent(form.second, (h, b), (None, by_column))[1]
        terms.append(_scaled_by_constant(moved, held))
    return y, _total(terms, y)


def _with_tangent(product: Callable, arrays: Sequence, tangents: Sequence) -> tuple[Any, Any]:
    """The product and its tangent, None if no operand has one."""
    moving = [i for i, tangent in enumerate(tangents) if not _still(tangent)]
    if not moving:
        return product(*arrays, flat=False), None

    def of(*some):
        every = [*arrays]
        for i, array in zip(moving, some, strict=True):
            every[i] = array
        return product(*every)

    return jax.jvp(of, [arrays[i] for i in moving], [tangents[i] for i in moving])


def _still(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, SymbolicZero)


def _total(terms: list, like: Any) -> Any:
    return sum(terms[1:], terms[0]) if terms else SymbolicZero(jax.typeof(like))


# With a checkpoint, a loop keeps the column itself for these, and nothing made of it.
_kept = partial(jax.checkpoint, prevent_cse=False)


@_kept
def _scaled(t, held):
    return _times(t, held)


@_kept
def _scaled_by_constant(t, held):
    return _times(t, lax.stop_gradient(held))


@_kept
def _rate(held, d_column):
    return d_column / lax.stop_gradient(held)


def _nonzero(column: Any) -> Any:
    """The column, but no entry so close to zero that a division by it is inexact.

    The gradient by the column divides by this, and those of ``x`` and the factors are multiplied by it, which
    adds less to them than they are rounded by.
    """
    least = jnp.asarray(1e-3 * jnp.finfo(column.dtype).eps, column.dtype)
    near = jnp.abs(column) < least
    away = jnp.copysign(least, column) - column
    return column + lax.stop_gradient(jnp.where(near, away, jnp.zeros_like(column)))


def _times(x: Any, column: Any) -> Any:
    """``x * column`` over flat tokens: products need it as a matrix, and no other form is then written."""
    flat = lax.reshape(x, (math.prod(x.shape[: x.ndim - column.ndim]), math.prod(column.shape)))
    return lax.reshape(flat * lax.reshape(column, (1, math.prod(column.shape))), x.shape)


def in_b(w: Factored, column: Part) -> Factored:
    """``a @ (column * b)``, which is ``column * (a @ b)`` but scales only the small factor."""
    b = w.parts["b"]
    # The column is float32 and b may be bfloat16: they are multiplied in the wider dtype, as in a merge.
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(b.array.dtype, column.array.dtype)
    scaled = b.array.astype(wide) * align(column.array.astype(wide), column.axes, b.axes)
    return w.with_part(w.base, "b", Part(scaled, b.axes))
