"""Mappings for families of models, as tables of names; `preset` puts one together for a kind of tree.

Each line of a family is a kind and names of torch modules: ``k`` a Linear, ``c`` GPT-2's Conv1D, ``v`` a
convolution, ``e`` an embedding, ``E`` one whose name does not say so, ``s`` a norm whose weight Flax calls
scale, ``w`` one that is called weight, ``p`` a bare parameter, ``b`` a bias without a weight of its own.
``(q|k)`` stands for either. A tree of transformers' Flax models has the same names with ``/`` between them.
"""

import itertools
import re

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop.places import Preset

_GATED = """
e model.embed_tokens
k model.layers.{i}.self_attn.(q|k|v|o)_proj
w model.layers.{i}.self_attn.(q|k)_norm
k model.layers.{i}.mlp.(gate|up|down)_proj
w model.layers.{i}.(input_layernorm|post_attention_layernorm)
w model.layers.{i}.(pre|post)_feedforward_layernorm
w model.norm
k lm_head
"""

_BERT = """
e {name}.embeddings.(word|position|token_type)_embeddings
s {name}.embeddings.LayerNorm
k {name}.encoder.layer.{i}.attention.self.(query|key|value)
k {name}.encoder.layer.{i}.(attention.output|intermediate|output).dense
s {name}.encoder.layer.{i}.(attention.output|output).LayerNorm
k {name}.pooler.dense
k (classifier|qa_outputs|classifier.dense|classifier.out_proj)
"""

_CLIP = """
e text_model.embeddings.(token|position)_embedding
p vision_model.embeddings.class_embedding
v vision_model.embeddings.patch_embedding
e vision_model.embeddings.position_embedding
k (text|vision)_model.encoder.layers.{i}.self_attn.(q|k|v|out)_proj
k (text|vision)_model.encoder.layers.{i}.mlp.(fc1|fc2)
s (text|vision)_model.encoder.layers.{i}.(layer_norm1|layer_norm2)
s (text_model.final_layer_norm|vision_model.pre_layrnorm|vision_model.post_layernorm)
k (visual|text)_projection
p logit_scale
"""

_UNET = """
v (conv_in|conv_out)
s conv_norm_out
k (time_embedding|add_embedding).(linear_1|linear_2)
v {part}_blocks.{i}.resnets.{j}.(conv1|conv2|conv_shortcut)
k {part}_blocks.{i}.resnets.{j}.time_emb_proj
s {part}_blocks.{i}.resnets.{j}.(norm1|norm2)
v {part}_blocks.{i}.(down|up)samplers.0.conv
s {part}_blocks.{i}.attentions.{j}.norm
k {part}_blocks.{i}.attentions.{j}.(proj_in|proj_out)
k {part}_blocks.{i}.attentions.{j}.transformer_blocks.{k}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
k {part}_blocks.{i}.attentions.{j}.transformer_blocks.{k}.(ff.net.0.proj|ff.net.2)
s {part}_blocks.{i}.attentions.{j}.transformer_blocks.{k}.(norm1|norm2|norm3)
v mid_block.resnets.{j}.(conv1|conv2)
k mid_block.resnets.{j}.time_emb_proj
s mid_block.resnets.{j}.(norm1|norm2)
s mid_block.attentions.{j}.norm
k mid_block.attentions.{j}.(proj_in|proj_out)
k mid_block.attentions.{j}.transformer_blocks.{k}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
k mid_block.attentions.{j}.transformer_blocks.{k}.(ff.net.0.proj|ff.net.2)
s mid_block.attentions.{j}.transformer_blocks.{k}.(norm1|norm2|norm3)
"""

FAMILIES = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,
    "phi": """
e model.embed_tokens
k model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|dense)
k model.layers.{i}.mlp.(fc1|fc2)
s model.layers.{i}.input_layernorm
s model.final_layernorm
k lm_head
""",
    "phi3": """
e model.embed_tokens
k model.layers.{i}.self_attn.(qkv_proj|o_proj)
k model.layers.{i}.mlp.(gate_up_proj|down_proj)
w model.layers.{i}.(input_layernorm|post_attention_layernorm)
w model.norm
k lm_head
""",
    "gpt2": """
e transformer.(wte|wpe)
s transformer.h.{i}.(ln_1|ln_2)
c transformer.h.{i}.attn.(c_attn|c_proj)
c transformer.h.{i}.mlp.(c_fc|c_proj)
s transformer.ln_f
k lm_head
""",
    "opt": """
e model.decoder.(embed_tokens|embed_positions)
s model.decoder.final_layer_norm
k model.decoder.(project_in|project_out)
k model.decoder.layers.{i}.self_attn.(q|k|v|out)_proj
k model.decoder.layers.{i}.(fc1|fc2)
s model.decoder.layers.{i}.(self_attn_layer_norm|final_layer_norm)
k lm_head
""",
    "bert": _BERT.replace("{name}", "bert")
    + """
k cls.predictions.(transform.dense|decoder)
s cls.predictions.transform.LayerNorm
b cls.predictions
""",
    "roberta": _BERT.replace("{name}", "roberta")
    + "k lm_head.(dense|decoder)\ns lm_head.layer_norm\nb lm_head",
    "t5": """
E shared
k (encoder|decoder).block.{i}.layer.0.SelfAttention.(q|k|v|o)
E (encoder|decoder).block.{i}.layer.0.SelfAttention.relative_attention_bias
k decoder.block.{i}.layer.1.EncDecAttention.(q|k|v|o)
k encoder.block.{i}.layer.1.DenseReluDense.(wi|wi_0|wi_1|wo)
k decoder.block.{i}.layer.2.DenseReluDense.(wi|wi_0|wi_1|wo)
w (encoder|decoder).block.{i}.layer.{j}.layer_norm
w (encoder|decoder).final_layer_norm
k lm_head
""",
    "vit": """
p vit.embeddings.(cls_token|position_embeddings)
v vit.embeddings.patch_embeddings.projection
k vit.encoder.layer.{i}.attention.attention.(query|key|value)
k vit.encoder.layer.{i}.(attention.output|intermediate|output).dense
s vit.encoder.layer.{i}.layernorm_(before|after)
s vit.layernorm
k classifier
""",
    "clip": _CLIP,
    "whisper": """
v model.encoder.(conv1|conv2)
e model.(encoder|decoder).embed_positions
e model.decoder.embed_tokens
k model.(encoder|decoder).layers.{i}.self_attn.(q|k|v|out)_proj
k model.decoder.layers.{i}.encoder_attn.(q|k|v|out)_proj
k model.(encoder|decoder).layers.{i}.(fc1|fc2)
s model.(encoder|decoder).layers.{i}.(self_attn_layer_norm|final_layer_norm)
s model.decoder.layers.{i}.encoder_attn_layer_norm
s model.(encoder|decoder).layer_norm
k proj_out
""",
    "unet": _UNET,
    "flux": """
k (x_embedder|context_embedder|proj_out|norm_out.linear)
k time_text_embed.(timestep_embedder|text_embedder|guidance_embedder).(linear_1|linear_2)
k transformer_blocks.{i}.(norm1.linear|norm1_context.linear)
k transformer_blocks.{i}.attn.(to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)
w transformer_blocks.{i}.attn.(norm_q|norm_k|norm_added_q|norm_added_k)
k transformer_blocks.{i}.(ff|ff_context).(net.0.proj|net.2)
k single_transformer_blocks.{i}.(norm.linear|proj_mlp|proj_out)
k single_transformer_blocks.{i}.attn.(to_q|to_k|to_v)
w single_transformer_blocks.{i}.attn.(norm_q|norm_k)
""",
}
SAME = {"sd": "unet", "sdxl": "unet", "llama3": "llama"}

_GEMMA_NORMS = {
    "gemma": {"post_attention_layernorm": "pre_ffw_norm"},
    "gemma2": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_LEAF = {
    "k": "kernel",
    "c": "kernel",
    "v": "kernel",
    "e": "embedding",
    "E": "embedding",
    "s": "scale",
    "w": "weight",
}
_HEADS = Layout((), (0,), (1, 2))  # (D, H, d)
_OUT = Layout((), (0, 1), (2,))  # (H, d, D)


def preset(family: str, tree: str = "flax", *, prefix: str = "") -> Preset:
    """A mapping for a family of models and a kind of tree.

    Args:
      family: ``"llama"``, ``"mistral"``, ``"qwen2"``, ``"qwen3"``, ``"gemma"``, ``"gemma2"``, ``"gemma3"``,
        ``"phi"``, ``"phi3"``, ``"gpt2"``, ``"opt"``, ``"bert"``, ``"roberta"``, ``"t5"``, ``"vit"``,
        ``"clip"``, ``"whisper"``, ``"unet"`` (SD and SDXL) or ``"flux"``.
      tree: ``"flax"``: torch's names with ``/``, and ``kernel``, ``embedding`` or ``scale`` last, as the Flax
        models of transformers and diffusers have; ``"tunix"``: google-tunix; ``"gemma"``: google-deepmind's
        gemma; ``"examples"``: the scanned Llama of this repository's examples.
      prefix: what stands before every path, such as ``"params/"``.

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
    if family not in FAMILIES or tree not in makers:
        raise error(
            "there is no such preset.",
            got=f"preset({family!r}, {tree!r})",
            want=f"a family of {', '.join(sorted(FAMILIES))}; a tree of {', '.join(makers)}",
            do="write the pairs yourself: ten lines of {module: path} do for most models.",
        )
    pairs, layouts = makers[tree](family)
    found = {name: prefix + path for name, path in pairs.items()}
    return Preset(found, {prefix + path: layout for path, layout in layouts.items()})


def _flax(family: str) -> tuple[dict[str, str], dict[str, Layout]]:
    pairs, layouts = {}, {}
    for line in FAMILIES[family].replace("{part}", "(down|up)").split("\n"):
        if not line:
            continue
        kind, _, text = line.partition(" ")
        for name in _alternatives(text):
            path = name.replace(".", "/")
            if kind == "b":
                pairs[f"{name}.bias"] = f"{path}/bias"
            elif kind == "p":
                pairs[f"{name}="] = path
            else:
                mark = {"c": "^T", "E": "^E"}.get(kind, "")
                pairs[name + mark] = f"{path}/{_LEAF[kind]}"
            if kind == "v":
                layouts[f"{path}/kernel"] = Layout((), (0, 1, 2), (3,))
                if family == "whisper":
                    layouts[f"{path}/kernel"] = Layout((), (0, 1), (2,))
    return pairs, layouts


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
    pairs[f"{layer}.self_attn.o_proj"] = f"{attn}/attn_vec_einsum/w"
    pairs[f"{layer}.self_attn.q_norm"] = f"{attn}/_query_norm/scale"
    pairs[f"{layer}.self_attn.k_norm"] = f"{attn}/_key_norm/scale"
    pairs[f"{layer}.mlp.gate_proj"] = "layer_{i}/mlp/gating_einsum[0/2]"
    pairs[f"{layer}.mlp.up_proj"] = "layer_{i}/mlp/gating_einsum[1/2]"
    pairs[f"{layer}.mlp.down_proj"] = "layer_{i}/mlp/linear"
    layouts = {
        f"{attn}/q_einsum/w": Layout((), (1,), (0, 2)),
        f"{attn}/kv_einsum/w": Layout((), (2,), (0, 1, 3)),
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
