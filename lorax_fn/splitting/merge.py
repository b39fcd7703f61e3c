"""`merge` folds adapters back into plain weights; `delta` says what each of them adds."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits, check_unstacked
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_concrete, replace_leaves, run

LOG = logging.getLogger("lorax_fn")


def merge(params: PyTree, lora: dict[str, Adapter], *, dtype: Any = None, requantize: bool = False) -> PyTree:
    """Folds adapters into the base weights: ``W' = W + scale * A @ B``, plain params for the untouched model.

    Args:
      params: the frozen tree that `split` returned.
      lora: its adapters, or some of them.
      dtype: dtype of the merged leaves; None keeps each leaf's own. Sums are float32 and cast once.
      requantize: whether quantized leaves stay quantized, in their format; what rounding takes from each is
        logged (logger ``lorax_fn``), for it may be more than the adapter adds. Else they become arrays, those
        without an adapter too.

    Returns:
      A tree like ``params``. Float leaves without an adapter are the same objects.

    Raises:
      LoraError: an adapter has no leaf, another shape, or dropout; all are listed, and nothing is merged.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> bool((lx.merge(params, lora)["q"]["kernel"] == params["q"]["kernel"]).all())
      True
    """
    named = dict(flatten_with_paths(params)[0])
    check_fits(named, lora, allow_dropped=False)
    merged, lost = {}, {}
    for path, leaf in named.items():
        if path in lora and requantize and is_stored(leaf):
            again, lost[path] = run(jax.jit(_requantized), lora[path], leaf)
            merged[path] = dataclasses.replace(again, dtype=np.dtype(dtype or leaf.dtype))
        elif path in lora:
            merged[path] = _merged(lora[path], leaf, dtype)
        elif is_stored(leaf) and not requantize:
            merged[path] = run(lambda leaf: dense(leaf).astype(dtype or leaf.dtype), leaf)
    _log(lost)
    return replace_leaves(params, merged)


def delta(lora: dict[str, Adapter]) -> dict[str, jax.Array]:
    """What each adapter adds to its weight: ``dW = scale * A @ B``.

    Adapters whose change depends on the weight itself (`Full`, `Rows`, `DoRA`) have none; they are left out.

    Args:
      lora: adapters by path.

    Returns:
      ``{path: dW}`` in float32, each on its weight's own axes.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or adapters are under dropout.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> lx.delta(lora)["q/kernel"].shape
      (8, 6)
    """
    check_unstacked(lora)
    dropped = [path for path, adapter in lora.items() if adapter.under_dropout]
    if dropped:
        raise error(
            "adapters under dropout have no one dW.", path=dropped, do="use the lora from before dropout."
        )
    able = {path: adapter for path, adapter in lora.items() if adapter.adds}
    return {path: run(lambda adapter: adapter.delta(), adapter) for path, adapter in able.items()}


def _requantized(adapter: Adapter, stored: Any) -> tuple[Any, jax.Array]:
    """The merged weight stored as before; what that rounds off, and the adapter's change, as shares of it."""
    w = dense(stored).astype(jnp.float32)
    merged = adapter.weight(w)
    again = stored.store(merged)
    parts = dense(again) - merged, merged - w, merged
    rounded, changed, whole = (jnp.sqrt(jnp.sum(jnp.square(part))) for part in parts)
    return again, jnp.stack([rounded, changed]) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def _log(lost: Mapping[str, Any]) -> None:
    """Says what requantizing took; a log line, as a warning would stop whoever makes errors of them."""
    if lost and all(map(is_concrete, lost.values())):
        lines = [f"  {path}: {r:.3%}, {c:.3%}" for path, (r, c) in jax.device_get(lost).items()]
        head = "merged and requantized: rounding, and the adapter's change, as shares of the weight's norm"
        LOG.warning("%s", "\n".join([head, *lines]))


def _merged(adapter: Adapter, w: Any, dtype: Any) -> Any:
    def weight(adapter, w):
        w = jnp.asarray(dense(w))
        return adapter.weight(w) if dtype is None else adapter.weight(w.astype(jnp.float32)).astype(dtype)

    return run(jax.jit(weight) if is_stored(w) else weight, adapter, w)  # jit: no unpacked copy beside it
