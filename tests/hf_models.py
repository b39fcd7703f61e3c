"""Tiny models of transformers, and the same in JAX on trees with the names of Flax: for these tests alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-peft", exc_type=ImportError)
hf = pytest.importorskip(
    "transformers", reason="transformers is not installed: make test-peft", exc_type=ImportError
)

D, F, H, K, V, L = 16, 24, 4, 2, 19, 2
SIZES = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, vocab_size=V)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int64)


def norm(x, scale, bias=None, eps=1e-6, center=False):
    x = x - x.mean(-1, keepdims=True) if center else x
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale
    return x if bias is None else x + bias


class Net:
    """Reads a tree by names, so that a layer is one line."""

    def __init__(self, params):
        self.p = params

    def dense(self, name, x):
        y = x @ self.p[f"{name}/kernel"]
        return y + self.p[f"{name}/bias"] if f"{name}/bias" in self.p else y

    def layer_norm(self, name, x, eps):
        return norm(x, self.p[f"{name}/scale"], self.p[f"{name}/bias"], eps, center=True)


def rope(x, theta=10000.0):
    d = x.shape[-1]
    angles = np.outer(np.arange(x.shape[1]), theta ** -(np.arange(0, d, 2) / d)).astype(np.float32)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v, causal, scale=None, bias=0.0):
    """``[B, T, H, d]`` each; grouped keys are repeated."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if causal:
        scores = jnp.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -1e30)
    y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return y.reshape(*y.shape[:2], -1)


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1)


def gated(params, tokens, family):
    """Llama, Qwen2 and Gemma."""
    net, gemma = Net(params), family == "gemma"

    def rms(name, x):
        scale = params[f"{name}/weight"]
        return norm(x, 1 + scale if gemma else scale)

    table = params["model/embed_tokens/embedding"]
    x = table[tokens] * (D**0.5 if gemma else 1.0)
    for i in range(L):
        at = f"model/layers/{i}"
        y = rms(f"{at}/input_layernorm", x)
        q, k, v = (net.dense(f"{at}/self_attn/{n}_proj", y) for n in "qkv")
        x = x + net.dense(
            f"{at}/self_attn/o_proj", attend(rope(heads(q, H)), rope(heads(k, K)), heads(v, K), True)
        )
        y = rms(f"{at}/post_attention_layernorm", x)
        act = jax.nn.gelu if gemma else jax.nn.silu
        y = act(net.dense(f"{at}/mlp/gate_proj", y)) * net.dense(f"{at}/mlp/up_proj", y)
        x = x + net.dense(f"{at}/mlp/down_proj", y)
    x = rms("model/norm", x)
    return x @ params["lm_head/kernel"] if "lm_head/kernel" in params else x @ table.T


def gpt2(params, tokens):
    net, table = Net(params), params["transformer/wte/embedding"]
    x = table[tokens] + params["transformer/wpe/embedding"][: tokens.shape[1]]
    for i in range(L):
        at = f"transformer/h/{i}"
        q, k, v = jnp.split(net.dense(f"{at}/attn/c_attn", net.layer_norm(f"{at}/ln_1", x, 1e-5)), 3, -1)
        x = x + net.dense(f"{at}/attn/c_proj", attend(heads(q, H), heads(k, H), heads(v, H), True))
        y = net.dense(f"{at}/mlp/c_fc", net.layer_norm(f"{at}/ln_2", x, 1e-5))
        x = x + net.dense(f"{at}/mlp/c_proj", jax.nn.gelu(y))
    return net.layer_norm("transformer/ln_f", x, 1e-5) @ table.T


def bert(params, tokens):
    net, e = Net(params), "bert/embeddings"
    table = params[f"{e}/word_embeddings/embedding"]
    x = table[tokens] + params[f"{e}/position_embeddings/embedding"][: tokens.shape[1]]
    x = net.layer_norm(f"{e}/LayerNorm", x + params[f"{e}/token_type_embeddings/embedding"][0], 1e-12)
    for i in range(L):
        at = f"bert/encoder/layer/{i}"
        q, k, v = (heads(net.dense(f"{at}/attention/self/{n}", x), H) for n in ("query", "key", "value"))
        y = net.dense(f"{at}/attention/output/dense", attend(q, k, v, False))
        x = net.layer_norm(f"{at}/attention/output/LayerNorm", x + y, 1e-12)
        y = jax.nn.gelu(net.dense(f"{at}/intermediate/dense", x), approximate=False)
        x = net.layer_norm(f"{at}/output/LayerNorm", x + net.dense(f"{at}/output/dense", y), 1e-12)
    y = jax.nn.gelu(net.dense("cls/predictions/transform/dense", x), approximate=False)
    return (
        net.layer_norm("cls/predictions/transform/LayerNorm", y, 1e-12) @ table.T
        + params["cls/predictions/bias"]
    )


def buckets(length, bidirectional, count=32, furthest=128):
    """T5's relative positions."""
    far = np.arange(length)[None] - np.arange(length)[:, None]
    base = 0
    if bidirectional:
        count //= 2
        base, far = (far > 0) * count, np.abs(far)
    else:
        far = -np.minimum(far, 0)
    exact = count // 2
    large = exact + (np.log(np.maximum(far, 1) / exact) / np.log(furthest / exact) * (count - exact)).astype(
        int
    )
    return base + np.where(far < exact, far, np.minimum(large, count - 1))


def t5(params, tokens):
    net, table = Net(params), params["shared/embedding"]

    def rms(name, x):
        return norm(x, params[f"{name}/weight"])

    def attention(at, x, memory, causal, bias):
        q, k, v = (
            heads(net.dense(f"{at}/{n}", y), H) for n, y in zip("qkv", (x, memory, memory), strict=True)
        )
        return net.dense(f"{at}/o", attend(q, k, v, causal, 1.0, bias))

    def stack(side, memory=None):
        x = table[tokens]
        first = f"{side}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        bias = jnp.moveaxis(params[first][buckets(tokens.shape[1], side == "encoder")], -1, 0)[None]
        for i in range(L):
            at = f"{side}/block/{i}/layer"
            y = rms(f"{at}/0/layer_norm", x)
            x = x + attention(f"{at}/0/SelfAttention", y, y, side == "decoder", bias)
            if memory is not None:
                x = x + attention(f"{at}/1/EncDecAttention", rms(f"{at}/1/layer_norm", x), memory, False, 0.0)
            last = f"{at}/{1 if memory is None else 2}"
            y = jax.nn.relu(net.dense(f"{last}/DenseReluDense/wi", rms(f"{last}/layer_norm", x)))
            x = x + net.dense(f"{last}/DenseReluDense/wo", y)
        return rms(f"{side}/final_layer_norm", x)

    return stack("decoder", stack("encoder")) * D**-0.5 @ table.T


def vit(params, images):
    net = Net(params)
    kernel = params["vit/embeddings/patch_embeddings/projection/kernel"]
    x = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC")
    )
    x = x.reshape(x.shape[0], -1, D) + params["vit/embeddings/patch_embeddings/projection/bias"]
    first = jnp.broadcast_to(params["vit/embeddings/cls_token"], (x.shape[0], 1, D))
    x = jnp.concatenate([first, x], 1) + params["vit/embeddings/position_embeddings"]
    for i in range(L):
        at = f"vit/encoder/layer/{i}"
        y = net.layer_norm(f"{at}/layernorm_before", x, 1e-12)
        q, k, v = (heads(net.dense(f"{at}/attention/attention/{n}", y), H) for n in ("query", "key", "value"))
        x = x + net.dense(f"{at}/attention/output/dense", attend(q, k, v, False))
        y = net.dense(f"{at}/intermediate/dense", net.layer_norm(f"{at}/layernorm_after", x, 1e-12))
        x = x + net.dense(f"{at}/output/dense", jax.nn.gelu(y, approximate=False))
    return net.dense("classifier", net.layer_norm("vit/layernorm", x, 1e-12)[:, 0])


def _gated(kind, **more):
    config = getattr(hf, f"{kind}Config")
    return getattr(hf, f"{kind}ForCausalLM")(
        config(**SIZES, num_key_value_heads=K, rms_norm_eps=1e-6, **more)
    )


MODELS = {  # family: how to make it, and its JAX twin
    "llama": (lambda: _gated("Llama"), lambda p, x: gated(p, x, "llama")),
    "qwen2": (lambda: _gated("Qwen2"), lambda p, x: gated(p, x, "qwen2")),
    "gemma": (
        lambda: _gated("Gemma", head_dim=4, hidden_act="gelu_pytorch_tanh"),
        lambda p, x: gated(p, x, "gemma"),
    ),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=D, n_layer=L, n_head=H, vocab_size=V)), gpt2),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), bert),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=D, d_ff=F, d_kv=4, num_layers=L, num_heads=H, vocab_size=V)
        ),
        t5,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8, patch_size=4)
        ),
        vit,
    ),
}


def model_of(family):
    """A model in eval mode, of random weights away from their start: norms and biases too."""
    torch.manual_seed(0)
    model = MODELS[family][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return model


def inputs(family):
    if family == "vit":
        return np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    return TOKENS


def logits(model, family, x):
    with torch.no_grad():
        x = torch.tensor(x)
        more = {"decoder_input_ids": x} if family == "t5" else {}
        return model(x, **more).logits.numpy()
