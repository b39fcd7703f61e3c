"""A tiny training run that the tests of `fit` share, and that they run as a process of its own too.

    python tests/fit_setup.py FOLDER STEPS EVERY [SECONDS A STEP]

trains in FOLDER/run, prints ``step <number>`` for each step, and writes the adapters to FOLDER/final.npz.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx
from lorax_fn.core.layouts import Layout

LAYOUT = Layout(inputs=(0,), outputs=(1,))
TX = optax.adam(0.05)
PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 4))}


def loss_fn(params, lora, batch, key):
    """The batch, the key (noise) and the extra-free state all matter: a wrong one after a restart shows."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    a, b = lora["w"].a, lora["w"].b
    out = x @ params["w"] + lora["w"].scale * ((x @ a) @ b)
    return jnp.mean((out - batch["y"]) ** 2), {"mean": jnp.mean(out), "out": out}


STEP = jax.jit(lx.make_train_step(loss_fn, TX), donate_argnums=0)
KEEPING_STEP = jax.jit(lx.make_train_step(loss_fn, TX))


def new_state(rank=2):
    a = jax.random.normal(jax.random.key(1), (6, rank))
    lora = {"w": lx.LoRA(a, jnp.zeros((rank, 4)), 4.0, rank, "lora", LAYOUT)}
    return lx.TrainState.create(lora=lora, tx=TX, key=jax.random.key(2))


def batch_at(number):
    rng = np.random.default_rng(number)
    return {name: rng.normal(size=(8, n)).astype(np.float32) for name, n in (("x", 6), ("y", 4))}


def batches(start=0):
    """Batch ``start``, ``start + 1``, ... without end."""
    while True:
        yield batch_at(start)
        start += 1


def by_hand(steps, state=None, source=None):
    """The same run without `fit`: the state after ``steps`` steps, and every loss."""
    state, losses, source = state or new_state(), [], source or batches()
    for _ in range(steps):
        state, metrics = KEEPING_STEP(state, PARAMS, next(source))
        losses.append(float(metrics["loss"]))
    return state, losses


def raw(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same(got, want):
    """Bit for bit, dtypes and structure too."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def main(folder, steps, every, seconds=0.0):
    def tell(row):
        if "loss" in row:
            print("step", row["step"], flush=True)
            time.sleep(seconds)

    state = lx.fit(
        STEP,
        new_state(),
        PARAMS,
        batches(),
        steps=steps,
        every=every,
        eval_fn=lambda state, params: jnp.mean(state.lora["w"].b),
        checkpoint_dir=folder / "run",
        metrics_file=folder / "metrics.jsonl",
        callbacks=[tell],
        progress=False,
    )
    leaves = jax.tree.leaves((state.lora, state.opt_state))
    np.savez(folder / "final.npz", *(np.asarray(x) for x in leaves))
    print("finished", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
