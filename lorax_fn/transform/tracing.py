"""`usage`: reads off a traced function what it does with each parameter. Nothing is computed."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax_fn.methods.lora import LoRA
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.factored import wrap
from lorax_fn.transform.rules import reshape_groups
from lorax_fn.transform.walk import Leaves, Report, Traces, Walk
from lorax_fn.types import Layout, PyTree, WeightUse, flatten_with_paths, is_array, is_float


class Usage(Mapping):
    """What a traced function does with each parameter: ``usage[path]`` is a `WeightUse`.

    Printed, it is a table.

    Args:
      uses: one `WeightUse` a parameter.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> use = lx.usage(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
      >>> print(use["w"].layout, use["w"].ops, use["w"].flops)
      Layout(stack=(), inputs=(0,), outputs=(1,)) ('dot_general',) 48
    """

    def __init__(self, uses: Sequence[WeightUse]):
        self._uses = {use.path: use for use in uses}

    def __getitem__(self, path: str) -> WeightUse:
        return self._uses[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = ("path", "shape", "ops", "stack", "inputs", "outputs", "times", "MFLOP", "low-rank rule")
        rows = [head, *(_cells(use) for use in self.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(use: WeightUse) -> tuple[str, ...]:
    layout = use.layout
    axes = ("-", "-", "-") if layout is None else map(str, (layout.stack, layout.inputs, layout.outputs))
    if layout is not None:
        served = "yes" if use.served else "no: " + "; ".join(use.source)
    else:
        products = [line for line in use.source if line.split(":")[0] in _PRODUCTS]
        served = "".join(f"no layout; {line}" for line in products[:1]) or "-"
    shape = "x".join(map(str, use.shape)) or "scalar"
    return (use.path, shape, ", ".join(use.ops) or "unused", *axes, str(use.times), f"{use.flops / 1e6:.3g}", served)


def usage(fn: Callable, params: PyTree, *args: Any, argnum: int = 0, **kwargs: Any) -> Usage:
    """Traces ``fn`` once and says what it does with each parameter.

    Axes that a dot product or convolution contracts are inputs, those that it keeps are outputs; axes that
    are scanned, indexed or batched are stack axes; an axis that array indices look up (an embedding) is an
    input. So ``split(params, layout=usage(fn, params, x))`` needs no naming convention.

    Args:
      fn: any JAX function.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *args: the other positional arguments, arrays or `jax.ShapeDtypeStruct`; static values as they are.
      argnum: position of ``params`` among the positional arguments of ``fn``.
      **kwargs: keyword arguments of ``fn``.

    Returns:
      A `Usage`: a mapping from path to `WeightUse`, which prints as a table.

    Raises:
      LoraError: two leaves of ``params`` have one path.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> def attention(params, x):
      ...     return jnp.einsum("btd,dhk->bthk", x, params["query"])
      >>> use = lx.usage(attention, {"query": jnp.ones((8, 2, 4))}, jnp.ones((1, 3, 8)))
      >>> use["query"].layout.outputs
      (1, 2)
    """
    named, treedef = flatten_with_paths(params)
    leaves = [leaf for _, leaf in named]
    trace = Traces(fn).of((*args[:argnum], Leaves(leaves, treedef), *args[argnum:]), kwargs)
    found: dict[str, list[_Use]] = {path: [] for path, leaf in named if is_array(leaf)}
    refs = []
    for slot in trace.slots:
        leaf = None if slot is None else leaves[slot]
        refs.append([] if leaf is None else [_Ref(named[slot][0], tuple((i,) for i in range(len(leaf.shape))))])
    reader = _Reader(found)
    reader.leave("return", "", reader.read(trace.jaxpr, refs, 1), 1)
    layouts = {path: _layout(uses, dict(named)[path]) for path, uses in found.items()}
    unserved = _unserved(trace, named, layouts)
    result = []
    for path, leaf in named:
        if not is_array(leaf):
            continue
        uses, layout = found[path], layouts[path]
        if layout is not None:
            source = [f"{report.primitive}: {report.where}" for report in unserved.get(path, [])]
        else:
            source = list(dict.fromkeys(f"{use.op}: {use.source}" for use in uses))
        ops = tuple(dict.fromkeys(use.op for use in uses))
        result.append(
            WeightUse(
                path,
                tuple(leaf.shape),
                leaf.dtype,
                ops,
                layout,
                times=sum(use.times for use in uses),
                flops=sum(use.flops * use.times for use in uses),
                served=layout is not None and not source,
                source=tuple(source),
            )
        )
    return Usage(result)


def _layout(uses: list["_Use"], leaf: Any) -> Layout | None:
    """The layout of the first use that has one; every axis of the weight must have exactly one role."""
    if not is_float(leaf):
        return None
    for use in uses:
        if use.layout is not None:
            axes = sorted((*use.layout.stack, *use.layout.inputs, *use.layout.outputs))
            return use.layout if axes == list(range(len(leaf.shape))) else None
    return None


def _unserved(trace: Any, named: list, layouts: dict[str, Layout | None]) -> dict[str, list[Report]]:
    """Where `adapt` would have to build a weight: found by walking the trace with abstract factors."""
    leaves = [wrap(path, leaf, _abstract_adapter(leaf, layouts[path])) if layouts.get(path) else leaf
              for path, leaf in named]  # fmt: skip
    values = [value if slot is None else leaves[slot] for value, slot in zip(trace.values, trace.slots, strict=True)]
    walk, reports = Walk("allow"), []

    def run(consts, values):
        with walk.collecting(reports):
            return walk.returned(walk.evaluate(trace.jaxpr, consts, values))

    jax.eval_shape(run, trace.consts, values)
    by_path: dict[str, list[Report]] = {}
    for report in dict.fromkeys(reports):
        for path in report.path.split(" + "):
            by_path.setdefault(path, []).append(report)
    return by_path


def _abstract_adapter(leaf: Any, layout: Layout) -> LoRA:
    stack, n, m = layout.shapes(leaf.shape)
    a = jax.ShapeDtypeStruct((*stack, *n, 1), np.float32)
    b = jax.ShapeDtypeStruct((*stack, 1, *m), np.float32)
    return LoRA(a, b, 1.0, 1, "lora", layout)


@dataclasses.dataclass(frozen=True)
class _Use:
    op: str
    layout: Layout | None
    times: int
    flops: int
    source: str


@dataclasses.dataclass(frozen=True)
class _Ref:
    """A value that is a view of one parameter: for each of its axes, the parameter's axes in it."""

    path: str
    axes: tuple[tuple[int, ...], ...]
    stack: frozenset[int] = frozenset()  # scanned or indexed away
    looked_up: frozenset[int] = frozenset()  # indexed by an array

    def moved(self, axes: Sequence[tuple[int, ...]], gone: Sequence[int] = ()) -> "_Ref":
        """The view with other axes; parameter axes in ``gone`` became stack axes."""
        return dataclasses.replace(self, axes=tuple(axes), stack=self.stack | frozenset(gone))


SAME = {
    "convert_element_type", "copy", "neg", "stop_gradient", "sharding_constraint", "reshard", "name", "device_put",
    "pvary", "pcast", "reduce_precision", "rev", "pad", "tile", "slice", "dynamic_slice", "optimization_barrier",
}  # fmt: skip
SCALING = {"mul", "div"}


class _Reader:
    """Follows views of parameters through jaxprs and notes where they are used."""

    def __init__(self, found: dict[str, list[_Use]]):
        self.found = found

    def read(self, jaxpr: Any, refs: Sequence[list[_Ref]], times: int) -> list[list[_Ref]]:
        env = dict(zip(jaxpr.invars, refs, strict=True))
        for _, eqn, _ in jx.order(jaxpr):
            views = [[] if jx.is_literal(v) else env.get(v, []) for v in eqn.invars]
            results = self._equation(eqn, views, times) if any(views) else [[]] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [[] if jx.is_literal(v) else env.get(v, []) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, views: list[list[_Ref]], times: int) -> list[list[_Ref]]:
        name = eqn.primitive.name
        inner = _INNER.get(name)
        if inner is not None:
            return inner(self, eqn, views, times)
        view = _VIEWS.get(name)
        if view is not None and not (name in SCALING and not _scales(eqn, views)):
            return view(eqn, views)
        for position, refs in enumerate(views):
            for ref in refs:
                self._use(eqn, position, ref, times)
        return [[]] * len(eqn.outvars)

    def _use(self, eqn: Any, position: int, ref: _Ref, times: int) -> None:
        name = eqn.primitive.name
        roles, flops = _PRODUCTS[name](eqn, position) if name in _PRODUCTS else (None, 0)
        layout = None if roles is None else _roles_of(ref, *roles)
        if layout is None and ref.looked_up:  # no product that keeps outputs: the rows are an activation
            self.leave(name, jx.source_line(eqn), [[ref]], times)
        else:
            self.found[ref.path].append(_Use(name, layout, times, flops, jx.source_line(eqn)))

    def leave(self, op: str, source: str, views: list[list[_Ref]], times: int) -> None:
        """Notes views that are followed no further: rows that were looked up, or a use without a layout."""
        for ref in (ref for refs in views for ref in refs):
            if ref.looked_up:
                rest = {i for axes in ref.axes for i in axes}
                layout = Layout(tuple(sorted(ref.stack)), tuple(sorted(ref.looked_up)), tuple(sorted(rest)))
                self.found[ref.path].append(_Use("gather", layout, times, 0, source))
            else:
                self.found[ref.path].append(_Use(op, None, times, 0, source))


def _roles_of(ref: _Ref, batch: Sequence[int], inputs: Sequence[int]) -> Layout | None:
    """Turns the roles of a view's axes into a layout of the parameter."""
    role: dict[int, str] = dict.fromkeys(ref.stack | ref.looked_up, "stack")
    for i, axes in enumerate(ref.axes):
        for axis in axes:
            new = "stack" if i in batch else "inputs" if i in inputs else "outputs"
            if role.setdefault(axis, new) not in (new, "stack"):
                return None  # an axis that a reshape split between two roles
    parts = {kind: tuple(sorted(i for i, r in role.items() if r == kind)) for kind in ("stack", "inputs", "outputs")}
    return Layout(**parts) if parts["inputs"] and parts["outputs"] else None


# Products: the roles of the weight's axes, and the flops.


def _dot(eqn: Any, position: int):
    (sums, batches), avals = eqn.params["dimension_numbers"], [v.aval for v in eqn.invars]
    contracted = math.prod(avals[0].shape[i] for i in sums[0])
    return (batches[position], sums[position]), 2 * contracted * math.prod(eqn.outvars[0].aval.shape)


def _conv(eqn: Any, position: int):
    if position != 1:
        return None, 0
    out_axis, in_axis, *window = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[i] for i in (in_axis, *window))
    return ((), (in_axis, *window)), flops


def _ragged(eqn: Any, position: int):
    if position != 1:
        return None, 0
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (sums, batches), groups = dims.dot_dimension_numbers, dims.rhs_group_dimensions
    contracted = math.prod(eqn.invars[1].aval.shape[i] for i in sums[1])
    return ((*batches[1], *groups), sums[1]), 2 * contracted * math.prod(eqn.outvars[0].aval.shape)


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv, "ragged_dot_general": _ragged}


# Views: how the axes of a result come from the axes of the operand.


def _each(change: Callable[[Any, _Ref], _Ref]):
    return lambda eqn, views: [[change(eqn, ref) for refs in views for ref in refs] for _ in eqn.outvars]


def _scales(eqn: Any, views: list) -> bool:
    """Whether one operand scales a weight by a number or along an axis, rather than entry by entry."""
    if all(views):
        return False
    weight, by = eqn.invars if views[0] else reversed(eqn.invars)
    many = [n for n in by.aval.shape if n != 1]
    return (len(many) <= 1 or by.aval.shape != weight.aval.shape) and not (eqn.primitive.name == "div" and views[1])


def _squeezed(eqn: Any, ref: _Ref) -> _Ref:
    dims = eqn.params["dimensions"]
    gone = [axis for d in dims for axis in ref.axes[d]]
    kept = [axes for i, axes in enumerate(ref.axes) if i not in dims]
    left = {axis for axes in kept for axis in axes}
    return ref.moved(kept, [axis for axis in gone if axis not in left])


def _broadcasted(eqn: Any, ref: _Ref) -> _Ref:
    axes: list[tuple[int, ...]] = [()] * len(eqn.params["shape"])
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        axes[place] = ref.axes[i]
    return ref.moved(axes)


def _reshaped(eqn: Any, ref: _Ref) -> _Ref:
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    axes: list[tuple[int, ...]] = [()] * len(new)
    for left, right in reshape_groups(old, new):
        held = tuple(dict.fromkeys(axis for i in left for axis in ref.axes[i]))
        for i in right:
            axes[i] = held
    held = {axis for group in axes for axis in group}
    ones = [axis for i, group in enumerate(ref.axes) if old[i] == 1 for axis in group if axis not in held]
    # An axis of size 1 that a reshape drops or moves: keep it where the result has a free axis of size 1.
    free = [i for i, n in enumerate(new) if n == 1 and not axes[i]]
    for axis, i in zip(list(ones), free, strict=False):
        axes[i] = (axis,)
        ones.remove(axis)
    return ref.moved(axes, ones)


def _unstacked(eqn: Any, ref: _Ref) -> _Ref:
    axis = eqn.params["axis"]
    return ref.moved(ref.axes[:axis] + ref.axes[axis + 1 :], ref.axes[axis])


def _stacked(eqn: Any, ref: _Ref) -> _Ref:
    axis = eqn.params["axis"]
    return ref.moved((*ref.axes[:axis], (), *ref.axes[axis:]))


def _gathered(eqn: Any, views: list) -> list[list[_Ref]]:
    dims = eqn.params["dimension_numbers"]
    index_ndim = len(eqn.invars[1].aval.shape) - 1
    results = []
    for ref in views[0]:
        kept = [i for i in range(len(ref.axes)) if i not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)]
        axes: list[tuple[int, ...]] = [()] * (index_ndim + len(dims.offset_dims))
        for i, place in zip(kept, sorted(dims.offset_dims), strict=True):
            axes[place] = ref.axes[i]
        indexed = [axis for i in dims.start_index_map if i not in kept for axis in ref.axes[i]]
        batched = [axis for i in dims.operand_batching_dims for axis in ref.axes[i]]
        looked_up = ref.looked_up | frozenset(indexed)
        results.append(dataclasses.replace(ref.moved(axes, batched), looked_up=looked_up))
    return [results]


_VIEWS: dict[str, Callable] = {
    **dict.fromkeys(SAME | SCALING, _each(lambda eqn, ref: ref)),
    "optimization_barrier": lambda eqn, views: views,
    "transpose": _each(lambda eqn, ref: ref.moved([ref.axes[i] for i in eqn.params["permutation"]])),
    "squeeze": _each(_squeezed),
    "broadcast_in_dim": _each(_broadcasted),
    "reshape": _each(_reshaped),
    "split": _each(lambda eqn, ref: ref),
    "unstack": _each(_unstacked),
    "concatenate": _each(lambda eqn, ref: ref),
    "stack": _each(_stacked),
    "gather": _gathered,
}


# Control flow. Views that it does not hand on are noted where they enter.


def _call(name: str):
    def rule(reader: _Reader, eqn: Any, views: list, times: int):
        return reader.read(jx.opened(eqn.params[name])[0], views, times)

    return rule


def _cond(reader: _Reader, eqn: Any, views: list, times: int):
    for closed in eqn.params["branches"]:
        reader.leave("cond", jx.source_line(eqn), reader.read(jx.opened(closed)[0], views[1:], times), times)
    return [[]] * len(eqn.outvars)


def _carry(reader: _Reader, eqn: Any, body: Any, first: int, views: list, times: int) -> list:
    """The carried views that the loop hands on unchanged; the others are followed no further."""
    same = [out is var for var, out in zip(body.invars[first : first + len(views)], body.outvars, strict=False)]
    for view, kept in zip(views, same, strict=True):
        reader.leave(eqn.primitive.name, jx.source_line(eqn), [] if kept else [view], times)
    return [view if kept else [] for view, kept in zip(views, same, strict=True)]


def _while(reader: _Reader, eqn: Any, views: list, times: int):
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = jx.opened(eqn.params["cond_jaxpr"])[0], jx.opened(eqn.params["body_jaxpr"])[0]
    carry = _carry(reader, eqn, body, m, views[n + m :], times)
    reader.read(cond, [*views[:n], *carry], times)
    reader.read(body, [*views[n : n + m], *carry], times)
    return carry


def _scan(reader: _Reader, eqn: Any, views: list, times: int):
    n, m = jx.scan_counts(eqn)
    body = jx.opened(eqn.params["jaxpr"])[0]
    carry = _carry(reader, eqn, body, n, views[n : n + m], times)
    slices = [[ref.moved(ref.axes[1:], ref.axes[0]) for ref in refs] for refs in views[n + m :]]
    results = reader.read(body, [*views[:n], *carry, *slices], times * eqn.params["length"])
    reader.leave("scan", jx.source_line(eqn), results[m:], times)
    return [*carry, *[[]] * (len(eqn.outvars) - m)]


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
