"""`usage`: what a traced function does with each parameter, read off its jaxpr; nothing is computed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax_fn.core.layouts import Layout, WeightUse
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_array, is_float
from lorax_fn.methods.lora import LoRA
from lorax_fn.transform.factored import wrap
from lorax_fn.transform.mutations import unchanged
from lorax_fn.transform.product_roles import PRODUCTS
from lorax_fn.transform.reach import reached
from lorax_fn.transform.traces import Leaves, Traces, check_argnum
from lorax_fn.transform.views import Reader, Ref, Use
from lorax_fn.transform.walk import Report, Walk


class Usage(Mapping):
    """What a traced function does with each parameter: ``usage[path]`` is a `WeightUse`.

    It prints as a table.

    Args:
      uses: one `WeightUse` per parameter.

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
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(use: WeightUse) -> tuple[str, ...]:
    layout = use.layout
    axes = ("-", "-", "-") if layout is None else map(str, (layout.stack, layout.inputs, layout.outputs))
    if layout is not None:
        served = "yes" if use.served else "no: " + "; ".join(use.source)
    else:
        products = [line for line in use.source if line.split(":")[0] in PRODUCTS]
        served = "".join(f"no layout; {line}" for line in products[:1]) or "-"
    shape = "x".join(map(str, use.shape)) or "scalar"
    return (
        use.path,
        shape,
        ", ".join(use.ops) or "unused",
        *axes,
        str(use.times),
        f"{use.flops / 1e6:.3g}",
        served,
    )


def usage(fn: Callable[..., Any], params: PyTree, *args: Any, argnum: int = 0, **kwargs: Any) -> Usage:
    """Traces ``fn`` once and says what it does with each parameter.

    Axes that a dot product or convolution contracts are inputs, and those that it keeps are outputs. Axes
    that are scanned, indexed or batched are stack axes, and an axis that array indices look up (an embedding)
    is an input. A row that a single number picks is a lookup if a product also uses the whole table;
    otherwise it has no layout. In a fused kernel ``[3, d, heads, head]``, the 3 is a stack axis if q, k and v
    are indexed or split apart: each has its own ``A``. If one product keeps it, it is an output: there is one
    ``A`` for all, as in PEFT. A leading axis that a product keeps is also a stack axis if it meets the
    leading axis of the next weight, as with experts. A weight that is modified before its product (times a
    parameter, standardized, normalized) has the layout of that product; ``served`` and ``source`` say whether
    `adapt` keeps it factored or builds it.

    So ``split(params, layout=usage(fn, params, x))`` needs no naming convention at all.

    Args:
      fn: any JAX function.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      *args: the other positional arguments: arrays, `jax.ShapeDtypeStruct` or static values.
      argnum: position of ``params`` among the positional arguments of ``fn``.
      **kwargs: keyword arguments of ``fn``.

    Returns:
      A `Usage`: a mapping from path to `WeightUse`, which prints as a table.

    Raises:
      LoraError: two leaves of ``params`` have the same path, or ``argnum`` is not a position of them.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> def attention(params, x):
      ...     return jnp.einsum("btd,dhk->bthk", x, params["query"])
      >>> use = lx.usage(attention, {"query": jnp.ones((8, 2, 4))}, jnp.ones((1, 3, 8)))
      >>> use["query"].layout.outputs
      (1, 2)
    """
    check_argnum(argnum, len(args))
    named, treedef = flatten_with_paths(params)
    leaves = [leaf for _, leaf in named]
    trace = Traces(fn).of((*args[:argnum], Leaves(leaves, treedef), *args[argnum:]), kwargs)
    found: dict[str, list[Use]] = {path: [] for path, leaf in named if is_array(leaf)}
    # Every parameter begins as a view of itself: its axis i holds axis i.
    refs = []
    for slot in trace.slots:
        path, leaf = ("", None) if slot is None else named[slot]
        refs.append([] if leaf is None else [Ref(path, tuple((i,) for i in range(len(leaf.shape))))])
    # The reader follows views through the program and notes at each use what became of their axes.
    reader = Reader(found)
    given = [v if slot is None else named[slot][1] for v, slot in zip(trace.values, trace.slots, strict=True)]
    kept = unchanged(trace, given, ((*args[:argnum], params, *args[argnum:]), kwargs))
    results = reader.read(trace.jaxpr, refs, 1)
    reader.leave("return", "", [refs for i, refs in enumerate(results) if i not in kept], 1)
    counts = reached(trace.jaxpr, [i not in kept for i in range(len(results))])
    alive = {named[i][0] for i, on in zip(trace.slots, counts, strict=True) if on and i is not None}
    leaf_of = dict(named)
    # Only now are all uses known, and they show whether rows belong to a table or to a stack of biases.
    found = {path: _with_lookups(uses, leaf_of[path]) for path, uses in found.items()}
    layouts = {path: _layout(uses, leaf_of[path]) for path, uses in found.items()}
    layouts |= _experts(layouts, reader.meetings)
    # The rules themselves decide whether `adapt` keeps a weight factored; nothing of them is repeated here.
    unserved = _unserved(trace, named, layouts, kept)
    result = []
    for path, leaf in named:
        if not is_array(leaf):
            continue
        uses, layout = found[path], layouts[path]
        # An operation that makes another weight of it is not counted as a use, unless no product followed.
        counted = [use for use in uses if not use.on_the_way or layout is None]
        if layout is not None:
            source = [f"{report.primitive}: {report.where}{report.line}" for report in unserved.get(path, [])]
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
                times=sum(use.times for use in counted),
                flops=sum(use.flops * use.times for use in counted),
                served=layout is not None and not source,
                source=tuple(source),
                moves=path in alive,
            )
        )
    return Usage(result)


def _with_lookups(uses: list[Use], leaf: Any) -> list[Use]:
    """Rows picked by a number are lookups in a table if a product uses the whole table, as for logits.

    Without such a product they may as well be biases or norm scales, one per layer, and have no layout.
    """
    whole = [use.layout for use in uses if use.layout is not None]
    if _layout(uses, leaf) is None:
        return uses
    # A row is one of a table if a product uses the table whole and not as a stack along that axis.
    return [
        dataclasses.replace(use, op="gather", layout=use.row)
        if use.row and any(not set(use.row.inputs) & set(layout.stack) for layout in whole)
        else use
        for use in uses
    ]


def _layout(uses: list[Use], leaf: Any) -> Layout | None:
    """The layout of the first use that has one; every axis of the weight must have exactly one role."""
    if not is_float(leaf):
        return None
    for use in uses:
        if use.layout is not None:
            # An axis in two roles, or in none, leaves no layout that a low-rank factor could follow.
            axes = sorted((*use.layout.stack, *use.layout.inputs, *use.layout.outputs))
            return use.layout if axes == list(range(len(leaf.shape))) else None
    return None


def _experts(
    layouts: dict[str, Layout | None], meetings: Sequence[tuple[tuple[str, int], tuple[str, int]]]
) -> dict[str, Layout | None]:
    """Layouts of experts that share their input: ``td,edf->tef``, then ``tef,efd->td``.

    Judged by the first product alone, ``e`` is an output; by the second alone, an input. It is a stack axis
    of both if it leads both weights, as it does in torch and in JAX, and nothing mixes tokens in between.
    """
    changed = {}
    for pair in meetings:
        known = [layouts[path] for path, _ in pair]
        new = [
            None if layout is None else _as_stack(layout, axis)
            for layout, (_, axis) in zip(known, pair, strict=True)
        ]
        if all(new) and pair[0][0] != pair[1][0]:
            changed.update((path, layout) for (path, _), layout in zip(pair, new, strict=True))
    return changed


def _as_stack(layout: Layout, axis: int) -> Layout | None:
    """The layout with ``axis`` as a stack axis; None if it does not lead, or if nothing would remain."""
    if axis in layout.stack:
        return layout
    # Experts lead in torch and in JAX. An axis elsewhere, such as heads, is not a stack of weights.
    if axis != min((*layout.inputs, *layout.outputs)):
        return None
    inputs, outputs = (tuple(i for i in axes if i != axis) for axes in (layout.inputs, layout.outputs))
    return Layout(tuple(sorted((*layout.stack, axis))), inputs, outputs) if inputs and outputs else None


def _unserved(
    trace: Any, named: list, layouts: dict[str, Layout | None], kept: Sequence[int]
) -> dict[str, list[Report]]:
    """Where `adapt` would have to build a weight: found by walking the trace with abstract factors."""
    leaves = [leaf for _, leaf in named]
    for i, (path, leaf) in enumerate(named):
        layout = layouts.get(path)
        leaves[i] = wrap(path, leaf, None if layout is None else _abstract_adapter(leaf, layout))
    values = [
        value if slot is None else leaves[slot] for value, slot in zip(trace.values, trace.slots, strict=True)
    ]
    # No array is computed: only the types of rank-1 factors go through the rules, and reports are collected.
    walk = Walk("allow").waiting()

    def run(consts, values):
        results = walk.evaluate(trace.jaxpr, consts, values)
        for place in kept:
            results[place] = None
        return walk.returned(results)

    jax.eval_shape(run, trace.consts, values)
    by_path: dict[str, list[Report]] = {}
    for report in dict.fromkeys(walk.notes.reports):
        for path in report.path.split(" + "):
            by_path.setdefault(path, []).append(report)
    return by_path


def _abstract_adapter(leaf: Any, layout: Layout) -> LoRA:
    stack, n, m = layout.shapes(leaf.shape)
    a = jax.ShapeDtypeStruct((*stack, *n, 1), np.float32)
    b = jax.ShapeDtypeStruct((*stack, 1, *m), np.float32)
    return LoRA(a, b, 1.0, 1, "lora", layout)
