"""Plans of `split`: the rank, alpha, scaling, method and init of each target, checked before it is built."""

import collections
import dataclasses
import glob
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import is_number, short
from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import is_abstract, is_array, is_float
from lorax_fn.inits.base import Init
from lorax_fn.inits.table import INITS, find_init
from lorax_fn.methods.low_rank import SCALINGS
from lorax_fn.methods.table import METHODS
from lorax_fn.targets.conventions import Role
from lorax_fn.targets.patterns import find, first_match, label_of

DEFAULTS = {"rank": 16, "alpha": 32.0, "scaling": "lora", "method": "lora", "init": "kaiming"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build for one weight, already checked."""

    layout: Layout
    rank: int | tuple[int, ...]
    alpha: Any  # a float, one per stack entry, or an array
    scaling: str
    method: str
    init: Init


def make_plans(
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    roles: Mapping[str, Role],
    by_default: bool = False,
    **choices: Any,
) -> dict[str, Plan]:
    """Resolves rank, alpha, scaling, method and init for each weight of ``layouts``.

    Args:
      leaves: all leaves by path.
      layouts: the weights to adapt.
      roles: the role of each leaf, to explain why a key decides nothing.
      by_default: whether the user named no targets. Weights too small for the common rank are then left out,
        unless a key other than ``"*"`` gives their rank.
      **choices: one value or ``{pattern: value}`` for each field of `Plan` other than the layout.

    Raises:
      LoraError: a value is unknown or not valid, or does not suit its weight; or a key decides nothing.
    """

    def why_not(path: str) -> str:
        return roles[path].reason or "a weight, but not among targets, or excluded"

    found = {name: _per_path(name, value, layouts, leaves, why_not) for name, value in choices.items()}
    given = {name: values for name, (values, _) in found.items()}
    decided = found["rank"][1]
    _check_known("method", given["method"], METHODS, _named_in(METHODS, given["method"]))
    _check_known("scaling", given["scaling"], SCALINGS, _named_in(SCALINGS, given["scaling"]))
    inits = {path: find_init(init) for path, init in given["init"].items()}
    _check_known(
        "init",
        given["init"],
        [*INITS, "pissa:4"],
        inits.get,
        ", or an init such as lx.inits.eva(fn, batches)",
    )
    ranks = {path: _as_rank(rank) for path, rank in given["rank"].items()}
    optional = {path for path in layouts if by_default and decided.get(path, "*") == "*"}
    left_out = _check_ranks(ranks, leaves, layouts, (choices["rank"], decided), given["method"], optional)
    layouts = {path: layout for path, layout in layouts.items() if path not in left_out}
    alphas = {path: _as_alpha(given["alpha"][path], ranks[path]) for path in layouts}
    _check_alphas(alphas, {path: axes.shapes(leaves[path].shape)[0] for path, axes in layouts.items()})
    words: tuple[Any, ...] = (given["scaling"], given["method"], inits)
    plans = {p: Plan(layouts[p], ranks[p], alphas[p], *(word[p] for word in words)) for p in layouts}
    _check_methods(plans, leaves, choices)
    return plans


def _check_methods(plans: Mapping[str, Plan], leaves: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Raises a `LoraError` if a method or init does not support its weight or options."""
    refused = {}
    # One value for all weights has an effect if any of their methods uses it.
    acts = frozenset().union(*(METHODS[plan.method].takes for plan in plans.values()))
    idle = {name for name, value in choices.items() if isinstance(value, Mapping) or name not in acts} | {
        "init"
    }
    for path, plan in plans.items():
        method, shape = METHODS[plan.method], tuple(leaves[path].shape)
        _, n, m = plan.layout.shapes(shape)
        why = method.refuses(shape, plan) or _without_effect(method, plan, idle)
        if why is None:
            why = plan.init.refuses(math.prod(n), math.prod(m), plan)
        if why is None and plan.init.moves_weight and is_stored(leaves[path]):
            why = f"float weights for init={plan.init!r}, which takes a part of W: "
            why += "split first, then lx.quantize"
        if why is not None:
            refused[path] = why
    if refused:
        raise error(
            "these weights do not suit their method, init or rank.",
            path=list(refused),
            got=[
                f"method={plans[p].method!r}, init={plans[p].init!r}, rank={plans[p].rank}, "
                f"shape {tuple(leaves[p].shape)}, {plans[p].layout}"
                for p in refused
            ],
            want=list(refused.values()),
            do="pass another method, init or rank for them by {pattern: value}, or exclude= them.",
        )


def _without_effect(method: Any, plan: Plan, names: Iterable[str]) -> str | None:
    """Which of the options ``names`` the method would ignore, or None; defaults do not count."""
    asked = {
        "init": plan.init != find_init(DEFAULTS["init"]),
        "alpha": not is_number(plan.alpha) or plan.alpha != DEFAULTS["alpha"],
        "scaling": plan.scaling != DEFAULTS["scaling"],
    }
    for name, was_asked in asked.items():
        if was_asked and name in names and name not in method.takes:
            value = getattr(plan, name)
            return f"no {name}=: {value!r} has no effect on method={plan.method!r}"
    return None


def _per_path(
    name: str, value: Any, targets: Mapping[str, Layout], leaves: Mapping[str, Any], why_not: Callable
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One value per target, and the pattern that decided it if ``{pattern: value}`` was given."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(targets, value), {}
    chosen, decided = first_match(value, leaves, name, targets, why_not)
    lost = [path for path in targets if path not in chosen]
    if lost:
        raise error(
            f"{name}= has no key for these targets.",
            path=lost,
            got=[str(list(map(label_of, value)))],
            want="a key that matches each target",
            do=f"end the mapping with '*': {DEFAULTS[name]!r}",
        )
    return chosen, decided


def _named_in(table: Mapping[str, Any], names: Mapping[str, Any]) -> Callable:
    return lambda path: table.get(names[path]) if isinstance(names[path], str) else None


def _check_known(
    name: str, values: Mapping[str, Any], names: Iterable[str], known: Callable, more: str = ""
) -> None:
    unknown = [path for path in values if known(path) is None]
    if unknown:
        first = values[unknown[0]]
        other = next((x for x in ("method", "scaling", "init") if x != name and _is_word_of(x, first)), "")
        raise error(
            f"unknown {name}.",
            path=unknown,
            got=[repr(values[path]) for path in unknown],
            want=f"one of {sorted(names)}{more}",
            do=f"{other}={first!r}." if other else f"{name}={DEFAULTS[name]!r}, or another of these.",
        )


def _is_word_of(name: str, value: Any) -> bool:
    if name == "init":
        return find_init(value) is not None
    return isinstance(value, str) and value in {"method": METHODS, "scaling": SCALINGS}[name]


def _as_rank(rank: Any) -> Any:
    """A rank as an int or a tuple of ints; anything else is returned as it is, for later checks."""
    listed = isinstance(rank, Sequence) and not isinstance(rank, str)
    if listed or (isinstance(rank, np.ndarray) and rank.ndim == 1):
        return tuple(map(_plain, rank))
    return _plain(rank)


def _plain(rank: Any) -> Any:
    return int(rank) if _is_int(rank) else rank


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _check_ranks(
    ranks: Mapping[str, Any],
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    given: tuple[Any, Mapping[str, Any]],
    methods: Mapping[str, str],
    optional: set[str],
) -> set[str]:
    """Raises a `LoraError` if a rank is not valid; returns the ``optional`` weights too small for theirs."""
    wrong, too_large = {}, {}
    for path, rank in ranks.items():
        stack, n, m = layouts[path].shapes(leaves[path].shape)
        entries, limit = math.prod(stack), METHODS[methods[path]].rank_limit(math.prod(n), math.prod(m))
        problem = _rank_problem(rank, entries if stack else None)
        if problem:
            wrong[path] = problem
        elif max(rank if isinstance(rank, tuple) else (rank,)) > limit:
            too_large[path] = limit
    if wrong:
        raise error(
            "a rank is not valid.",
            path=list(wrong),
            got=[f"rank={ranks[path]!r}" for path in wrong],
            want=list(wrong.values()),
            do="rank=16, or one int per stack entry for a stacked weight, or {pattern: rank}.",
        )
    if too_large.keys() <= optional and len(too_large) < len(ranks):
        return set(too_large)
    if too_large:
        raise error(
            "a rank is larger than its weight allows.",
            path=list(too_large),
            got=[f"rank={ranks[path]} for shape {tuple(leaves[path].shape)}" for path in too_large],
            want=[f"at most {limit}{_of(methods[path])}" for path, limit in too_large.items()],
            do=f"rank={_remedy(ranks, too_large, *given)!r}",
        )
    return set()


def _of(method: str) -> str:
    return f", for method={method!r}" if method == "lokr" else ", the smaller of n and m"


def _rank_problem(rank: Any, entries: int | None) -> str | None:
    """What the rank should be, or None if it is valid; ``entries`` is None for an unstacked weight."""
    if not isinstance(rank, tuple):
        return None if _is_int(rank) and rank > 0 else "an int of 1 or more"
    if entries is None:
        return "one int, because this weight is not stacked"
    if len(rank) != entries:
        return f"{entries} ints, one per stack entry, not {len(rank)}"
    if not all(_is_int(r) and r >= 0 for r in rank):
        return "ints of 0 (not adapted) or more"
    return None if any(rank) else "at least one entry above 0; to adapt none, name the weight in exclude="


def _remedy(ranks: Mapping[str, Any], limits: Mapping[str, int], given: Any, decided: Mapping) -> dict:
    """The mapping to paste: the largest allowed rank for weights that are too small, else the given rank.

    Keys of the given mapping that would then decide nothing are left out.
    """

    def clipped(rank, limit):
        return tuple(min(r, limit) for r in rank) if isinstance(rank, tuple) else min(rank, limit)

    fitting = {glob.escape(path): clipped(ranks[path], limit) for path, limit in limits.items()}
    if not isinstance(given, Mapping):
        return fitting | {"*": _as_rank(given)}
    used = {pattern for path, pattern in decided.items() if path not in limits} | ({"*"} & given.keys())
    return fitting | {pattern: rank for pattern, rank in given.items() if pattern in used - fitting.keys()}


def _as_alpha(alpha: Any, rank: int | tuple[int, ...]) -> Any:
    """Alpha as a float, or as one per stack entry if it is a function of ranks that differ."""
    if not callable(alpha):
        return _number(alpha)
    if isinstance(rank, tuple):
        return tuple(_number(alpha(r)) if r else 0.0 for r in rank)
    return _number(alpha(rank))


def _number(x: Any) -> Any:
    if is_array(x) and not isinstance(x, np.generic):
        return jnp.asarray(x, jnp.float32) if not is_abstract(x) else x
    return float(x) if isinstance(x, numbers.Real) and not isinstance(x, bool) else x


def _check_alphas(alphas: Mapping[str, Any], stacks: Mapping[str, tuple[int, ...]]) -> None:
    def is_finite(x):
        return isinstance(x, float) and math.isfinite(x)

    def fits(path, alpha):
        if is_array(alpha):
            return alpha.shape in ((), stacks[path])
        return all(map(is_finite, alpha)) if isinstance(alpha, tuple) else is_finite(alpha)

    wrong = [path for path, alpha in alphas.items() if not fits(path, alpha)]
    if wrong:
        raise error(
            "an alpha is not valid.",
            path=wrong,
            got=[f"alpha={short(alphas[path])}" for path in wrong],
            want="a finite number, an array of shape () or of the stack axes, a function of the rank, "
            "or {pattern: one of these}",
            do="alpha=32.0, or alpha=lambda rank: 2 * rank.",
        )


def make_row_plans(
    leaves: Mapping[str, Any], roles: Mapping[str, Role], rows: Any
) -> dict[str, tuple[tuple[int, ...], int]]:
    """``{path: (ids, axis)}`` of the rows to train, for each leaf that ``rows={pattern: ids}`` names.

    Rows of an embedding lie along the axis that is looked up, and rows of an output head along its outputs,
    so that token 3 is row 3 of both. Rows of any other leaf lie along axis 0.

    Raises:
      LoraError: ``rows`` is not a mapping, a pattern names no table, or ids are not valid for a table.
    """
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        raise error(
            "rows= is not a mapping.", got=repr(rows), want="{pattern: ids}", do="rows={'embed': [3, 7]}"
        )
    hits = {
        pattern: paths for pattern, (_, paths) in zip(rows, find(list(rows), leaves, "rows"), strict=True)
    }
    tables = {path for path, leaf in leaves.items() if is_float(leaf) and len(leaf.shape) > 1}
    alone = {path for paths in hits.values() for path in paths if tables.isdisjoint(paths)}
    among = dict.fromkeys(tables | alone)
    ids, _ = first_match(rows, leaves, "rows", among, lambda path: "not a float table")
    axes = {path: _row_axis(roles[path]) for path in ids}
    wrong = {
        p: why for p, given in ids.items() if (why := _rows_problem(given, leaves[p], roles[p], axes[p]))
    }
    if wrong:
        raise error(
            "these rows= cannot be trained.",
            path=list(wrong),
            got=[f"{leaves[p].dtype}{tuple(leaves[p].shape)}, ids {str(ids[p])[:60]}" for p in wrong],
            want=list(wrong.values()),
            do="rows={'embed': [3, 7]}, with each id once, from 0 to the number of rows less one.",
        )
    return {path: (tuple(int(i) for i in given), axes[path] or 0) for path, given in ids.items()}


def _row_axis(role: Role) -> int | None:
    """The axis along which rows lie, or None if it is unknown."""
    if role.kind not in ("embedding", "head"):
        return 0
    if role.layout is None:
        return None
    axes = role.layout.inputs if role.kind == "embedding" else role.layout.outputs
    return axes[0] if len(axes) == 1 and not role.layout.stack else None


def _rows_problem(ids: Any, leaf: Any, role: Role, axis: int | None) -> str | None:
    if not is_float(leaf) or len(leaf.shape) < 2:
        return "a float table of two or more axes"
    if axis is None:
        known = role.layout or "its layout is open"
        return f"a table with one axis of rows, given by layout=: {role.reason}, {known}"
    listed = isinstance(ids, Sequence) and not isinstance(ids, str) or isinstance(ids, np.ndarray | jax.Array)
    ids = list(np.asarray(ids)) if listed and np.ndim(ids) == 1 else []
    if not ids or not all(map(_is_int, ids)):
        return "a sequence of one or more ints"
    counts = collections.Counter(map(int, ids))
    outside = sorted(i for i in counts if not 0 <= i < leaf.shape[axis])
    if outside:
        return f"ids from 0 to {leaf.shape[axis] - 1}, not {outside[:8]}: axis {axis} holds the rows"
    twice = sorted(i for i, count in counts.items() if count > 1)
    return f"each id once: {twice[:8]} repeat" if twice else None
