"""Llama 3, Qwen 3 and Gemma of google-tunix (Flax NNX), unchanged; in an environment of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import check_tree
from flax import nnx
from flops import RANK, check_flops
from merged_oracle import check_model

import lorax_fn as lx

pytestmark = [
    pytest.mark.extra_env,
    # The models' own code, and what google-tunix imports, is not held to this repository's warnings.
    pytest.mark.filterwarnings("ignore"),
]

DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 16, 24, 4, 2, 8, 19, 2
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)


def check(fn, params, args, layouts, targets=None):
    check_model(fn, params, args, layouts, targets)
    check_flops(fn, lx.split(params, rank=RANK, targets=targets, layout=layouts)[1], params, args)


@pytest.fixture(autouse=True)
def loose_promotion():
    """These models add int32 to float32 and other ranks, which this repository's own code may not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def tunix(family: str, config: dict, name: str, **arguments) -> tuple:
    """``(fn, params, args)`` of one model; the test is skipped where google-tunix is not installed."""
    module = pytest.importorskip(
        f"tunix.models.{family}.model",
        reason="google-tunix is not installed: make test-extra",
        exc_type=ImportError,
    )
    config = {key: value(module) if callable(value) else value for key, value in config.items()}
    config = module.ModelConfig(**config)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: getattr(module, name)(config, rngs=nnx.Rngs(0))))
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    mask = np.broadcast_to(np.tril(np.ones((TOKENS.shape[1],) * 2, bool)), (2, 5, 5))

    def logits(state, tokens):
        return nnx.merge(graphdef, state)(tokens, jnp.asarray(positions), None, jnp.asarray(mask))[0]

    return logits, state, (TOKENS,)


SIZES = dict(
    num_layers=LAYERS,
    embed_dim=DIM,
    hidden_dim=HIDDEN,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_kv_heads=KV_HEADS,
)
ROPE = dict(vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6)


def inputs_first(ndim: int) -> lx.Layout:
    return lx.Layout((), (0,), tuple(range(1, ndim)))


PROJECTIONS = {
    **{f"attn/{name}_proj/w": inputs_first(3) for name in "qkv"},
    "attn/o_proj/w": lx.Layout((), (0, 1), (2,)),
}
MLP = {f"mlp/{name}_proj/kernel": inputs_first(2) for name in ("gate", "up", "down")}
EMBEDDING = {"embedder/input_embedding": inputs_first(2)}


def in_layers(layouts: dict) -> dict:
    return {f"layers/{i}/{path}": layout for i in range(LAYERS) for path, layout in layouts.items()}


def remat(module):
    return module.RematConfig.BLOCK


@pytest.mark.parametrize("tied", [True, False])
def test_llama3(tied):
    model = tunix("llama3", SIZES | ROPE | dict(weight_tying=tied, remat_config=remat), "Llama3")
    layouts = in_layers(PROJECTIONS | MLP)
    assert len(layouts) == 14
    check(*model, layouts)
    with pytest.raises(lx.LoraError, match=r"(?s)is open.*layers/0/attn/q_proj/w.*usage"):
        lx.split(model[1], rank=2)
    head = {} if tied else {"lm_head/w": inputs_first(2)}
    check(*model, layouts | EMBEDDING | head, targets=["layers", "embedder", *(["lm_head"] if head else [])])


def test_qwen3():
    model = tunix("qwen3", SIZES | ROPE | dict(use_tied_embedding=True), "Qwen3")
    check(*model, in_layers(PROJECTIONS | MLP) | EMBEDDING, targets=["layers", "embedder"])


def test_qwen3_mixture_of_experts():
    config = SIZES | ROPE | dict(num_experts=3, num_experts_per_tok=2)
    model = tunix("qwen3", config, "Qwen3")
    experts = {f"mlp/{name}_proj": lx.Layout((0,), (1,), (2,)) for name in ("gate", "up", "down")}
    layouts = in_layers(PROJECTIONS | experts | {"mlp/router/kernel": inputs_first(2)})
    assert len(layouts) == 16
    check(*model, layouts)


GEMMA = SIZES | dict(
    num_embed=VOCAB,
    final_logit_softcap=30.0,
    attn_logits_soft_cap=50.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    sliding_window_size=3,
    attention_types=lambda module: (module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL),
)


@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_gemma(kv_heads):
    """With as many key heads as query heads, q, k and v are one weight [3, n, d, h]."""
    model = tunix("gemma", GEMMA | dict(num_kv_heads=kv_heads), "Gemma")
    out = {"attn/attn_vec_einsum/w": lx.Layout((), (0, 1), (2,))}
    if kv_heads == HEADS:
        attention = {"attn/qkv_einsum/w": lx.Layout((), (2,), (0, 1, 3))}
    else:
        attention = {
            "attn/q_einsum/w": lx.Layout((), (1,), (0, 2)),
            "attn/kv_einsum/w": lx.Layout((), (2,), (0, 1, 3)),
        }
    check(*model, in_layers(attention | out | MLP) | EMBEDDING, targets=["layers", "embedder"])


GEMMA_1 = SIZES | dict(
    num_embed=VOCAB, final_logit_softcap=None, use_post_attn_norm=False, use_post_ffw_norm=False,
    attention_types=lambda module: (module.AttentionType.GLOBAL,) * 2,
)  # fmt: skip
LLAMA = SIZES | dict(vocab_size=VOCAB, rope_theta=1_000_000, norm_eps=1e-6)
PRESETS = {
    "llama": ("llama3", LLAMA | dict(weight_tying=False), "Llama3"),
    "llama tied": ("llama3", LLAMA | dict(weight_tying=True), "Llama3"),
    "qwen3": ("qwen3", LLAMA | dict(use_tied_embedding=True), "Qwen3"),
    "gemma": ("gemma", GEMMA_1 | dict(num_kv_heads=1), "Gemma"),
    "gemma with as many keys": ("gemma", GEMMA_1 | dict(num_kv_heads=HEADS), "Gemma"),
    "gemma2": ("gemma", GEMMA, "Gemma"),
    "gemma2 with as many keys": ("gemma", GEMMA | dict(num_kv_heads=HEADS), "Gemma"),
    "gemma3": (
        "gemma3",
        SIZES | dict(num_embed=VOCAB, sliding_window_size=3, param_dtype=np.dtype("float32")),
        "Gemma3",
    ),
}


@pytest.mark.parametrize("case", PRESETS)
def test_the_preset_fills_the_model_with_a_checkpoint_of_transformers(case, tmp_path):
    logits, state, _ = tunix(*PRESETS[case])
    check_tree(case, "tunix", state, "", lambda params: logits(params, TOKENS), tmp_path)
