"""The two ends of a run: `split` makes the trainable factors, `merge` folds them back into plain params.

Both are pure functions on trees. Every check comes before anything is built, so an error never leaves half
a result.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.trees import (
    Adapter,
    PyTree,
    checked_key,
    dense,
    error,
    flatten_with_paths,
    is_abstract,
    is_concrete,
    is_dropped,
    is_stored,
    leaf_key,
    replace_leaves,
    run,
)
from lorax_fn.inits.plain import FromData, find_init
from lorax_fn.methods.low_rank import Start
from lorax_fn.methods.whole import Full, Rows
from lorax_fn.splitting.plans import METHODS, Plan, make_plans, make_row_plans
from lorax_fn.targets.roles import arrays, check_fits, check_lora, choose, classify

LOG = logging.getLogger("lorax_fn")


def split(
    params: PyTree,
    rank: int | Sequence[int] | Mapping = 16,
    *,
    alpha: float | Callable[[int], float] | Mapping = 32.0,
    scaling: str | Mapping = "lora",
    method: str | Mapping = "lora",
    init: Any = "kaiming",
    targets=None,
    exclude=None,
    full=None,
    rows=None,
    layout: Mapping | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[PyTree, dict[str, Adapter]]:
    """Makes low-rank adapters for the weights of a parameter tree: ``W' = W + scale * A @ B``.

    Equation (3) of Hu et al., "LoRA" (https://arxiv.org/abs/2106.09685). ``rank``, ``alpha``, ``scaling``,
    ``method`` and ``init`` take one value or ``{pattern: value}``, where the first match wins.

    Args:
      params: any pytree; abstract leaves (`jax.ShapeDtypeStruct`) give abstract adapters.
      rank: ``r``, from 1 to ``min(n, m)`` of one stack entry; for a stacked weight also one int a stack entry
        (``*s`` flattened), where 0 leaves that entry as it is and the factors are padded with exact zeros.
      alpha: numerator of the scale, or a function of the rank. One value for every rank keeps the first step
        on the data independent of the rank.
      scaling: ``"lora"`` for alpha / rank, ``"rslora"`` for alpha / sqrt(rank).
      method: ``"lora"``, ``"dora"``, ``"lora_fa"``, ``"vera"``, ``"loha"``, ``"lokr"`` or
        ``"lora_xs"``.
      init: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"`` or ``"zero_a"``; or ``"pissa"``, ``"pissa:4"`` (by
        a randomised SVD of four iterations) or ``"olora"``, which take a part of W into the factors;
        or `lorax_fn.loftq`, which also quantises W; or one from data, `lorax_fn.eva`, `lorax_fn.lora_ga` or
        `lorax_fn.corda`.
      targets: patterns: a glob over whole path components, a compiled regex, or ``f(path, leaf) -> bool``;
        one or a sequence. None is every linear weight: no embedding, norm, convolution or output head.
      exclude: patterns that win over ``targets``.
      full: patterns of leaves trained whole, which win over both.
      rows: ``{pattern: ids}``: rows of a table to train, such as new tokens of an embedding; see `Rows`.
      layout: `lorax_fn.usage` of the function, or ``{pattern: Layout}``; without it conventions decide.
      key: PRNG key; None is ``jax.random.key(0)``. Each leaf folds in the crc32 of its path, so that another
        target never changes the values of the others.
      dtype: dtype of all that trains.

    Returns:
      ``(params, lora)``: the same tree of the same objects, and ``{path: Adapter}``. `LoRA` holds
      ``a [*s, *n, r]`` and ``b [*s, r, *m]``; step 0 is the base model. Only where an init takes a part of W
      is that leaf of ``params`` another: what remains of it.

    Raises:
      LoraError: a pattern matches nothing; a rank, alpha, method, scaling, init, key or dtype is not valid,
        or not for a weight; ids of rows are out of range or repeat; a weight is not float or its layout is
        open; there is no weight. All offending paths are listed.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> lora["q/kernel"].a.shape, lora["q/kernel"].b.shape, lora["q/kernel"].scale
      ((8, 2), (2, 6), 16.0)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise error("adapters train in a float dtype.", got=f"dtype={dtype!r}", do="dtype=jnp.float32.")
    key = checked_key(jax.random.key(0) if key is None else key)
    leaves = arrays(params)
    roles = classify(params, layout)
    chosen_rows = make_row_plans(leaves, rows)
    layouts, whole = choose(leaves, roles, targets, exclude, full, list(chosen_rows))
    plans = make_plans(leaves, layouts, rank=rank, alpha=alpha, scaling=scaling, method=method, init=init)

    starts = _starts_from_data(params, leaves, plans)
    lora: dict[str, Adapter] = {}
    residuals: dict[str, Any] = {}
    for path in leaves:
        if path in plans:
            lora[path], frozen = _build(plans[path], starts.get(path), key, path, leaves[path], dtype)
            if frozen is not leaves[path]:
                residuals[path] = frozen
        elif path in whole:
            lora[path] = Full(_copy(leaves[path], dtype))
        elif path in chosen_rows:
            lora[path] = run(lambda w, ids=chosen_rows[path]: _rows(w, ids, dtype), leaves[path])
    return replace_leaves(params, residuals), lora


def merge(params: PyTree, lora: dict[str, Adapter], *, dtype: Any = None, requantize: bool = False) -> PyTree:
    """Folds adapters into the base weights: ``W' = W + scale * A @ B``, plain params for the untouched model.

    Args:
      params: the frozen tree that `split` returned.
      lora: its adapters, or some of them.
      dtype: dtype of the merged leaves; None keeps each leaf's own. Sums are float32 and cast once.
      requantize: whether quantised leaves stay quantised, in their format; what rounding takes from each is
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
    check_lora(lora)
    dropped = [path for path, adapter in lora.items() if is_dropped(adapter)]
    if dropped:
        raise error(
            "adapters under dropout have no one dW.", path=dropped, do="use the lora from before dropout."
        )
    able = {path: adapter for path, adapter in lora.items() if getattr(adapter, "adds", False)}
    return {path: run(lambda adapter: adapter.delta(), adapter) for path, adapter in able.items()}


# Building ---------------------------------------------------------------------------------------------


def _starts_from_data(params: PyTree, leaves: Mapping[str, Any], plans: Mapping[str, Plan]) -> dict:
    """The init of each weight whose init looks at data: each of those sees all of its weights at once."""
    asked: dict[Any, dict[str, Plan]] = {}
    for path, plan in plans.items():
        if isinstance(plan.init, FromData):
            asked.setdefault(id(plan.init), {})[path] = plan
    from_data = [path for group in asked.values() for path in group]
    unseen = [p for p, w in leaves.items() if not is_concrete(w)]
    if from_data and unseen:
        raise error(
            "an init from data runs the function, and there are no numbers to run it on.",
            path=from_data,
            got=[f"abstract or traced params: {', '.join(unseen[:4])}"],
            want="params of concrete arrays",
            do="for shapes alone, split with init='kaiming': factors have the same shapes.",
        )
    starts = {}
    for group in asked.values():
        starts |= next(iter(group.values())).init.starts(params, group)
    return starts


def _build(plan: Plan, init: Any, key: jax.Array, path: str, w: Any, dtype: Any) -> tuple[Adapter, Any]:
    """The adapter of one weight, and the weight to freeze."""
    init = init or find_init(plan.init)
    start = Start(leaf_key(key, path), plan.layout, plan.rank, plan.alpha, plan.scaling, init, dtype)
    create = METHODS[plan.method].create
    if is_abstract(w):
        adapter, frozen = jax.eval_shape(lambda w: create(w, start), w)
        return adapter, frozen if is_stored(frozen) and not is_stored(w) else w
    return create(w, start)


def _rows(w: Any, ids: tuple[int, ...], dtype: Any) -> Rows:
    return Rows(jnp.asarray(dense(w))[np.asarray(ids, np.int32)].astype(dtype), ids)


def _copy(leaf: Any, dtype: Any) -> Any:
    """A copy in ``dtype``, always: a donated adapter must never delete the user's params."""
    return run(lambda leaf: jnp.array(dense(leaf), dtype=dtype, copy=True), leaf)


def _requantized(adapter: Adapter, stored: Any) -> tuple[Any, jax.Array]:
    """The merged weight stored as before; what that rounds off, and the adapter's change, as shares of it."""
    w = dense(stored).astype(jnp.float32)
    merged = adapter.weight(w)
    again = stored.store(merged)
    parts = dense(again) - merged, merged - w, merged
    rounded, changed, whole = (jnp.sqrt(jnp.sum(jnp.square(part))) for part in parts)
    return again, jnp.stack([rounded, changed]) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def _log(lost: Mapping[str, Any]) -> None:
    """Says what requantising took; a log line, as a warning would stop whoever makes errors of them."""
    if lost and all(map(is_concrete, lost.values())):
        lines = [f"  {path}: {r:.3%}, {c:.3%}" for path, (r, c) in jax.device_get(lost).items()]
        head = "merged and requantised: rounding, and the adapter's change, as shares of the weight's norm"
        LOG.warning("%s", "\n".join([head, *lines]))


def _merged(adapter: Adapter, w: Any, dtype: Any) -> Any:
    def weight(adapter, w):
        w = jnp.asarray(dense(w))
        return adapter.weight(w) if dtype is None else adapter.weight(w.astype(jnp.float32)).astype(dtype)

    return run(jax.jit(weight) if is_stored(w) else weight, adapter, w)  # jit: no unpacked copy beside it
