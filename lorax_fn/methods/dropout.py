"""Dropout as data: a copy of the adapters that drops inputs of A wherever the transform uses it."""

import dataclasses

import jax
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.keys import leaf_key
from lorax_fn.methods.lora import LoRA


def dropout(lora: dict[str, Adapter], rate: float, key: jax.Array) -> dict[str, Adapter]:
    """Drops inputs of A: ``x @ W + scale * (drop(x) @ A) @ B``, with ``drop(x) = x * keep / (1 - rate)``.

    Section 4 of Hu et al. (https://arxiv.org/abs/2106.09685) in PEFT's form: only the low-rank branch is
    dropped. Dropout is data, not a mode: call this inside the loss with that step's key, and evaluate with
    the ``lora`` that has not passed through it. Keys differ by weight, by stack entry (so by layer, also
    under scan) and by use; under `jax.vmap` one key an example gives one mask an example.

    Args:
      lora: adapters from `lorax_fn.split`.
      rate: share of inputs to drop, ``0 <= rate < 1``.
      key: a PRNG key; consumed.

    Returns:
      Adapters of the same arrays that carry keys. They cannot be merged or saved.

    Raises:
      LoraError: ``rate`` out of range, or an adapter that has no inputs of A.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=1)
      >>> dropped = lx.dropout(lora, 0.5, jax.random.key(0))
      >>> dropped["kernel"].rate
      0.5
    """
    if not 0.0 <= rate < 1.0:
        raise error(
            "a dropout rate is a share below one.", got=rate, want="0 <= rate < 1", do="rate=0.1 is common."
        )
    if rate == 0.0:
        return lora
    return {path: _dropped(path, adapter, float(rate), key) for path, adapter in lora.items()}


def _dropped(path: str, adapter: Adapter, rate: float, key: jax.Array) -> Adapter:
    if not isinstance(adapter, LoRA):
        return adapter  # a whole leaf has no inputs of A
    stack = np.shape(adapter.a)[: len(adapter.layout.stack)]
    keys = jax.random.split(leaf_key(key, path), int(np.prod(stack))).reshape(stack)
    return dataclasses.replace(adapter, key=keys, rate=rate)
