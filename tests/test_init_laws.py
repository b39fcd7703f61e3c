"""The laws of every init, on the model and with the compiled functions of the contract of methods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_methods import IDS, LAYOUTS, close, everything, model, moved, params_of

import lorax_fn as lx
from lorax_fn.inits.table import INITS

BATCHES = [IDS, np.array([[1, 4, 6, 7], [2, 3, 0, 5]])]


def loss(params, ids):
    return jnp.mean(jnp.square(model(params, ids) - 1.0))


# Looked-up rows contract no inputs: `eva` and `corda` start all but the table.
# LoftQ quantizes the weights too; test_quantized_leaves.py has its laws.
ROWS = {name: name for name in [*INITS, "pissa:4"] if name != "loftq"} | {
    "eva": {"embed": "kaiming", "*": lx.inits.eva(model, BATCHES)},
    "lora_ga": lx.inits.lora_ga(loss, BATCHES),
    "corda": {"embed": "kaiming", "*": lx.inits.corda(model, BATCHES)},
}
B_IS_ZERO = ("kaiming", "gaussian", "zero_a", "eva")
SOME = ("kaiming", "orthogonal", "pissa", "corda")  # one of each kind; the others are slow tests
NAMES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
MOVES_W = ("pissa", "pissa:4", "olora", "lora_ga", "corda")


@functools.cache
def original():
    params = params_of()
    return params, model(params, IDS)


@functools.cache
def split(name):
    return lx.split(original()[0], 2, alpha=6.0, targets=list(LAYOUTS), layout=LAYOUTS, init=ROWS[name])


def trained(lora):
    """Not far from where they started: what a residual took is in them still."""
    return jax.tree.map(lambda x, change: x + 0.2 * change, lora, moved(lora, seed=2))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_adapt_equals_merge_from_every_init(name):
    """At init, and moved: values and gradients, under jit, checkpoint and vmap."""
    params, start = split(name)
    for lora in (start, trained(start)):
        got = everything()(params, start, lora)
        for law in ("values", "gradients", "checkpoint", "vmap"):
            one, other = (jax.tree.leaves(side) for side in got[law])
            largest = max(np.abs(np.asarray(x)).max() for x in other)
            for leaf, want in zip(one, other, strict=True):
                np.testing.assert_allclose(leaf, want, rtol=0, atol=3e-5 * largest, err_msg=law)
    close(got["start"], original()[1], 4 * 2.0**-23 if name in B_IS_ZERO else 1e-5)
    for path, w in lx.merge(params, start).items():
        close(w, original()[0][path], 0.0 if name in B_IS_ZERO else 2e-6, path)
        kept = name not in MOVES_W or (name == "corda" and path == "embed")
        assert (params[path] is original()[0][path]) == kept


@functools.cache
def training():
    adapted, tx = lx.adapt(model, fallback="error"), optax.adamw(0.02, weight_decay=0.1)

    def loss_fn(params, lora, ids, key):
        return jnp.mean(jnp.square(adapted(params, lora, ids) - 1.0))

    return jax.jit(lx.make_train_step(loss_fn, tx)), tx


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_alike_after_save_and_load_from_every_init(name, tmp_path):
    params, lora = split(name)
    step, tx = training()
    state, losses = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0)), []
    for _ in range(4):
        state, metrics = step(state, params, IDS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    lx.checkpoint.save(tmp_path / "adapter", state.lora, params=params)
    loaded = lx.checkpoint.load(tmp_path / "adapter", params=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(state.lora)
    want, _ = step(state, params, IDS)
    got, _ = step(dataclasses.replace(state, lora=loaded), params, IDS)
    jax.tree.map(np.testing.assert_array_equal, got.lora, want.lora)


@pytest.mark.parametrize("name", MOVES_W)
def test_a_trained_adapter_of_a_residual_is_an_ordinary_one_of_the_original(name):
    params, start = split(name)
    lora, before = trained(start), original()[0]
    plain = lx.ranks.to_plain(before, params, lora)
    merged = lx.merge(before, plain)
    for path, w in lx.merge(params, lora).items():
        assert plain[path].rank == (2 if params[path] is before[path] else 4)
        close(merged[path], w, 1e-5, path)
