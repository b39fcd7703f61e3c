"""Products of many adapters under `jax.vmap`, each lane at its own rank.

Lanes of different ranks are padded to the widest, and a `jax.vmap` of the product would multiply the padding
too. Where the ranks are known, the padding is cut off. Then either lanes of similar rank form one product of
that width, or the factors of all lanes lie side by side in one matrix, and a mask leaves each lane its own
columns: more operations, but results that need not be put together, which on a TPU is the dearer part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

Product = Callable[[Any, Any, Any, Any], Any]


class Lanes(NamedTuple):
    """The ranks of lanes: ``(how many lanes, their widest rank)`` for each run of neighbors, in order."""

    runs: tuple[tuple[int, int], ...]
    side_by_side: bool = False


def by_lane(product: Product, lanes: Lanes, axes: tuple[int, int], by_column: Product) -> Product:
    """``product(x, first, second, scale)`` that leaves the padding out under a `jax.vmap` over lanes.

    The `vmap` over lanes is the one that maps over ``scale``. It has to be inside `jax.grad`, as in
    ``grad(lambda loras: vmap(loss)(loras).sum())``: JAX cannot differentiate what is not mapped yet.

    Args:
      product: what a single lane computes.
      lanes: the lanes' ranks, and which form their products take.
      axes: the axis of the rank in ``first`` and in ``second``.
      by_column: the same as ``product`` for a scale with a last axis, the rank.
    """
    mapped = custom_vmap(product)
    counts = [count for count, _ in lanes.runs]

    @mapped.def_vmap
    def rule(size, batched, x, first, second, scale):
        at = tuple(0 if is_mapped else None for is_mapped in batched)
        if not any(batched[1:]):  # a vmap over examples, say: lanes may come later
            inner = by_lane(jax.vmap(product, at), lanes, axes, jax.vmap(by_column, at))
            return inner(x, first, second, scale), True
        if not all(batched[1:]) or size != sum(counts):
            return jax.vmap(product, at)(x, first, second, scale), True
        firsts, seconds = (cut(array, lanes, axis) for array, axis in ((first, axes[0]), (second, axes[1])))
        if lanes.side_by_side:
            first, second = (_merged(runs, axis) for runs, axis in ((firsts, axes[0]), (seconds, axes[1])))
            mapped_by = (at[0], None, None, 0)
            return jax.vmap(by_column, mapped_by)(x, first, second, _columns(scale, lanes)), True
        xs, scales = lax.split(x, counts) if batched[0] else [x] * len(counts), lax.split(scale, counts)
        made = []
        for x, first, second, by in zip(xs, firsts, seconds, scales, strict=True):
            if len(by) == 1:
                made.append(product(x[0] if batched[0] else x, first[0], second[0], by[0])[None])
            else:
                made.append(jax.vmap(product, at)(x, first, second, by))
        return jnp.concatenate(made), True

    return mapped


def cut(array: jax.Array, lanes: Lanes, axis: int) -> list[jax.Array]:
    """The factors ``[lanes, ...]`` run by run, each cut to its rank along ``axis`` of a single lane's."""
    parts = lax.split(array, [count for count, _ in lanes.runs])
    ranks = [rank for _, rank in lanes.runs]
    return [lax.slice_in_dim(x, 0, rank, axis=axis + 1) for x, rank in zip(parts, ranks, strict=True)]


def _merged(runs: list[jax.Array], axis: int) -> jax.Array:
    """The factors of all lanes along one axis, that of the rank."""

    def merged(x):
        x = jnp.moveaxis(x, 0, axis)  # the lanes, right before their ranks
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jnp.concatenate([merged(x) for x in runs], axis)


def _columns(scale: jax.Array, lanes: Lanes) -> jax.Array:
    """Each lane's scale for its own columns, and zero for those of the others: ``[lanes, ..., columns]``."""
    ranks = np.repeat([rank for _, rank in lanes.runs], [count for count, _ in lanes.runs])
    own = np.repeat(np.arange(len(ranks)), ranks) == np.arange(len(ranks))[:, None]
    own = own.reshape(len(ranks), *[1] * (scale.ndim - 1), -1)
    return jnp.where(own, scale[..., None], jnp.zeros((), scale.dtype))
