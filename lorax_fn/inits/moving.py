"""What PiSSA and OLoRA share: they move a part of each weight into its factors."""

import jax
import jax.numpy as jnp

from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import entries as entries
from lorax_fn.core.matrices import entry_scales, taken_out, used_ranks


def with_part_moved(one, key, w, layout: Layout, rank, scale, dtype):
    """Maps ``one(key, matrix, s, used) -> (a, b)`` over stack entries; subtracts ``s a @ b`` from ``w``."""
    matrices = entries(w, layout)
    count = matrices.shape[0]
    used = jnp.asarray(used_ranks(rank, count), matrices.dtype)
    keys = jax.random.split(key, count)
    a, b = jax.vmap(one)(keys, matrices, entry_scales(scale, count).astype(matrices.dtype), used)
    return taken_out(a, b, w, layout, scale, dtype)
