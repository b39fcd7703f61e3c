"""AdaLoRA's reallocation: scores every rank of every adapter, and keeps the best."""

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
    """Estimates how much the loss depends on each rank: the mean ``|w dL/dw|`` over its entries in A and B.

    Zhang et al., "AdaLoRA" (https://arxiv.org/abs/2303.10512), equations (7) and (8), for factors A and B.
    Average it over several batches, since a single one is noisy.

    Args:
      lora: adapters by path.
      grads: their gradients, as `jax.grad` with respect to ``lora`` gives them.

    Returns:
      ``{path: [*s, r]}`` float32, for each `LoRA`, `DoRA` and `LoRAFA`.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or is stacked for `jax.vmap`; or ``grads`` lack one.

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
            want="gradients with respect to lora, as jax.grad gives them",
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
    """Keeps the ``budget`` ranks with the highest scores over all adapters, and drops the others.

    AdaLoRA's pruning step (https://arxiv.org/abs/2303.10512, section 3.2). Kept ranks keep their numbers, bit
    for bit, and the scale. Stack entries of one weight may keep different numbers of ranks; shorter ones are
    padded. Each adapter keeps at least its best rank.

    Args:
      lora: adapters by path; those without scores stay as they are.
      scores: ``{path: [*s, r]}``, concrete; for instance from `sensitivity`.
      budget: how many ranks to keep in total, counted over stack entries; at least one per adapter.

    Returns:
      New adapters of the same methods. Initialize a new optimizer state, because shapes change.

    Raises:
      LoraError: a score has no `LoRA`, `DoRA` or `LoRAFA` at its path, has another shape or is not finite; or
        the budget is too small.

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
            want="an int of at least one rank per adapter",
            do=f"budget={2 * len(scores)}.",
        )
    tables = {path: _table(lora[path], score) for path, score in scores.items()}
    kept = {path: np.zeros(table.shape, bool) for path, table in tables.items()}
    for path, table in tables.items():
        kept[path].flat[table.argmax()] = True
    rest = [
        (-score, path, index)  # among equal scores, the earlier path wins
        for path, table in sorted(tables.items())
        for index, score in enumerate(table.flat)
        if np.isfinite(score) and not kept[path].flat[index]
    ]
    for _, path, index in sorted(rest)[: budget - len(tables)]:
        kept[path].flat[index] = True
    return {path: _kept(x, kept[path]) if path in kept else x for path, x in lora.items()}


def _table(adapter: Any, score: Any) -> np.ndarray:
    """Scores ``[s, r]``, minus infinity in the padding."""
    table = np.asarray(score, np.float64).reshape(-1, np.shape(adapter.a)[-1])
    ranks = np.asarray(adapter.rank if isinstance(adapter.rank, tuple) else [adapter.rank] * len(table))
    return np.where(np.arange(table.shape[1])[None, :] < ranks[:, None], table, -np.inf)


def _kept(adapter: Any, kept: np.ndarray) -> LoRA:
    """The adapter with only the ranks that are True in ``kept [s, r]``, moved to the front of each entry."""
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
            do="lx.ranks.sensitivity(lora, grads), or your own scores, one per rank.",
        )
