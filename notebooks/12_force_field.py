# %% [markdown]
# # 12 · A science model: a force field that stays equivariant
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/12_force_field.ipynb)
#
# Force fields are trained on much cheap data and then refined on a little that is expensive. Nequix (https://github.com/atomicarchitects/nequix) is one, in Equinox: a graph network whose
# features are scalars and vectors, and whose forces are the gradient of its energy. The model is used as it is installed. Its weights mix channels, one array per path between
# irreps, so that an adapter of such an array cannot break the symmetry: this is checked by turning molecules.

# %%
import importlib.util
import subprocess
import sys

pip = [sys.executable, "-m", "pip", "install", "-q"]
if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([*pip, "lorax_fn", "equinox", "sympy", "matplotlib"], check=True)
if importlib.util.find_spec("nequix") is None:  # without its tools for training, wandb and CUDA among them
    subprocess.run([*pip, "--no-deps", "nequix==0.4.5", "e3nn-jax==0.21.0", "jraph==0.0.6.dev0"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from nequix.model import Nequix

import lorax_fn as lx

# %% [markdown]
# ## Two potentials
#
# Clusters of five atoms. The cheap method is a pair potential; the expensive one has its minimum elsewhere, another stiffness, and a term of three atoms.

# %%
ATOMS = 5
SENDERS, RECEIVERS = np.nonzero(~np.eye(ATOMS, dtype=bool))


def distances(positions):
    difference = positions[SENDERS] - positions[RECEIVERS]
    return difference, jnp.sqrt((difference**2).sum(axis=1))


def cheap(positions):
    _, r = distances(positions)
    return 0.5 * ((1 / r) ** 8 - 2 * (1 / r) ** 4).sum()


def expensive(positions):
    difference, r = distances(positions)
    morse = 0.5 * ((1 - jnp.exp(-2.5 * (r - 1.15))) ** 2 - 1).sum()
    arm = (difference / r[:, None]).reshape(ATOMS, ATOMS - 1, 3)  # to the others of each atom
    near = jnp.exp(-((r / 1.4) ** 4)).reshape(ATOMS, ATOMS - 1)
    cosine = jnp.einsum("aix,ajx->aij", arm, arm)
    return morse + 0.15 * (near[:, :, None] * near[:, None] * (cosine - 0.5) ** 2).sum()


def clusters(count, seed):
    """Corners of a distorted bipyramid, which holds no two atoms too near to each other."""
    turn = 2 * np.pi * np.arange(3) / 3
    ring = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1) * 0.62
    shape = np.concatenate([ring, [[0, 0, 0.85], [0, 0, -0.85]]]) * 1.05
    noise = np.random.default_rng(seed).normal(0, 0.06, (count, ATOMS, 3))
    return jnp.asarray(shape + noise, jnp.float32)


def labelled(potential, positions):
    energy, gradient = jax.vmap(jax.value_and_grad(potential))(positions)
    return {"x": positions, "energy": energy, "forces": -gradient}


many, few, test = clusters(256, 0), clusters(24, 1), clusters(64, 2)
held_out = labelled(expensive, test)

# %% [markdown]
# ## The model as a function
#
# `eqx.partition` takes the arrays out; the function puts them back in and differentiates by the positions. That makes training a gradient of a gradient, which `adapt` goes through
# as through everything else.

# %%
model = Nequix(
    jax.random.key(0),
    n_species=1,
    lmax=1,
    cutoff=3.0,
    hidden_irreps="16x0e + 8x1o",
    n_layers=2,
    radial_mlp_size=16,
    radial_mlp_layers=2,
    avg_n_neighbors=4.0,
)
arrays, static = eqx.partition(model, eqx.is_inexact_array)
species = jnp.zeros(ATOMS, jnp.int32)


def energy_of(arrays, positions):
    difference = positions[SENDERS] - positions[RECEIVERS]
    return eqx.combine(arrays, static).node_energies(difference, species, SENDERS, RECEIVERS).sum()


def energy_and_forces(arrays, positions):
    energy, gradient = jax.vmap(jax.value_and_grad(energy_of, argnums=1), in_axes=(None, 0))(
        arrays, positions
    )
    return energy, -gradient


adapted = lx.adapt(energy_and_forces, fallback="error")


def loss_fn(params, lora, batch, key):
    energy, forces = adapted(params, lora, batch["x"])
    return jnp.mean((energy - batch["energy"]) ** 2) / ATOMS + 3 * jnp.mean((forces - batch["forces"]) ** 2)


def train(params, lora, data, steps, lr, batch=16):
    tx = optax.adam(optax.cosine_decay_schedule(lr, steps))
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        chosen = rng.permutation(len(data["x"]))[:batch]
        state, metrics = step(state, params, jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], data))
        losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.4f}")
    return state.lora


# %% [markdown]
# ## The base: much cheap data
#
# Every leaf is trained whole: the same step, with `Full` adapters, and a merge at the end.

# %%
_, everything = lx.split(arrays, targets=[], full=["*"])
base = lx.merge(arrays, train(arrays, everything, labelled(cheap, many), steps=200, lr=5e-3))

# %% [markdown]
# ## Adapters: 24 expensive clusters

# %%
usage = lx.usage(energy_and_forces, base, test[:2])
base, lora = lx.split(base, rank=4, alpha=8.0, layout=usage, full=["readout"])
for path, adapter in list(lora.items())[:4]:
    print(f"{path:40} {type(adapter).__name__} {tuple(jax.tree.leaves(adapter)[0].shape)}")
weights, numbers = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (base, lora))
print(f"{len(lora)} weights adapted, {numbers} numbers beside {weights}")

evaluate = jax.jit(adapted)


def force_error(lora):
    _, forces = evaluate(base, lora, held_out["x"])
    return float(jnp.sqrt(jnp.mean((forces - held_out["forces"]) ** 2)))


untrained = jax.tree.map(jnp.copy, lora)
learned = train(base, lora, labelled(expensive, few), steps=150, lr=1e-2)
before, after = force_error(untrained), force_error(learned)
size = float(jnp.sqrt(jnp.mean(held_out["forces"] ** 2)))
print(
    f"forces on held-out clusters, root mean square {size:.2f}: off by {before:.3f} before, {after:.3f} after"
)
assert after < before / 3

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), dpi=70, sharex=True, sharey=True)
for axis, some, title in zip(axes, (untrained, learned), ("base", "with adapters"), strict=True):
    _, forces = evaluate(base, some, held_out["x"])
    axis.plot(held_out["forces"].ravel(), forces.ravel(), ".", markersize=2)
    low, high = float(held_out["forces"].min()), float(held_out["forces"].max())
    axis.plot([low, high], [low, high], color="black", linewidth=0.8)
    axis.set(title=title, xlabel="force, expensive method", ylim=(1.3 * low, 1.3 * high))
axes[0].set_ylabel("force, model")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Symmetry
#
# Turned molecules have the same energy and turned forces, with any adapter: here with those that were learned, and with random ones.

# %%
turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
turn = jnp.asarray(turn * np.sign(np.linalg.det(turn)), jnp.float32)
rough = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(5), leaf.shape), learned)
for name, some in {"learned": learned, "random": rough}.items():
    energy, forces = evaluate(base, some, held_out["x"])
    turned_energy, turned_forces = evaluate(base, some, held_out["x"] @ turn.T)
    off = float(jnp.abs(turned_forces - forces @ turn.T).max() / jnp.abs(forces).max())
    print(
        f"{name:8} energies differ by {float(jnp.abs(turned_energy - energy).max()):.0e}, forces by {off:.0e}"
    )
    assert off < 1e-4 and jnp.allclose(turned_energy, energy, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Merged
#
# For simulation programs that know nothing of adapters: an ordinary Nequix module with other numbers.

# %%
finished = eqx.combine(lx.merge(base, learned), static)
energy = finished.node_energies(test[0][SENDERS] - test[0][RECEIVERS], species, SENDERS, RECEIVERS).sum()
want, _ = evaluate(base, learned, held_out["x"])
print(f"energy of the first cluster: merged {float(energy):.4f}, adapted {float(want[0]):.4f}")
assert jnp.allclose(energy, want[0], atol=1e-3)
