"""Adapters of single modules, as other programs store them, joined into adapters of our leaves and cut out.

A `Piece` holds the factors of one torch module in our order of axes, ``a [n, r]`` and ``b [r, m]``, with
inputs and outputs flattened. Several of them may share one leaf: entries of a stack, or side by side in its
outputs.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import factor_entries
from lorax_fn.interop.places import Units
from lorax_fn.methods.dora import DoRA
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import scale_of


@dataclasses.dataclass(frozen=True)
class Piece:
    """``dW = scale * a @ b`` of one module, scale by ``alpha`` and ``rank``; with a magnitude it is DoRA.

    Args:
      a: ``[*s, n, r]``; ``*s`` only where the module itself is a stack, such as experts.
      b: ``[*s, r, m]``.
      alpha: numerator of the scale.
      rank: ``r``.
      scaling: ``"lora"`` or ``"rslora"``.
      magnitude: ``[*s, m]``, or None.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    rank: int
    scaling: str
    magnitude: np.ndarray | None = None

    @property
    def scale(self) -> float:
        return float(scale_of(self.alpha, self.rank, self.scaling, ())) if self.rank else 0.0


def alpha_for(scale: float, rank: int, scaling: str) -> float:
    """The alpha that gives ``scale`` at ``rank``."""
    return scale / float(scale_of(1.0, rank, scaling, ()))


def outputs_of(piece: Piece, index: np.ndarray) -> Piece:
    """The piece of some outputs of a fused module: A is shared, B and magnitude are cut."""
    magnitude = None if piece.magnitude is None else piece.magnitude[..., index]
    return dataclasses.replace(piece, b=piece.b[..., index], magnitude=magnitude)


def side_by_side(parts: Sequence[tuple[np.ndarray, Piece]], m: int) -> Piece:
    """One piece of ``m`` outputs from pieces that each have some of them.

    Where all share one A, so does the result; else A are put side by side and B in blocks: exactly, at the
    sum of the ranks.
    """
    first = parts[0][1]
    same_a = all(
        p.a.shape == first.a.shape and p.scale == first.scale and np.array_equal(p.a, first.a)
        for _, p in parts
    )
    rank = first.rank if same_a else sum(p.rank for _, p in parts)
    b = np.zeros((*first.b.shape[:-2], rank, m), first.b.dtype)
    at = 0
    for index, piece in parts:
        # scales that differ go into B, relative to the first
        ratio = 1.0 if piece.scale == first.scale or not first.scale else piece.scale / first.scale
        rows = slice(0, rank) if same_a else slice(at, at + piece.rank)
        b[..., rows, index] = piece.b if ratio == 1.0 else (piece.b * ratio).astype(piece.b.dtype)
        at += 0 if same_a else piece.rank
    a = first.a if same_a else np.concatenate([p.a for _, p in parts], -1)
    alpha = first.alpha if rank == first.rank else alpha_for(first.scale, rank, first.scaling)
    magnitude = None
    if first.magnitude is not None and all(p.magnitude is not None for _, p in parts):
        magnitude = np.zeros((*first.magnitude.shape[:-1], m), first.magnitude.dtype)
        for index, piece in parts:
            magnitude[..., index] = piece.magnitude
    return Piece(a, b, alpha, rank, first.scaling, magnitude)


def covered(parts: Sequence[tuple[np.ndarray, Any]], m: int) -> bool:
    """Whether the parts contain each of ``m`` outputs exactly once."""
    found = np.concatenate([index for index, _ in parts]) if parts else np.zeros(0, int)
    return found.size == m and np.array_equal(np.sort(found), np.arange(m))


def to_adapter(
    entries: dict[tuple[int, ...], Piece], layout: Layout, shape: tuple[int, ...], norms: Any
) -> LoRA:
    """The adapter of one leaf from the pieces of its stack entries.

    Entries without a piece get rank 0. For DoRA ``norms()`` gives the magnitudes ``[*s, m]`` of those: the
    norms of W.
    """
    stack, n, m = layout.shapes(shape)
    first = next(iter(entries.values()))
    if list(entries) == [()]:
        a, b = first.a.reshape(*stack, *n, -1), first.b.reshape(*stack, -1, *m)
        facts = (a, b, first.alpha, first.rank, first.scaling, layout)
        return (
            LoRA(*facts)
            if first.magnitude is None
            else DoRA(*facts, magnitude=first.magnitude.reshape(*stack, *m))
        )
    depth = len(next(iter(entries)))
    own = stack[depth:]  # axes of the module itself
    every = [tuple(int(i) for i in index) for index in np.ndindex(*stack[:depth])]
    rank = max(piece.rank for piece in entries.values())
    a = np.zeros((*stack, math.prod(n), rank), first.a.dtype)
    b = np.zeros((*stack, rank, math.prod(m)), first.b.dtype)
    ranks, alphas = [], []
    for index in every:
        piece = entries.get(index)
        if piece is not None:
            a[index][..., : piece.rank], b[index][..., : piece.rank, :] = piece.a, piece.b
        count = math.prod(own)
        ranks += [0 if piece is None else piece.rank] * count
        alphas += [first.alpha if piece is None else piece.alpha] * count
    a, b = a.reshape(*stack, *n, rank), b.reshape(*stack, rank, *m)
    even = len(set(ranks)) == 1 and len(set(alphas)) == 1
    facts = (
        a,
        b,
        alphas[0] if even else tuple(alphas),
        rank if even else tuple(ranks),
        first.scaling,
        layout,
    )
    if first.magnitude is None:
        return LoRA(*facts)
    magnitude = np.array(norms(), first.magnitude.dtype).reshape(*stack, math.prod(m))
    for index, piece in entries.items():
        magnitude[index] = piece.magnitude
    return DoRA(*facts, magnitude=magnitude.reshape(*stack, *m))


def from_adapter(path: str, adapter: Any, entry: tuple[int, ...]) -> Piece:
    """The piece of one stack entry, without the zeros that pad its rank."""
    layout = adapter.layout
    stack = layout.shapes(adapter.shape)[0]
    a, b, scale = factor_entries(adapter)
    scaling = getattr(adapter, "scaling", "lora")
    own = stack[len(entry) :]
    within = np.arange(math.prod(stack)).reshape(stack)[entry].reshape(-1)
    ranks = np.broadcast_to(
        np.asarray(getattr(adapter, "rank", a.shape[-1])).reshape(-1), (math.prod(stack),)
    )
    plain = isinstance(adapter, LoRA)  # its own fields are the factors, in their own dtype
    rank = int(ranks[within].max()) if plain else a.shape[-1]
    scales = np.unique(np.asarray(scale)[within][:, : max(rank, 1)])
    if plain:
        n, m = a.shape[1], b.shape[2]
        a = np.asarray(adapter.a).reshape(-1, n, a.shape[-1])
        b = np.asarray(adapter.b).reshape(-1, b.shape[1], m)
        alphas = np.broadcast_to(np.asarray(adapter.alpha, np.float64).reshape(-1), (math.prod(stack),))
        alpha = float(alphas[within][0])
        if len(set(ranks[within])) > 1 or len(set(alphas[within])) > 1:
            raise error(
                "the ranks or alphas of one module's entries differ, and its file has one for all.",
                path=path,
                got=f"ranks {sorted(set(ranks[within].tolist()))}",
                do="one rank for all experts: lx.ranks.resize(lora, rank) pads the smaller ones.",
            )
    else:
        a, b = np.asarray(a), np.asarray(b)
        if len(scales) > 1:  # one number for each rank
            b, scales = b * np.asarray(scale)[:, :, None], np.ones(1)
        alpha = alpha_for(float(scales[0]), rank, scaling)
    a, b = a[within][..., :rank], b[within][..., :rank, :]
    magnitude = getattr(adapter, "magnitude", None)
    if magnitude is not None:
        magnitude = np.asarray(magnitude).reshape(math.prod(stack), -1)[within].reshape(*own, -1)
    a, b = a.reshape(*own, *a.shape[1:]), b.reshape(*own, *b.shape[1:])
    return Piece(a, b, alpha, rank, scaling, magnitude)


def unit_index(units: Units | None, size: int, what: str) -> np.ndarray:
    """The outputs that some units are, checked."""
    index = np.arange(size) if units is None else units.index(size)
    if index is None:
        raise error(
            "outputs cannot be cut as the mapping says.",
            path=what,
            got=f"{size} outputs",
            want=f"a multiple of {units.count * units.groups if units else 1}",
            do="correct the [a:b/n@g] of its pair.",
        )
    return index
