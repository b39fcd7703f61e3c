# %% [markdown]
# # 04 · Methods side by side
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/04_methods_side_by_side.ipynb)
#
# One base model, one new task, every method and every start that needs no data: how many numbers train, how fast the loss falls, and what
# a merge gives. A toy, so read the laws and not the ranking.

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
# ## A base model and a new task
#
# The base learns a random teacher. The new task is that teacher with a change of rank 4 in its middle layer, so that rank 4 is
# enough in principle.

# %%
WIDTH, RANK, STEPS = 32, 4, 300


def model(params, x):
    h = jnp.tanh(x @ params["one"]["kernel"])
    h = jnp.tanh(h @ params["two"]["kernel"])
    return h @ params["out"]["kernel"]


def weights(key, scale=1.0):
    keys = jax.random.split(key, 3)
    shapes = {"one": (16, WIDTH), "two": (WIDTH, WIDTH), "out": (WIDTH, 8)}
    return {
        name: {"kernel": scale * jax.random.normal(k, shape) / jnp.sqrt(shape[0])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


params = weights(jax.random.key(0))
a, b = jax.random.normal(jax.random.key(1), (2, WIDTH, RANK))
teacher = {**params, "two": {"kernel": params["two"]["kernel"] + a @ b.T / WIDTH}}
x = jax.random.normal(jax.random.key(2), (512, 16))
y = model(teacher, x)


def train(loss, trained, tx):
    """All steps in one scan: one program for each method."""

    def step(carry, _):
        trained, opt_state = carry
        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    run = jax.jit(lambda trained: jax.lax.scan(step, (trained, tx.init(trained)), length=STEPS))
    (trained, _), losses = run(trained)
    return trained, losses


# %% [markdown]
# ## Every method, every start

# %%
CHOICES = {  # VeRA has no alpha, and giving it one raises
    "lora": {"alpha": 8.0},
    "lora, rslora scale": {"scaling": "rslora", "alpha": 8.0},
    "lora, pissa": {"init": "pissa", "alpha": 8.0},
    "lora, olora": {"init": "olora", "alpha": 8.0},
    "lora, orthogonal": {"init": "orthogonal", "alpha": 8.0},
    "dora": {"method": "dora", "alpha": 8.0},
    "lora_fa": {"method": "lora_fa", "alpha": 8.0},
    "vera": {"method": "vera"},
    "loha": {"method": "loha", "alpha": 8.0},
    "lokr": {"method": "lokr", "alpha": 8.0},
    "lora_xs": {"method": "lora_xs", "alpha": 8.0},
}
adapted = lx.adapt(model, fallback="error")
start = float(jnp.mean((model(params, x) - y) ** 2))
curves, rows = {}, []

for name, choice in CHOICES.items():
    base, lora = lx.split(params, rank=RANK, targets=["one", "two"], **choice)
    first = float(jnp.mean((adapted(base, lora, x) - y) ** 2))
    assert abs(first - start) < 1e-3 * start, name  # every method starts at the base model
    trained, losses = train(
        lambda lora: jnp.mean((adapted(base, lora, x) - y) ** 2), lora, lx.train_only(optax.adam(1e-2))
    )
    merged = lx.merge(base, trained)
    assert jnp.allclose(model(merged, x), adapted(base, trained, x), atol=1e-4), name
    assert losses[-1] < losses[0], name
    numbers = sum(leaf.size for leaf in jax.tree.leaves(lx.trainable(lora)))
    curves[name] = losses
    rows.append((name, numbers, float(losses[-1])))

_, losses = train(lambda params: jnp.mean((model(params, x) - y) ** 2), params, optax.adam(1e-2))
assert losses[-1] < start / 3
curves["full fine-tuning"] = losses
rows.append(("full fine-tuning", sum(leaf.size for leaf in jax.tree.leaves(params)), float(losses[-1])))

print(f"{'':22}{'numbers':>8}  loss after {STEPS} steps (before: {start:.3f})")
for name, numbers, final in rows:
    print(f"{name:22}{numbers:>8}  {final:.4f}")

# %%
figure, axes = plt.subplots(figsize=(7, 4), dpi=70)
axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
for name, losses in curves.items():
    axes.semilogy(losses, label=name, linestyle="--" if "full" in name else "-")
axes.set(xlabel="step", ylabel="loss")
axes.legend(fontsize=7, ncols=2)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What to take from it
#
# - All start at the base model, and all merge into plain weights.
# - LoRA-XS and VeRA train very few numbers, and LoRA-FA keeps A: it stores fewer activations.
# - PiSSA and OLoRA start inside the weight, so the frozen tree that `split` returns is another one. Go on with that.
# - Ranks and learning rates that suit one method do not suit all. On a task of your own, compare at each method's best rate.

# %%
final = {name: loss for name, _, loss in rows}
assert final["lora"] < start / 3
assert dict((name, numbers) for name, numbers, _ in rows)["lora_xs"] == 2 * RANK**2
