"""PRNG keys: a check of the user's key, and one key per leaf."""

import zlib
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_array


def checked_key(key: Any) -> jax.Array:
    """``key`` itself, if it is a single PRNG key, new-style or old-style; else raises a `LoraError`."""
    dtype = key.dtype if is_array(key) else None
    new = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    if new or (dtype == np.uint32 and key.ndim == 1):
        return key
    raise error(
        "key= is not a single PRNG key.", got=repr(key), want="a single key", do="key=jax.random.key(0)."
    )


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf. It folds in the crc32 of the path, since ``hash()`` differs between processes."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
