"""What vLLM and SGLang accept in an adapter, checked before anything is written.

Their loaders refuse saved modules, DoRA, biases and ranks above a limit, and a server that recognizes no key
silently serves the base. So all of this is checked here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.interop.places import Place
from lorax_fn.interop.weights import Leaves, is_embedding
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import LowRank
from lorax_fn.methods.whole import Full, Rows

TARGETS = ("peft", "vllm", "sglang")
ACCEPTED = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")


def check_target(target: str, max_lora_rank: int | None) -> None:
    """Raises where the target is unknown, or the server's largest rank is missing or not one it accepts."""
    if target not in TARGETS:
        raise error(
            "unknown target.", got=repr(target), want=f"one of {', '.join(TARGETS)}", do='target="peft".'
        )
    if target == "peft":
        if max_lora_rank is not None:
            raise error(
                "max_lora_rank= is an option of servers.",
                got='target="peft"',
                do='target="vllm", or leave it out.',
            )
        return
    if max_lora_rank is None:
        raise error(
            f"{target} refuses ranks above its own limit, and that limit is not given.",
            want=f"max_lora_rank=, as the server is started with (vLLM's default is 16): one of {ACCEPTED}",
            do=f"lx.peft.save(path, lora, target={target!r}, max_lora_rank=16).",
        )
    if max_lora_rank not in ACCEPTED:
        raise error(
            f"{target} cannot be started with this rank.",
            got=f"max_lora_rank={max_lora_rank!r}",
            want=f"one of {ACCEPTED}",
            do="take the next larger one.",
        )


def for_server(
    lora: Mapping[str, Adapter], target: str, limit: int | None, leaves: Leaves, places: list[Place]
) -> dict[str, Adapter]:
    """The adapters as the server accepts them: one rank for all, padded with exact zeros.

    Raises:
      LoraError: the server refuses some of them; the message says what to do instead.
    """
    if target == "peft" or limit is None:
        return dict(lora)
    named = {place.path: place for place in places}
    _check_experts(lora, target, leaves, named)
    merged = "fold it: lx.merge(params, lora), and serve the weights that lx.huggingface.save writes."
    refused = []
    for path, adapter in lora.items():
        place = named.get(path, Place(path, path))
        module = place.module.rpartition(".")[2]
        if isinstance(adapter, Full | Rows):
            refused.append(
                (path, f"a leaf trained whole ({type(adapter).__name__}: saved modules, biases, rows)")
            )
        elif not isinstance(adapter, LowRank) or not adapter.adds:
            refused.append((path, f"{type(adapter).__name__}, whose change depends on the weight"))
        elif is_embedding(place, leaves.kind(path)) or leaves.kind(path) == "head" or module in HEADS:
            refused.append((path, "an embedding or output head"))
        elif leaves.kind(path) == "convolution":
            refused.append((path, "a convolution"))
        elif not isinstance(adapter, LoRA):
            refused.append((path, f"{type(adapter).__name__}; the server reads LoRA alone"))
    if refused:
        raise error(
            f"{target} refuses adapters of these leaves.",
            path=[path for path, _ in refused],
            got=[what for _, what in refused],
            want="LoRA of linear weights",
            do=f"adapt without them (exclude=), or {merged}",
        )
    return _padded({path: adapter for path, adapter in lora.items()}, target, limit)


def _check_experts(
    lora: Mapping[str, Adapter], target: str, leaves: Leaves, named: Mapping[str, Place]
) -> None:
    """A parameter that holds all experts of a layer is one LoRA in PEFT; servers want one for each expert."""
    whole = {}
    for path in lora:
        place = named.get(path, Place(path, path, same=True))
        layout = leaves.entry_layout(place) if path in leaves.by_path else None
        if isinstance(lora[path], LowRank) and layout is not None and layout.stack:
            whole[path] = place.module
    if whole:
        path, module = next(iter(whole.items()))
        raise error(
            f"{target} wants one module for each expert.",
            path=list(whole),
            got=[f"{name}: one parameter for all experts" for name in whole.values()],
            want='a mapping whose names run along the experts, as lx.mappings.preset("qwen3_moe") has',
            do=f'mapping={{"{module.rpartition(".")[0]}.{{e}}.gate_proj": {path!r}, ...}}; two halves of one '
            f"leaf are {path + '[0/2]'!r} and {path + '[1/2]'!r}.",
        )


def _padded(lora: dict[str, Any], target: str, limit: int) -> dict[str, Adapter]:
    widths = {path: int(np.max(adapter.rank)) for path, adapter in lora.items()}
    most = max(widths.values())
    if most > limit:
        raise error(
            f"the rank is larger than {target}'s max_lora_rank.",
            path=[path for path, r in widths.items() if r > limit],
            got=f"rank {most}, where max_lora_rank={limit}",
            do=f"start the server with a larger one, or cut the adapter: lx.ranks.truncate(lora, {limit}).",
        )
    rank = next(r for r in ACCEPTED if r >= most)
    return {path: _with_width(adapter, rank) for path, adapter in lora.items()}


def _with_width(adapter: Any, rank: int) -> LoRA:
    """The same change at another rank: zeros beyond the old one in A and B, alpha such that the scale stays.

    Ranks that differ along a stack become one: the entries' scales go into B.
    """
    s = len(adapter.layout.stack)
    a, b = jnp.asarray(adapter.a), jnp.asarray(adapter.b)
    if isinstance(adapter.rank, tuple) or np.ndim(adapter.alpha):
        scale = np.asarray(adapter.scale, np.float32).reshape(-1)
        first = float(scale[np.flatnonzero(scale)[0]]) if scale.any() else 1.0
        ratio = jnp.asarray(scale / first, b.dtype).reshape(a.shape[:s] + (1,) * (b.ndim - s))
        rule = adapter.scaling
        adapter = dataclasses.replace(
            adapter,
            b=b * ratio,
            rank=a.shape[-1],
            alpha=first * (a.shape[-1] if rule == "lora" else a.shape[-1] ** 0.5),
        )
        b = adapter.b
    more = rank - a.shape[-1]
    if not more:
        return adapter
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
    b = jnp.pad(b, [(0, more if i == s else 0) for i in range(b.ndim)])
    stack, n, m = adapter.layout.shapes(adapter.shape)
    size = int(np.prod(stack))
    return adapter.with_factors(a.reshape(size, -1, rank), b.reshape(size, rank, -1), rank)
