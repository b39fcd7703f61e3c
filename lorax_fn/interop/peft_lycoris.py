"""LoHa, LoKr and VeRA as PEFT's tensors, each module by itself."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.interop.peft_config import PREFIX
from lorax_fn.interop.peft_methods import torch_a
from lorax_fn.interop.pieces import unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.stacks import MERGE, cut, fused, module_of
from lorax_fn.methods.loha import LoHa
from lorax_fn.methods.lokr import LoKr
from lorax_fn.methods.vera import VeRA


def _modules(writing: Any, path: str, adapter: Any) -> Iterator[tuple[Place, Any]]:
    """The modules of one leaf, each with its own adapter; parts of fused ones have one in a LoHa alone."""
    for place in writing.places[path]:
        if (place.theirs or place.ours) and not isinstance(adapter, LoHa):
            raise error(
                f"PEFT has no {type(adapter).__name__} of a part of a fused weight.",
                path=path,
                got=place.module,
                do=MERGE,
            )
        yield place, module_of(path, adapter, place.entry)


def write_loha(writing: Any, lora: Mapping[str, LoHa]) -> dict[str, Any]:
    joint: dict[str, list[tuple[np.ndarray, LoHa, Place]]] = {}
    for path, adapter in lora.items():
        _no_rslora(path, adapter)
        for place, x in _modules(writing, path, adapter):
            if place.ours is not None:
                x = cut(x, unit_index(place.ours, x.b1.shape[-1], path))
            if place.theirs is None:
                _put_loha(writing, place, x)
            else:
                index = unit_index(place.theirs, writing.outputs(place), place.module)
                joint.setdefault(place.module, []).append((index, x, place))
    for module, parts in joint.items():
        place = parts[0][2]
        _put_loha(writing, place, fused([(i, x) for i, x, _ in parts], writing.outputs(place), module))
    return {"peft_type": "LOHA", **writing.numbers("alpha")}


def _put_loha(writing: Any, place: Place, x: LoHa) -> None:
    leaves, key = writing.leaves, f"{PREFIX}{place.module}"
    layout, shape = leaves.entry_layout(place), leaves.entry_shape(place)
    layout = writing.lora[place.path].layout if place.same else layout
    for i, a, b in (("1", x.a1, x.b1), ("2", x.a2, x.b2)):
        writing.tensors[f"{key}.hada_w{i}_a"] = b.T
        down = torch_a(a, layout, shape, leaves.kind(place.path))
        writing.tensors[f"{key}.hada_w{i}_b"] = down.reshape(x.rank, -1)
    writing.modules[place.module] = (x.rank, float(x.alpha))


def write_lokr(writing: Any, lora: Mapping[str, LoKr]) -> dict[str, Any]:
    sides = []
    for path, adapter in lora.items():
        _no_rslora(path, adapter)
        conv = writing.leaves.kind(path) == "convolution"
        for place, x in _modules(writing, path, adapter):
            if conv and not x.layout.outputs[0] < min(x.layout.inputs):
                raise error(
                    "PEFT's LoKr of a convolution splits (in, *window), and this kernel is (*window, in).",
                    path=path,
                    do=MERGE,
                )
            w1, a, b = x.w1, x.a, x.b
            (n1, m1), n2, m2 = w1.shape, a.shape[0], b.shape[1]
            window = x.sizes[2:] if conv else ()
            inner = n2 // math.prod(window)
            sides.append((path, (n1, inner), (m1, m2)))
            key = f"{PREFIX}{place.module}"
            writing.tensors[f"{key}.lokr_w1"] = w1.T
            if x.rank >= max(m2, inner) / 2:  # where PEFT keeps the second factor whole
                writing.tensors[f"{key}.lokr_w2"] = np.asarray((a @ b).T.reshape(m2, inner, *window))
            else:
                writing.tensors[f"{key}.lokr_w2_a"], writing.tensors[f"{key}.lokr_w2_b"] = b.T, a.T
            writing.modules[place.module] = (x.rank, float(x.alpha))
    factor = {"decompose_factor": _factor(sides)} if writing.for_peft else {}
    return {"peft_type": "LOKR", **factor, **writing.numbers("alpha")}


def write_vera(writing: Any, lora: Mapping[str, VeRA]) -> dict[str, Any]:
    """PEFT has one A and one B for all modules: of ours the largest, of which all others are corners."""
    ranks = {x.rank for x in lora.values()}
    modules = [(path, *module) for path, x in lora.items() for module in _modules(writing, path, x)]
    a = {path: np.asarray(x.a).reshape(-1, x.rank).T for path, x in lora.items()}
    b = {path: np.asarray(x.b).reshape(x.rank, -1).T for path, x in lora.items()}
    shared = {
        name: max(found.values(), key=lambda x: x.size) for name, found in (("vera_A", a), ("vera_B", b))
    }
    for path, place, x in modules:
        ratio = _corner_ratio(shared["vera_A"], a[path])
        if ranks != {x.rank} or ratio is None or _corner_ratio(shared["vera_B"], b[path]) != 1.0:
            raise error(
                "PEFT's VeRA shares one A and one B, of one rank, and these adapters do not.",
                path=path,
                got=f"ranks {sorted(ranks)}",
                do="split all of them at once, with one rank.",
            )
        key = f"{PREFIX}{place.module}"
        writing.tensors[f"{key}.vera_lambda_b"] = x.gain.reshape(-1)
        writing.tensors[f"{key}.vera_lambda_d"] = x.d.reshape(-1) * x.d.dtype.type(ratio)
        writing.modules[place.module] = (x.rank, 1.0)
    writing.tensors |= {f"base_model.{name}": x for name, x in shared.items()}
    return {"peft_type": "VERA", "r": max(ranks), "save_projection": True, "projection_prng_key": 0}


def _no_rslora(path: str, adapter: Any) -> None:
    if adapter.scaling != "lora":
        raise error(
            f"PEFT's {type(adapter).__name__} has no rsLoRA scaling.",
            path=path,
            got=f"scaling={adapter.scaling!r}, alpha={adapter.alpha}, rank={adapter.rank}",
            do="dataclasses.replace(adapter, scaling='lora', alpha=alpha * rank**0.5): the same scale.",
        )


def _corner_ratio(whole: np.ndarray, x: np.ndarray) -> float | None:
    """The factor between ``x`` and the first rows and columns of ``whole``, None where there is none.

    The bound of an A depends on its number of inputs, so that it is a corner of a larger one times a factor,
    which d takes.
    """
    if x.shape[0] > whole.shape[0] or x.shape[1] > whole.shape[1]:
        return None
    corner = whole[: x.shape[0], : x.shape[1]]
    if np.array_equal(corner, x):
        return 1.0
    size = float(np.linalg.norm(corner))
    ratio = float(np.linalg.norm(x)) / size if size else 0.0
    return ratio if np.allclose(x, corner * ratio, rtol=1e-5, atol=1e-6 * np.abs(x).max()) else None


def _factor(sides: list[tuple[str, tuple[int, int], tuple[int, int]]]) -> int:
    """The ``decompose_factor`` with which PEFT splits every side as these adapters do."""
    for factor in (-1, 8, *range(1, 257)):
        if all(_factorized(a * b, factor) == (a, b) for _, *pairs in sides for a, b in pairs):
            return factor
    raise error(
        "no one decompose_factor of PEFT splits all of these weights as these adapters do.",
        path=[f"{path}: inputs {n[0]} x {n[1]}, outputs {m[0]} x {m[1]}" for path, n, m in sides],
        do="save them in folders of their own, or fold them: lx.merge(params, lora).",
    )


def _factorized(size: int, factor: int) -> tuple[int, int]:
    """PEFT's rule: ``factor`` where it divides, else the divisor pair with the smallest sum below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    first = 1
    for d in range(2, math.isqrt(size) + 1):
        if size % d == 0:
            if d > limit:
                break
            first = d
    return first, size // first
