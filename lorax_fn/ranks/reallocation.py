"""Ranks moved to where they matter, after AdaLoRA: score every rank of every adapter, keep the best."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_unstacked
from lorax_fn.core.matrices import factor_entries
from lorax_fn.methods.lora import LoRA


def sensitivity(lora: dict[str, Adapter], grads: dict[str, Adapter]) -> dict[str, jax.Array]:
    """How much the loss would change without each rank: the mean ``|w dL/dw|`` over its part of A and of B.

    Zhang et al., "AdaLoRA" (https://arxiv.org/abs/2303.10512), equations (7) and (8), of factors A and B.
    Average it over several batches: one is noisy.

    Args:
      lora: adapters by path.
      grads: their gradients, as `jax.grad` by ``lora`` gives them.

    Returns:
      ``{path: [*s, r]}`` float32, of each `LoRA`, `DoRA` and `LoRAFA`.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or one of them has no gradient in ``grads``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> lora = {"w": lx.LoRA(jnp.ones((2, 2)), jnp.eye(2), 2.0, 2, "lora", layout)}
      >>> lx.ranks.sensitivity(lora, lora)["w"]
      Array([1.5, 1.5], dtype=float32)
    """
    check_unstacked(lora)
    missing = [path for path, adapter in lora.items() if adapter.owns_factors and path not in grads]
    if missing:
        raise error(
            "grads do not hold every adapter of lora.",
            path=missing,
            got=sorted(grads),
            want="the tree that jax.grad by lora gives",
            do="lx.ranks.sensitivity({path: lora[path] for path in grads}, grads).",
        )
    scores = {}
    adapter: Any
    for path, adapter in lora.items():
        if adapter.owns_factors:
            (a, b, _), (ga, gb, _) = factor_entries(adapter), factor_entries(grads[path])
            score = jnp.abs(a * ga).mean(1) + jnp.abs(b * gb).mean(2)
            scores[path] = score.reshape(*adapter.a.shape[: len(adapter.layout.stack)], -1)
    return scores


def reallocate(lora: dict[str, Adapter], scores: Mapping[str, Any], budget: int) -> dict[str, Adapter]:
    """Keeps the ``budget`` ranks of the highest scores over all adapters, and drops the others.

    AdaLoRA's pruning step (https://arxiv.org/abs/2303.10512, section 3.2). What is kept is kept bit for bit,
    at the same scale. Stack entries of one weight may keep different numbers of ranks; the arrays are then as
    wide as the largest. Each adapter keeps its best rank, whatever the budget says of it.

    Args:
      lora: adapters by path; those without scores stay as they are.
      scores: ``{path: [*s, r]}``, concrete; from `sensitivity`, for instance.
      budget: how many ranks to keep, counted over stack entries; at least one per adapter.

    Returns:
      New adapters of the same methods. The optimizer's state has to start anew: shapes change.

    Raises:
      LoraError: scores are of no `LoRA` or of another shape, or the budget is too small.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"q": {"kernel": jnp.ones((8, 6))}, "k": {"kernel": jnp.ones((8, 6))}}
      >>> _, lora = lx.split(params, rank=2)
      >>> scores = {"q/kernel": jnp.array([4.0, 3.0]), "k/kernel": jnp.array([1.0, 2.0])}
      >>> {path: adapter.rank for path, adapter in lx.ranks.reallocate(lora, scores, budget=3).items()}
      {'k/kernel': 1, 'q/kernel': 2}
    """
    check_unstacked(lora)
    _check_scores(lora, scores)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < len(scores):
        raise error(
            "the budget is too small.",
            got=f"budget={budget!r} for {len(scores)} adapters",
            want="an int: one rank an adapter, or more",
            do=f"budget={2 * len(scores)}.",
        )
    tables = {path: _table(lora[path], score) for path, score in scores.items()}
    kept = {path: np.zeros(table.shape, bool) for path, table in tables.items()}
    for path, table in tables.items():
        kept[path].flat[table.argmax()] = True
    rest = [
        (-score, path, index)  # the tie of equal scores goes to the earlier path
        for path, table in sorted(tables.items())
        for index, score in enumerate(table.flat)
        if np.isfinite(score) and not kept[path].flat[index]
    ]
    for _, path, index in sorted(rest)[: budget - len(tables)]:
        kept[path].flat[index] = True
    return {path: _kept(x, kept[path]) if path in kept else x for path, x in lora.items()}


def _table(adapter: Any, score: Any) -> np.ndarray:
    """Scores ``[s, r]``, minus infinity in the pads."""
    table = np.asarray(score, np.float64).reshape(-1, np.shape(adapter.a)[-1])
    ranks = np.asarray(adapter.rank if isinstance(adapter.rank, tuple) else [adapter.rank] * len(table))
    return np.where(np.arange(table.shape[1])[None, :] < ranks[:, None], table, -np.inf)


def _kept(adapter: Any, kept: np.ndarray) -> LoRA:
    counts = kept.sum(1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : counts.max()]
    used = (np.arange(counts.max())[None, :] < counts[:, None]).astype(np.float32)
    a, b, _ = factor_entries(adapter)
    a = jnp.take_along_axis(a, order[:, None, :], -1) * used[:, None, :]
    b = jnp.take_along_axis(b, order[:, :, None], 1) * used[:, :, None]
    even = len(set(counts.tolist())) == 1 and not isinstance(adapter.rank, tuple)
    return adapter.with_factors(a, b, int(counts[0]) if even else tuple(counts.tolist()))


def _check_scores(lora: Mapping[str, Adapter], scores: Mapping[str, Any]) -> None:
    wrong = {}
    for path, score in scores.items():
        adapter: Any = lora.get(path)
        if adapter is None or not adapter.owns_factors:
            wrong[path] = "the path of a LoRA"
        else:
            shape = (*np.shape(adapter.a)[: len(adapter.layout.stack)], np.shape(adapter.a)[-1])
            if np.shape(score) != shape or not math.isfinite(np.asarray(score, np.float64).sum()):
                wrong[path] = f"finite numbers of shape {shape}"
    if wrong:
        raise error(
            "scores do not fit lora.",
            path=list(wrong),
            got=[f"shape {np.shape(scores[path])}" for path in wrong],
            want=list(wrong.values()),
            do="lx.ranks.sensitivity(lora, grads), or one score a rank of your own.",
        )
