"""Weights that hold the factors of many adapters, from which each use picks one or mixes all.

The factors of a bank run along one more axis, `PICK`. If there is a part ``pick``, a number, a product picks
that adapter's factors right where it contracts them: under `jax.vmap` over the number, each row of the batch
gathers its own factors of this weight alone. Without ``pick``, the scale holds the weights of a mixture:
``sum_k w_k A_k B_k`` is one product of rank ``k * r``, which contracts `PICK` together with the rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_fn.transform.factored import PICK, RANK, Factored, Part, is_factored


def picked(w: Factored, x: Any = None) -> Factored:
    """The weight with the factors of the adapter that its number picks; a mixture is left as it is."""
    if "pick" not in w.parts:
        return w
    number = w.parts["pick"].array
    number = number if x is None else _after(number, lax.stop_gradient(x))
    parts = {name: _at(part, number) for name, part in w.parts.items() if name != "pick"}
    return dataclasses.replace(w, parts=parts)


@jax.custom_batching.custom_vmap
def _after(number: Any, x: Any) -> Any:
    """``number``, which is made to depend on ``x`` where each row has its own.

    Rows then gather their factors next to the product that uses them. Otherwise XLA's CPU scheduler would
    gather the factors of all layers at the start of the program, and barriers do not prevent that.
    """
    del x
    return number


@_after.def_vmap
def _after_in_rows(axis_size: int, batched: list, number: Any, x: Any) -> tuple[Any, bool]:
    del axis_size
    if not batched[0]:
        return number, False
    # One number of each row of x [rows, ...]: [rows, 1, ...].
    one = lax.slice(x, (0,) * x.ndim, (x.shape[0] if batched[1] else 1, *(1,) * (x.ndim - 1)))
    never = jnp.isnan(one) & jnp.isinf(one)  # always False, but XLA does not know that
    return number + jnp.broadcast_to(never.reshape(-1), number.shape[:1]).astype(number.dtype), True


def chosen(w: Any) -> Any:
    """The operand with no `PICK` axis in its factors: one adapter picked, or a mixture of rank ``k * r``."""
    if not is_factored(w) or not any(PICK in part.axes for part in w.parts.values()):
        return w
    if "pick" not in w.parts:
        return _mixed(w)
    w = picked(w)
    scale, rank = w.parts["scale"], w.parts["a"].array.shape[w.parts["a"].axes.index(RANK)]
    # Rules expect a scale with an axis: one number per rank.
    wide = jnp.broadcast_to(scale.array[..., None], (*scale.array.shape, rank))
    return w.with_part(w.base, "scale", Part(wide, (*scale.axes, RANK)))


def _at(part: Part, number: Any) -> Part:
    """The part of adapter ``number``; zeros if there is no such adapter, as for -1."""
    if PICK not in part.axes:
        return part
    # One entry along PICK, which is then gone: a [k, n, r] -> [n, r].
    at = part.axes.index(PICK)
    window = list(range(part.array.ndim - 1))
    numbers = lax.GatherDimensionNumbers(tuple(window), (at,), (at,))
    sizes = tuple(1 if i == at else n for i, n in enumerate(part.array.shape))
    rows = lax.gather(
        part.array,
        jnp.asarray(number, jnp.int32)[None],
        numbers,
        sizes,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )
    return Part(rows, part.axes[:at] + part.axes[at + 1 :])


def _mixed(w: Factored) -> Factored:
    """The mixture as one adapter: its rank runs over all adapters' ranks, ``[k * r]``."""
    parts = dict(w.parts)
    k = parts["a"].array.shape[parts["a"].axes.index(PICK)]
    rank = parts["a"].array.shape[parts["a"].axes.index(RANK)]
    scale = parts["scale"]
    wide = jnp.broadcast_to(scale.array[..., None], (*scale.array.shape, rank))
    parts["scale"] = Part(wide, (*scale.axes, RANK))
    for name in ("a", "b", "scale"):
        part = parts[name]
        # a [k, n, r] -> [n, k, r] -> [n, k * r], and likewise b and the scale: PICK becomes part of the rank.
        rest = [axis for axis in part.axes if axis not in (PICK, RANK)]
        order = [part.axes.index(axis) for axis in (*rest, PICK, RANK)]
        array = lax.transpose(part.array, order)
        parts[name] = Part(array.reshape(*array.shape[: len(rest)], k * rank), (*rest, RANK))
    return dataclasses.replace(w, parts=parts)
