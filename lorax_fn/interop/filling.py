"""One leaf from its parts, one after the other: at most one part is held beside the tree."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.stored import is_stored
from lorax_fn.interop.places import Place


def filled(reader: Any, parts: Sequence[tuple[Place, str]], sharding: Any) -> Any:
    """The leaf that ``reader`` reads: at once where it is whole, else entry by entry into its stack."""
    entries: dict[tuple[int, ...], list[tuple[Place, str]]] = {}
    for place, name in parts:
        entries.setdefault(place.entry, []).append((place, name))
    if list(entries) == [()]:
        return _placed(reader.part(entries[()]), sharding)
    axes = reader.leaves.entry_axes(parts[0][0])
    shape = tuple(reader.leaf.shape)
    whole = None
    for entry, found in entries.items():
        part = reader.part(found)
        if whole is None:
            whole = _blank(part, axes, shape, sharding)
        whole = jax.tree.map(
            lambda w, x, e=entry: _put(w, jnp.asarray(x), axes, e), whole, _stacked(part, axes, shape)
        )
    jax.block_until_ready(whole)
    return whole


def _placed(x: Any, sharding: Any) -> Any:
    if is_stored(x):
        return x if sharding is None else jax.device_put(x, sharding)
    return jnp.array(x) if sharding is None else jax.device_put(np.asarray(x), sharding)


def _stacked(part: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """A quantized entry with the facts of the whole stack and the arrays of one entry."""
    if not is_stored(part):
        return part
    for axis in sorted(axes):
        part = part.stacked(axis, shape[axis])
    return part


def _blank(part: Any, axes: tuple[int, ...], shape: tuple[int, ...], sharding: Any) -> Any:
    """Zeros for the whole stack, of every array that one entry has."""

    def zeros(x: Any) -> jax.Array:
        sizes = list(np.shape(x))
        for axis in sorted(axes):
            sizes.insert(axis, shape[axis])
        make = functools.partial(jnp.zeros, tuple(sizes), x.dtype)
        return jax.jit(make, out_shardings=sharding)() if sharding is not None else make()

    return jax.tree.map(zeros, _stacked(part, axes, shape))


@functools.partial(jax.jit, static_argnums=(2,), donate_argnums=(0,))
def _put(whole: jax.Array, x: jax.Array, axes: tuple[int, ...], entry: tuple[int, ...]) -> jax.Array:
    index: list[Any] = [slice(None)] * whole.ndim
    for axis, i in zip(axes, entry, strict=True):
        index[axis] = i
    return whole.at[tuple(index)].set(x)
