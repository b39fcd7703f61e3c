"""Mappings for families of models: `preset` makes one of a family's table for a kind of tree."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop.families import FAMILIES, RENAMED, SAME
from lorax_fn.interop.places import Preset

_GEMMA_NORMS = {
    "gemma": {"post_attention_layernorm": "pre_ffw_norm"},
    "gemma2": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_LEAF = {**dict.fromkeys("kcvx", "kernel"), **dict.fromkeys("eE", "embedding"), "s": "scale", "w": "weight"}
_HEADS = Layout((), (0,), (1, 2))  # (D, H, d)
_OUT = Layout((), (0, 1), (2,))  # (H, d, D)
_IN_OUT, _OUT_IN = Layout((), (0,), (1,)), Layout((), (1,), (0,))


def preset(family: str, tree: str = "flax", *, prefix: str = "", theirs: str = "") -> Preset:
    """A mapping for a family of models and a kind of tree.

    Args:
      family: ``"llama"``, ``"mistral"``, ``"qwen2"``, ``"qwen3"``, ``"gemma"``, ``"gemma2"``, ``"gemma3"``,
        ``"mixtral"``, ``"qwen2_moe"``, ``"qwen3_moe"``, ``"phi"``, ``"phi3"``, ``"gpt2"``, ``"opt"``,
        ``"bert"``, ``"roberta"``, ``"t5"``, ``"vit"``, ``"clip"``, ``"whisper"``, ``"unet"`` (SD and SDXL) or
        ``"flux"``. ``"vit5"``, ``"mixtral5"``, ``"qwen2_moe5"`` and ``"qwen3_moe5"`` lead to the same paths
        from the modules of transformers 5, whose names PEFT's adapters bear, while its checkpoints keep the
        older ones.
      tree: ``"flax"``: torch's names with ``/``, and ``kernel``, ``embedding`` or ``scale`` last, as the Flax
        models of transformers and diffusers have, and the experts of a layer in one leaf; ``"tunix"``:
        google-tunix; ``"gemma"``: google-deepmind's gemma; ``"examples"``: the scanned Llama of this
        repository's examples.
      prefix: what stands before every path, such as ``"params/"``.
      theirs: what stands before every name of theirs, such as ``"language_model."`` in the checkpoints of
        Gemma 3 with images.

    Returns:
      A dict of pairs that may have more of them than a model has leaves, with the layouts that need words.

    Raises:
      LoraError: there is no such table.

    Example:
      >>> from lorax_fn.interop.presets import preset
      >>> preset("gpt2")["transformer.h.{i}.attn.c_attn^T"]
      'transformer/h/{i}/attn/c_attn/kernel'
    """
    family = SAME.get(family, family)
    makers = {"flax": _flax, "tunix": _tunix, "gemma": _gemma, "examples": _examples}
    family, new = (family[:-1], True) if family[:-1] in RENAMED and family[-1] == "5" else (family, False)
    if family not in FAMILIES or tree not in makers or (new and tree != "flax"):
        raise error(
            "there is no such preset.",
            got=f"preset({family!r}, {tree!r})",
            want=f"a family of {', '.join(sorted(FAMILIES))}; a tree of {', '.join(makers)}",
            do="write the pairs yourself: ten lines of {module: path} do for most models.",
        )
    pairs, layouts = makers[tree](family)
    pairs = _renamed(pairs, family) if new else pairs
    found = {theirs + name: prefix + path for name, path in pairs.items()}
    layouts = {prefix + path: layout for path, layout in layouts.items()}
    convolutions = [path for path in layouts if tree == "flax" and not layouts[path].stack]
    by_shapes = _BY_SHAPES.get((family, tree)) or _BY_SHAPES.get(tree)
    return Preset(found, layouts, by_shapes, convolutions)


def _flax(family: str) -> tuple[dict[str, str], dict[str, Layout]]:
    pairs, layouts = {}, {}
    for line in FAMILIES[family].split("\n"):
        if not line:
            continue
        kind, _, text = line.partition(" ")
        for name in _alternatives(text):
            path = _flax_path(family, name.replace("{e}.", "") if kind == "x" else name)
            if kind == "b":
                pairs[f"{name}.bias"] = f"{path}/bias"
            elif kind == "p":
                pairs[f"{name}="] = path
            else:
                mark = {"c": "^T", "E": "^E"}.get(kind, "")
                pairs[name + mark] = f"{path}/{_LEAF[kind]}"
            if kind == "v":
                axes = (0, 1) if family == "whisper" else (0, 1, 2)
                layouts[f"{path}/kernel"] = Layout((), axes, (len(axes),))
            elif kind == "x":
                layouts[f"{path}/kernel"] = Layout((0,), (1,), (2,))
    return pairs, layouts


def _flax_path(family: str, name: str) -> str:
    """In transformers a number is a level of its own, ``layers/0``; in diffusers it is not, ``resnets_0``."""
    if family == "unet":
        name = re.sub(r"\.(\{\w\}|\d)(?=\.|$)", r"_\1", name)
    return name.replace(".", "/")


def _renamed(pairs: Mapping[str, str], family: str) -> dict[str, str]:
    """The same paths under the modules' names in transformers 5, with gate_up before down, as PEFT nests."""
    new = {}
    for name, path in pairs.items():
        for old, now in RENAMED[family].items():
            name = name.replace(old, now)
        new[name] = path
    return dict(sorted(new.items(), key=lambda pair: "experts.down_proj" in pair[0]))


def _conv1d_layouts(leaves: Mapping[str, Any]) -> dict[str, Layout]:
    """GPT-2's kernels, (out, in) in transformers' Flax model and (in, out) in others: c_attn shows which.

    It has three outputs for each input, so that nothing need be guessed for the square c_proj beside it.
    """
    kernels = {p: x for p, x in leaves.items() if re.fullmatch(r".*/(c_attn|c_proj|c_fc|q_attn)/kernel", p)}
    found = {
        _OUT_IN if x.shape[0] == 3 * x.shape[1] else _IN_OUT
        for path, x in kernels.items()
        if path.endswith("/attn/c_attn/kernel") and len(x.shape) == 2
    }
    return dict.fromkeys(kernels, found.pop()) if len(found) == 1 else {}


def _gating_layouts(leaves: Mapping[str, Any]) -> dict[str, Layout]:
    """Gemma's gate and up, (2, F, D) or (2, D, F) as its config says: ``linear``, (F, D), shows which."""
    found = {}
    for path, x in leaves.items():
        below = leaves.get(path.removesuffix("gating_einsum") + "linear")
        if path.endswith("mlp/gating_einsum") and len(x.shape) == 3 and below is not None:
            f, d = below.shape
            turned = tuple(x.shape[1:]) == (f, d)
            if f != d:
                found[path] = Layout((), (2,), (0, 1)) if turned else Layout((), (1,), (0, 2))
    return found


_BY_SHAPES = {("gpt2", "flax"): _conv1d_layouts, "gemma": _gating_layouts}


def _alternatives(text: str) -> list[str]:
    parts = re.split(r"\(([^()]*)\)", text)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _tunix(family: str) -> tuple[dict[str, str], dict[str, Layout]]:
    layer = "model.layers.{i}"
    if family.startswith("gemma"):
        pairs, layouts = _gemma(family)
        new = {}
        for name, path in pairs.items():
            path = path.replace("layer_{i}", "layers/{i}")
            path = path.replace("post_attention_norm", "post_attn_norm") if family != "gemma3" else path
            new[name] = path
        for name in ("gate", "up", "down"):
            new[f"{layer}.mlp.{name}_proj"] = f"layers/{{i}}/mlp/{name}_proj/kernel"
        return new, {path.replace("layer_{i}", "layers/{i}"): x for path, x in layouts.items()}
    if family not in ("llama", "qwen2", "qwen3"):
        raise error(
            "google-tunix has no such model.",
            got=family,
            want="llama, qwen2, qwen3, gemma...",
            do='tree="flax".',
        )
    pairs = {
        "model.embed_tokens": "embedder/input_embedding",
        "model.norm": "final_norm/w",
        "lm_head": "lm_head/w",
    }
    layouts = {}
    for x in "qkvo":
        pairs[f"{layer}.self_attn.{x}_proj"] = f"layers/{{i}}/attn/{x}_proj/w"
        layouts[f"layers/{{i}}/attn/{x}_proj/w"] = _OUT if x == "o" else _HEADS
    for x in "qkv":
        pairs[f"{layer}.self_attn.{x}_proj.bias"] = f"layers/{{i}}/attn/{x}_bias"
    for x in "qk":
        pairs[f"{layer}.self_attn.{x}_norm"] = f"layers/{{i}}/attn/{x}_norm/w"
    for x in ("gate", "up", "down"):
        pairs[f"{layer}.mlp.{x}_proj"] = f"layers/{{i}}/mlp/{x}_proj/kernel"
    for x in ("input", "post_attention"):
        pairs[f"{layer}.{x}_layernorm"] = f"layers/{{i}}/{x}_layernorm/w"
    return pairs, layouts


def _gemma(family: str) -> tuple[dict[str, str], dict[str, Layout]]:
    """q, k and v are one weight where there are as many of each; k and v are one in any case."""
    if not family.startswith("gemma"):
        raise error(
            "this is a tree of Gemma models.", got=family, want="gemma, gemma2 or gemma3", do='tree="flax".'
        )
    layer, attn = "model.layers.{i}", "layer_{i}/attn"
    pairs = {"model.embed_tokens": "embedder/input_embedding", "model.norm": "final_norm/scale"}
    pairs[f"{layer}.input_layernorm"] = "layer_{i}/pre_attention_norm/scale"
    for theirs, ours in _GEMMA_NORMS["gemma" if family == "gemma" else "gemma2"].items():
        pairs[f"{layer}.{theirs}"] = f"layer_{{i}}/{ours}/scale"
    pairs[f"{layer}.self_attn.q_proj"] = f"{attn}/q_einsum/w"
    pairs[f"{layer}.self_attn.k_proj"] = f"{attn}/kv_einsum/w[0/2]"
    pairs[f"{layer}.self_attn.v_proj"] = f"{attn}/kv_einsum/w[1/2]"
    for i, x in enumerate("qkv"):  # with ".weight" they are other keys of the dict for the same tensors
        pairs[f"{layer}.self_attn.{x}_proj.weight"] = f"{attn}/qkv_einsum/w[{i}/3]"
    pairs[f"{layer}.self_attn.o_proj"] = f"{attn}/attn_vec_einsum/w"
    pairs[f"{layer}.self_attn.q_norm"] = f"{attn}/_query_norm/scale"
    pairs[f"{layer}.self_attn.k_norm"] = f"{attn}/_key_norm/scale"
    pairs[f"{layer}.mlp.gate_proj"] = "layer_{i}/mlp/gating_einsum[0/2]"
    pairs[f"{layer}.mlp.up_proj"] = "layer_{i}/mlp/gating_einsum[1/2]"
    pairs[f"{layer}.mlp.down_proj"] = "layer_{i}/mlp/linear"
    layouts = {
        f"{attn}/q_einsum/w": Layout((), (1,), (0, 2)),
        f"{attn}/kv_einsum/w": Layout((), (2,), (0, 1, 3)),
        f"{attn}/qkv_einsum/w": Layout((), (2,), (0, 1, 3)),
        f"{attn}/attn_vec_einsum/w": _OUT,
        "layer_{i}/mlp/linear": Layout((), (0,), (1,)),
    }
    return pairs, layouts


def _examples(family: str) -> tuple[dict[str, str], dict[str, Layout]]:
    if family != "llama":
        raise error("the examples have a Llama.", got=family, do='tree="flax".')
    pairs = {"model.embed_tokens": "params/embed/embedding", "model.norm": "params/norm/scale"}
    layer, layouts = "model.layers.{i}", {}
    for x in "qkvo":
        pairs[f"{layer}.self_attn.{x}_proj"] = f"params/layers/attn/{x}/kernel"
    for x in ("gate", "up", "down"):
        pairs[f"{layer}.mlp.{x}_proj"] = f"params/layers/mlp/{x}/kernel"
    layouts = {path: Layout((0,), (1,), (2,)) for path in pairs.values() if path.endswith("kernel")}
    pairs[f"{layer}.input_layernorm"] = "params/layers/attn_norm/scale"
    pairs[f"{layer}.post_attention_layernorm"] = "params/layers/mlp_norm/scale"
    return pairs, layouts
