# %% [markdown]
# # 08 · To PEFT, to vLLM, and back
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/08_peft_and_vllm.ipynb)
#
# An adapter trained here goes into the files that PEFT and vLLM read, and theirs come back. Neither torch nor peft is needed: the files are safetensors.
# Each claim is an equality that is checked.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None or importlib.util.find_spec("safetensors") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn[peft]"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import json
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import lorax_fn as lx

folder = tempfile.TemporaryDirectory()
files = pathlib.Path(folder.name)

# %% [markdown]
# ## A small Llama, its layers in one stack
#
# A scan runs over the layers, so one array holds the same weight of all of them, and `q` keeps its heads on axes of their own. Nothing in it looks like torch.

# %%
LAYERS, D, HEADS, F, VOCAB = 3, 32, 4, 48, 64


def norm(x, scale):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def block(x, w):
    h = norm(x, w["norm1"])
    q, k, v = (jnp.einsum("btd,dhk->bhtk", h, w[name]) for name in "qkv")
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / (D // HEADS) ** 0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
    attended = jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", attended, w["o"])
    h = norm(x, w["norm2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None


def model(params, tokens):
    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return norm(x, params["norm"]) @ params["lm_head"]


K = D // HEADS
shapes = {
    "q": (D, HEADS, K),
    "k": (D, HEADS, K),
    "v": (D, HEADS, K),
    "o": (HEADS, K, D),
    "gate": (D, F),
    "up": (D, F),
    "down": (F, D),
}
keys = iter(jax.random.split(jax.random.key(0), 16))
layers = {name: jax.random.normal(next(keys), (LAYERS, *shape)) / 6 for name, shape in shapes.items()}
layers |= {name: jnp.ones((LAYERS, D)) for name in ("norm1", "norm2")}
params = {
    "embed": jax.random.normal(next(keys), (VOCAB, D)),
    "layers": layers,
    "norm": jnp.ones(D),
    "lm_head": jax.random.normal(next(keys), (D, VOCAB)) / 6,
}
tokens = jax.random.randint(next(keys), (4, 16), 0, VOCAB)

# %% [markdown]
# ## A mapping is data
#
# Pairs of a module's name there and a path here. `{i}` is not in our paths, so it runs along the stack axis. Which axes are inputs and outputs is read off the program.

# %%
mapping = {
    "model.embed_tokens": "embed",
    "model.layers.{i}.self_attn.q_proj": "layers/q",
    "model.layers.{i}.self_attn.k_proj": "layers/k",
    "model.layers.{i}.self_attn.v_proj": "layers/v",
    "model.layers.{i}.self_attn.o_proj": "layers/o",
    "model.layers.{i}.mlp.gate_proj": "layers/gate",
    "model.layers.{i}.mlp.up_proj": "layers/up",
    "model.layers.{i}.mlp.down_proj": "layers/down",
    "model.layers.{i}.input_layernorm": "layers/norm1",
    "model.layers.{i}.post_attention_layernorm": "layers/norm2",
    "model.norm": "norm",
    "lm_head": "lm_head",
}
layout = lx.usage(model, params, tokens)
print(layout["layers/q"].layout)
print(layout["layers/o"].layout)

# %% [markdown]
# ## Train an adapter

# %%
params, lora = lx.split(params, rank=4, alpha=8.0, targets=["q", "v", "o", "down"], layout=layout)
apply = lx.adapt(model, fallback="error")


def loss_fn(params, lora, batch, key):
    logits = apply(params, lora, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


tx = optax.adam(1e-2)
state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(1))
step = jax.jit(lx.make_train_step(loss_fn, tx))
losses = []
for _ in range(30):
    state, metrics = step(state, params, tokens)
    losses.append(float(metrics["loss"]))
lora = state.lora
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5

# %% [markdown]
# ## PEFT's files
#
# One stacked adapter of ours is three modules there.

# %%
lx.peft.save(files / "adapter", lora, params=params, mapping=mapping, base_model="org/small-llama")
config = json.loads((files / "adapter" / "adapter_config.json").read_text())
print({name: config[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")})
stored = load_file(files / "adapter" / "adapter_model.safetensors")
for name in sorted(stored)[:4]:
    print(f"{name:64} {stored[name].shape}")
print(f"... {len(stored)} tensors")
assert len(stored) == 4 * LAYERS * 2

# %% [markdown]
# PEFT adds `lora_alpha / r * B @ A` to a weight stored (out, in). Done by hand for one module, that is our merged weight, turned around.

# %%
name = "base_model.model.model.layers.1.self_attn.q_proj"
a, b = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
by_hand = np.asarray(params["layers"]["q"][1]).reshape(D, D).T + config["lora_alpha"] / config["r"] * (b @ a)
merged = lx.merge(params, lora)
ours = np.asarray(merged["layers"]["q"][1]).reshape(D, D).T
print(f"PEFT's formula against our merge: {np.abs(by_hand - ours).max():.0e}")
assert np.allclose(by_hand, ours, atol=1e-6)

# %% [markdown]
# And back, bit for bit.

# %%
again = lx.peft.load(files / "adapter", params, mapping=mapping, layout=layout)
assert jnp.array_equal(apply(params, again, tokens), apply(params, lora, tokens))
for path, dw in lx.delta(lora).items():
    assert jnp.array_equal(lx.delta(again)[path], dw)
print(f"{len(again)} adapters came back with equal bits")

# %% [markdown]
# ## The same file in a program of another shape
#
# A friend has the same model unrolled: a dict of the names of torch, weights stored (out, in). The names themselves are the mapping, and the file fits there as well.

# %%
lx.huggingface.save(files / "base", params, mapping=mapping, layout=layout)
theirs = {name: jnp.asarray(array) for name, array in load_file(files / "base" / "model.safetensors").items()}


def unrolled(weights, tokens):
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        h = norm(x, weights[at + "input_layernorm.weight"])
        q, k, v = (
            (h @ weights[f"{at}self_attn.{n}_proj.weight"].T).reshape(*h.shape[:2], HEADS, K) for n in "qkv"
        )
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / K**0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
        attended = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v).reshape(x.shape)
        x = x + attended @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, weights[at + "post_attention_layernorm.weight"])
        gate, up = (h @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (jax.nn.silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


assert jnp.allclose(unrolled(theirs, tokens), model(params, tokens), atol=1e-4)
friend = lx.peft.load(files / "adapter", theirs)
got = lx.adapt(unrolled, fallback="error")(theirs, friend, tokens)
off = float(jnp.abs(got - apply(params, lora, tokens)).max())
print(f"{len(friend)} adapters in the unrolled model, logits differ by {off:.0e}")
assert len(friend) == 4 * LAYERS and off < 1e-4

# %% [markdown]
# ## For vLLM
#
# A server is started with `--max-lora-rank`, one of a few numbers, and refuses some adapters, or worse, serves the base in silence. `target="vllm"` asks first. Rank 4 is padded to
# the next one that it takes, with exact zeros.

# %%
lx.peft.save(
    files / "served",
    lora,
    params=params,
    mapping=mapping,
    target="vllm",
    max_lora_rank=16,
    base_model="org/x",
)
print({name: lx.peft.config(files / "served")[name] for name in ("r", "lora_alpha", "target_modules")})
served = lx.peft.load(files / "served", params, mapping=mapping, layout=layout)
for path, dw in lx.delta(lora).items():
    assert jnp.allclose(lx.delta(served)[path], dw, atol=1e-7)
assert lx.peft.config(files / "served")["r"] == 8

_, dora = lx.split(params, rank=4, targets=["q"], method="dora", layout=layout)
try:
    lx.peft.save(files / "refused", dora, params=params, mapping=mapping, target="vllm", max_lora_rank=16)
except lx.LoraError as refusal:
    print(refusal)
else:
    raise AssertionError("vLLM has no DoRA")
assert not (files / "refused").exists()

# %% [markdown]
# What a server does not take as an adapter it takes merged, as an ordinary checkpoint.

# %%
lx.huggingface.save(files / "merged", merged, mapping=mapping, layout=layout)
loaded = lx.huggingface.load(files / "merged", jax.eval_shape(lambda: params), mapping=mapping, layout=layout)
assert jnp.array_equal(model(loaded, tokens), model(merged, tokens))
off = float(jnp.abs(model(loaded, tokens) - apply(params, lora, tokens)).max())
print(f"merged checkpoint against the adapter: {off:.0e}")
assert off < 1e-4

# %% [markdown]
# ## An adapter that took a part of W
#
# PiSSA moves the strongest directions of a weight into the factors, so its adapter fits only a base without them. `to_plain` writes it as one of twice the rank
# for the weights that everybody has.

# %%
residual, pissa = lx.split(params, rank=4, targets=["down"], init="pissa", layout=layout)
pissa = jax.tree.map(lambda leaf: leaf * 1.05, pissa)  # as if trained
plain = lx.ranks.to_plain(params, residual, pissa)
lx.peft.save(files / "pissa", plain, params=params, mapping=mapping)
back = lx.peft.load(files / "pissa", params, mapping=mapping, layout=layout)
off = float(jnp.abs(apply(params, back, tokens) - apply(residual, pissa, tokens)).max())
print(
    f"PiSSA of rank 4, saved as LoRA of rank {lx.peft.config(files / 'pissa')['r']}: logits differ by {off:.0e}"
)
assert off < 1e-4
folder.cleanup()
