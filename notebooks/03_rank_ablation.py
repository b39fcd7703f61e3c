# %% [markdown]
# # 03 · Which rank? An ablation in one program
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/03_rank_ablation.ipynb)
#
# Five ranks, four learning rates and three seeds are sixty runs. `lx.sweep` trains them side by side as one program: the base is held once, compiled
# for once, and each lane equals the run of its own. The task is made so that the right answer is known: the change to learn has rank 4.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn[plot,pandas]"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorax_fn as lx

# %matplotlib inline
plt.rcParams["figure.dpi"] = 70  # pictures of the report are ordinary figures

# %% [markdown]
# ## A base, and a change of rank 4
#
# The teacher is the base with something added to both weights: four directions, equally strong. The student sees the teacher's answers with noise on them, and is
# judged without.

# %%
WIDTH, TRUE_RANK, RANKS, RATES, SEEDS = 32, 4, [1, 2, 4, 8, 16], [3e-3, 1e-2, 3e-2, 1e-1], [0, 1, 2]


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def directions(key):
    left, right = jax.random.normal(key, (2, WIDTH, TRUE_RANK))
    return jnp.linalg.qr(left)[0] @ jnp.linalg.qr(right)[0].T


keys = jax.random.split(jax.random.key(0), 7)
params = {
    "up": {"kernel": jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5},
    "down": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5},
}
teacher = {
    "up": {"kernel": params["up"]["kernel"] + 0.8 * directions(keys[2])},
    "down": {"kernel": params["down"]["kernel"] + 0.8 * directions(keys[3])},
}
x, held_out = jax.random.normal(keys[4], (256, WIDTH)), jax.random.normal(keys[5], (256, WIDTH))
train = {"x": x, "y": model(teacher, x) + 0.1 * jax.random.normal(keys[6], x.shape)}
test = {"x": held_out, "y": model(teacher, held_out)}
adapted = lx.adapt(model)


def loss_fn(params, lora, batch, key):
    return jnp.mean((adapted(params, lora, batch["x"]) - batch["y"]) ** 2)


def evaluate(state, params):
    return {"held_out": loss_fn(params, state.lora, test, None)}


start = float(loss_fn(params, {}, test, None))
print(f"held-out error of the bare base: {start:.3f}")

# %% [markdown]
# ## Sixty runs
#
# `grid` is the product of its arguments. `rank` and `seed` are read by the sweep; `lr` goes to your optimizer.

# %%
STEPS = 150
lanes = lx.grid(rank=RANKS, lr=RATES, seed=SEEDS)


def tx(lane):
    return optax.adam(lane["lr"])


settings = dict(steps=STEPS, tx=tx, key=jax.random.key(7), eval_fn=evaluate, every=50, progress=False)
result = lx.sweep(loss_fn, params, lanes, [train], **settings)
assert result.finished and len(lanes) == 60
result.to_pandas().query("step == @STEPS and seed == 0").pivot(
    index="rank", columns="lr", values="held_out"
).round(4)

# %% [markdown]
# A lane is the separate run. Here is one of them, trained by hand with its own key and rank: no lane sees another.

# %%
lane = lanes.index({"rank": 2, "lr": 1e-2, "seed": 1})
own = jax.random.fold_in(jax.random.key(7), 1)
_, lora = lx.split(params, rank=2, key=own)
state = lx.TrainState.create(lora=lora, tx=optax.adam(1e-2), key=own)
step = jax.jit(lx.make_train_step(loss_fn, optax.adam(1e-2)))
alone = []
for _ in range(STEPS):
    state, metrics = step(state, params, train)
    alone.append(float(metrics["loss"]))
off = np.abs(result.curves["loss"][lane] - alone).max() / alone[0]
print(f"lane {lane} against a run of its own: curves differ by {off:.0e} of the first loss")
assert off < 1e-4
assert result.lora(lane)["up/kernel"].rank == 2

# %% [markdown]
# ## What rank is enough?
#
# Each point is the mean over seeds at the best learning rate. Below rank 4 something cannot be learned, however long one trains; above, only noise is left to learn.

# %%
best = {rank: min(row["mean"] for row in result.means("held_out") if row["rank"] == rank) for rank in RANKS}
print({rank: round(error, 4) for rank, error in best.items()})
assert start > best[1] > best[2] > 3 * best[4]
assert best[4] < min(best[8], best[16]) < start / 5
lx.report.plot_metric(result, metric="held_out", x="rank")

# %% [markdown]
# ## Does the learning rate move with the rank?
#
# The scale is `alpha / rank` with one alpha for all, so the first step on the data does not depend on the rank, and what is good for one rank is not bad for another. That large
# ranks do best with the lowest rate here has another reason: a faster one fits the noise. The best cell is framed.

# %%
lx.report.plot_heatmap(result, metric="held_out", x="lr", y="rank")

# %% [markdown]
# `optimum` fits a parabola over `log(lr)` around the best point, and says how far seeds let it wander.

# %%
found = {}
for rank in RANKS:
    scores = [
        [
            next(
                row["held_out"]
                for row in result.final()
                if (row["rank"], row["lr"], row["seed"]) == (rank, lr, seed)
            )
            for lr in RATES
        ]
        for seed in SEEDS
    ]
    found[rank] = lx.sweeps.optimum(RATES, np.log(scores), points=3)
    print(
        f"rank {rank:2}: best learning rate {found[rank].x:.3f}, between {found[rank].low:.3f} and {found[rank].high:.3f}"
    )
assert max(o.x for o in found.values()) < 10 * min(o.x for o in found.values())  # while ranks differ by 16

# %% [markdown]
# ## What was learned has rank 4, also where 16 were allowed
#
# The singular values of `dW` of the best lane of rank 16: four of them are large.

# %%
row = min((r for r in result.final() if r["rank"] == 16), key=lambda r: r["held_out"])
wide = result.lora(row["lane"])
values = {path: np.linalg.svd(np.asarray(dw), compute_uv=False) for path, dw in lx.delta(wide).items()}
for path, s in values.items():
    print(f"{path:12} singular values 1, 4, 5: {s[0]:.2f}, {s[3]:.2f}, {s[4]:.2f}")
    assert s[4] < s[3] / 2 and s[16] < 1e-4
lx.report.plot_spectra(wide)

# %% [markdown]
# So the trained adapter of rank 16 can be cut down to rank 4 afterwards, at almost no cost; cut to 2 it loses what rank 2 cannot hold.

# %%
for rank in (8, 4, 2):
    small = lx.ranks.truncate(wide, rank)
    error = float(loss_fn(params, small, test, None))
    print(f"cut from 16 to {rank}: held-out error {error:.4f} (trained at rank {rank}: {best[rank]:.4f})")
    if rank == 4:
        assert error < 0.2 * start
assert error > 5 * best[4]

# %% [markdown]
# Curves of all lanes, colored by rank. `lx.report.page(result, "sweep.html")` writes all of this as one page with tables that sort.

# %%
lx.report.plot_curves(result, hue="rank")
