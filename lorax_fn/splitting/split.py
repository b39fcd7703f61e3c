"""`split` makes adapters for the weights of a tree. All checks come before anything is built."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Adapter, is_number
from lorax_fn.core.errors import error
from lorax_fn.core.keys import checked_key, leaf_key
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, arrays, is_abstract, is_concrete, replace_leaves, run
from lorax_fn.methods.low_rank import Start
from lorax_fn.methods.stuck import LoraStuckWarning, stuck
from lorax_fn.methods.table import METHODS
from lorax_fn.methods.whole import Full, Rows, rows_of
from lorax_fn.splitting.plans import Plan, make_plans, make_row_plans
from lorax_fn.targets.patterns import Index, Pattern, Patterns
from lorax_fn.targets.roles import choose, is_default, roles_of


def split(
    params: PyTree,
    rank: int | Sequence[int] | Mapping[Any, Any] = 16,
    *,
    alpha: float | Callable[[int], float] | Mapping[Any, Any] = 32.0,
    scaling: str | Mapping[Any, Any] = "lora",
    method: str | Mapping[Any, Any] = "lora",
    init: Any = "kaiming",
    targets: Patterns = None,
    exclude: Patterns = None,
    full: Patterns = None,
    rows: Mapping[Pattern, Sequence[int]] | None = None,
    layout: Mapping[Any, Any] | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[PyTree, dict[str, Adapter]]:
    """Makes low-rank adapters for the weights of a parameter tree: ``W' = W + scale * A @ B``.

    Equation (3) of Hu et al., "LoRA" (https://arxiv.org/abs/2106.09685). ``rank``, ``alpha``, ``scaling``,
    ``method`` and ``init`` take one value or ``{pattern: value}``, where the first match wins.

    Args:
      params: any pytree; abstract leaves (`jax.ShapeDtypeStruct`) give abstract adapters.
      rank: ``r``, from 1 to ``min(n, m)`` of one stack entry. A stacked weight may have one int per stack
        entry (``*s`` flattened); 0 leaves that entry unadapted, and factors are padded with exact zeros.
      alpha: numerator of the scale: a number, an array (a leaf that never trains), or a function of the rank.
        With a constant alpha, the first step does not depend on the rank.
      scaling: ``"lora"`` for alpha / rank, ``"rslora"`` for alpha / sqrt(rank).
      method: ``"lora"``, ``"dora"``, ``"lora_fa"``, ``"vera"``, ``"loha"``, ``"lokr"`` or
        ``"lora_xs"``.
      init: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"`` or ``"zero_a"``; or ``"pissa"``, ``"pissa:4"`` (a
        randomized SVD of four iterations) or ``"olora"``, which move a part of W into the factors;
        or `lorax_fn.inits.loftq`, which also quantizes W; or one from data, `lorax_fn.inits.eva`,
        `lorax_fn.inits.lora_ga` or `lorax_fn.inits.corda`.
      targets: one pattern or several: a glob over whole path components, a compiled regex, or
        ``f(path, leaf) -> bool``. None or ``"all-linear"`` is every linear weight that is large enough for
        the rank: no embedding, norm, convolution or output head. `summary` lists the leaves left out.
      exclude: patterns that win over ``targets``.
      full: patterns of leaves to train whole, which win over both. Running statistics (``batch_stats``,
        `nnx.BatchStat`, ...) are left alone, here and in ``targets``, unless a pattern is their whole path.
      rows: ``{pattern: ids}``, rows of a table to train, such as new tokens of an embedding or output head.
        See `Rows` for a vocabulary that grew.
      layout: `lorax_fn.usage` of the function, or ``{pattern: Layout}``; without it, conventions decide.
      key: PRNG key; None is ``jax.random.key(0)``. Each leaf folds in the crc32 of its path, so its values do
        not depend on the other targets.
      dtype: dtype of all arrays that train.

    Returns:
      ``(params, lora)``: a tree like ``params`` with the same leaves, and ``{path: Adapter}``. `LoRA` has
      ``a [*s, *n, r]`` and ``b [*s, r, *m]``; at step 0 the function is the base function. If an init moves
      a part of W, that leaf of ``params`` is replaced by the rest. ``lora | other`` is a dict union, which
      keeps one adapter per path; ``adapt(adapt(fn))(params, new, old, x)`` adds the changes of both.

    Raises:
      LoraError: a pattern matches or decides nothing; a rank, alpha, method, scaling, init, key or dtype is
        not valid, or does not suit a weight; ids of rows are out of range or repeat; a weight is not float or
        its layout is open; or there is no weight to adapt.

    Warns:
      LoraStuckWarning: adapters that can never move, because they were made from a weight of zeros.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> lora["q/kernel"].a.shape, lora["q/kernel"].b.shape, lora["q/kernel"].scale
      ((8, 2), (2, 6), 16.0)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise error("adapters need a float dtype.", got=f"dtype={dtype!r}", do="dtype=jnp.float32.")
    key = checked_key(jax.random.key(0) if key is None else key)
    leaves = Index(arrays(params))
    roles = roles_of(params, leaves, layout)
    chosen_rows = make_row_plans(leaves, roles, rows)
    layouts, whole = choose(leaves, roles, targets, exclude, full, list(chosen_rows))
    choices = {"rank": rank, "alpha": alpha, "scaling": scaling, "method": method, "init": init}
    plans = make_plans(leaves, layouts, roles, is_default(targets), **choices)

    starts = _starts(params, leaves, plans)
    lora: dict[str, Adapter] = {}
    residuals: dict[str, Any] = {}
    known: dict[Any, tuple[Adapter, Any]] = {}
    for path in leaves:
        if path in plans:
            lora[path], frozen = _build(plans[path], starts[path], key, path, leaves[path], dtype, known)
            if frozen is not leaves[path]:
                residuals[path] = frozen
        elif path in whole:
            lora[path] = Full(_copy(leaves[path], dtype))
        elif path in chosen_rows:
            lora[path] = run(
                lambda w, rows=chosen_rows[path]: _rows(w, rows[0], rows[1], dtype), leaves[path]
            )
    _warn_of_stuck(lora, plans, residuals)
    return replace_leaves(params, residuals), lora


def _warn_of_stuck(
    lora: Mapping[str, Adapter], plans: Mapping[str, Plan], residuals: Mapping[str, Any]
) -> None:
    """Warns of adapters that can never move, among those whose factors are computed from the weight."""
    asked = [path for path in plans if path in residuals or type(lora[path]).frozen]
    why = {path: reason for path in asked if (reason := stuck(lora[path]))}
    if why:
        plan = plans[next(iter(why))]
        text = error(
            "these adapters can never move.",
            path=list(why),
            got=[
                f"method={plans[p].method!r}, init={plans[p].init!r}: {reason}" for p, reason in why.items()
            ],
            want="factors that are not all zero; these were computed from a weight of zeros",
            do=f"exclude={list(why)!r}, or another start: "
            f"method={{{next(iter(why))!r}: 'lora', '*': {plan.method!r}}}, init='kaiming'.",
        )
        warnings.warn(str(text), LoraStuckWarning, stacklevel=3)


def _starts(params: PyTree, leaves: Mapping[str, Any], plans: Mapping[str, Plan]) -> dict[str, Callable]:
    """The function that starts each weight. Each init is called once, with all the weights that it starts."""
    asked: dict[int, dict[str, Plan]] = {}
    for path, plan in plans.items():
        asked.setdefault(id(plan.init), {})[path] = plan
    from_data = [path for path, plan in plans.items() if plan.init.needs_data]
    unseen = [path for path, w in leaves.items() if not is_concrete(w)] if from_data else []
    if unseen:
        raise error(
            "an init from data runs the function, but these params hold no numbers to run it on.",
            path=from_data,
            got=[f"abstract or traced params: {', '.join(unseen[:4])}"],
            want="params of concrete arrays",
            do="for shapes only, split with init='kaiming', which gives factors of the same shapes.",
        )
    starts = {}
    for group in asked.values():
        starts |= next(iter(group.values())).init.starts(params, group)
    return starts


def _build(
    plan: Plan, init: Callable, key: jax.Array, path: str, w: Any, dtype: Any, known: dict
) -> tuple[Adapter, Any]:
    """The adapter of one weight, and the weight to freeze.

    Among abstract weights that are alike, only the first is traced; ``known`` caches its adapter.
    """
    facts = (plan.layout, plan.rank, plan.alpha, plan.scaling)
    create = METHODS[plan.method].create
    if not is_abstract(w):
        return create(w, Start(leaf_key(key, path), key, *facts, init, dtype))
    alike = None
    if isinstance(w, jax.ShapeDtypeStruct) and is_number(plan.alpha):
        alike = (w.shape, w.dtype, w.sharding, *facts, plan.method, id(plan.init))
    if alike in known:
        return known[alike][0], w
    start = Start(leaf_key(key, path), key, *facts, init, dtype)
    adapter, frozen = jax.eval_shape(lambda w: create(w, start), w)
    frozen = frozen if is_stored(frozen) and not is_stored(w) else w
    if alike is not None and frozen is w:
        known[alike] = adapter, frozen
    return adapter, frozen


def _rows(w: Any, ids: tuple[int, ...], axis: int, dtype: Any) -> Rows:
    return Rows(rows_of(jnp.asarray(dense(w)), ids, axis).astype(dtype), ids, axis)


def _copy(leaf: Any, dtype: Any) -> Any:
    """A copy in ``dtype``, even if that is the leaf's own: donating an adapter must not delete params."""
    return run(lambda leaf: jnp.array(dense(leaf), dtype=dtype, copy=True), leaf)
