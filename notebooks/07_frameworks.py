# %% [markdown]
# # 07 · NNX, Linen, Equinox, Haiku and plain functions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/07_frameworks.ipynb)
#
# The same small classifier in five styles, with BatchNorm where the framework has it. What a model rewrites between calls travels as
# `extra`: into the loss, out of it, and never through a gradient.

# %%
import importlib.util
import subprocess
import sys

wanted = {"lorax_fn": "lorax_fn", "equinox": "equinox", "haiku": "dm-haiku"}
missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax.numpy as jnp
import optax
from flax import nnx

import lorax_fn as lx

# %% [markdown]
# ## A task, and one training loop for all
#
# Points on three interleaved spirals. The loop is the same whatever the model is made of.

# %%
angle = jnp.linspace(0.5, 3.0, 60)
spirals = [
    jnp.stack([angle * jnp.cos(2 * angle + turn), angle * jnp.sin(2 * angle + turn)], axis=1)
    for turn in (0.0, 2.1, 4.2)
]
x = jnp.concatenate(spirals)
labels = jnp.repeat(jnp.arange(3), 60)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fit(loss_fn, params, lora, extra=None, steps=150):
    tx = optax.adam(1e-2)
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(1), extra=extra)
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, params, x)
        losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapters: {', '.join(sorted(lora))}")
    assert losses[-1] < 0.8 * losses[0]
    return state


# %% [markdown]
# ## A plain function

# %%
WIDTH = 48


def plain(params, x):
    h = jnp.tanh(x @ params["one"]["kernel"])
    h = jnp.tanh(h @ params["two"]["kernel"])
    return h @ params["head"]["kernel"]


keys = jax.random.split(jax.random.key(0), 3)
shapes = {"one": (2, WIDTH), "two": (WIDTH, WIDTH), "head": (WIDTH, 3)}
params = {
    name: {"kernel": jax.random.normal(key, shape) / jnp.sqrt(shape[0])}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
}
params, lora = lx.split(params, rank={"one": 2, "*": 8}, full=["head"], layout=lx.usage(plain, params, x))
adapted = lx.adapt(plain)
state = fit(lambda params, lora, x, key: cross_entropy(adapted(params, lora, x)), params, lora)
assert jnp.allclose(plain(lx.merge(params, state.lora), x), adapted(params, state.lora, x), atol=1e-3)

# %% [markdown]
# ## Flax Linen, with BatchNorm
#
# `variables["params"]` is split; `batch_stats` are `extra`.


# %%
class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(nn.Dense(WIDTH, name="one")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(WIDTH, name="two")(x))
        return nn.Dense(3, name="head")(jnp.tanh(x))


model = Linen()
variables = model.init(jax.random.key(0), x, train=False)
params, stats = {"params": variables["params"]}, variables["batch_stats"]
params, lora = lx.split(params, rank={"one": 2, "*": 8}, full=["norm", "head"])
adapted = lx.adapt(model.apply)


def linen_loss(params, lora, x, key, extra):
    logits, changed = adapted({**params, "batch_stats": extra}, lora, x, train=True, mutable=["batch_stats"])
    return cross_entropy(logits), (changed["batch_stats"], None)


state = fit(linen_loss, params, lora, extra=stats)
trained = {**params, "batch_stats": state.extra}
merged = lx.merge(trained, state.lora)
want = adapted(trained, state.lora, x, train=False)
assert jnp.allclose(model.apply(merged, x, train=False), want, atol=1e-3)
assert not jnp.array_equal(state.extra["norm"]["mean"], stats["norm"]["mean"])

# %% [markdown]
# ## Flax NNX, with BatchNorm and dropout
#
# `nnx.split` gives the parameters and the rest: statistics, and the counters of the random streams. `copy=True` gives the function Variables of its
# own to write to: NNX does not let a gradient write to those of its caller.


# %%
class Module(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(2, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.05, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.two(jnp.tanh(self.one(x))))
        return self.head(self.drop(jnp.tanh(x)))


module = Module(nnx.Rngs(0))
module.train()
graphdef, params, rest = nnx.split(module, nnx.Param, ...)


def forward(params, rest, x):
    module = nnx.merge(graphdef, params, rest, copy=True)
    logits = module(x)
    return logits, nnx.state(module, nnx.Not(nnx.Param))


params, lora = lx.split(params, rank={"one": 2, "*": 8}, full=["norm", "head"])
adapted = lx.adapt(forward)


def nnx_loss(params, lora, x, key, extra):
    logits, extra = adapted(params, lora, extra, x)
    return cross_entropy(logits), (extra, None)


state = fit(nnx_loss, params, lora, extra=rest)
finished = nnx.merge(graphdef, lx.merge(params, state.lora), state.extra)
finished.eval()
accuracy = float((finished(x).argmax(axis=1) == labels).mean())
print(f"accuracy of the merged module in evaluation: {accuracy:.2f}")
assert accuracy > 0.6

# %% [markdown]
# ## Haiku, with BatchNorm
#
# `transform_with_state` already has the right signature: `apply(params, state, x, is_training)`.


# %%
def network(x, is_training):
    x = jnp.tanh(hk.Linear(WIDTH, name="one")(x))
    x = hk.BatchNorm(True, True, 0.9, name="norm")(hk.Linear(WIDTH, name="two")(x), is_training)
    return hk.Linear(3, name="head")(jnp.tanh(x))


transformed = hk.without_apply_rng(hk.transform_with_state(network))
params, statistics = transformed.init(jax.random.key(0), x, True)
params, lora = lx.split(params, rank={"one": 2, "*": 8}, full=["norm", "head"])
adapted = lx.adapt(transformed.apply)


def haiku_loss(params, lora, x, key, extra):
    logits, extra = adapted(params, lora, extra, x, True)
    return cross_entropy(logits), (extra, None)


state = fit(haiku_loss, params, lora, extra=statistics)
merged_logits, _ = transformed.apply(lx.merge(params, state.lora), state.extra, x, False)
logits, _ = adapted(params, state.lora, state.extra, x, False)
assert jnp.allclose(merged_logits, logits, atol=1e-3)

# %% [markdown]
# ## Equinox
#
# A module is a pytree with functions in it. A training step wants arrays alone: `eqx.partition` takes the rest out, and `eqx.combine`
# puts it back inside the function. Which axis of a weight is the input is read off the program.

# %%
mlp = eqx.nn.MLP(2, 3, width_size=WIDTH, depth=2, activation=jnp.tanh, key=jax.random.key(0))
arrays, static = eqx.partition(mlp, eqx.is_array)


def call(arrays, x):
    return jax.vmap(eqx.combine(arrays, static))(x)


usage = lx.usage(call, arrays, x)
arrays, lora = lx.split(
    arrays, rank={"layers/1": 8, "*": 2}, full=["layers/2"], targets=["layers/0", "layers/1"], layout=usage
)
adapted = lx.adapt(call)
state = fit(lambda params, lora, x, key: cross_entropy(adapted(params, lora, x)), arrays, lora)
finished = eqx.combine(lx.merge(arrays, state.lora), static)
assert jnp.allclose(jax.vmap(finished)(x), adapted(arrays, state.lora, x), atol=1e-3)
