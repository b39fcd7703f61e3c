"""Chooses one of several weights: by a mask along one side of them, or by the branches of a ``cond``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.edits import EDITS
from lorax_fn.transform.factored import RANK, Factored, Part, align, is_factored
from lorax_fn.transform.gathers import GATHERS
from lorax_fn.transform.low_rank_products import absorbed
from lorax_fn.transform.picks import chosen as one_adapter
from lorax_fn.transform.rules import MOVES
from lorax_fn.transform.stored import is_unbuilt


@dataclasses.dataclass(frozen=True)
class Form:
    """What weights must have in common for one of them to be chosen: the same factors, in the same order.

    ``axes`` holds the axes of ``a`` and of ``b``, in the weight's order and with the rank last, and those of
    the column if any weight has one.
    """

    shape: tuple[int, ...]
    axes: dict[str, tuple[int, ...]]
    ranks: tuple[int, ...]
    dtype: Any
    paths: tuple[str, ...]
    tap: bool


def form_of(weights: Sequence[Factored], along: Sequence[int] = ()) -> Form | None:
    """The form that weights of one shape share, with the axes ``along`` in every factor; None without one."""
    if any(set(w.parts) - {"a", "b", "scale", "column"} or is_unbuilt(w.base) or w.lookup for w in weights):
        return None
    # A stored weight has no factors, and a tapped weight can't be chosen beside one that is not.
    if not all(w.parts for w in weights) or len({w.tap for w in weights}) > 1:
        return None
    axes = {}
    for name in ("a", "b", "column"):
        # Each factor has to run along the same axes in all weights. Their order may differ; from here on it
        # is that of the weight's own axes.
        kinds = {frozenset({*w.parts[name].axes, *along} - {RANK}) for w in weights if name in w.parts}
        if len(kinds) > 1:
            return None  # an axis is an input of one weight and an output of another
        if kinds:
            (kind,) = kinds
            axes[name] = (*sorted(kind), *([RANK] if name != "column" else []))
    arrays = [part.array for w in weights for part in w.parts.values()]
    ranks = tuple(w.parts["a"].array.shape[w.parts["a"].axes.index(RANK)] for w in weights)
    paths = tuple(dict.fromkeys(path for w in weights for path in w.paths))
    return Form(weights[0].shape, axes, ranks, jnp.result_type(*arrays), paths, weights[0].tap)


def in_form(value: Any, form: Form, rank: int) -> dict[str, Any]:
    """The factors of a weight, zero-padded to ``rank``; an array gets factors of zeros, a column of ones."""
    # For W [s, n, m]: a [s, n, r], b [s, m, r], column [s, m], each along its own axes of the form.
    sizes = {RANK: rank, **dict(enumerate(form.shape))}
    arrays = {}
    parts: dict[str, Part] = {}
    if is_factored(value):
        parts = dict(zip("ab", absorbed(value, form.dtype), strict=True))
        parts |= {"column": value.parts["column"]} if "column" in value.parts else {}
    for name, axes in form.axes.items():
        shape = [sizes[i] for i in axes]
        # An array has no low-rank change, and a weight without a column is multiplied by one.
        if name not in parts:
            arrays[name] = jnp.full(shape, 1 if name == "column" else 0, form.dtype)
            continue
        array = align(parts[name].array.astype(form.dtype), parts[name].axes, axes)
        if name != "column":
            # Zeros along the rank add nothing, so a rank of 4 can be padded to 8.
            more = rank - array.shape[-1]
            array = jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, more)]) if more else array
        arrays[name] = jnp.broadcast_to(array, shape)
    return arrays


def _weight(form: Form, base: Any, arrays: dict[str, Any]) -> Factored:
    parts = {name: Part(arrays[name], axes) for name, axes in form.axes.items()}
    return Factored(base, parts, 1.0, 0.0, form.paths, tap=form.tap)


def select(walk, eqn, values, varies: Sequence[int]):
    """``select_n``, where the mask is the same along all axes but ``varies``.

    If it varies only along axes that both factors have, or neither, each entry takes the factors of its own
    case. If it varies along inputs (or outputs), the masked ``a`` (or ``b``) of all cases are put side by
    side along the rank.
    """
    del walk
    which, *cases = values
    weights = [case for case in cases if is_factored(case)]
    if is_factored(which):
        return NotImplemented
    # With a mask along stack axes, or one number for all of W (no axis at all), each entry takes the factors
    # of one case.
    alike = all(w.has("a", i) == w.has("b", i) for w in weights for i in varies)
    form = form_of(weights, varies if alike else ())
    # A column would have to vary with the mask too. Along inputs it cannot: the product that follows could
    # not apply it.
    if form is None or not set(varies) <= set(form.axes.get("column", varies)):
        return NotImplemented
    # Along a mixture of inputs and outputs neither factor can be masked: m[n, m] * (a b) is of full rank.
    side = next((name for name in "ba" if set(varies) <= set(form.axes[name])), None)
    if side is None:
        return NotImplemented
    base = jx.bind(eqn, [which, *(case.base if is_factored(case) else case for case in cases)])[0]
    # The mask is [n, m]. Along an axis on which it does not vary, one entry of it is enough: [n, 1].
    small = which
    if jnp.ndim(which):
        keep = [n if i in varies else 1 for i, n in enumerate(form.shape)]
        small = lax.slice(which, [0] * len(keep), keep)

    def chosen(name: str, arrays: Sequence[Any]) -> Any:
        axes = form.axes[name]
        mask = small
        if jnp.ndim(which):  # broadcast over the axes of this factor, the rank among them
            mask = lax.squeeze(small, [i for i in range(len(form.shape)) if i not in varies])
            mask = jnp.broadcast_to(align(mask, varies, axes), arrays[0].shape)
        return lax.select_n(mask, *arrays)

    # The a [s, n, r] of all cases, where s is the mask's axis, go through one select. Its rank is the largest
    # of theirs, not the sum.
    if alike:
        every = [in_form(case, form, max(form.ranks)) for case in cases]
        return [_weight(form, base, {name: chosen(name, [e[name] for e in every]) for name in form.axes})]
    # where(m, a1 b1, a2 b2) = (m a1) b1 + ((1 - m) a2) b2 = [m a1, (1 - m) a2] [b1; b2], m along the inputs.
    ranks = iter(form.ranks)
    every = [in_form(case, form, next(ranks) if is_factored(case) else 1) for case in cases]
    arrays = {"column": chosen("column", [e["column"] for e in every])} if "column" in form.axes else {}
    for name in "ab":
        pieces = []
        for k, case in enumerate(cases):
            if is_factored(case):
                # In the k-th piece, case k has its factor and all other cases have zeros; the factor that is
                # not masked is taken whole.
                mine, zero = every[k][name], jnp.zeros_like(every[k][name])
                others = [mine if j == k else zero for j in range(len(cases))]
                pieces.append(chosen(name, others) if name == side else mine)
        arrays[name] = lax.concatenate(pieces, pieces[0].ndim - 1)
    return [_weight(form, base, arrays)]


def cond(walk, eqn, values):
    """Walks each branch with the factors kept apart; a weight that all branches return stays factored."""

    def run(walk, which, *args):
        traced: dict[int, Any] = {}
        forms = _forms(walk, eqn, args)

        def branch(i, closed):
            jaxpr, consts = jx.opened(closed)

            # Each branch counts draws and reports in a walk of its own, as only one of them runs.
            def taken(*args):
                traced[i] = walk.inner()
                results = [one_adapter(r) for r in traced[i].evaluate(jaxpr, consts, args)]
                return [
                    traced[i].dense(eqn, [result])[0] if form is None else _settled(result, form)
                    for result, form in zip(results, forms, strict=True)
                ]

            return taken

        branches = [branch(i, closed) for i, closed in enumerate(eqn.params["branches"])]
        results = lax.switch(which, branches, *args)
        most: dict[str, int] = {}  # later draws are numbered as if the branch with the most draws had run
        for inner in traced.values():
            most.update((path, max(n, most.get(path, 0))) for path, n in inner.notes.draws.items())
        walk.count(most)
        return results

    which, *operands = values
    return walk.in_one_piece(eqn, run, which, *walk.entering(operands))


def _settled(result: Any, form: Form) -> Factored:
    """The result of a branch in the form that all branches have to return."""
    base = result.base if is_factored(result) else result
    return _weight(form, base, in_form(result, form, max(form.ranks)))


def _forms(walk, eqn, args) -> list[Form | None]:
    """For each result, the form in which the branches return it as a weight; None where it is an array.

    All branches have to agree before one of them is traced. So if any of them could return a weight, they are
    first traced for their types alone.
    """
    branches = [jx.opened(closed) for closed in eqn.params["branches"]]
    weights = [is_factored(arg) for arg in args]
    if not any(any(_returned(jaxpr, weights)) for jaxpr, _ in branches):
        return [None] * len(eqn.outvars)
    # What this trace reports stays in the `waiting` walk and is dropped: the actual trace reports it again.
    results = []
    for jaxpr, consts in branches:

        def of(*args, jaxpr=jaxpr, consts=consts):
            return [one_adapter(result) for result in walk.waiting().evaluate(jaxpr, consts, args)]

        results.append(jax.eval_shape(of, *args))
    found = []
    for several in zip(*results, strict=True):
        # An array beside weights takes their form, with factors of zeros; arrays in all branches need none.
        some = [result for result in several if is_factored(result)]
        found.append(form_of(some) if some else None)
    return found


_VIEWS = {*MOVES, *EDITS, *GATHERS, prims.concatenate_p.name, "stack", prims.select_n_p.name}


def _returned(jaxpr: Any, weights: Sequence[bool]) -> list[bool]:
    """For each result, whether it may be a weight that is among the operands, or a view of one."""
    views = {var for var, weight in zip(jaxpr.invars, weights, strict=True) if weight}
    for eqn in jaxpr.eqns:
        inside = [not jx.is_literal(var) and var in views for var in eqn.invars]
        name = eqn.primitive.name
        if not any(inside):
            continue
        # Including too many does no harm: if a rule then builds the weight, the trace for types shows an
        # array.
        if name in _VIEWS:
            views.update(eqn.outvars)
        elif name in (jx.NAMES["jit"], jx.NAMES["remat"]):
            out = _returned(jx.opened(eqn.params["jaxpr"])[0], inside)
            views.update(var for var, view in zip(eqn.outvars, out, strict=True) if view)
        elif name == jx.NAMES["cond"]:
            for closed in eqn.params["branches"]:
                out = _returned(jx.opened(closed)[0], inside[1:])
                views.update(var for var, view in zip(eqn.outvars, out, strict=True) if view)
    return [not jx.is_literal(var) and var in views for var in jaxpr.outvars]
