"""Tiny random models of transformers and diffusers, one or more for every family that has a preset."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-peft", exc_type=ImportError)
hf = pytest.importorskip(
    "transformers", reason="transformers is not installed: make test-peft", exc_type=ImportError
)

D, F, H, K, V, L = 16, 24, 4, 2, 19, 2
SIZES = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, vocab_size=V)
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = {k: v for k, v in SIZES.items() if k != "vocab_size"} | dict(image_size=8, patch_size=4)
SHORT = dict(max_position_embeddings=12)
FOUR = dict(head_dim=4)
MOE = dict(num_key_value_heads=K, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)

SHARED = MOE | dict(shared_expert_intermediate_size=12)


def lm(kind, head="ForCausalLM", **options):
    config = getattr(hf, f"{kind}Config")(**SIZES, **ENDS, **{"num_key_value_heads": K} | options)
    return getattr(hf, kind + head)(config)


def plain(kind, head, **options):
    return getattr(hf, kind + head)(getattr(hf, f"{kind}Config")(**options))


def bert(kind, head, **options):
    return plain(kind, head, **SIZES, **SHORT, **ENDS, **options)


def gpt2(head, **options):
    sizes = dict(n_embd=D, n_layer=L, n_head=H, vocab_size=V, n_positions=16)
    return plain("GPT2", head, **sizes, **ENDS, **options)


def t5(**options):
    sizes = dict(d_model=D, d_ff=F, d_kv=4, num_layers=L, num_heads=H, vocab_size=V, decoder_start_token_id=0)
    return plain("T5", "ForConditionalGeneration", **sizes, **options)


def opt(**options):
    sizes = dict(hidden_size=D, ffn_dim=F, num_hidden_layers=L, num_attention_heads=H, vocab_size=V)
    return plain("OPT", "ForCausalLM", **sizes, **SHORT, **ENDS, **options)


def whisper():
    sides = {f"{side}_{n}": x for side in ("encoder", "decoder")
             for n, x in (("layers", L), ("attention_heads", H), ("ffn_dim", F))}  # fmt: skip
    sizes = dict(vocab_size=V, d_model=D, num_mel_bins=6, max_source_positions=10, max_target_positions=12)
    return plain("Whisper", "ForConditionalGeneration", **sizes, **sides, **ENDS, decoder_start_token_id=1)


def clip():
    text, vision = SIZES | SHORT | ENDS | dict(projection_dim=8), VISION | dict(projection_dim=8)
    return plain("CLIP", "Model", text_config=text, vision_config=vision, projection_dim=8)


def gemma3(**options):
    sizes = SIZES | ENDS | FOUR | dict(num_key_value_heads=K) | options
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))


def gemma3_with_images():
    text = SIZES | ENDS | FOUR | dict(num_key_value_heads=K)
    sizes = dict(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return plain("Gemma3", "ForConditionalGeneration", **sizes)


def unet(**options):
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), cross_attention_dim=8
    )
    return diffusers.UNet2DConditionModel(**sizes, **options)


SD = dict(
    layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
)  # fmt: skip
SDXL = dict(
    layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=40,
)  # fmt: skip


def flux():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


MODELS = {  # family: its variants, which together have every name of its preset
    "llama": [
        lambda: lm("Llama"),
        lambda: lm("Llama", "ForSequenceClassification", attention_bias=True, mlp_bias=True),
    ],
    "mistral": [lambda: lm("Mistral", **FOUR), lambda: lm("Mistral", "ForSequenceClassification", **FOUR)],
    "qwen2": [lambda: lm("Qwen2"), lambda: lm("Qwen2", "ForSequenceClassification")],
    "qwen3": [lambda: lm("Qwen3", **FOUR), lambda: lm("Qwen3", "ForSequenceClassification", **FOUR)],
    "gemma": [
        lambda: lm("Gemma", **FOUR),
        lambda: lm("Gemma", **FOUR, tie_word_embeddings=False),
        lambda: lm("Gemma", "ForSequenceClassification", **FOUR),
    ],
    "gemma2": [
        lambda: lm("Gemma2", **FOUR),
        lambda: lm("Gemma2", **FOUR, tie_word_embeddings=False),
        lambda: lm("Gemma2", "ForSequenceClassification", **FOUR),
    ],
    "gemma3": [
        gemma3,
        lambda: gemma3(tie_word_embeddings=False),
        lambda: hf.Gemma3TextForSequenceClassification(gemma3().config),
    ],
    "mixtral": [
        lambda: lm("Mixtral", num_local_experts=3),
        lambda: lm("Mixtral", "ForSequenceClassification", num_local_experts=3),
    ],
    "qwen2_moe": [
        lambda: lm("Qwen2Moe", **SHARED, mlp_only_layers=[1]),
        lambda: lm("Qwen2Moe", "ForSequenceClassification", **SHARED),
    ],
    "qwen3_moe": [
        lambda: lm("Qwen3Moe", **MOE, **FOUR, mlp_only_layers=[1]),
        lambda: lm("Qwen3Moe", "ForSequenceClassification", **MOE, **FOUR),
    ],
    "phi": [lambda: lm("Phi"), lambda: lm("Phi", qk_layernorm=True)],
    "phi3": [lambda: lm("Phi3")],
    "gpt2": [
        lambda: gpt2("LMHeadModel"),
        lambda: gpt2("LMHeadModel", add_cross_attention=True, tie_word_embeddings=False),
        lambda: gpt2("ForSequenceClassification"),
    ],
    "opt": [
        lambda: opt(),
        lambda: opt(word_embed_proj_dim=8, tie_word_embeddings=False),
    ],
    "bert": [
        lambda: bert("Bert", "ForMaskedLM"),
        lambda: bert("Bert", "ForPreTraining"),
        lambda: bert("Bert", "ForSequenceClassification"),
        lambda: bert("Bert", "ForQuestionAnswering"),
        lambda: bert("Bert", "ForMaskedLM", tie_word_embeddings=False),
    ],
    "roberta": [
        lambda: bert("Roberta", "ForMaskedLM"),
        lambda: bert("Roberta", "ForMaskedLM", tie_word_embeddings=False),
        lambda: bert("Roberta", "ForSequenceClassification"),
        lambda: bert("Roberta", "ForTokenClassification"),
        lambda: bert("Roberta", "ForQuestionAnswering"),
        lambda: bert("Roberta", "ForMultipleChoice"),
    ],
    "t5": [lambda: t5(), lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)],
    "vit": [lambda: plain("ViT", "ForImageClassification", **VISION)],
    "clip": [clip],
    "whisper": [whisper],
    "unet": [lambda: unet(**SD), lambda: unet(**SDXL)],
    "flux": [flux],
}
# Heads of their own in older checkpoints, which transformers ties now in any case.
OLDER = {"t5": {"lm_head"}, "whisper": {"proj_out"}}


def model_of(make):
    """A model in eval mode, whose numbers all differ."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return model
