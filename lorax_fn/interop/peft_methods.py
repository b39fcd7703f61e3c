"""PEFT's tensors of one module as factors of ours, one function for each family of methods."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop.pieces import Piece
from lorax_fn.interop.places import Place
from lorax_fn.interop.stacks import FLAT
from lorax_fn.interop.weights import our_inputs, torch_inputs
from lorax_fn.methods.loha import LoHa
from lorax_fn.methods.lokr import LoKr
from lorax_fn.methods.vera import VeRA


def low_rank_piece(
    parts: Mapping[str, np.ndarray],
    layout: Layout,
    shape: tuple[int, ...],
    kind: str,
    alpha: float,
    rank: int | None,
    config: Mapping[str, Any],
    place: Place,
) -> Piece:
    """LoRA, DoRA and AdaLoRA, of every kind of layer.

    Raises:
      ValueError: with the sizes that do not fit, where they do not.
    """
    stack, n, m = layout.shapes(shape)
    count, n, m = math.prod(stack), math.prod(n), module_outputs(math.prod(m), place)
    scaling = "rslora" if config.get("use_rslora") else "lora"
    if "lora_E" in parts:
        a, b, values = (parts[name] for name in ("lora_A", "lora_B", "lora_E"))
        rank = int(a.shape[0])
        _check(a, (rank, n), b, (m, rank), values, (rank, 1))
        a = torch_inputs((a * values).T, layout, shape) if kind == "convolution" else (a * values).T
        return Piece(a, b.T, alpha * rank, rank, "lora")  # alpha is the scale here
    if "lora_embedding_A" in parts:
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
    else:
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    if stack:
        return _experts(a, b, alpha, rank, scaling, (count, n, m), stack)
    found = a.shape[0] if a.ndim else 0
    if rank is not None and found != rank:
        raise ValueError(f"rank {found}, where the config says {rank}")
    sizes = [shape[i] for i in layout.inputs]
    if a.ndim > 2:  # a convolution: (r, in, *window) and (out, r, 1, 1)
        if b.ndim > 1 and 0 < b.shape[1] < found:
            raise ValueError(
                f"A {a.shape}, B {b.shape} of a convolution in {found // b.shape[1]} groups: A acts on all "
                "channels and the weight on those of its group, so that no change of the weight is the same "
                "(PEFT cannot merge it, either)"
            )
        if kind == "convolution" or len(sizes) == a.ndim - 1:
            torch_order = sizes if layout.outputs[0] < min(layout.inputs) else [sizes[-1], *sizes[:-1]]
            if list(a.shape[1:]) != torch_order:
                raise ValueError(f"A {a.shape}, B {b.shape} for a weight {shape} of inputs {torch_order}")
        b = b.reshape(b.shape[:2]) if b.size == math.prod(b.shape[:2]) else b
        a = torch_inputs(a.reshape(found, -1).T, layout, shape) if a.size == found * n else a
    else:
        a = a.T
    _check(a, (n, found), b, (m, found))
    magnitude = parts.get("lora_magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise ValueError("use_dora, but no lora_magnitude_vector")
    if magnitude is not None and magnitude.size != m:
        raise ValueError(f"a magnitude of shape {magnitude.shape} for {m} outputs")
    return Piece(a, b.T, alpha, found, scaling, None if magnitude is None else magnitude.reshape(m))


def module_outputs(m: int, place: Place) -> int:
    """How many outputs a module has, of which the entry of a leaf, or a part of it, has ``m``."""
    if place.theirs is not None:
        return m * place.theirs.count // (place.theirs.last - place.theirs.first)
    if place.ours is not None:
        return m * (place.ours.last - place.ours.first) // place.ours.count
    return m


def _experts(a, b, alpha, rank, scaling, sizes, stack) -> Piece:
    """A is (experts * r, in), expert by expert; B is (out, r * experts), rank by rank."""
    count, n, m = sizes
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % count or a.shape[0] == 0:
        raise ValueError(f"A {a.shape}, B {b.shape} for {count} entries")
    r = a.shape[0] // count
    _check(a, (count * r, n), b, (m, r * count))
    if rank is not None and r != rank:
        raise ValueError(f"rank {r}, where the config says {rank}")
    a = np.moveaxis(a.reshape(*stack, r, n), -2, -1)
    b = np.moveaxis(b.reshape(m, r, *stack), (0, 1), (-1, -2))
    return Piece(a, b, alpha, r, scaling)


def _check(*pairs: Any) -> None:
    arrays, wanted = pairs[::2], pairs[1::2]
    if [x.shape for x in arrays] != list(wanted):
        got = ", ".join(str(x.shape) for x in arrays)
        raise ValueError(f"{got}, where {', '.join(map(str, wanted))} fits the weight")


# LoHa, LoKr and VeRA ---------------------------------------------------------------------------------


def lycoris_adapter(
    parts: Mapping[str, np.ndarray],
    layout: Layout,
    shape: tuple[int, ...],
    kind: str,
    alpha: float,
    rank: int | None,
    place: Place,
) -> Adapter:
    """LoHa or LoKr of one module; a LoHa's layout is `FLAT`, and `lorax_fn.interop.stacks` puts it on a leaf.

    Raises:
      ValueError: with the reason, where the parts do not fit or are of no adapter here.
    """
    if layout.stack:
        raise ValueError(f"a parameter {shape} that is a stack itself (experts): merge it in PEFT instead")
    if any(name.startswith("hada_") for name in parts):
        return _loha(parts, layout, shape, kind, alpha, rank, place)
    _check_whole(place, "LoKr")
    return _lokr(parts, layout, shape, kind, alpha, rank)


def _check_whole(place: Place, name: str) -> None:
    if place.theirs is not None or place.ours is not None:
        raise ValueError(
            f"{name} of a fused weight, whose parts are no {name}: merge it in PEFT (merge_and_unload)"
        )


def _loha(parts, layout, shape, kind, alpha, rank, place) -> LoHa:
    _, n, m = layout.shapes(shape)
    n, m = math.prod(n), module_outputs(math.prod(m), place)
    factors = []
    for i in "12":
        up, down, core = (parts.get(f"hada_{name}") for name in (f"w{i}_a", f"w{i}_b", f"t{i}"))
        if up is None or down is None:
            raise ValueError(f"hada_w{i}_a or hada_w{i}_b is missing")
        if core is not None:  # factors of a convolution, with the window in a core of their own
            if core.ndim < 3 or core.shape[:2] != (down.shape[0], down.shape[0]) or up.ndim != 2:
                raise ValueError(f"a core {core.shape} for factors {up.shape}, {down.shape}")
            down = np.einsum("ij...,jn->in...", core, down).reshape(core.shape[0], -1)
            up = up.T
        r = down.shape[0]
        _check(up, (m, r), down, (r, n))
        if rank is not None and r != rank:
            raise ValueError(f"rank {r}, where the config says {rank}")
        down = torch_inputs(down.T, layout, shape) if kind == "convolution" else down.T
        factors += [down, up.T]
    a1, b1, a2, b2 = factors
    return LoHa(a1, b1, a2, b2, alpha, a1.shape[-1], "lora", FLAT)


def _lokr(parts, layout, shape, kind, alpha, rank) -> LoKr:
    _, n, m = layout.shapes(shape)
    n, m = math.prod(n), math.prod(m)
    w1 = parts.get("lokr_w1")
    if w1 is None:
        if "lokr_w1_a" not in parts or "lokr_w1_b" not in parts:
            raise ValueError("lokr_w1 is missing")
        w1 = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if rank is None:
        raise ValueError("LoKr, but the config has no r")
    w2, up, down, core = (parts.get(f"lokr_{name}") for name in ("w2", "w2_a", "w2_b", "t2"))
    kept = rank
    if w2 is not None:  # full: a factor of the largest rank, with the same scale
        w2 = w2.reshape(w2.shape[0], -1)
        up, down, rank = (w2, np.eye(w2.shape[1], dtype=w2.dtype), w2.shape[1])
    elif up is None or down is None:
        raise ValueError("lokr_w2 is missing")
    elif core is not None:
        if core.ndim < 3 or core.shape[:2] != (rank, rank):
            raise ValueError(f"a core {core.shape} for rank {rank}")
        up, down = up.T, np.einsum("ij...,jn->in...", core, down).reshape(rank, -1)
    if w1.ndim != 2 or up.ndim != 2 or down.ndim != 2 or up.shape[1] != rank or down.shape[0] != rank:
        raise ValueError(f"factors {w1.shape}, {up.shape}, {down.shape} for rank {rank}")
    if (w1.shape[0] * up.shape[0], w1.shape[1] * down.shape[1]) != (m, n):
        raise ValueError(f"factors {w1.shape}, {up.shape}, {down.shape} for {m} outputs and {n} inputs")
    window = [shape[i] for i in layout.inputs]
    if kind == "convolution" and len(window) > 1 and not layout.outputs[0] < min(layout.inputs):
        raise ValueError(
            "LoKr splits (in, *window), which this kernel's (*window, in) does not: merge it instead"
        )
    facts = (alpha * rank / kept if rank != kept else alpha, rank, "lora", layout, tuple(shape))
    return LoKr(w1.T, down.T, up.T, *facts)


def vera_adapter(
    parts: Mapping, shared: Mapping, layout: Layout, shape: tuple[int, ...], place: Place
) -> VeRA:
    """VeRA: every module has its corner of one A and one B."""
    _check_whole(place, "VeRA")
    if len(shared) != 2:
        raise error(
            "this VeRA file lacks its shared factors, which PEFT draws again from torch's own generator.",
            want="base_model.vera_A and base_model.vera_B",
            do="save it in PEFT with save_projection=True.",
        )
    stack, n, m = layout.shapes(shape)
    a, b = shared["vera_A"], shared["vera_B"]
    d, gain = parts["vera_lambda_d"], parts["vera_lambda_b"]
    rank = d.size
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank or stack:
        raise ValueError(f"shared factors {a.shape}, {b.shape} for rank {rank}")
    if a.shape[1] < math.prod(n) or b.shape[0] < math.prod(m) or gain.size != math.prod(m):
        raise ValueError(f"shared factors {a.shape}, {b.shape} for a weight {shape}")
    a, b = a[:, : math.prod(n)].T.reshape(*n, rank), b[: math.prod(m)].T.reshape(rank, *m)
    return VeRA(a, b, d.reshape(rank), gain.reshape(m), rank, layout)


def torch_a(a: np.ndarray, layout: Layout, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """``[n, r]`` in our order as torch's A: ``(r, in)``, or ``(r, in, *window)`` of a convolution."""
    if kind != "convolution":
        return a.T
    n = [shape[i] for i in layout.inputs]
    n = n if layout.outputs[0] < min(layout.inputs) else [n[-1], *n[:-1]]
    return our_inputs(a, layout, shape).T.reshape(-1, *n)
