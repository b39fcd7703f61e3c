"""Default targets by the names of real models: every linear weight, and no embedding, norm or output head.

Each tree has one leaf of every kind that its model has, with the shapes scaled down. A leaf marked with ``+``
is to be adapted.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.whole import Full
from lorax_fn.splitting.split import split
from lorax_fn.targets.roles import classify
from lorax_fn.transform.usage import usage

V, D, F, L = 320, 32, 64, 3


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TREES = """
llama of Meta
    tok_embeddings.weight V,D; +layers.0.attention.wq.weight D,D;
    +layers.0.feed_forward.w1.weight F,D; layers.0.attention_norm.weight D; norm.weight D;
    output.weight V,D
llama for classes
    model.embed_tokens.weight V,D; +model.layers.0.self_attn.q_proj.weight D,D; score.weight 2,D
llama with a value head
    model.embed_tokens.weight V,D; +model.layers.0.mlp.up_proj.weight F,D; lm_head.weight V,D;
    v_head.summary.weight 1,D; v_head.summary.bias 1
llama of stacked layers
    embed_tokens.weight V,D; layers.input_layernorm.weight L,D; layers.attn_norm_pre.weight L,D;
    layers.norm_attn.weight L,D; layers.q_norm.weight L,D; layers.norm1.weight L,D;
    +x.q_proj.weight D,D
deepseek
    model.embed_tokens.weight V,D; +model.layers.0.self_attn.q_a_proj.weight 8,D;
    model.layers.0.self_attn.q_a_layernorm.weight 8;
    +model.layers.0.self_attn.kv_a_proj_with_mqa.weight 8,D; +model.layers.0.mlp.gate.weight 4,D;
    +model.layers.0.mlp.shared_experts.up_proj.weight F,D; +model.layers.1.eh_proj.weight D,F;
    model.layers.1.shared_head.head.weight V,D; lm_head.weight V,D
gemma 3n
    model.embed_tokens.weight V,D; model.embed_tokens_per_layer.weight V,D;
    +model.per_layer_model_projection.weight F,D; model.layers.0.pre_feedforward_layernorm.weight D;
    +model.layers.0.self_attn.q_proj.weight D,D
falcon
    transformer.word_embeddings.weight V,D; transformer.h.0.ln_attn.weight D; lm_head.weight V,D;
    +transformer.h.0.self_attention.query_key_value.weight F,D;
    +transformer.h.0.mlp.dense_h_to_4h.weight F,D
mpt
    transformer.wte.weight V,D; +transformer.blocks.0.attn.Wqkv.weight F,D;
    transformer.blocks.0.norm_1.weight D; transformer.norm_f.weight D
olmo
    transformer.wte.weight V,D; +transformer.blocks.0.ff_out.weight D,F;
    transformer.ff_out.weight V,D
bloom
    word_embeddings.weight V,D; word_embeddings_layernorm.weight D;
    word_embeddings_layernorm.bias D; +h.0.self_attention.dense.weight D,D;
    +h.0.self_attention.dense.bias D
gpt-neox
    gpt_neox.embed_in.weight V,D; embed_out.weight V,D;
    +gpt_neox.layers.0.attention.dense.weight D,D
chatglm
    transformer.embedding.word_embeddings.weight V,D;
    +transformer.encoder.layers.0.mlp.dense_4h_to_h.weight D,F; transformer.output_layer.weight V,D
mamba
    backbone.embeddings.weight V,D; +backbone.layers.0.mixer.in_proj.weight F,D;
    backbone.layers.0.mixer.A_log D,8; backbone.layers.0.mixer.conv1d.weight D,1,4;
    backbone.layers.0.mixer.conv1d.bias D; backbone.norm_f.weight D;
    +backbone.layers.0.mixer.dt_proj.weight F,8; lm_head.weight V,D
rwkv
    emb.weight V,D; +blocks.0.att.key.weight D,D; blocks.0.ln1.weight D;
    blocks.0.att.time_mix_k 1,1,D; head.weight V,D
t5
    shared.weight V,D; +encoder.block.0.layer.0.SelfAttention.q.weight D,D; lm_head.weight V,D;
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight 32,4;
    +decoder.block.0.layer.2.DenseReluDense.wi_0.weight F,D; encoder.final_layer_norm.weight D
bart
    model.shared.weight V,D; model.encoder.embed_positions.weight 128,D; final_logits_bias 1,V;
    +model.encoder.layers.0.self_attn.out_proj.weight D,D;
    +model.decoder.layers.0.encoder_attn.q_proj.weight D,D; classification_head.dense.weight D,D;
    classification_head.out_proj.weight 2,D; lm_head.weight V,D
bert
    embeddings.word_embeddings.weight V,D; embeddings.token_type_embeddings.weight 2,D;
    +encoder.layer.0.attention.self.query.weight D,D;
    +encoder.layer.0.attention.output.dense.weight D,D; +encoder.layer.0.output.dense.weight D,F;
    encoder.layer.0.output.LayerNorm.weight D; cls.predictions.decoder.weight V,D;
    cls.predictions.decoder.bias V; cls.seq_relationship.weight 2,D; qa_outputs.weight 2,D;
    classifier.weight 2,D
distilbert
    distilbert.embeddings.position_embeddings.weight 128,D; vocab_projector.weight V,D;
    +distilbert.transformer.layer.0.attention.q_lin.weight D,D
esm
    esm.embeddings.word_embeddings.weight 33,D; +esm.encoder.layer.0.attention.self.key.weight D,D;
    esm.contact_head.regression.weight 1,8; lm_head.dense.weight D,D; lm_head.decoder.weight 33,D
whisper
    model.decoder.embed_tokens.weight V,D; model.encoder.embed_positions.weight 128,D;
    proj_out.weight V,D; +model.decoder.layers.0.self_attn.k_proj.weight D,D;
    model.encoder.conv1.weight D,80,3; model.encoder.conv1.bias D
wav2vec2
    feature_extractor.conv_layers.0.conv.weight D,1,10; feature_projection.layer_norm.weight D;
    +feature_projection.projection.weight D,F; encoder.pos_conv_embed.conv.weight_v D,2,128;
    +encoder.layers.0.feed_forward.intermediate_dense.weight F,D; lm_head.weight 32,D
clip
    text_model.embeddings.token_embedding.weight V,D;
    vision_model.embeddings.patch_embedding.weight D,3,16,16;
    vision_model.embeddings.class_embedding D; vision_model.pre_layrnorm.weight D; logit_scale .;
    +vision_model.encoder.layers.0.self_attn.v_proj.weight D,D; +visual_projection.weight D,F
sam
    shared_image_embedding.positional_embedding 2,16; prompt_encoder.no_mask_embed.weight 1,D;
    prompt_encoder.point_embed.0.weight 1,D; +vision_encoder.layers.0.attn.qkv.weight F,D;
    +mask_decoder.transformer.layers.0.mlp.lin1.weight F,D;
    vision_encoder.layers.0.attn.rel_pos_h 27,8;
    mask_decoder.iou_prediction_head.proj_in.weight D,D
vit
    embeddings.cls_token 1,1,D; embeddings.patch_embeddings.projection.weight D,3,4,4;
    embeddings.patch_embeddings.projection.bias D;
    +encoder.layer.0.attention.attention.query.weight D,D; classifier.weight 10,D
vit of timm
    pos_embed 1,17,D; patch_embed.proj.weight D,3,4,4; patch_embed.proj.bias D;
    +blocks.0.attn.qkv.weight F,D; blocks.0.norm1.weight D; head.weight 10,D; head.bias 10
resnet and a projection
    conv1.weight 64,3,7,7; bn1.weight 64; layer1.0.conv1.weight 64,64,3,3;
    layer1.0.downsample.0.weight 64,32,1,1; fc.weight 10,64; fc.bias 10; +adapter.weight 8,64
flux
    x_embedder.weight D,16; +x_embedder.bias D; transformer_blocks.0.attn.norm_added_q.weight 16;
    transformer_blocks.attn.norm_q.weight L,16; +transformer_blocks.0.norm1.linear.weight F,D;
    proj_out.weight 16,D
dit
    x_embedder.proj.weight D,4,2,2; x_embedder.proj.bias D; +t_embedder.mlp.0.weight D,16;
    y_embedder.embedding_table.weight 11,D; +blocks.0.attn.qkv.weight F,D;
    +blocks.0.adaLN_modulation.1.weight F,D; final_layer.linear.weight 16,D
unet
    time_embedding.linear_1.weight F,D; +time_embedding.linear_1.bias F; conv_in.weight D,4,3,3;
    +down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight D,D;
    +down_blocks.0.attentions.0.proj_out.weight D,D; down_blocks.0.resnets.0.norm1.weight D
unet of ldm
    +time_embed.0.weight F,D; +time_embed.0.bias F; input_blocks.0.0.weight D,4,3,3
gpt-2 of Flax
    transformer/wte/embedding V,D; transformer/wpe/embedding 128,D; lm_head/kernel D,V;
    +transformer/h/0/attn/c_attn/kernel D,F; transformer/h/0/ln_1/scale D
t5x
    token_embedder/embedding V,D; decoder/relpos_bias/rel_embedding 4,32;
    decoder/logits_dense/kernel D,V; +decoder/layers_0/self_attention/query/kernel D,D;
    decoder/layers_0/pre_self_attention_layer_norm/scale D
big_vision
    params/embedding/kernel 4,4,3,D; params/embedding/bias D; params/pos_embedding 1,17,D;
    +params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel D,F; params/head/kernel D,10;
    params/head/bias 10
haiku
    transformer/embed/embeddings V,D; +transformer/attn/query/w D,D; transformer/attn/query/b D;
    transformer/layer_norm/scale D; lm_head/w D,V
tunix
    embedder/input_embedding V,D; +layers/0/mlp/gate_proj/kernel D,F; layers/0/input_layernorm/w D;
    lm_head/w D,V
"""


def trees():
    """``{name: (leaves, weights to adapt)}`` of `TREES`."""
    found = {}
    for name, text in re.findall(r"^(\S.*)\n((?:    .*\n)+)", TREES, re.MULTILINE):
        leaves, marked = {}, []
        for entry in text.replace("\n", " ").split(";"):
            if not entry.strip():
                continue
            path, shape = entry.strip().lstrip("+").split(" ")
            sizes = [] if shape == "." else [int(globals().get(size, size)) for size in shape.split(",")]
            leaves[path] = shaped(*sizes)
            marked += [path] if "+" in entry else []
        # A marked bias says that its weight is a projection, whatever the name.
        weights = {p.removesuffix("bias") + "weight" if p.endswith(".bias") else p for p in marked}
        found[name] = leaves, sorted(weights)
    return found


@pytest.mark.parametrize(("leaves", "weights"), trees().values(), ids=list(trees()))
def test_every_linear_weight_and_no_other(leaves, weights):
    assert sorted(split(leaves, rank=1)[1]) == weights
    assert sorted(split(leaves, rank=1, targets="all-linear")[1]) == weights


def test_the_table_is_read_whole():
    assert len(trees()) == 35 and sum(len(leaves) for leaves, _ in trees().values()) == TREES.count(";") + 35


def test_all_linear_stands_beside_other_patterns():
    params = {"q": {"kernel": shaped(4, 4)}, "lm_head": {"kernel": shaped(4, 9)}}
    _, lora = split(params, rank=1, targets=["all-linear", "lm_head"])
    assert sorted(lora) == ["lm_head/kernel", "q/kernel"]


def test_tables_are_told_by_their_use_where_usage_is_given():
    def fn(params, ids):
        rows = params["names"]["kernel"][ids]
        return (rows @ params["mix"]["kernel"]) @ params["names"]["kernel"].T

    params = {"names": {"kernel": jnp.ones((9, 4))}, "mix": {"kernel": jnp.ones((4, 4))}}
    assert sorted(split(params, rank=1)[1]) == ["mix/kernel", "names/kernel"]
    assert list(split(params, rank=1, layout=usage(fn, params, jnp.array([1])))[1]) == ["mix/kernel"]


# Too small for the rank -------------------------------------------------------------------------------

SMALL = {"q": {"kernel": shaped(64, 64)}, "gate": {"kernel": shaped(8, 1)}}


def test_what_cannot_take_the_rank_is_left_out_unless_it_is_named():
    assert list(split(SMALL, rank=16)[1]) == ["q/kernel"]
    assert list(split(SMALL, rank={"q": 4, "*": 8})[1]) == ["q/kernel"]
    for options in ({"targets": "kernel"}, {"rank": {"gate": 16, "*": 16}}):
        with pytest.raises(LoraError, match=r"(?s)larger.*path: +gate/kernel.*at most 1"):
            split(SMALL, **options)
    with pytest.raises(LoraError, match=r"(?s)larger.*gate/kernel.*q/kernel"):
        split(SMALL, rank=65)  # nothing would be left


# Running statistics -----------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(4)(x)))


def test_running_statistics_are_trained_only_by_their_whole_path():
    variables = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 5)))
    _, lora = split(variables, rank=1, full=["bn"])
    assert sorted(p for p, x in lora.items() if isinstance(x, Full)) == ["params/bn/bias", "params/bn/scale"]
    _, lora = split(variables, rank=1, full=["batch_stats/bn/mean"])
    assert isinstance(lora["batch_stats/bn/mean"], Full)
    with pytest.raises(LoraError, match=r"(?s)running statistics.*batch_stats/bn/mean.*whole path"):
        split(variables, rank=1, full=["batch_stats"])
    with pytest.raises(LoraError, match=r"(?s)names no weight.*a running statistic"):
        split(variables, rank=1, targets=["mean", "Dense_0"])


def test_state_of_nnx_is_known_by_its_variables():
    class Model(nnx.Module):
        def __init__(self):
            self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    _, lora = split(nnx.state(Model()), rank=1, full=["bn", "out/bias"])
    assert sorted(lora) == ["bn/bias", "bn/scale", "out/bias", "out/kernel"]


def test_integers_and_keys_beside_a_float_leaf_are_left_alone():
    params = {"head": {"bias": shaped(3), "count": shaped(dtype=jnp.int32), "key": jax.random.key(0)}}
    assert list(split(params, targets=(), full="head")[1]) == ["head/bias"]
    with pytest.raises(LoraError, match=r"(?s)not float.*head/count.*int32"):
        split(params, targets=(), full=["head/count", "head/bias"])


# Layouts stated beside a usage ------------------------------------------------------------------------


def test_the_first_stated_layout_wins_and_star_means_weights():
    params = {
        "attn": {"out": {"kernel": shaped(2, 4, 8)}},
        "mlp": {"weight": shaped(8, 6)},
        "norm": {"weight": shaped(8)},
    }
    layout = {"attn/out": Layout((), (0, 1), (2,)), "*": Layout((), (0,), (1,))}
    roles = classify(params, layout)
    assert roles["attn/out/kernel"].layout.inputs == (0, 1)
    assert roles["mlp/weight"].layout.inputs == (0,)
    with pytest.raises(LoraError, match=r"(?s)key of layout= decides nothing.*attn.*before it"):
        classify(params, {"*": Layout((), (0, 1), (2,)), "attn": Layout((), (0, 1), (2,))})
    with pytest.raises(LoraError, match=r"(?s)not a partition.*mlp/weight"):
        classify(params, {"attn/out": Layout((), (0, 1), (2,)), "mlp": Layout((0,), (1,), (2,))})


def test_a_float_weight_that_nothing_serves_is_not_told_to_be_cast():
    params = {"w": {"kernel": jnp.ones((3, 3))}, "v": {"kernel": jnp.ones((3, 3))}}
    used = usage(
        lambda p, x: jnp.sin(p["w"]["kernel"]).max() * x @ p["v"]["kernel"], params, jnp.ones((2, 3))
    )
    with pytest.raises(LoraError, match=r"(?s)cannot be adapted.*used by sin") as caught:
        split(params, rank=1, layout=used, targets=["w", "v"])
    advice = str(caught.value).split("do: ")[1]
    assert "cast" not in advice and "{**usage, 'w/kernel': lx.Layout(...)}" in advice
    stated = {**used, "w/kernel": Layout((), (0,), (1,))}
    assert sorted(split(params, rank=1, layout=stated, targets=["w", "v"])[1]) == ["v/kernel", "w/kernel"]
    with pytest.raises(LoraError, match=r"(?s)no weight to adapt.*do: +name them in targets=\.$"):
        split(params, rank=1, layout=usage(lambda p: jnp.sin(p["w"]["kernel"]), params))
    complexes = {"w": {"kernel": shaped(3, 3, dtype=jnp.complex64)}, "v": params["v"]}
    with pytest.raises(LoraError, match=r"(?s)complex64.*real and imaginary") as caught:
        split(complexes, rank=1, targets="kernel")
    assert "cast" not in str(caught.value)


def test_a_weight_that_no_gradient_reaches_is_no_target():
    def fn(params, x):
        x = jax.jit(lambda w, x: x @ w)(params["body"]["kernel"], x)
        jnp.tanh(x @ params["pooler"]["kernel"])
        frozen = jax.lax.stop_gradient(x @ params["teacher"]["kernel"])
        return x @ params["out"]["kernel"] + frozen

    params = {name: {"kernel": shaped(4, 4)} for name in ("body", "pooler", "teacher", "out")}
    used = usage(fn, params, shaped(2, 4))
    assert sorted(split(params, rank=1, layout=used)[1]) == ["body/kernel", "out/kernel"]
    with pytest.raises(LoraError, match=r"(?s)cannot be adapted.*teacher/kernel.*no gradient reaches it"):
        split(params, rank=1, layout=used, targets=["teacher", "out"])
    with pytest.raises(LoraError, match=r"(?s)names no weight.*pooler/kernel.*not used"):
        split(params, rank=1, layout=used, targets=["pooler", "out"])
