# %% [markdown]
# # 05 · QLoRA: what fits where
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/05_qlora_what_fits_where.ipynb)
#
# First arithmetic on shapes, for which no weight is needed: what 7B and 70B parameters take in each format, with adapters and their
# optimizer. Then a small model, trained on a base of 4 bits.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn", "matplotlib"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import lorax_fn as lx

# %% [markdown]
# ## Llamas as shapes
#
# `quantize` and `split` take abstract arrays. Layers are stacked, `[layers, in, out]`.


# %%
def llama(width, hidden, layers, kv_width, vocab=32_000):
    def weight(*shape):
        return {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)}

    return {
        "embed": {"embedding": jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16)},
        "layers": {
            "attn": {
                "q": weight(width, width),
                "k": weight(width, kv_width),
                "v": weight(width, kv_width),
                "o": weight(width, width),
            },
            "mlp": {
                "gate": weight(width, hidden),
                "up": weight(width, hidden),
                "down": weight(hidden, width),
            },
        },
        "lm_head": {"kernel": jax.ShapeDtypeStruct((width, vocab), jnp.bfloat16)},
    }


MODELS = {"7B": llama(4096, 11008, 32, 4096), "70B": llama(8192, 28672, 80, 1024)}
STACKED = {"layers": lx.Layout(stack=(0,), inputs=(1,), outputs=(2,))}
GIB = 2**30


def stored_bytes(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, lx.Quantized))
    return sum(
        leaf.nbytes if isinstance(leaf, lx.Quantized) else leaf.size * leaf.dtype.itemsize for leaf in leaves
    )


rows = []
for name, shapes in MODELS.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    _, lora = lx.split(shapes, rank=16, layout=STACKED)
    adapters = sum(leaf.size * 4 for leaf in jax.tree.leaves(lora))
    full = count * (2 + 4 + 4 + 4) / GIB  # weights and gradients in bfloat16 and float32, two moments of Adam
    rows.append((name, "full fine-tuning", full))
    for form in ("bfloat16", "int8", "nf4"):
        base = shapes if form == "bfloat16" else lx.quantize(shapes, form, layout=STACKED)
        rows.append((name, f"LoRA on {form}", (stored_bytes(base) + 4 * adapters) / GIB))
    print(
        f"{name}: {count / 1e9:.1f} billion weights; adapters of rank 16 hold {adapters / 4 / 1e6:.0f} million numbers"
    )

print("\nGiB for weights, adapters, gradients and Adam; activations come on top")
for name, form, gib in rows:
    print(f"{name:>4}  {form:18}{gib:8.1f}")

# %% [markdown]
# Activations depend on batch, length and checkpointing. For one sequence of 2048 tokens and recomputed layers, the TPU's compiler gives 6.2 GiB for a whole
# QLoRA step of 7B on one v5e (`docs/devices.md`); the table above counts 4.2 of them. A rough reading, with 80 % of a device for what is counted here:

# %%
DEVICES = {"TPU v5e, T4: 16": 16, "RTX 4090: 24": 24, "A100: 40": 40, "H100: 80": 80, "TPU v5p: 95": 95}
sizes = {(name, form): gib for name, form, gib in rows}
print(
    f"{'GiB':18}"
    + "".join(
        f"{name + ' ' + form.removeprefix('LoRA on '):>14}" for name, form in sizes if "full" not in form
    )
)
for device, memory in DEVICES.items():
    fits = [
        "fits" if gib < 0.8 * memory else "-" for (name, form), gib in sizes.items() if "full" not in form
    ]
    print(f"{device:18}" + "".join(f"{word:>14}" for word in fits))

assert sizes["7B", "LoRA on nf4"] < 0.8 * 16 < sizes["7B", "LoRA on bfloat16"]
assert sizes["70B", "LoRA on nf4"] < 0.8 * 80 < sizes["70B", "LoRA on int8"]
assert sizes["7B", "full fine-tuning"] > 80

# %% [markdown]
# ## What four bits do to a weight
#
# nf4 has sixteen levels at the quantiles of a normal distribution, and a scale for every 64 weights, itself in 8 bits: 4.13 bits a weight.

# %%
w = jax.random.normal(jax.random.key(0), (512, 512)) / 20
errors = {}
for form in ("nf4", "int4", "int8"):
    leaf = lx.quantize({"kernel": w}, form)["kernel"]
    back = lx.dequantize({"kernel": leaf})["kernel"]
    errors[form] = float(jnp.linalg.norm(back - w) / jnp.linalg.norm(w))
    print(f"{form}: {8 * leaf.nbytes / leaf.size:.2f} bits a weight, relative error {errors[form]:.3f}")
assert errors["int8"] < errors["nf4"] < errors["int4"]

# %% [markdown]
# ## Training on four bits
#
# A small model and a new task. `adapt` unpacks a weight for each product, and again for its gradient, and keeps none. The adapters learn the
# task and what rounding took away.


# %%
def model(params, x):
    h = jax.nn.gelu(x @ params["up"]["kernel"])
    return h @ params["down"]["kernel"]


keys = jax.random.split(jax.random.key(1), 5)
params = {
    "up": {"kernel": jax.random.normal(keys[0], (64, 128)) / 8},
    "down": {"kernel": jax.random.normal(keys[1], (128, 64)) / 11},
}
change = jax.random.normal(keys[2], (64, 4)) @ jax.random.normal(keys[3], (4, 128)) / 32
teacher = {**params, "up": {"kernel": params["up"]["kernel"] + change}}
x = jax.random.normal(keys[4], (512, 64))
y = model(teacher, x)
adapted = lx.adapt(model)
tx = optax.adam(3e-3)


def loss_fn(params, lora, batch, key):
    return jnp.mean((adapted(params, lora, batch["x"]) - batch["y"]) ** 2)


curves = {}
for form in ("float32", "int8", "nf4"):
    base = params if form == "float32" else lx.quantize(params, form)
    base, lora = lx.split(base, rank=8, alpha=16.0)
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    curves[form] = []
    for _ in range(150):
        state, metrics = step(state, base, {"x": x, "y": y})
        curves[form].append(float(metrics["loss"]))
    print(f"{form:8} loss {curves[form][0]:.4f} -> {curves[form][-1]:.4f}")
    merged = lx.merge(base, state.lora)  # float weights
    assert jnp.allclose(model(merged, x), adapted(base, state.lora, x), atol=1e-3)

assert all(curve[-1] < curve[0] / 4 for curve in curves.values())
assert abs(curves["int8"][-1] - curves["float32"][-1]) < 0.02 * curves["float32"][0]

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), dpi=70)
for form, losses in curves.items():
    axes.semilogy(losses, label=form)
axes.set(xlabel="step", ylabel="loss")
axes.legend()
figure.tight_layout()
plt.show()
