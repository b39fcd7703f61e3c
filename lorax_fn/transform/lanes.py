"""Products of many adapters under `jax.vmap`, each lane at its own rank.

Lanes of different ranks are padded to the widest, and a `jax.vmap` of the product would multiply the padding
too. Where the ranks are known, the padding is cut off: lanes of similar rank form one product of that width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Product = Callable[[Any, Any, Any, Any], Any]


def by_lane(product: Product, lanes: tuple[tuple[int, int], ...], axes: tuple[int, int]) -> Product:
    """``product(x, first, second, scale)`` that leaves the padding out under a `jax.vmap` over lanes.

    The `vmap` over lanes is the one that maps over ``scale``. It has to be inside `jax.grad`, as in
    ``grad(lambda loras: vmap(loss)(loras).sum())``: JAX cannot differentiate what is not mapped yet.

    Args:
      product: what a single lane computes.
      lanes: ``(how many lanes, their widest rank)`` for each run of neighboring lanes, in order.
      axes: the axis of the rank in ``first`` and in ``second``.
    """
    mapped = custom_vmap(product)

    @mapped.def_vmap
    def rule(size, batched, x, first, second, scale):
        at = tuple(0 if is_mapped else None for is_mapped in batched)
        if not any(batched[1:]):  # a vmap over examples, say: lanes may come later
            inner = by_lane(jax.vmap(product, at), lanes, axes)
            return inner(x, first, second, scale), True
        if not all(batched[1:]) or size != sum(count for count, _ in lanes):
            return jax.vmap(product, at)(x, first, second, scale), True
        counts = [count for count, _ in lanes]
        xs = lax.split(x, counts) if batched[0] else [x] * len(lanes)
        parts = zip(xs, *(lax.split(array, counts) for array in (first, second, scale)), strict=True)
        made = []
        # Each run of lanes has its own product, with first [count, ..., rank] and second cut to its rank.
        for (x, first, second, scale), (count, rank) in zip(parts, lanes, strict=True):
            first = lax.slice_in_dim(first, 0, rank, axis=axes[0] + 1)
            second = lax.slice_in_dim(second, 0, rank, axis=axes[1] + 1)
            if count == 1:
                made.append(product(x[0] if batched[0] else x, first[0], second[0], scale[0])[None])
            else:
                made.append(jax.vmap(product, at)(x, first, second, scale))
        return jnp.concatenate(made), True

    return mapped
