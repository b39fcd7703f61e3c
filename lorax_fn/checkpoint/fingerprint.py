"""Fingerprints of base trees, to compare them cheaply: paths, shapes, dtypes and a hash of some elements.

A fingerprint is a list with one entry per array leaf: path, shape, dtype, and the crc32 of at most 4096
elements of a float leaf. It is JSON and does not depend on the sharding. It distinguishes most bases, but not
all: two that differ only in elements it does not read have the same fingerprint.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_abstract, is_array

SAMPLE = 4096  # elements per leaf that the fingerprint reads
VERSION = 2
GOLDEN = (math.sqrt(5) - 1) / 2


def fingerprint(params: PyTree, version: int = VERSION) -> list[dict]:
    """The fingerprint of a tree: path, shape and dtype of every array, and a hash of a sample of its floats.

    It is the same in every run and for every sharding; abstract leaves have no crc32. A quantized weight
    names its format, and its crc32 covers all its arrays. The content of integers, bools and PRNG keys is not
    compared, because they may be state that a forward pass changes, such as counters of random numbers.

    Args:
      params: any tree.
      version: 1 samples as checkpoints of version 1 did: leaves of every dtype, at even strides.
    """
    return [
        {
            "path": path,
            "shape": list(leaf.shape),
            "dtype": f"{leaf.dtype} as {leaf.format}" if is_stored(leaf) else str(leaf.dtype),
            "crc32": None if is_abstract(leaf) or not _is_content(leaf, version) else _crc(leaf, version),
        }
        for path, leaf in flatten_with_paths(params)[0]
        if is_array(leaf)
    ]


def _is_content(leaf: Any, version: int) -> bool:
    return version == 1 or is_stored(leaf) or jnp.issubdtype(leaf.dtype, jnp.inexact)


def _crc(leaf: Any, version: int) -> int:
    crc = 0
    for array in jax.tree.leaves(leaf):
        crc = zlib.crc32(_sample(array, version).tobytes(), crc)
    return crc


def differences(saved: list[dict], given: list[dict]) -> dict[str, str]:
    """``{path: what differs}`` between a stored fingerprint and that of params.

    Content is compared if both have a hash, which abstract leaves do not.
    """
    was = {entry["path"]: entry for entry in saved}
    now = {entry["path"]: entry for entry in given}
    found = {}
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if old is None or new is None:
            found[name] = f"{'missing' if new is None else 'extra'} in params"
        elif old["shape"] != new["shape"]:
            found[name] = f"shape: {old['shape']} saved, {new['shape']} in params"
        elif old["dtype"] != new["dtype"]:
            found[name] = f"dtype: {old['dtype']} saved, {new['dtype']} in params"
        elif old["crc32"] != new["crc32"] and None not in (old["crc32"], new["crc32"]):
            found[name] = "content: other values"
    return found


def places(size: int, version: int = VERSION) -> np.ndarray:
    """The elements of a flattened array to read: all of a small one, else `SAMPLE` of them.

    They are the multiples of a stride, modulo the size. The stride is near the golden ratio of the size and
    has no common factor with it, so the elements are spread over all axes: they meet every row and every
    column of a square matrix of up to 4096 rows, and do not lie on one diagonal.
    """
    if version == 1:
        return np.arange(0, size, -(-size // SAMPLE))
    if size <= SAMPLE:
        return np.arange(size)
    stride = round(GOLDEN * size)
    while math.gcd(stride, size) > 1:
        stride += 1
    return np.sort(np.arange(SAMPLE, dtype=np.int64) * stride % size)


def _sample(leaf: Any, version: int) -> np.ndarray:
    """The elements at `places`, without copying a large or sharded array as a whole."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shape = np.shape(leaf)
    size = math.prod(shape)
    small = version > 1 and size <= SAMPLE and getattr(leaf, "is_fully_addressable", True)
    if not shape or not size or small:
        return np.asarray(leaf)
    index = np.unravel_index(places(size, version), shape)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding):
        replicated = jax.NamedSharding(sharding.mesh, jax.P())
        if sharding.mesh.explicit_axes:
            return np.asarray(leaf.at[index].get(out_sharding=replicated))
        if not leaf.is_fully_addressable:  # All processes gather the sample together.
            return np.asarray(jax.jit(lambda x: x[index], out_shardings=replicated)(leaf))
    return np.asarray(leaf[index])
