"""Families of models as tables of names, of which `lorax_fn.interop.presets` makes mappings.

Each line is a kind and names of torch modules: ``k`` a Linear, ``c`` GPT-2's Conv1D, ``v`` a convolution,
``e`` an embedding, ``E`` one whose name does not say so, ``s`` a norm whose weight Flax calls scale, ``w``
one that is called weight, ``p`` a bare parameter, ``b`` a bias without a weight of its own, ``x`` experts,
each of them a Linear there and all of them one leaf here. ``(q|k)`` stands for either name.
"""

_DECODER = """
e model.embed_tokens
k model.layers.{i}.self_attn.(q|k|v|o)_proj
w model.layers.{i}.(input_layernorm|post_attention_layernorm)
w model.norm
k (lm_head|score)
"""
_GATED = f"{_DECODER}k model.layers.{{i}}.mlp.(gate|up|down)_proj\n"
_QK_NORMS = "w model.layers.{i}.self_attn.(q|k)_norm\n"
_MORE_NORMS = "w model.layers.{i}.(pre|post)_feedforward_layernorm\n"
_QWEN_EXPERTS = """k model.layers.{i}.mlp.gate
x model.layers.{i}.mlp.experts.{e}.(gate|up|down)_proj
"""

_BERT = """
e {name}.embeddings.(word|position|token_type)_embeddings
s {name}.embeddings.LayerNorm
k {name}.encoder.layer.{i}.attention.self.(query|key|value)
k {name}.encoder.layer.{i}.(attention.output|intermediate|output).dense
s {name}.encoder.layer.{i}.(attention.output|output).LayerNorm
k {name}.pooler.dense
k (classifier|qa_outputs)
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
v (down|up)_blocks.{i}.resnets.{j}.(conv1|conv2|conv_shortcut)
v (down_blocks.{i}.downsamplers|up_blocks.{i}.upsamplers).0.conv
v mid_block.resnets.{j}.(conv1|conv2)
k {block}.resnets.{j}.time_emb_proj
s {block}.resnets.{j}.(norm1|norm2)
s {block}.attentions.{j}.norm
v {block}.attentions.{j}.(proj_in|proj_out)
k {block}.attentions.{j}.transformer_blocks.{k}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
k {block}.attentions.{j}.transformer_blocks.{k}.(ff.net.0.proj|ff.net.2)
s {block}.attentions.{j}.transformer_blocks.{k}.(norm1|norm2|norm3)
""".replace("{block}", "(down_blocks.{i}|up_blocks.{i}|mid_block)")

FAMILIES = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED + _QK_NORMS,
    "gemma": _GATED,
    "gemma2": _GATED + _MORE_NORMS,
    "gemma3": _GATED + _QK_NORMS + _MORE_NORMS,
    "mixtral": _DECODER
    + """k model.layers.{i}.block_sparse_moe.gate
x model.layers.{i}.block_sparse_moe.experts.{e}.(w1|w2|w3)
""",
    "qwen2_moe": _DECODER
    + _QWEN_EXPERTS
    + """k model.layers.{i}.mlp.shared_expert.(gate|up|down)_proj
k model.layers.{i}.mlp.shared_expert_gate
k model.layers.{i}.mlp.(gate|up|down)_proj
""",
    "qwen3_moe": _GATED + _QK_NORMS + _QWEN_EXPERTS,
    "phi": """
e model.embed_tokens
k model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|dense)
k model.layers.{i}.mlp.(fc1|fc2)
s model.layers.{i}.self_attn.(q|k)_layernorm
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
s transformer.h.{i}.(ln_1|ln_2|ln_cross_attn)
c transformer.h.{i}.attn.(c_attn|c_proj)
c transformer.h.{i}.crossattention.(q_attn|c_attn|c_proj)
c transformer.h.{i}.mlp.(c_fc|c_proj)
s transformer.ln_f
k (lm_head|score)
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
k (cls.predictions.transform.dense|cls.predictions.decoder|cls.seq_relationship)
s cls.predictions.transform.LayerNorm
b cls.predictions
""",
    "roberta": _BERT.replace("{name}", "roberta")
    + """
k (lm_head.dense|lm_head.decoder|classifier.dense|classifier.out_proj)
s lm_head.layer_norm
b lm_head
""",
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

# Where the modules of transformers 5, whose names its adapters bear, are not those of its own checkpoints.
RENAMED = {
    "vit": {
        "vit.encoder.layer.": "vit.layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    },
    "mixtral": {
        "block_sparse_moe": "mlp",
        "experts.{e}.w1": "experts.gate_up_proj=[0/2]",
        "experts.{e}.w3": "experts.gate_up_proj=[1/2]",
        "experts.{e}.w2": "experts.down_proj=",
    },
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe"),
        {
            "experts.{e}.gate_proj": "experts.gate_up_proj=[0/2]",
            "experts.{e}.up_proj": "experts.gate_up_proj=[1/2]",
            "experts.{e}.down_proj": "experts.down_proj=",
        },
    ),
}
