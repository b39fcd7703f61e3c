"""One device, pmap and meshes give the same training: losses, adapters, statistics, compilations, buffers."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from many_devices import KINDS, RULES, STEPS, TX, P, make, mesh_of, rules_of

import lorax_fn as lx

ENGINES = ["pmap", "auto8", "explicit8", "auto222", "explicit222"]
FORMS = {
    f"accumulate{a}{'-checkpoint' * c}{'-extra' * e}": dict(accumulate=a, checkpoint=c, extra=e)
    for a, c, e in itertools.product((1, 2), (False, True), (False, True))
}
SHORT = ["accumulate1", "accumulate2-checkpoint-extra"]
DEFAULT, SLOW = SHORT, [pytest.param(name, marks=pytest.mark.slow) for name in FORMS if name not in SHORT]


@contextlib.contextmanager
def compiled(names):
    """Adds the name of each program that XLA compiles in the block; pmap has no cache size to ask for."""

    def listen(event, *args, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)


def train(step, state, params, batch, read=lambda x: x):
    losses, names = [], []
    for _ in range(STEPS):
        with compiled(names):
            state, metrics = step(state, params, batch)
        losses.append(float(read(metrics["loss"])))
    assert len(names) == 1, names
    return losses, jax.device_get(read(state)), jax.device_get(read(metrics))


@functools.cache
def one_device(form):
    loss_fn, state, params, batch = make(**FORMS[form])
    step = jax.jit(lx.make_train_step(loss_fn, TX, accumulate=FORMS[form]["accumulate"]), donate_argnums=0)
    return train(step, state, params, batch)


def engine(name, form):
    """``(step, state, params, batch, read)``, everything in its place."""
    loss_fn, state, params, batch = make(**FORMS[form])
    accumulate = FORMS[form]["accumulate"]
    if name == "pmap":
        step = lx.pmap_train_step(loss_fn, TX, accumulate=accumulate)
        return step, lx.replicate(state), lx.replicate(params), lx.shard(batch), lx.unreplicate
    mesh = mesh_of((8,) if name.endswith("8") else (2, 2, 2), name.rstrip("82"))
    step = lx.mesh_train_step(mesh, rules_of(mesh), loss_fn, TX, accumulate=accumulate)
    return step, *step.place(state, params), batch, lambda x: x


def close(got, want, tolerance=1e-5):
    """By the relative norm of each leaf, in float32."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("form", DEFAULT + SLOW)
@pytest.mark.parametrize("name", ENGINES)
def test_the_same_losses_and_adapters_as_one_device(name, form):
    want_losses, want, want_metrics = one_device(form)
    step, state, params, batch, read = engine(name, form)
    given = jax.tree.leaves((state.lora, state.opt_state))
    losses, got, metrics = train(step, state, params, batch, read)

    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    close(got.lora, want.lora)
    close(got.opt_state, want.opt_state, 1e-3)  # the mean of gradients that nearly cancel
    assert got.step == STEPS
    if FORMS[form]["extra"]:
        close(got.extra["mean"], want.extra["mean"])
        assert got.extra["n"] == want.extra["n"] == STEPS * FORMS[form]["accumulate"]
        close(metrics["aux"]["twice"], want_metrics["aux"]["twice"])
    assert all(x.is_deleted() for x in given)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
