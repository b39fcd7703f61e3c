"""One adapter of a bank, or a mixture of all, as an adapter of its own, picked inside each contraction."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, Factors, fact, number, register
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import Stored, dense
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import SCALINGS, LowRank
from lorax_fn.methods.table import METHODS
from lorax_fn.transform.factored import RANK, align, factor
from lorax_fn.transform.low_rank_products import build
from lorax_fn.transform.picks import chosen

# What a slot may hold. The bank says it by a number: 0 is an empty slot, i + 1 is KINDS[i].
KINDS = [
    (cls, scaling)
    for cls in METHODS.values()
    if cls.owns_factors and issubclass(cls, LoRA)
    for scaling in SCALINGS
]


def extras_of(cls: type[Adapter]) -> tuple[str, ...]:
    """The arrays that a method trains beside A and B, each ``[*s, *m]``: DoRA's magnitude."""
    return tuple(name for name in cls.trained() if name not in LoRA.trained())


@register
class Picked(LowRank):
    """One adapter of a bank, or a mixture, picked where a weight's product contracts it.

    Args:
      a: ``[*s, k, *n, r]``, of all slots.
      b: ``[*s, k, r, *m]``.
      extras: as in `Slots`.
      scale: ``[*s, k]``.
      kind: ``[k]``.
      which: an integer array ``[]``, the slot; any outside of ``0 .. k-1`` is the bare base. Or float
        weights ``[k]`` of a mixture.
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: share of A's inputs dropped; set by `lorax_fn.dropout` only.
    """

    up: ClassVar[tuple[str, ...]] = ("b",)
    frozen: ClassVar[tuple[str, ...]] = ("scale", "kind", "which")
    a: Any
    b: Any
    extras: Any
    scale: Any
    kind: Any
    which: Any
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        layout, s = self.layout, len(self.layout.stack)
        a, b = np.shape(self.a), np.shape(self.b)
        sizes = dict(zip((*layout.stack, *layout.inputs), (*a[:s], *a[s + 1 : -1]), strict=True))
        sizes |= dict(zip(layout.outputs, b[s + 2 :], strict=True))
        return tuple(sizes[i] for i in range(layout.ndim))

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        stack, layout = self.layout.stack, self.layout
        return {"a": (*stack, None, *layout.inputs, None), "b": (*stack, None, None, *layout.outputs)}

    def pair(self) -> Factors:
        layout, stack = self.layout, self.layout.stack
        many = Factors(self.a, self.b, layout, self.scale, pick=self.which)
        one = chosen(factor("", jax.ShapeDtypeStruct(self.shape, self.a.dtype), many))
        a = align(one.parts["a"].array, one.parts["a"].axes, (*stack, *layout.inputs, RANK))
        b = align(one.parts["b"].array, one.parts["b"].axes, (*stack, RANK, *layout.outputs))
        return Factors(a, b, layout, one.parts["scale"].array)

    def factors(self, w: Any) -> Factors:
        del w
        facts = {"key": self.key, "rate": self.rate, "pick": self.which}
        return Factors(self.a, self.b, self.layout, self.scale, **facts)


@register
class PickedWithColumn(Picked):
    """The same from a bank in which some slots scale each output (DoRA).

    A mixture is ``W + sum_k w_k (W'_k - W)``, which is ``c * (W + sum_k w_k scale_k A_k (B_k g_k / c))`` with
    ``c = 1 + sum_k w_k (g_k - 1)`` and each adapter's own gain ``g_k``. Fields are those of `Picked`.
    """

    adds: ClassVar[bool] = False

    def weight(self, w: Any) -> jax.Array:
        w = dense(w)
        return build(factor("", w, self.factors(w)))

    def factors(self, w: Any) -> Factors:
        plain = super().factors(w)
        if self.which.ndim == 0:
            return dataclasses.replace(plain, column=self._column(w, self.which))
        s = len(self.layout.stack)
        slots = jnp.arange(np.shape(self.kind)[-1], dtype=jnp.int32)
        gains = jnp.moveaxis(jax.vmap(lambda i: self._column(w, i))(slots), 0, s)  # [*s, k, *m]
        weights = self.which.reshape(*(1,) * s, -1, *(1,) * (gains.ndim - s - 1)).astype(gains.dtype)
        column = 1.0 + (weights * (gains - 1.0)).sum(s)
        share = gains / jnp.expand_dims(jnp.where(column == 0, jnp.ones_like(column), column), s)
        b = self.b * jnp.expand_dims(share, s + 1).astype(self.b.dtype)
        return dataclasses.replace(plain, b=b, column=column)

    def _column(self, w: Any, slot: Any) -> jax.Array:
        """What slot ``slot`` multiplies each output by, ``[*s, *m]``; ones for a method without a column."""
        stack, _, m = self.layout.shapes(self.shape)
        column = jnp.ones((*stack, *m), jnp.float32)
        there = (slot >= 0) & (slot < np.shape(self.kind)[-1])
        held = jnp.where(there, jnp.take(self.kind, slot, mode="clip"), jnp.float32(0))
        for cls in dict.fromkeys(cls for cls, _ in KINDS if extras_of(cls)):
            names = extras_of(cls)
            if not set(names) <= set(self.extras):
                continue
            arrays = self.a, self.b, self.scale, *(self.extras[name] for name in names)
            made = _by_entry(_column_of(cls, names, slot), w, self.layout, *arrays)
            kinds = jnp.asarray([float(i + 1) for i, (c, _) in enumerate(KINDS) if c is cls])
            mine = (held == kinds).any()
            column = jnp.where(mine, made.astype(jnp.float32), column)
        return column


def _column_of(cls: type[Adapter], names: tuple[str, ...], slot: Any) -> Callable:
    """A function that makes one entry's adapter of slot ``slot``, for its column alone."""

    def column(w, layout, a, b, scale, *extras):
        a, b, scale, *extras = (jnp.take(x, slot, axis=0, mode="clip") for x in (a, b, scale, *extras))
        named = dict(zip(names, extras, strict=True))
        one = cls(a, b, scale, 1, "lora", layout, **named)  # pyright: ignore[reportCallIssue]
        return one.factors(w).column  # pyright: ignore[reportOptionalMemberAccess]

    return column


def _by_entry(f: Callable, w: Any, layout: Layout, *factors: Any) -> Any:
    """``f(w, layout, *factors)`` of one stack entry after the other, so of one entry's picks at a time."""
    if not layout.stack:
        return f(dense(w), layout, *factors)
    axis = layout.stack[0]
    if isinstance(w, Stored) and w.entry(axis) is None:
        w = dense(w)

    def one(parts):
        w, *factors = parts
        entry = w.entry(axis) if isinstance(w, Stored) else w
        return _by_entry(f, entry, layout.without(axis), *factors)

    first = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), w)
    return jax.lax.map(one, (first, *factors))
