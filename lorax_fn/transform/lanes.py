"""Products of adapters side by side under `jax.vmap`, each lane's at its own rank.

Lanes of several ranks are padded to the widest, and a `jax.vmap` of the product would multiply the padding
too. Told the ranks, it is cut off: lanes of about one rank form one product of that width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Product = Callable[[Any, Any, Any, Any], Any]


def by_lane(product: Product, lanes: tuple[tuple[int, int], ...], axes: tuple[int, int]) -> Product:
    """``product(x, first, second, scale)``, which under a `jax.vmap` over lanes leaves the padding out.

    The `vmap` over lanes is the one that maps over ``scale``. It has to be the inner one of `jax.grad` and
    `vmap`, ``grad(lambda loras: vmap(loss)(loras).sum())``: JAX cannot differentiate what is not mapped yet.

    Args:
      product: what a single lane computes.
      lanes: ``(how many lanes, their widest rank)`` of neighbors, in the order of the lanes.
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
        for (x, first, second, scale), (count, rank) in zip(parts, lanes, strict=True):
            first = lax.slice_in_dim(first, 0, rank, axis=axes[0] + 1)
            second = lax.slice_in_dim(second, 0, rank, axis=axes[1] + 1)
            if count == 1:
                made.append(product(x[0] if batched[0] else x, first[0], second[0], scale[0])[None])
            else:
                made.append(jax.vmap(product, at)(x, first, second, scale))
        return jnp.concatenate(made), True

    return mapped
