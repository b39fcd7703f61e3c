"""Two 4-bit codes in one byte, and the runs of neighbors along an axis that share a byte or a block."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Packs neighboring 4-bit codes along ``axis`` into one byte, the first in the high half."""
    pairs = folded(codes, axis, 2)
    high, low = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return (high << np.uint8(4)) | low


def unpack(codes: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `pack`, cut to ``length`` codes along ``axis``."""
    # A new axis of size 2 after ``axis`` gets the high and low half of each byte, and is then merged into it.
    shift = np.array([4, 0], np.uint8).reshape(2, *(1,) * (codes.ndim - axis - 1))
    shift = shift.reshape((1,) * (axis + 1) + shift.shape)
    pairs = (jnp.expand_dims(codes, axis + 1) >> shift) & np.uint8(15)
    return cut(pairs.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :]), axis, length)


def folded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits ``axis`` into two, ``[runs, size]``; the last run is padded with zeros."""
    extra = -x.shape[axis] % size
    x = _gathered(x, axis, -(-x.shape[axis] // size))
    if extra:
        x = jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def cut(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The first ``length`` entries along ``axis``."""
    return x if x.shape[axis] == length else jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _gathered(x: jax.Array, axis: int, runs: int) -> jax.Array:
    """``x``, resharded to be whole along ``axis`` if an explicit mesh's shards do not divide the runs."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else (names,)
    if runs % math.prod(sharding.mesh.shape[name] for name in names if name) == 0:
        return x
    spec = (*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
