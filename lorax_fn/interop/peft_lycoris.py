"""LoHa, LoKr and VeRA as PEFT's tensors: one module a leaf, or a reason why not."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop.peft_config import PREFIX
from lorax_fn.interop.peft_methods import torch_a
from lorax_fn.interop.places import Place
from lorax_fn.methods.loha import LoHa
from lorax_fn.methods.lokr import LoKr
from lorax_fn.methods.vera import VeRA


def _only_place(writing: Any, path: str) -> tuple[Place, Layout, tuple[int, ...], str]:
    places: list[Place] = writing.places[path]
    adapter: Any = writing.lora[path]
    place = places[0]
    if len(places) > 1 or place.entry or place.theirs or place.ours or adapter.layout.stack:
        raise error(
            f"PEFT has no {type(adapter).__name__} of a stacked or fused weight.",
            path=path,
            do="fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save.",
        )
    return place, adapter.layout, adapter.shape, writing.leaves.kind(path)


def write_loha(writing: Any, lora: Mapping[str, LoHa]) -> dict[str, Any]:
    for path, x in lora.items():
        place, layout, shape, kind = _only_place(writing, path)
        _no_rslora(path, x)
        key = f"{PREFIX}{place.module}"
        for i, a, b in (("1", x.a1, x.b1), ("2", x.a2, x.b2)):
            a, b = np.asarray(a).reshape(-1, x.rank), np.asarray(b).reshape(x.rank, -1)
            writing.tensors[f"{key}.hada_w{i}_a"] = b.T
            down = torch_a(a, layout, shape, kind)
            writing.tensors[f"{key}.hada_w{i}_b"] = down.reshape(x.rank, -1)
        writing.modules[place.module] = (x.rank, float(x.alpha))
    return {"peft_type": "LOHA", **writing.numbers("alpha")}


def write_lokr(writing: Any, lora: Mapping[str, LoKr]) -> dict[str, Any]:
    sides = []
    for path, x in lora.items():
        place, layout, shape, kind = _only_place(writing, path)
        _no_rslora(path, x)
        conv = kind == "convolution"
        if conv and not layout.outputs[0] < min(layout.inputs):
            raise error(
                "PEFT's LoKr of a convolution splits (in, *window), and this kernel is (*window, in).",
                path=path,
                do="fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save.",
            )
        w1, a, b = (np.asarray(y) for y in (x.w1, x.a, x.b))
        (n1, m1), n2, m2 = w1.shape, a.shape[0], b.shape[1]
        window = shape[2:] if conv else ()
        inner = n2 // math.prod(window)
        sides.append((path, (n1, inner), (m1, m2)))
        key, alpha = f"{PREFIX}{place.module}", float(x.alpha)
        writing.tensors[f"{key}.lokr_w1"] = w1.T
        if x.rank >= max(m2, inner) / 2:  # where PEFT keeps the second factor whole
            writing.tensors[f"{key}.lokr_w2"] = np.asarray((a @ b).T.reshape(m2, inner, *window))
        else:
            writing.tensors[f"{key}.lokr_w2_a"], writing.tensors[f"{key}.lokr_w2_b"] = b.T, a.T
        writing.modules[place.module] = (x.rank, alpha)
    factor = {"decompose_factor": _factor(sides)} if writing.for_peft else {}
    return {"peft_type": "LOKR", **factor, **writing.numbers("alpha")}


def write_vera(writing: Any, lora: Mapping[str, VeRA]) -> dict[str, Any]:
    shared: dict[str, np.ndarray] = {}
    ranks = {x.rank for x in lora.values()}
    for path, x in lora.items():
        place = _only_place(writing, path)[0]
        key = f"{PREFIX}{place.module}"
        corners = {
            "vera_A": np.asarray(x.a).reshape(-1, x.rank).T,
            "vera_B": np.asarray(x.b).reshape(x.rank, -1).T,
        }
        for name, corner in corners.items():
            most = shared.get(name, corner)
            if ranks != {x.rank} or not _is_corner(most, corner):
                raise error(
                    "PEFT's VeRA shares one A and one B, of one rank, and these adapters do not.",
                    path=path,
                    got=f"ranks {sorted(ranks)}",
                    do="split all of them at once, with one rank.",
                )
            shared[name] = most if most.size >= corner.size else corner
        writing.tensors[f"{key}.vera_lambda_b"] = np.asarray(x.gain).reshape(-1)
        writing.tensors[f"{key}.vera_lambda_d"] = np.asarray(x.d).reshape(-1)
        writing.modules[place.module] = (x.rank, 1.0)
    writing.tensors |= {f"base_model.{name}": x for name, x in shared.items()}
    return {"peft_type": "VERA", "r": max(ranks), "save_projection": True, "projection_prng_key": 0}


def _no_rslora(path: str, adapter: Any) -> None:
    if adapter.scaling != "lora":
        raise error(
            f"PEFT's {type(adapter).__name__} knows no rsLoRA scale.",
            path=path,
            got=f"scaling={adapter.scaling!r}, alpha={adapter.alpha}, rank={adapter.rank}",
            do="dataclasses.replace(adapter, scaling='lora', alpha=alpha * rank**0.5): the same scale.",
        )


def _is_corner(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the smaller of two matrices is the first rows and columns of the other."""
    rows, columns = (min(x) for x in zip(a.shape, b.shape, strict=True))
    return np.array_equal(a[:rows, :columns], b[:rows, :columns]) and ((rows, columns) in (a.shape, b.shape))


def _factor(sides: list[tuple[str, tuple[int, int], tuple[int, int]]]) -> int:
    """The ``decompose_factor`` by which PEFT splits every side as these adapters do."""
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
