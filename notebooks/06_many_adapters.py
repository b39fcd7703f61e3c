# %% [markdown]
# # 06 · Many adapters in one batch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/06_many_adapters.ipynb)
#
# One base model and five tenants, each with an adapter of its own. They are trained side by side in one program, put into a bank, and served from one batch in
# which every row has its own adapter.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import jax.numpy as jnp
import optax

import lorax_fn as lx

# %% [markdown]
# ## A base model, and five tasks
#
# Every tenant wants another wave.

# %%
WIDTH, TENANTS, RANK = 64, 5, 4


def model(params, x):  # x: [B, 1]
    h = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"][None])
    h = jnp.tanh(h @ params["two"]["kernel"])
    return h @ params["out"]["kernel"]


keys = jax.random.split(jax.random.key(0), 4)
params = {
    "one": {
        "kernel": 2 * jax.random.normal(keys[0], (1, WIDTH)),
        "bias": jax.random.normal(keys[1], (WIDTH,)),
    },
    "two": {"kernel": jax.random.normal(keys[2], (WIDTH, WIDTH)) / 8},
    "out": {"kernel": jax.random.normal(keys[3], (WIDTH, 1)) / 8},
}
x = jnp.linspace(-2, 2, 128)[:, None]
waves = jnp.stack([jnp.sin((1 + 0.4 * i) * x + i) for i in range(TENANTS)])  # [tenants, 128, 1]
adapted = lx.adapt(model, fallback="error")

# %% [markdown]
# ## Trained side by side
#
# `stack` lays adapters side by side on a first axis, and `jax.vmap` maps the whole training over it: five runs, one program. The base is there once.

# %%
_, lora = lx.split(params, rank=RANK, alpha=8.0, targets="two")
start = lx.stack([lora] * TENANTS)
tx = lx.train_only(optax.adam(2e-2))


def train(lora, y):
    def step(carry, _):
        lora, opt_state = carry
        loss, grads = jax.value_and_grad(lambda lora: jnp.mean((adapted(params, lora, x) - y) ** 2))(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return (optax.apply_updates(lora, updates), opt_state), loss

    (lora, _), losses = jax.lax.scan(step, (lora, tx.init(lora)), length=400)
    return lora, losses


trained, losses = jax.jit(jax.vmap(train))(start, waves)
tenants = lx.unstack(trained)
for i in range(TENANTS):
    print(f"tenant {i}: loss {losses[i, 0]:.3f} -> {losses[i, -1]:.4f}")
assert (losses[:, -1] < 0.1 * losses[:, 0]).all()

# %% [markdown]
# ## Served from one batch
#
# A bank has slots of one size; `bank[i]` is an ordinary `lora`, and `i` may be an array that is mapped over. Slot -1 is the bare base.

# %%
bank = lx.bank(tenants, capacity=8)
print(bank)


@jax.jit
def serve(bank, slots, x):
    return jax.vmap(lambda slot, x: adapted(params, bank[slot], x[None])[0])(slots, x)


slots = jax.random.randint(jax.random.key(1), (128,), -1, TENANTS)
served = serve(bank, slots, x)
for slot in range(-1, TENANTS):
    rows = slots == slot
    alone = adapted(params, tenants[slot] if slot >= 0 else {}, x)
    off = float(jnp.abs(jnp.where(rows[:, None], served - alone, 0.0)).max())
    print(f"slot {slot:2}: {int(rows.sum()):3} rows, off by {off:.0e} from a run of its own")
    assert off < 1e-4

# %% [markdown]
# ## A tenant comes, a tenant goes
#
# Another adapter in a slot is other data for the same program.

# %%
y = jnp.cos(3 * x)
newcomer, losses = jax.jit(train)(lora, y)
bank = bank.set(5, newcomer).clear(0)
served = serve(bank, jnp.full(128, 5, jnp.int32), x)
error = float(jnp.mean((served - y) ** 2))
print(f"the newcomer's error, served: {error:.4f}; compilations of serve: {serve._cache_size()}")
assert serve._cache_size() == 1 and error < 0.1 * float(losses[0])
assert jnp.allclose(
    serve(bank, jnp.full(128, 0, jnp.int32), x), model(params, x), atol=1e-5
)  # an empty slot is the base

# %% [markdown]
# ## What it costs
#
# The products of the base stay single products over the batch, so that a mixed batch takes few more operations than one adapter for all.

# %%
one = jax.jit(adapted).lower(params, tenants[0], x).compile().cost_analysis()["flops"]
many = serve.lower(bank, slots, x).compile().cost_analysis()["flops"]
print(f"one adapter for all rows: {one / 1e6:.2f} MFLOP; each row its own: {many / 1e6:.2f} MFLOP")
assert many < 1.5 * one

# %% [markdown]
# ## Mixtures
#
# Weights instead of a slot pick all adapters at once, and `combine` makes one adapter of several.

# %%
weights = jnp.zeros(8).at[jnp.array([1, 2])].set(0.5)
both = lx.combine([(0.5, tenants[1]), (0.5, tenants[2])])
off = float(jnp.abs(adapted(params, bank[weights], x) - adapted(params, both, x)).max())
print(f"mixed in the bank against combined: off by {off:.0e}")
assert off < 1e-4
