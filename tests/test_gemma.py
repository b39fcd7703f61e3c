"""The transformer of google-deepmind's gemma (Flax Linen), unchanged; in an environment of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import check_tree
from flops import RANK, check_flops
from merged_oracle import check_model

import lorax_fn as lx

pytestmark = [
    pytest.mark.extra_env,
    # The model's own code, and what gemma imports, is not held to this repository's warnings.
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
HEADS, LAYERS = 4, 2


def check(fn, params, args, layouts, targets=None):
    check_model(fn, params, args, layouts, targets)
    check_flops(fn, lx.split(params, rank=RANK, targets=targets, layout=layouts)[1], params, args)


@pytest.fixture(autouse=True)
def loose_promotion():
    """The model adds int32 to float32 and other ranks, which this repository's own code may not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def transformer(kv_heads: int, transposed: bool, **options) -> tuple:
    gm = pytest.importorskip(
        "gemma.gm", reason="gemma is not installed: make test-extra", exc_type=ImportError
    )
    kinds = gm.nn.AttentionType
    sizes = dict(
        num_embed=19, embed_dim=16, hidden_dim=24, num_heads=HEADS, head_dim=8, num_kv_heads=kv_heads,
        final_logit_softcap=30.0, attn_logits_soft_cap=50.0, use_post_attn_norm=True, use_post_ffw_norm=True,
        use_qk_norm=True, sliding_window_size=3, transpose_gating_einsum=transposed,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
    )  # fmt: skip
    options = {key: value(kinds) if callable(value) else value for key, value in options.items()}
    config = gm.nn.config.TransformerConfig(**sizes | options)
    model = gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return lambda params, tokens: model.apply(params, tokens).logits, params, (TOKENS,)


@pytest.mark.parametrize(("kv_heads", "transposed"), [(2, True), (HEADS, False)])
def test_gemma(kv_heads, transposed):
    """With as many key heads as query heads, q, k and v are one weight [3, n, d, h]."""
    fn, params, args = transformer(kv_heads, transposed)
    layer = {
        "attn/attn_vec_einsum/w": lx.Layout((), (0, 1), (2,)),
        "mlp/gating_einsum": lx.Layout((), (2,), (0, 1)) if transposed else lx.Layout((), (1,), (0, 2)),
        "mlp/linear": lx.Layout((), (0,), (1,)),
    }
    if kv_heads == HEADS:
        layer |= {"attn/qkv_einsum/w": lx.Layout((), (2,), (0, 1, 3))}
    else:
        layer |= {
            "attn/q_einsum/w": lx.Layout((), (1,), (0, 2)),
            "attn/kv_einsum/w": lx.Layout((), (2,), (0, 1, 3)),
        }
    layouts = {f"params/layer_{i}/{path}": layout for i in range(LAYERS) for path, layout in layer.items()}
    assert len(layouts) == (10 if kv_heads < HEADS else 8)
    check(fn, params, args, layouts)
    embedding = {"params/embedder/input_embedding": lx.Layout((), (0,), (1,))}
    check(fn, params, args, layouts | embedding, targets=["layer_*", "embedder"])
    with pytest.raises(lx.LoraError, match=r"(?s)is open.*layer_0/attn/attn_vec_einsum/w.*usage"):
        lx.split(params, rank=2)


FIRST = dict(
    final_logit_softcap=None, attn_logits_soft_cap=None, use_post_attn_norm=False, use_post_ffw_norm=False,
    use_qk_norm=False, attention_types=lambda kinds: (kinds.GLOBAL, kinds.GLOBAL),
)  # fmt: skip
THIRD = dict(
    final_logit_softcap=None,
    attn_logits_soft_cap=None,
    attention_types=lambda kinds: (kinds.LOCAL_SLIDING, kinds.LOCAL_SLIDING),
)
PRESETS = [  # case, number of key heads, whether the gate is (2, hidden, width), and the rest of the config
    ("gemma", 1, False, FIRST),
    ("gemma with as many keys", HEADS, False, FIRST),
    ("gemma2", 2, False, dict(use_qk_norm=False)),
    ("gemma2", 2, True, dict(use_qk_norm=False)),
    ("gemma2 with as many keys", HEADS, True, dict(use_qk_norm=False)),
    ("gemma3", 2, True, THIRD),
]


@pytest.mark.parametrize(("case", "kv_heads", "transposed", "options"), PRESETS)
def test_the_preset_fills_the_model_with_a_checkpoint_of_transformers(
    case, kv_heads, transposed, options, tmp_path
):
    fn, like, _ = transformer(kv_heads, transposed, **options)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), like)
    check_tree(case, "gemma", like, "params/", lambda params: fn(params, TOKENS), tmp_path)
