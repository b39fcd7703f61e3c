"""Which base is this: paths, shapes, dtypes and a cheap content hash of a tree, and what two differ in.

A fingerprint is a list with one entry an array leaf: path, shape, dtype, and crc32 of at most 4096 elements
of it. It is JSON, and the same for every sharding of the same values.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_abstract, is_array

SAMPLE = 4096  # elements a leaf that the fingerprint reads


def fingerprint(params: PyTree) -> list[dict]:
    """What tells one base from another: path, shape, dtype and crc32 of a strided sample of every array.

    It is the same on every run and for every sharding; abstract leaves have no crc32. A quantized weight
    names its format, and the crc32 is that of all its arrays.
    """
    return [
        {
            "path": path,
            "shape": list(leaf.shape),
            "dtype": f"{leaf.dtype} as {leaf.format}" if is_stored(leaf) else str(leaf.dtype),
            "crc32": None if is_abstract(leaf) else _crc(leaf),
        }
        for path, leaf in flatten_with_paths(params)[0]
        if is_array(leaf)
    ]


def _crc(leaf: Any) -> int:
    crc = 0
    for array in jax.tree.leaves(leaf):
        crc = zlib.crc32(_sample(array).tobytes(), crc)
    return crc


def differences(saved: list[dict], given: list[dict]) -> dict[str, str]:
    """``{path: what differs}`` between a stored fingerprint and that of params; no hash is as good as any."""
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


def _sample(leaf: Any) -> np.ndarray:
    """At most `SAMPLE` elements at even strides; never the whole of a big or sharded array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shape = np.shape(leaf)
    size = math.prod(shape)
    if not shape or not size:
        return np.asarray(leaf)
    index = np.unravel_index(np.arange(0, size, -(-size // SAMPLE)), shape)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding):
        replicated = jax.NamedSharding(sharding.mesh, jax.P())
        if sharding.mesh.explicit_axes:
            return np.asarray(leaf.at[index].get(out_sharding=replicated))
        if not leaf.is_fully_addressable:  # each process holds a part: all of them together gather the sample
            return np.asarray(jax.jit(lambda x: x[index], out_shardings=replicated)(leaf))
    return np.asarray(leaf[index])
