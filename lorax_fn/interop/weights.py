"""One tensor of torch and one leaf of ours: which axis is which, both ways.

Torch's form of a weight is ``(out, in, *window)``; of an embedding ``(rows, width)``. Ours is whatever the
leaf's `Layout` says.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.trees import PyTree, arrays
from lorax_fn.interop.places import Place, Preset, find_places
from lorax_fn.targets.conventions import OUT_IN_NAMES, WEIGHT_NAMES, by_convention
from lorax_fn.targets.patterns import components
from lorax_fn.targets.roles import Role, classify


class Leaves:
    """What is known of a tree: its leaves, and the kind and layout of each."""

    def __init__(self, params: PyTree, layout: Any = None, stacked: Mapping[str, int] | None = None):
        self.by_path = arrays(params)
        self.roles = classify(params, layout)
        self.layouts = {path: role.layout for path, role in self.roles.items() if role.layout is not None}
        for path, count in (stacked or {}).items():
            self._stack(path, count)

    def _stack(self, path: str, count: int) -> None:
        """Where a mapping says that the first axes of a kernel are stacked, two more make a linear weight."""
        leaf, name = self.by_path[path], components(path)[-1]
        if path in self.layouts or name not in WEIGHT_NAMES or len(leaf.shape) != count + 2:
            return
        first, last = (count,), (count + 1,)
        inputs, outputs = (last, first) if name in OUT_IN_NAMES else (first, last)
        self.layouts[path] = Layout(tuple(range(count)), inputs, outputs)
        self.roles[path] = Role("linear", self.layouts[path])

    def turn(self, path: str, layout: Layout, kind: str = "linear") -> None:
        """Corrects the layout of a weight that convention had the other way round."""
        self.layouts[path] = layout
        self.roles[path] = dataclasses.replace(self.roles[path], layout=layout, kind=kind)

    def settle(self, place: Place, table: bool) -> None:
        """Settles a layout that conventions left open, for a weight that a file adapts.

        PEFT adapts no transposed convolution, and gives the factors of an embedding names of their own.
        """
        path, shape = place.path, self.entry_shape(place)
        name = components(path)[-1]
        if path in self.layouts or place.entry or name not in WEIGHT_NAMES or len(shape) < 2:
            return
        rest, out_in = tuple(range(1, len(shape))), name in OUT_IN_NAMES
        if self.roles[path].kind == "convolution" or (place.same and len(shape) > 2):
            front = Layout((), tuple(range(len(shape) - 1)), (len(shape) - 1,))
            self.turn(path, Layout((), rest, (0,)) if out_in else front, "convolution")
        elif place.same and len(shape) == 2 and table:
            self.turn(path, Layout((), (0,), (1,)), "embedding")
        elif place.same and len(shape) == 2:
            self.turn(path, Layout((), (1,), (0,)))

    def entry_layout(self, place: Place) -> Layout | None:
        """The layout of one entry of a leaf, after the stack axes that ``place`` indexes are gone."""
        layout = self.layouts.get(place.path)
        for axis in () if layout is None else sorted(layout.stack[: len(place.entry)], reverse=True):
            layout = layout.without(axis) if layout is not None else None
        return layout

    def entry_shape(self, place: Place) -> tuple[int, ...]:
        """The shape of the part of a leaf that ``place`` names, before any cut along outputs."""
        shape = tuple(self.by_path[place.path].shape)
        gone = self.entry_axes(place)
        return tuple(size for i, size in enumerate(shape) if i not in gone)

    def entry_axes(self, place: Place) -> tuple[int, ...]:
        """Which axes of the leaf the entry of ``place`` indexes."""
        layout = self.layouts.get(place.path)
        stack = layout.stack if layout is not None else tuple(range(len(place.entry)))
        return stack[: len(place.entry)]

    def kind(self, path: str) -> str:
        return self.roles[path].kind


def known(params: PyTree, mapping: Mapping[str, str] | None, layout: Any) -> tuple[Leaves, list[Place]]:
    """The leaves of a tree, with the stack axes that the mapping implies, and all places."""
    if layout is None and isinstance(mapping, Preset):
        layout = mapping.layouts_of(arrays(params))
    leaves = Leaves(params, layout)
    places = find_places(mapping, leaves.by_path, leaves.layouts)
    stacked = {place.path: len(place.entry) for place in places if place.entry}
    if any(path not in leaves.layouts for path in stacked):
        leaves = Leaves(params, layout, stacked)
        places = find_places(mapping, leaves.by_path, leaves.layouts)
    if isinstance(mapping, Preset):
        for path, axes in leaves.layouts.items():
            if len(axes.inputs) > 1 and mapping.is_convolution(path):
                leaves.turn(path, axes, "convolution")
    for place in places:
        if place.embedding and leaves.layouts.get(place.path) == Layout((), (1,), (0,)):
            leaves.turn(place.path, Layout((), (0,), (1,)), "embedding")
    return leaves, places


def known_by_adapters(
    params: PyTree, lora: Mapping[str, Any], mapping: Mapping[str, str] | None
) -> tuple[Leaves, list[Place]]:
    """As `known`, from what adapters say of their leaves; ``params`` may be None."""
    stacked = [path for path, adapter in lora.items() if adapter.is_stacked]
    if stacked:
        raise error(
            "these adapters hold several side by side, as lx.stack makes them.",
            path=stacked,
            want="one adapter for each leaf",
            do="save each of lx.unstack(lora) by itself.",
        )
    if params is None and isinstance(mapping, Mapping) and not isinstance(mapping, Preset):
        mapping = Preset(mapping)  # pairs of leaves that are not adapted match nothing here
    return known(_abstract(lora) if params is None else params, mapping, _layouts(lora))


def _abstract(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Abstract leaves of the shapes that adapters have, for a mapping to match."""
    return {path: jax.ShapeDtypeStruct(_shape(x), "float32") for path, x in lora.items()}


def _shape(adapter: Any) -> tuple[int, ...]:
    shape = getattr(adapter, "shape", None)
    if shape is not None:
        return tuple(shape)
    if hasattr(adapter, "ids"):
        sizes = list(adapter.values.shape[1:])
        sizes.insert(adapter.axis, max(adapter.ids) + 1)
        return tuple(sizes)
    return tuple(adapter.value.shape)


def _layouts(lora: Mapping[str, Any]) -> dict[Any, Any]:
    return {
        re.compile(re.escape(path)): x.layout
        for path, x in lora.items()
        if getattr(x, "layout", None) is not None
    }


def entry_of(x: Any, axes: tuple[int, ...], entry: tuple[int, ...]) -> np.ndarray:
    """``x`` at ``entry`` along ``axes``, a view."""
    index: list[Any] = [slice(None)] * np.ndim(x)
    for axis, i in zip(axes, entry, strict=True):
        index[axis] = i
    return x[tuple(index)]


def is_embedding(place: Place, kind: str) -> bool:
    """Whether torch's module is an Embedding, whose weight is (rows, width): by our leaf or by its name."""
    if kind == "embedding" or place.embedding:
        return True
    module = place.module.rpartition(".")[2]
    shape = np.broadcast_to(np.float32(0), (2, 2))
    return by_convention(f"{module}.weight", shape, {}, None).kind == "embedding"


def window_last(layout: Layout) -> bool:
    """Whether a convolution's inputs are (in, *window), as torch has them, and not (*window, in)."""
    return layout.outputs[0] < min(layout.inputs)


def to_matrix(x: np.ndarray, layout: Layout) -> np.ndarray:
    """A weight on its own axes as ``[*s, n, m]``."""
    stack, n, m = layout.shapes(x.shape)
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    return np.transpose(x, order).reshape(*stack, math.prod(n), math.prod(m))


def from_matrix(x: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """``[*s, n, m]`` on the axes of a weight of ``shape``."""
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    x = x.reshape([shape[i] for i in order])
    return np.transpose(x, [order.index(i) for i in range(len(shape))])


def torch_inputs(x: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """``[n, ...]`` with inputs in our order, from ``[n, ...]`` with torch's ``(in, *window)`` order."""
    n = [shape[i] for i in layout.inputs]
    if len(n) == 1 or window_last(layout):
        return x
    return np.moveaxis(x.reshape(n[-1], *n[:-1], *x.shape[1:]), 0, len(n) - 1).reshape(x.shape)


def our_inputs(x: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `torch_inputs`."""
    n = [shape[i] for i in layout.inputs]
    if len(n) == 1 or window_last(layout):
        return x
    return np.moveaxis(x.reshape(*n, *x.shape[1:]), len(n) - 1, 0).reshape(x.shape)


def to_torch(x: np.ndarray, place: Place, layout: Layout | None, kind: str) -> np.ndarray:
    """One entry of a leaf as torch stores it, all its outputs."""
    if layout is None or place.same:
        return x
    shape = x.shape
    matrix = to_matrix(x, layout)
    if kind == "convolution" and not layout.stack:
        n = [shape[i] for i in layout.inputs]
        n = n if window_last(layout) else [n[-1], *n[:-1]]
        return our_inputs(matrix, layout, shape).T.reshape(-1, *n)
    return matrix if place.turned or is_embedding(place, kind) else np.swapaxes(matrix, -1, -2)


def from_torch(x: np.ndarray, place: Place, layout: Layout | None, kind: str, shape: tuple[int, ...]):
    """A tensor of torch, of all outputs, on the axes of an entry of ``shape``; None if it does not fit."""
    if layout is None or place.same:
        plain = x.shape == shape or (
            x.size == math.prod(shape) and _one_run(x.shape, shape) and not place.same
        )
        return x.reshape(shape) if plain else None
    stack, n, m = layout.shapes(shape)
    n, m = math.prod(n), math.prod(m)
    if kind == "convolution" and not stack:
        if x.ndim != 1 + len(layout.inputs) or x.shape[0] != m or x.size != n * m:
            return None
        sizes = [shape[i] for i in layout.inputs]
        wanted = sizes if window_last(layout) else [sizes[-1], *sizes[:-1]]
        if list(x.shape[1:]) != wanted:
            return None
        return from_matrix(torch_inputs(x.reshape(m, n).T, layout, shape), layout, shape)
    turned = place.turned or is_embedding(place, kind)
    if x.shape != (*stack, *((n, m) if turned else (m, n))):
        return None
    return from_matrix(x if turned else np.swapaxes(x, -1, -2), layout, shape)


def outputs_axis(place: Place, layout: Layout | None, kind: str) -> int:
    """Along which axis of torch's tensor the outputs run."""
    turned = place.turned or (layout is not None and is_embedding(place, kind))
    return -1 if turned and layout is not None else 0


def _one_run(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes differ by axes of size 1, or by one of them being flat."""
    return [i for i in a if i != 1] == [i for i in b if i != 1] or 1 in (len(a), len(b))
