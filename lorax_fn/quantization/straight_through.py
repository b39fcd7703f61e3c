"""Training through the quantizer, so that a merge into quantized weights keeps what was trained.

forward    x Q(W + dW)              Q: the rounding of `lorax_fn.merge(..., requantize="unbiased")`
backward   that of x (W + dW)       straight through Q, by the factors: no cotangent of a weight is built

This is the straight-through estimator of Bengio et al., "Estimating or Propagating Gradients Through
Stochastic Neurons" (https://arxiv.org/abs/1308.3432).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Adapter, Factors, register
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, replace_leaves, run
from lorax_fn.quantization.blocks import Quantized, nudged


def merge_aware(params: PyTree, lora: dict[str, Adapter]) -> tuple[PyTree, dict[str, Adapter]]:
    """Rounds adapters into their quantized weights, and lets gradients pass straight through the rounding.

    The forward pass with the returned pair is that of ``merge(params, lora, requantize="unbiased")``; its
    gradient with respect to ``lora`` is that of ``W + dW``. Like `lorax_fn.dropout`, this is data, not a
    mode: call it inside the loss, on the adapters that train. The loss then includes the rounding error of a
    later merge, and training compensates for it.

    Use it if the final model must consist of quantized weights alone. Otherwise keep the adapters separate or
    merge to floats, neither of which rounds. Each step additionally rounds every adapted weight, which takes
    one float32 copy of a weight at a time.

    Args:
      params: the tree that `lorax_fn.split` returned, with `Quantized` leaves.
      lora: its adapters; those of leaves that are not quantized stay as they are.

    Returns:
      ``(params, lora)`` for a function of `lorax_fn.adapt`. To save or merge, use the original ``lora``.

    Raises:
      LoraError: ``lora`` does not fit or is under dropout; no adapted leaf is quantized; or a quantized leaf
        has an adapter whose change depends on the weight (`DoRA`, `Full`, `Rows`).

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params = lx.quantize({"kernel": jax.random.normal(jax.random.key(0), (64, 8))})
      >>> params, lora = lx.split(params, rank=2)
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> def loss(lora, x):
      ...     return jnp.mean(apply(*lx.quantization.merge_aware(params, lora), x) ** 2)
      >>> gradient = jax.grad(loss)(lora, jnp.ones((4, 64)))
      >>> bool(gradient["kernel"].b.any())
      True
    """
    named = dict(flatten_with_paths(params)[0])
    check_fits(named, lora, allow_dropped=False)
    stored = {path: adapter for path, adapter in lora.items() if is_stored(named[path])}
    if not stored:
        raise error(
            "there is nothing to round: no adapted weight is quantized.",
            path=list(lora),
            want="params from lx.quantize, and adapters of them",
            do="params, lora = lx.split(lx.quantize(params)), or leave lx.quantization.merge_aware out.",
        )
    strange = [path for path, adapter in stored.items() if not adapter.adds]
    if strange:
        raise error(
            "no gradient goes straight through the rounding of these weights.",
            path=strange,
            got=[type(stored[path]).__name__ for path in strange],
            want="adapters whose change does not depend on the weight",
            do='split them with another method, such as method="lora".',
        )
    codes = {path: run(requantized_unbiased, adapter, named[path]) for path, adapter in stored.items()}
    straight = {path: _Straight(lora[path]) if path in stored else lora[path] for path in lora}
    return replace_leaves(params, codes), straight


@jax.jit
def requantized(adapter: Adapter, stored: Any) -> Any:
    """The merged weight rounded to the nearest codes; stack entries that do not change keep theirs."""
    w = dense(stored).astype(jnp.float32)
    changed = adapter.weight(w)
    return _where_changed(changed != w, stored.store(changed), stored)


@jax.jit
def requantized_unbiased(adapter: Adapter, stored: Quantized) -> Quantized:
    """The merged weight rounded without bias, with no gradient."""
    adapter = jax.lax.stop_gradient(adapter)
    w = dense(stored).astype(jnp.float32)
    change = adapter.weight(w) - w
    return _where_changed(change != 0, nudged(stored, change), stored)


def _where_changed(which: jax.Array, new: Any, old: Any) -> Any:
    """``new``, but ``old`` for stack entries in which no number changes, so that their scales stay too."""
    inner = [i for i in range(which.ndim) if i not in old.layout.stack]
    some = jnp.any(which, inner, keepdims=True)
    new = dataclasses.replace(new, dtype=old.dtype)
    return jax.tree.map(lambda x, y: jnp.where(some, x, y), new, old)


@register
class _Straight(Adapter):
    """Adds nothing to a weight that adapter ``of`` was merged into, but has the gradients of that adapter."""

    of: Any

    def weight(self, w: jax.Array) -> jax.Array:
        return dense(w)

    def factors(self, w: jax.Array) -> Factors:
        """``scale * (A @ B - A' @ B')``, where ``A'`` and ``B'`` are A and B without a gradient."""
        del w
        pair: Factors = self.of.pair()
        a, b, scale = pair.a, pair.b, pair.scale
        rank = len(pair.layout.stack)
        still_a, still_b = jax.lax.stop_gradient((a, -b))
        both = {"a": jnp.concatenate([a, still_a], -1)}
        both["b"] = jnp.concatenate([b, still_b], b.ndim - 1 - len(pair.layout.outputs))
        if jnp.ndim(scale) > rank:  # one number per rank, which may train
            both["scale"] = jnp.concatenate([scale, jax.lax.stop_gradient(scale)], -1)
        return dataclasses.replace(pair, **both)

    def problem(self, w: Any) -> str | None:
        return self.of.problem(w)
