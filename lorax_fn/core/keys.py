"""PRNG keys: one checked key, and one key for each leaf."""

import zlib
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_array


def checked_key(key: Any) -> jax.Array:
    """``key`` itself, if it is one PRNG key of the new or the old style."""
    dtype = key.dtype if is_array(key) else None
    new = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    if new or (dtype == np.uint32 and key.ndim == 1):
        return key
    raise error("key= is not one PRNG key.", got=repr(key), want="a single key", do="key=jax.random.key(0).")


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """A key of one leaf: crc32 of its path, never ``hash()``, so it is the same in every process."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
