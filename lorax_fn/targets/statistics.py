"""Finds float leaves that are a model's own state and should not train: running statistics and caches."""

import sys
from collections.abc import Mapping
from typing import Any

from lorax_fn.core.trees import PyTree, is_float
from lorax_fn.targets.patterns import components

# Components that mark such a leaf anywhere in a path, in Flax, Haiku, torch and Keras.
_ANYWHERE = {
    "batch_stats", "running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance",
    "moving_var", "mean_ema", "var_ema",
}  # fmt: skip


# Flax collections, which are the first component of a path.
_COLLECTIONS = ("cache", "intermediates", "perturbations", "ema", "ema_params", "spectral_stats")


_NNX = ("BatchStat", "Cache", "Intermediate", "Perturbation", "RngState")


def statistics(params: PyTree, leaves: Mapping[str, Any]) -> list[str]:
    """The paths of float leaves that train only if their whole path is named.

    They are recognized by their collection or name, or by the type of their Flax NNX variable. Integers and
    keys are not included, as they have no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_fn.core.trees import arrays
      >>> from lorax_fn.targets.statistics import statistics
      >>> params = {"params": {"bn": {"scale": jnp.ones(2)}}, "batch_stats": {"bn": {"mean": jnp.ones(2)}}}
      >>> statistics(params, arrays(params))
      ['batch_stats/bn/mean']
    """
    variables = _variables(params)

    def is_state(path):
        parts = components(path)
        return path in variables or parts[0] in _COLLECTIONS or not _ANYWHERE.isdisjoint(parts)

    return [path for path, leaf in leaves.items() if is_float(leaf) and is_state(path)]


def _variables(params: PyTree) -> set[str]:
    """The paths of NNX variables whose type marks them as state."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return set()
    import jax

    kinds = tuple(kind for name in _NNX if (kind := getattr(nnx, name, None)) is not None)
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, node in nodes
        if isinstance(node, kinds)
    }
