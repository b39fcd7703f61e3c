"""LoHa, LoKr and VeRA of stacked and fused weights: modules of others joined, and leaves of ours cut again.

Each layer of a stack is a module, and its arrays are stacked. Columns of a LoHa are a LoHa again, because its
product is elementwise, so fused weights can be cut and joined, too. Columns of a Kronecker product are not
such a product, and columns cut out of VeRA are not a corner of the factors that it shares.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop.pieces import unit_index
from lorax_fn.interop.places import Place
from lorax_fn.methods.loha import LoHa

FLAT = Layout((), (0,), (1,))  # of a LoHa of one module: a [n, r], b [r, m]
MERGE = "fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save."


def joined(found: Sequence[tuple[Place, Any]], layout: Layout, shape: tuple[int, ...]) -> Any:
    """The adapter of one leaf from those of its modules; a LoHa's is `FLAT`.

    Raises:
      ValueError: with the reason, where no one adapter says the same.
    """
    stack, n, m = layout.shapes(shape)
    entries: dict[tuple[int, ...], list[tuple[np.ndarray, Any]]] = {}
    for place, adapter in found:
        index = unit_index(place.ours, math.prod(m), place.path)
        entries.setdefault(place.entry, []).append((index, adapter))
    modules = {entry: _side_by_side(parts, math.prod(m)) for entry, parts in entries.items()}
    modules = {entry: _on_axes(x, n, m) for entry, x in modules.items()}
    return _stacked(modules, layout, shape, stack)


def _on_axes(x: Any, n: tuple[int, ...], m: tuple[int, ...]) -> Any:
    """A LoHa that was `FLAT`, with the axes of its leaf; LoKr and VeRA have them already."""
    if not isinstance(x, LoHa):
        return x
    a1, a2 = (a.reshape(*n, x.rank) for a in (x.a1, x.a2))
    b1, b2 = (b.reshape(x.rank, *m) for b in (x.b1, x.b2))
    return dataclasses.replace(x, a1=a1, b1=b1, a2=a2, b2=b2)


def _stacked(modules: Mapping[tuple, Any], layout: Layout, shape: tuple[int, ...], stack: tuple) -> Any:
    """One adapter for a whole stack; factors that its entries share stay as they are."""
    first, name = next(iter(modules.values())), type(next(iter(modules.values()))).__name__
    depth = len(next(iter(modules)))
    every = [tuple(map(int, entry)) for entry in np.ndindex(*stack[:depth])]
    lost = [entry for entry in every if entry not in modules]
    if lost:
        raise ValueError(f"{name} of {len(modules)} of {len(every)} layers that are one leaf here: {_APART}")
    facts = {(x.rank, getattr(x, "alpha", None)) for x in modules.values()}
    if len(facts) > 1:
        raise ValueError(f"{name} of several ranks or alphas {sorted(facts)} in one leaf: {_APART}")
    sizes = {"sizes": tuple(shape)} if hasattr(first, "sizes") else {}
    whole = dataclasses.replace(first, layout=layout, **sizes)
    arrays = {}
    for field, axes in whole.axes().items():
        parts = [np.asarray(getattr(modules[entry], field)) for entry in every]
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"{name} of several shapes of {field} in one leaf: {_APART}")
        if axes[: len(stack)] == layout.stack:
            arrays[field] = np.stack(parts).reshape(*stack, *parts[0].shape)
    return dataclasses.replace(whole, **arrays)


_APART = "load it into a tree with one leaf per layer, or merge it in PEFT (merge_and_unload)"


def cut(adapter: Any, index: np.ndarray) -> Any:
    """The outputs ``index`` of a module's adapter, as an adapter.

    Raises:
      ValueError: with the reason, where they are none.
    """
    if not isinstance(adapter, LoHa):
        raise ValueError(f"a part of a fused weight has no {type(adapter).__name__} of its own; merge it")
    return dataclasses.replace(adapter, b1=adapter.b1[:, index], b2=adapter.b2[:, index])


def _side_by_side(parts: Sequence[tuple[np.ndarray, Any]], m: int) -> Any:
    """One adapter of ``m`` outputs from those that each have some of them; the rest does not change.

    Where all share A1, A2 and scale, so does the result; else it has the sum of the ranks: A are put side by
    side and B in blocks, so that each column is still the product of its own part.
    """
    first = parts[0][1]
    if len(parts) == 1 and len(parts[0][0]) == m:
        return first
    if not isinstance(first, LoHa):
        raise ValueError(f"several modules side by side in one leaf have no {type(first).__name__} together")
    taken = np.concatenate([index for index, _ in parts])
    if len(set(taken.tolist())) != len(taken):
        raise ValueError("two modules for the same outputs")
    shared = all(
        x.scale == first.scale
        and x.a1.shape == first.a1.shape
        and np.array_equal(x.a1, first.a1)
        and np.array_equal(x.a2, first.a2)
        for _, x in parts
    )
    rank = first.rank if shared else sum(x.rank for _, x in parts)
    b1, b2 = (np.zeros((rank, m), b.dtype) for b in (first.b1, first.b2))
    at = 0
    for index, x in parts:
        rows = slice(0, rank) if shared else slice(at, at + x.rank)
        ratio = 1.0 if x.scale == first.scale or not first.scale else x.scale / first.scale
        b1[rows, index] = x.b1 if ratio == 1.0 else (x.b1 * ratio).astype(x.b1.dtype)
        b2[rows, index] = x.b2
        at += x.rank
    a1, a2 = (
        getattr(first, name) if shared else np.concatenate([getattr(x, name) for _, x in parts], -1)
        for name in ("a1", "a2")
    )
    alpha = first.alpha if rank == first.rank else first.scale * rank
    return dataclasses.replace(first, a1=a1, b1=b1, a2=a2, b2=b2, alpha=alpha, rank=rank)


def module_of(path: str, adapter: Any, entry: tuple[int, ...]) -> Any:
    """The adapter of one stack entry, of NumPy arrays; a LoHa's is `FLAT`.

    Raises:
      LoraError: the entry is a stack itself, such as experts, which PEFT adapts by LoRA alone.
    """
    layout = adapter.layout
    name = type(adapter).__name__
    if len(entry) != len(layout.stack):
        raise error(
            f"PEFT has no {name} of a parameter that is a stack, such as experts.",
            path=path,
            got=f"{layout}, of which the mapping indexes {len(entry)} stack axes",
            want="a placeholder of the module's name for each stack axis",
            do=f'name one module per entry, "experts.{{e}}.w1": {path!r}; or {MERGE}',
        )
    inner = layout
    for axis in sorted(layout.stack, reverse=True):
        inner = inner.without(axis)
    sizes = {}
    if hasattr(adapter, "sizes"):
        sizes["sizes"] = tuple(x for i, x in enumerate(adapter.sizes) if i not in layout.stack)
    arrays = {}
    for field, axes in adapter.axes().items():
        x = np.asarray(getattr(adapter, field))
        arrays[field] = x[entry] if axes[: len(entry)] == layout.stack else x
    if isinstance(adapter, LoHa):
        r, inner = adapter.rank, FLAT
        arrays = {k: x.reshape((-1, r) if k in ("a1", "a2") else (r, -1)) for k, x in arrays.items()}
    return dataclasses.replace(adapter, layout=inner, **sizes, **arrays)


def fused(parts: Sequence[tuple[np.ndarray, Any]], m: int, module: str) -> Any:
    """The LoHa of a fused module of others, of ``m`` outputs.

    Raises:
      LoraError: two of ours have the same outputs.
    """
    try:
        return _side_by_side(parts, m)
    except ValueError as failure:
        raise error(
            "a fused module cannot be put together.", path=module, got=str(failure), do=MERGE
        ) from failure
