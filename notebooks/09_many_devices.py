# %% [markdown]
# # 09 · Many devices: jit, pmap, mesh
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/09_many_devices.ipynb)
#
# The same step on one device, under `pmap`, and on a mesh, with the same result. A TPU with eight cores is used as it is; elsewhere the CPU
# pretends to be eight devices.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn"], check=True)

import jax
import jax.extend.backend

jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts; accelerators are not touched by it
if jax.device_count() < 8:
    jax.config.update("jax_platforms", "cpu")
    jax.extend.backend.clear_backends()
devices = jax.devices()[:8]
print(devices[0].platform, len(devices))
assert len(devices) == 8

# %%
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx

# %% [markdown]
# ## A model with stacked layers, and a loss with a mask
#
# The loss is a mean over what the mask leaves. A device that holds few such examples must count less: `weight` says how much.


# %%
def model(params, x):
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"]


LAYERS, WIDTH, HIDDEN = 3, 16, 32
keys = jax.random.split(jax.random.key(0), 5)
params = {
    "layers": {
        "up": {"kernel": jax.random.normal(keys[0], (LAYERS, WIDTH, HIDDEN)) / 4},
        "down": {"kernel": jax.random.normal(keys[1], (LAYERS, HIDDEN, WIDTH)) / 8},
    },
    "head": {"kernel": jax.random.normal(keys[2], (WIDTH, 4)) / 4},
}
batch = {
    "x": jax.random.normal(keys[3], (32, WIDTH)),
    "y": jnp.arange(32) % 4,
    "mask": (jnp.arange(32) < 20).astype(jnp.float32),  # some devices hold nothing that counts
}
adapted = lx.adapt(model, fallback="error")


def loss_fn(params, lora, batch, key):
    nll = optax.softmax_cross_entropy_with_integer_labels(adapted(params, lora, batch["x"]), batch["y"])
    return (nll * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1.0)


def weight(batch):
    return batch["mask"].sum()


layout = lx.usage(model, params, batch["x"])
params, lora = lx.split(params, rank=4, layout=layout)
tx = optax.adam(1e-2)
STEPS = 5


def fresh():  # the steps below consume the state that they are given
    return lx.TrainState.create(lora=jax.tree.map(jnp.copy, lora), tx=tx, key=jax.random.key(1))


# %% [markdown]
# ## One device

# %%
step = jax.jit(lx.make_train_step(loss_fn, tx, accumulate=2, weight=weight))
state, one = fresh(), []
for _ in range(STEPS):
    state, metrics = step(state, params, batch)
    one.append(float(metrics["loss"]))
reference = state.lora
print("one device:", np.round(one, 4))
assert one[-1] < one[0]

# %% [markdown]
# ## pmap: every device holds the base
#
# `replicate` copies the state and the base, `shard` cuts the batch into one part for each device.

# %%
step = lx.pmap_train_step(loss_fn, tx, weight=weight)
copies, base = lx.replicate(fresh()), lx.replicate(params)
pmapped = []
for _ in range(STEPS):
    copies, metrics = step(copies, base, lx.shard(batch))
    pmapped.append(float(np.ravel(metrics["loss"])[0]))
trained = lx.unreplicate(copies).lora
print("pmap:      ", np.round(pmapped, 4))
assert np.allclose(pmapped, one, atol=1e-4)

# %% [markdown]
# ## A mesh: the base is laid out over devices
#
# Rules name the weights; an adapter follows its weight: A is sharded as the inputs, B as the outputs, and the rank stays whole.

# %%
mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices
)
rules = {"up": jax.P(None, "fsdp", "tensor"), "down": jax.P(None, "tensor", "fsdp")}
step = lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules=rules, weight=weight)
placed, base = step.place(fresh(), params)
meshed = []
for _ in range(STEPS):
    placed, metrics = step(placed, base, batch)
    meshed.append(float(metrics["loss"]))
print("mesh:      ", np.round(meshed, 4))
assert np.allclose(meshed, one, atol=1e-4)

up = placed.lora["layers/up/kernel"]
print("A:", up.a.sharding.spec, " B:", up.b.sharding.spec)
assert up.a.sharding.spec == jax.P(None, "fsdp", None) and up.b.sharding.spec == jax.P(None, None, "tensor")

# %% [markdown]
# The adapters are those of one device, up to the order in which floats are added.

# %%
for name, adapters in {"pmap": trained, "mesh": placed.lora}.items():
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(adapters), strict=True)
    off = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    print(f"{name}: largest difference of an adapter's entry {off:.1e}")
    assert off < 1e-3

# %% [markdown]
# ## What is on one device
#
# The base is cut in four (`fsdp` times `tensor`), and `data` holds two copies. Counted in the compiled program's own arrays:

# %%
kernel = base["layers"]["up"]["kernel"]
shard = kernel.addressable_shards[0].data
print("whole:", kernel.shape, " on a device:", shard.shape)
assert shard.size * 4 == kernel.size

# %% [markdown]
# ## Seven billion weights on TPUs
#
# The compiler of TPUs runs without one. By its memory analysis a step of a 7B Llama in bfloat16, sharded over eight v5e chips, takes 4.1 GiB a
# chip with LoRA of rank 16, 7.4 when the adapters are merged inside of the loss, and 12.3 for full fine-tuning (arguments and temporaries; an example of 2048
# tokens a chip). `docs/devices.md` has the table, and `tests/test_tpu_aot.py` a program that asks the compiler.
