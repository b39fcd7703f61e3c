"""Dropout as data: a copy of the adapters that drops inputs of A wherever the transform uses it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_lora
from lorax_fn.core.trees import is_tracer


def dropout(lora: dict[str, Adapter], rate: float | jax.Array, key: jax.Array) -> dict[str, Adapter]:
    """Drops inputs of A: ``x @ W + scale * (drop(x) @ A) @ B``, with ``drop(x) = x * keep / (1 - rate)``.

    Section 4 of Hu et al. (https://arxiv.org/abs/2106.09685) in PEFT's form: dropout applies to the low-rank
    branch only, and to all low-rank methods alike. Dropout is data, not a mode: call this inside the loss
    with the key of the step, and evaluate with the original ``lora``. The mask of a product depends on the
    key, on the weight's path and stack entry (so each layer of a scan has its own), and on how many products
    used that weight before. It does not depend on the rest of the program, nor on `jax.jit` or
    `jax.checkpoint` around it. Under `jax.vmap`, one key per example gives one mask per example.

    Args:
      lora: adapters from `lorax_fn.split`. `Full` and `Rows` have no low-rank branch and are returned as is.
      rate: fraction of inputs to drop, ``0 <= rate < 1``. An array compiles once for all rates; a traced
        array is not checked.
      key: a PRNG key, new-style or old-style; consumed.

    Returns:
      Adapters with the same arrays and with dropout keys, which cannot be merged or saved; ``lora`` itself if
      ``rate`` is the number 0.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or was consumed by a step; ``rate`` is out of range; or
        an adapter's method does not support dropout.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=1)
      >>> dropped = lx.dropout(lora, 0.5, jax.random.key(0))
      >>> dropped["kernel"].rate
      0.5
    """
    check_lora(lora)
    number = isinstance(rate, float | int)
    if np.ndim(rate) != 0 or (not is_tracer(rate) and not 0.0 <= float(rate) < 1.0):
        raise error(
            "a dropout rate is not a fraction below one.",
            got=rate,
            want="0 <= rate < 1",
            do="lx.dropout(lora, 0.1, key).",
        )
    if number and rate == 0.0:
        return lora
    rate = float(rate) if number else jnp.asarray(rate, jnp.float32)
    keys = _keys(key, list(lora))
    return {path: adapter.with_dropout(rate, keys[path]) for path, adapter in lora.items()}


def _keys(key: jax.Array, paths: list[str]) -> dict[str, jax.Array]:
    """One key per path, independent of which other paths there are.

    All are made at once: a hundred separate `jax.random.fold_in` take longer to compile than the masks.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # an old-style key, of jax.random.PRNGKey
    hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    # Slices, because `jax.debug_key_reuse` takes keys from `jnp.unstack` for consumed.
    return {path: jax.lax.index_in_dim(folded, i, keepdims=False) for i, path in enumerate(paths)}
