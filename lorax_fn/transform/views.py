"""Follows views of parameters through jaxprs: which axes a use contracts, keeps, scans or looks up."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lorax_fn.core.layouts import Layout
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.product_roles import PRODUCTS
from lorax_fn.transform.rules import reshape_groups


@dataclasses.dataclass(frozen=True)
class Use:
    op: str
    layout: Layout | None
    times: int
    flops: int
    source: str
    row: Layout | None = None  # for one row, picked by a number: the layout if this is a lookup in a table
    on_the_way: bool = False  # makes another weight of it (say, a normalized one) for a later product


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value that is a view of one parameter: each of its axes holds some of the parameter's axes."""

    path: str
    axes: tuple[tuple[int, ...], ...]
    stack: frozenset[int] = frozenset()  # scanned or indexed away
    looked_up: frozenset[int] = frozenset()  # indexed by an array
    picked: frozenset[int] = frozenset()  # one entry taken: of a stack of layers, or a row of a table
    made: bool = False  # computed entry by entry from the parameter: the same axes, but other numbers
    result: bool = False  # not a view, but a product of the parameter with data; axes are those it kept

    def moved(self, axes: Sequence[tuple[int, ...]], gone: Sequence[int] = ()) -> "Ref":
        """The view with other axes; parameter axes in ``gone`` became stack axes."""
        return dataclasses.replace(self, axes=tuple(axes), stack=self.stack | frozenset(gone))


SAME = {
    "convert_element_type", "copy", "neg", "stop_gradient", "sharding_constraint", "reshard", "name",
    "device_put", "pvary", "pcast", "reduce_precision", "rev", "pad", "tile", "concatenate",
}  # fmt: skip
SCALING = {"mul", "div"}


class Reader:
    """Follows views of parameters through jaxprs and notes where they are used."""

    def __init__(self, found: dict[str, list[Use]]):
        self.found = found
        self.around: list[Any] = []  # the control flow around the current equation
        # An axis that one parameter's product kept, and the axis of the next parameter that met it.
        self.meetings: list[tuple[tuple[str, int], tuple[str, int]]] = []

    def line(self, eqn: Any) -> str:
        return jx.source_line(eqn, *reversed(self.around))

    def read(
        self, jaxpr: Any, refs: Sequence[list[Ref]], times: int, fixed: Sequence[bool] = ()
    ) -> list[list[Ref]]:
        """The views that a jaxpr's results are; ``fixed`` says which operands do not depend on data."""
        env = dict(zip(jaxpr.invars, refs, strict=True))
        known = fixed or [any(not ref.result for ref in views) for views in refs]
        without_data = {v for v, yes in zip(jaxpr.invars, known, strict=True) if yes} | {*jaxpr.constvars}
        for eqn, _ in jx.order(jaxpr):
            views = [[] if jx.is_literal(v) else env.get(v, []) for v in eqn.invars]
            fixed = [jx.is_literal(v) or v in without_data for v in eqn.invars]
            results = self._equation(eqn, views, times, fixed) if any(views) else [[]] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
            if all(fixed):
                without_data.update(eqn.outvars)
        return [[] if jx.is_literal(v) else env.get(v, []) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, views: list[list[Ref]], times: int, fixed: list[bool]) -> list[list[Ref]]:
        name = eqn.primitive.name
        inner = _INNER.get(name)
        if inner is not None:
            self.around.append(eqn)
            results = inner(self, eqn, views, times, fixed)
            self.around.pop()
            return results
        products = [[ref for ref in refs if ref.result] for refs in views]
        views = [[ref for ref in refs if not ref.result] for refs in views]
        followed = self._results(eqn, views, products)
        view = _VIEWS.get(name)
        if not any(views):
            return followed
        if view is not None and not (name in ONLY_WHERE and not ONLY_WHERE[name](eqn, views)):
            return [[*a, *b] for a, b in zip(view(eqn, views), followed, strict=True)]
        for position, refs in enumerate(views):
            alone = not any(views[:position] + views[position + 1 :])
            for ref in refs:
                new = _made(eqn, position, ref) if all(fixed) else None
                if new is not None:
                    on_the_way = Use(name, None, times, 0, self.line(eqn), on_the_way=True)
                    self.found[ref.path].append(on_the_way)
                    followed = [[*refs, new] for refs in followed]
                else:
                    self._use(eqn, position, ref, times, alone)
        return followed

    def _results(self, eqn: Any, views: list[list[Ref]], products: list[list[Ref]]) -> list[list[Ref]]:
        """Follows products of parameters with data as long as each entry of the result keeps its place."""
        name = eqn.primitive.name
        if name == "dot_general":
            return [self._product(eqn, views, products)]
        if not any(products):
            return [[]] * len(eqn.outvars)
        if name in _VIEWS and name not in SAME | SCALING:
            return _VIEWS[name](eqn, products)
        return [
            [
                ref
                for var, refs in zip(eqn.invars, products, strict=True)
                for ref in refs
                if jx.surely(lambda var=var, out=out: var.aval.shape == out.aval.shape)
            ]
            for out in eqn.outvars
        ]

    def _product(self, eqn: Any, views: list[list[Ref]], products: list[list[Ref]]) -> list[Ref]:
        """What a dot product keeps of a parameter's axes; one that sums over data is followed no further."""
        (sums, batches), kept = eqn.params["dimension_numbers"], []
        for side in (0, 1):
            ndim = len(eqn.invars[side].aval.shape)
            free = [i for i in range(ndim) if i not in (*sums[side], *batches[side])]
            before = 0 if side == 0 else len(eqn.outvars[0].aval.shape) - len(batches[side]) - len(free)
            # Without a sum, a product of data with data goes entry by entry, as with the weights of experts.
            through = [] if sums[side] else products[side]
            for ref in [*views[side], *through] if not views[1 - side] else []:
                axes: list[tuple[int, ...]] = [()] * len(eqn.outvars[0].aval.shape)
                for place, i in enumerate(batches[side]):
                    axes[place] = ref.axes[i]
                for place, i in enumerate(free):
                    axes[len(batches[side]) + before + place] = ref.axes[i]
                kept.append(Ref(ref.path, tuple(axes), result=True))
            met = [*zip(batches[side], batches[1 - side], strict=True)]
            met += zip(sums[side], sums[1 - side], strict=True)
            self.meetings.extend(
                ((ref.path, axis), (other.path, met_by))
                for ref in products[side]
                for other in views[1 - side]
                for i, j in met
                for axis in ref.axes[i]
                for met_by in other.axes[j]
            )
        return kept

    def _use(self, eqn: Any, position: int, ref: Ref, times: int, alone: bool) -> None:
        name = eqn.primitive.name
        roles, flops = PRODUCTS[name](eqn, position) if name in PRODUCTS else (None, 0)
        # A row that was picked from one parameter and meets another is more likely a lookup than a weight.
        activation = bool(ref.picked) and not alone
        layout = None if roles is None or activation else _roles_of(ref, *roles)
        if layout is None and ref.looked_up:  # no product that keeps outputs: the rows are an activation
            self.leave(name, self.line(eqn), [[ref]], times)
        else:
            row = _row(ref) if layout is None else None
            on_the_way = ref.made and layout is None
            self.found[ref.path].append(Use(name, layout, times, flops, self.line(eqn), row, on_the_way))

    def leave(self, op: str, source: str, views: list[list[Ref]], times: int) -> None:
        """Notes views that are followed no further: rows that were looked up, or a use without a layout."""
        for ref in (ref for refs in views for ref in refs if not ref.result):
            if ref.looked_up:
                rest = {i for axes in ref.axes for i in axes}
                layout = Layout(tuple(sorted(ref.stack)), tuple(sorted(ref.looked_up)), tuple(sorted(rest)))
                self.found[ref.path].append(Use("gather", layout, times, 0, source))
            else:
                self.found[ref.path].append(Use(op, None, times, 0, source, _row(ref)))


def _made(eqn: Any, position: int, ref: Ref) -> Ref | None:
    """The result of an entrywise operation, if all its axes are those of the parameter; else None."""
    shape = eqn.invars[position].aval.shape
    whole = all(axes or n == 1 for axes, n in zip(ref.axes, shape, strict=True))
    if len(eqn.outvars) != 1 or eqn.primitive.name in PRODUCTS or not whole or ref.looked_up or ref.picked:
        return None
    if eqn.outvars[0].aval.shape != shape or sum(n != 1 for n in shape) < 2:
        return None
    return dataclasses.replace(ref, made=True)


def _row(ref: Ref) -> Layout | None:
    """The layout of a table, if the view is a row of it; else None."""
    rest = {axis for axes in ref.axes for axis in axes}
    if not ref.picked or not rest:
        return None
    return Layout(tuple(sorted(ref.stack - ref.picked)), tuple(sorted(ref.picked)), tuple(sorted(rest)))


def _roles_of(ref: Ref, batch: Sequence[int], inputs: Sequence[int]) -> Layout | None:
    """Turns the roles of a view's axes into a layout of the parameter."""
    role: dict[int, str] = dict.fromkeys(ref.stack | ref.looked_up, "stack")
    for i, axes in enumerate(ref.axes):
        for axis in axes:
            new = "stack" if i in batch else "inputs" if i in inputs else "outputs"
            if role.setdefault(axis, new) not in (new, "stack"):
                return None  # an axis that a reshape split between two roles
    parts = {
        kind: tuple(sorted(i for i, r in role.items() if r == kind))
        for kind in ("stack", "inputs", "outputs")
    }
    return Layout(**parts) if parts["inputs"] and parts["outputs"] else None


# Views: how the axes of a result come from the axes of the operand.


def _each(change: Callable[[Any, Ref], Ref]):
    return lambda eqn, views: [[change(eqn, ref) for refs in views for ref in refs] for _ in eqn.outvars]


def _scales(eqn: Any, views: list) -> bool:
    """Whether one operand scales a weight by a number or along an axis, rather than entry by entry."""
    if all(views):
        return False
    weight, by = eqn.invars if views[0] else reversed(eqn.invars)
    many = [n for n in by.aval.shape if n != 1]
    # An operand larger than the weight along some axis is an activation: the weight scales it (as in a norm).
    fits = all(n in (1, size) for n, size in zip(by.aval.shape, weight.aval.shape, strict=False))
    by_axis = len(many) <= 1 or by.aval.shape != weight.aval.shape
    return fits and by_axis and not (eqn.primitive.name == "div" and views[1])


def _cut(eqn: Any, views: list) -> list[list[Ref]]:
    """An axis of which one entry is taken is a stack axis; other uses show if it is the rows of a table."""
    before, results = eqn.invars[0].aval.shape, []
    for out in eqn.outvars:
        one = [i for i, n in enumerate(out.aval.shape) if n == 1 < before[i]]
        results.append([_picked(ref, one) for ref in views[0]])
    return results


def _picked(ref: Ref, one: Sequence[int]) -> Ref:
    gone = [axis for i in one for axis in ref.axes[i]]
    moved = ref.moved([() if i in one else axes for i, axes in enumerate(ref.axes)], gone)
    return dataclasses.replace(moved, picked=ref.picked | frozenset(gone))


def _sums_ones(eqn: Any, views: list) -> bool:
    """Whether a sum is over axes of size 1 alone, which is how `jax.numpy.einsum` drops them."""
    return all(eqn.invars[0].aval.shape[i] == 1 for i in eqn.params["axes"])


def _squeezed(eqn: Any, ref: Ref) -> Ref:
    dims = eqn.params["dimensions"] if "dimensions" in eqn.params else eqn.params["axes"]
    gone = [axis for d in dims for axis in ref.axes[d]]
    kept = [axes for i, axes in enumerate(ref.axes) if i not in dims]
    left = {axis for axes in kept for axis in axes}
    return ref.moved(kept, [axis for axis in gone if axis not in left])


def _broadcasted(eqn: Any, ref: Ref) -> Ref:
    axes: list[tuple[int, ...]] = [()] * len(eqn.params["shape"])
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        axes[place] = ref.axes[i]
    return ref.moved(axes)


def _reshaped(eqn: Any, ref: Ref) -> Ref:
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    axes: list[tuple[int, ...]] = [()] * len(new)
    for left, right in reshape_groups(old, new):
        held = tuple(dict.fromkeys(axis for i in left for axis in ref.axes[i]))
        for i in right:
            axes[i] = held
    held = {axis for group in axes for axis in group}
    ones = [axis for i, group in enumerate(ref.axes) if old[i] == 1 for axis in group if axis not in held]
    # An axis of size 1 that a reshape drops or moves is kept where the result has a free axis of size 1.
    free = [i for i, n in enumerate(new) if n == 1 and not axes[i]]
    for axis, i in zip(list(ones), free, strict=False):
        axes[i] = (axis,)
        ones.remove(axis)
    return ref.moved(axes, ones)


def _unstacked(eqn: Any, ref: Ref) -> Ref:
    axis = eqn.params["axis"]
    ref = _picked(ref, [axis])
    return ref.moved(ref.axes[:axis] + ref.axes[axis + 1 :])


def _stacked(eqn: Any, ref: Ref) -> Ref:
    axis = eqn.params["axis"]
    return ref.moved((*ref.axes[:axis], (), *ref.axes[axis:]))


def _gathered(eqn: Any, views: list) -> list[list[Ref]]:
    dims = eqn.params["dimension_numbers"]
    index_ndim = len(eqn.invars[1].aval.shape) - 1
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    results = []
    for ref in views[0]:
        kept = [
            i
            for i in range(len(ref.axes))
            if i not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        ]
        # A vmapped dynamic_slice indexes every axis and keeps, at size 1, those that it takes one entry of.
        taken = [i for i in dims.start_index_map if i not in kept or sizes[i] == 1 < shape[i]]
        axes: list[tuple[int, ...]] = [()] * (index_ndim + len(dims.offset_dims))
        for i, place in zip(kept, sorted(dims.offset_dims), strict=True):
            axes[place] = () if i in taken else ref.axes[i]
        indexed = [axis for i in taken for axis in ref.axes[i]]
        batched = [axis for i in dims.operand_batching_dims for axis in ref.axes[i]]
        looked_up = ref.looked_up | frozenset(indexed)
        results.append(dataclasses.replace(ref.moved(axes, batched), looked_up=looked_up))
    return [results]


_VIEWS: dict[str, Callable] = {
    **dict.fromkeys(SAME | SCALING, _each(lambda eqn, ref: ref)),
    "optimization_barrier": lambda eqn, views: views,
    "transpose": _each(lambda eqn, ref: ref.moved([ref.axes[i] for i in eqn.params["permutation"]])),
    "squeeze": _each(_squeezed),
    **dict.fromkeys(("slice", "dynamic_slice", "split"), _cut),
    "reduce_sum": _each(_squeezed),
    "broadcast_in_dim": _each(_broadcasted),
    "reshape": _each(_reshaped),
    "unstack": _each(_unstacked),
    "stack": _each(_stacked),
    "gather": _gathered,
}
ONLY_WHERE = {**dict.fromkeys(SCALING, _scales), "reduce_sum": _sums_ones}


# Control flow. Views that it does not pass on are noted where they enter it.


def _call(name: str):
    def rule(reader: Reader, eqn: Any, views: list, times: int, fixed: list):
        return reader.read(jx.opened(eqn.params[name])[0], views, times, fixed)

    return rule


def _cond(reader: Reader, eqn: Any, views: list, times: int, fixed: list):
    """A view of a parameter that the branches return stays a view; looked-up rows are followed no further."""
    handed: list[list[Ref]] = [[] for _ in eqn.outvars]
    for closed in eqn.params["branches"]:
        for place, refs in zip(handed, reader.read(jx.opened(closed)[0], views[1:], times), strict=True):
            reader.leave("cond", reader.line(eqn), [[ref for ref in refs if ref.looked_up]], times)
            place += [ref for ref in refs if not (ref.looked_up or ref.result or ref in place)]
    return handed


def _carry(reader: Reader, eqn: Any, body: Any, first: int, views: list, times: int) -> list:
    """The carried views that the loop passes on unchanged; the others are followed no further."""
    same = [i == first + k for k, i in enumerate(jx.handed_on(body)[: len(views)])]
    for view, kept in zip(views, same, strict=True):
        reader.leave(eqn.primitive.name, reader.line(eqn), [] if kept else [view], times)
    return [view if kept else [] for view, kept in zip(views, same, strict=True)]


def _while(reader: Reader, eqn: Any, views: list, times: int, fixed: list):
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = jx.opened(eqn.params["cond_jaxpr"])[0], jx.opened(eqn.params["body_jaxpr"])[0]
    carry = _carry(reader, eqn, body, m, views[n + m :], times)
    reader.read(cond, [*views[:n], *carry], times)
    reader.read(body, [*views[n : n + m], *carry], times)
    return carry


def _scan(reader: Reader, eqn: Any, views: list, times: int, fixed: list):
    n, m = jx.scan_counts(eqn)
    body = jx.opened(eqn.params["jaxpr"])[0]
    carry = _carry(reader, eqn, body, n, views[n : n + m], times)
    slices = [[ref.moved(ref.axes[1:], ref.axes[0]) for ref in refs] for refs in views[n + m :]]
    results = reader.read(body, [*views[:n], *carry, *slices], times * eqn.params["length"])
    stacked = []
    for refs in results[m:]:  # a weight returned by every iteration (Flax NNX) is that weight again
        reader.leave("scan", reader.line(eqn), [[ref for ref in refs if ref.looked_up]], times)
        stacked.append([ref.moved([(), *ref.axes]) for ref in refs if not ref.looked_up])
    return [*carry, *stacked]


_INNER = {
    jx.NAMES["jit"]: _call("jaxpr"),
    jx.NAMES["remat"]: _call("jaxpr"),
    jx.NAMES["closed_call"]: _call("call_jaxpr"),
    jx.NAMES["custom_jvp_call"]: _call("call_jaxpr"),
    jx.NAMES["custom_vjp_call"]: _call("call_jaxpr"),
    jx.NAMES["cond"]: _cond,
    jx.NAMES["while"]: _while,
    jx.NAMES["scan"]: _scan,
    "shard_map": _call("jaxpr"),
}
