"""The train step against steps written out by hand: gradients, keys, accumulation, extra, devices."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.whole import Full
from lorax_fn.training.masks import train_only
from lorax_fn.training.step import TrainState, make_train_step

LAYOUT = Layout(inputs=(0,), outputs=(1,))
KEY = jax.random.key(7)
ADAM = optax.adam(0.05)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def setup(dtype=jnp.float32, b=None):
    params = {"w": normal(0, (4, 3)), "bias": jnp.zeros(3)}
    b = jnp.zeros((2, 3), dtype) if b is None else b
    a = normal(1, (4, 2), dtype)
    lora = {"w": LoRA(a, b, 4.0, 2, "lora", LAYOUT), "bias": Full(jnp.zeros(3, dtype))}
    batch = {"x": normal(3, (16, 4)), "y": normal(4, (16, 3))}
    return params, lora, batch


def apply(params, lora, x):
    """``x@W + s*(x@A)@B + bias`` written by hand, in float32."""
    w, a, b = params["w"], lora["w"].a.astype(jnp.float32), lora["w"].b.astype(jnp.float32)
    return x @ w + lora["w"].scale * ((x @ a) @ b) + lora["bias"].weight(params["bias"])[None]


def loss_fn(params, lora, batch, key):
    del key
    return jnp.mean((apply(params, lora, batch["x"]) - batch["y"]) ** 2)


def state_of(lora, tx=ADAM, **kwargs):
    return TrainState.create(lora=jax.tree.map(jnp.copy, lora), tx=tx, key=KEY, **kwargs)


def close(got, want, rtol=2e-6, atol=1e-7):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol), got, want)


def test_steps_equal_a_loop_written_by_hand():
    params, lora, batch = setup()
    state, step = state_of(lora), jax.jit(make_train_step(loss_fn, ADAM), donate_argnums=0)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = ADAM.init(lora)
    for i in range(4):
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(params, lora, batch, None)
        state, metrics = step(state, params, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = ADAM.update(grads, opt_state, lora)
        lora = optax.apply_updates(lora, updates)
        close(state.lora, lora, rtol=1e-5, atol=1e-6)
        assert (state.step, state.step.dtype) == (i + 1, jnp.int32)
    assert set(metrics) == {"loss", "grad_norm"}
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(KEY).tolist()


def test_at_step_one_a_has_no_gradient_and_b_has():
    params, lora, batch = setup()
    tx = optax.sgd(1.0)
    state, _ = jax.jit(make_train_step(loss_fn, tx))(state_of(lora, tx), params, batch)
    np.testing.assert_array_equal(state.lora["w"].a, lora["w"].a)
    assert np.abs(state.lora["w"].b).min() > 1e-4
    grads = jax.grad(loss_fn, argnums=1)(params, lora, batch, None)
    np.testing.assert_array_equal(grads["w"].a, np.zeros((4, 2)))


def test_frozen_leaves_are_the_same_objects_after_training():
    params, lora, batch = setup()
    before = jax.tree.map(id, params), jax.tree.map(np.array, params)
    state = state_of(lora)
    step = jax.jit(make_train_step(loss_fn, ADAM), donate_argnums=0)
    for _ in range(2):
        state, _ = step(state, params, batch)
    assert jax.tree.map(id, params) == before[0]
    jax.tree.map(np.testing.assert_array_equal, params, before[1])


@pytest.mark.parametrize(
    "tx",
    [
        ADAM,
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(optax.linear_schedule(0.1, 0.0, 9), 0.9)),
        optax.MultiSteps(ADAM, 2),
        optax.contrib.schedule_free_adamw(0.1),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    ],
    ids=["adam", "inject", "clip", "multisteps", "schedule_free", "plateau"],
)
def test_a_second_step_traces_nothing_and_donation_works(tx):
    params, lora, batch = setup()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_train_step(loss_fn, tx), n=1), donate_argnums=0)
    state = given = state_of(lora, tx)
    for _ in range(3):
        state, metrics = step(state, params, batch)
    assert given.lora["w"].a.is_deleted()
    assert np.isfinite(metrics["loss"]) and not np.array_equal(state.lora["w"].b, lora["w"].b)


def test_a_donating_step_leaves_key_and_extra_of_the_caller_alive():
    params, lora, batch = setup()
    key, extra = jax.random.key(3), {"n": jnp.zeros(())}
    state = TrainState.create(lora=lora, tx=ADAM, key=key, extra=extra)

    def with_extra(params, lora, batch, key, extra):
        return loss_fn(params, lora, batch, key), ({"n": extra["n"] + 1}, None)

    state, _ = jax.jit(make_train_step(with_extra, ADAM), donate_argnums=0)(state, params, batch)
    assert (state.extra["n"], extra["n"], key.is_deleted()) == (1.0, 0.0, False)
    assert lora["w"].b.is_deleted()


def test_clip_by_global_norm_does_not_see_frozen_leaves():
    params, lora, batch = setup()
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state, metrics = make_train_step(loss_fn, tx)(state_of(lora, tx), params, batch)
    grads = jax.grad(loss_fn, argnums=1)(params, lora, batch, None)
    moved = jax.tree.map(lambda new, old: new - old, state.lora, lora)
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-4)
    close(moved, jax.tree.map(lambda g: -g * 1e-3 / optax.tree.norm(grads), grads), rtol=1e-4)
    assert metrics["grad_norm"] > 1e-2


def test_wrapping_twice_does_no_harm():
    params, lora, batch = setup()
    twice = (ADAM, train_only(ADAM))
    states = [make_train_step(loss_fn, tx)(state_of(lora, tx), params, batch)[0] for tx in twice]
    jax.tree.map(np.testing.assert_array_equal, states[0].lora, states[1].lora)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Adapter):
    """A frozen array, a key and integers beside the vector that trains (VeRA's shape)."""

    frozen = ("shared",)

    shared: Any
    vector: Any
    seed: Any
    ids: Any


def test_frozen_fields_keys_and_integers_of_an_adapter_stay_and_cost_nothing():
    shared = normal(5, (3, 3))
    lora = {"v": Scaled(shared, jnp.ones(3), jax.random.key(1), jnp.arange(3, dtype=jnp.int32))}

    def loss(params, lora, batch, key):
        return jnp.sum((batch @ lora["v"].shared * lora["v"].vector[None]) ** 2)

    state = TrainState.create(lora=lora, tx=ADAM, key=KEY)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 3 + 3 + 1
    new, metrics = make_train_step(loss, ADAM)(state, {}, jnp.ones((2, 3)))
    for name in ("shared", "seed", "ids"):
        assert getattr(new.lora["v"], name) is getattr(lora["v"], name)
    want = jnp.linalg.norm(2 * 2 * jnp.sum(shared, 0) ** 2)
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-5)
    text = jax.jit(make_train_step(loss, ADAM)).lower(state, {}, jnp.ones((2, 3))).as_text()
    assert text.count("dot_general") == 1  # the forward one: shared has no gradient


def test_a_step_has_a_key_of_its_own_and_aux_is_handed_on():
    params, lora, batch = setup()

    def noisy(params, lora, batch, key):
        return loss_fn(params, lora, batch, key), {"noise": jax.random.normal(key)}

    state, step = state_of(lora), jax.jit(make_train_step(noisy, ADAM))
    for i in range(2):
        state, metrics = step(state, params, batch)
        np.testing.assert_array_equal(metrics["aux"]["noise"], jax.random.normal(jax.random.fold_in(KEY, i)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accumulated_micro_batches_equal_the_whole_batch(dtype):
    params, lora, batch = setup(dtype)

    def with_aux(params, lora, batch, key):
        loss = loss_fn(params, lora, batch, key)
        return loss, {"twice": 2 * loss, "n": jnp.int32(len(batch["x"])), "key": jax.random.key_data(key)}

    tx = optax.sgd(0.1)
    whole, want = jax.jit(make_train_step(with_aux, tx))(state_of(lora, tx), params, batch)
    parts, got = jax.jit(make_train_step(with_aux, tx, accumulate=4))(state_of(lora, tx), params, batch)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    close(parts.lora, whole.lora, rtol=tolerance, atol=tolerance)
    close([got["loss"], got["grad_norm"]], [want["loss"], want["grad_norm"]], rtol=tolerance)
    np.testing.assert_allclose(got["aux"]["twice"], 2 * got["loss"], rtol=1e-6)
    last = jax.random.fold_in(jax.random.fold_in(KEY, 0), 3)
    np.testing.assert_array_equal(got["aux"]["key"], jax.random.key_data(last))
    assert got["aux"]["n"] == 4 and parts.lora["w"].b.dtype == dtype


def test_extra_goes_from_one_micro_batch_to_the_next():
    params, lora, batch = setup()
    batch["id"] = jnp.arange(16, dtype=jnp.float32)

    def ordered(params, lora, batch, key, extra):
        return loss_fn(params, lora, batch, key), (10 * extra + batch["id"][0], None)

    state = state_of(lora, extra=jnp.zeros(()))
    state, metrics = jax.jit(make_train_step(ordered, ADAM, accumulate=4))(state, params, batch)
    assert state.extra == 123.0 and metrics["aux"] is None


class BatchNormNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(1)(nn.relu(x))


def test_a_batch_norm_model_trains_with_its_statistics_in_extra():
    net, x = BatchNormNet(), 3 + normal(2, (16, 4))
    y = normal(9, (16, 1))
    with jax.numpy_rank_promotion("allow"):
        variables = net.init(jax.random.key(0), x, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    lora = {"k": LoRA(normal(1, (4, 2)), jnp.zeros((2, 4)), 2.0, 2, "lora", LAYOUT)}

    def loss(params, lora, batch, key, extra):
        dense = params["Dense_0"] | {"kernel": lora["k"].weight(params["Dense_0"]["kernel"])}
        variables = {"params": params | {"Dense_0": dense}, "batch_stats": extra}
        with jax.numpy_rank_promotion("allow"):
            out, new = net.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), (new["batch_stats"], {"mean": jnp.mean(out)})

    tx = optax.adam(0.02)
    state = state_of(lora, tx, extra=stats)
    step = jax.jit(make_train_step(loss, tx), donate_argnums=0)
    losses = []
    for _ in range(40):
        state, metrics = step(state, params, {"x": x, "y": y})
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:  # momentum 0.5: half of the first batch's mean, as B is still 0
            hidden = x @ params["Dense_0"]["kernel"]
            got = state.extra["BatchNorm_0"]["mean"]
            np.testing.assert_allclose(got, 0.5 * hidden.mean(0), rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0] and metrics["aux"]["mean"].shape == ()
    np.testing.assert_array_equal(stats["BatchNorm_0"]["mean"], np.zeros(4))


def replicated(tree, n=8):
    return jax.tree.map(lambda x: jnp.stack([x] * n), tree)


def per_device(params, lora, batch, key, extra):
    """Statistics and noise as models have them; the loss does not use the key."""
    loss = loss_fn(params, lora, batch, key)
    extra = {"mean": 0.5 * extra["mean"] + 0.5 * jnp.mean(batch["x"]), "n": extra["n"] + 1}
    return loss, (extra, {"noise": jax.random.normal(key)})


def test_pmap_over_eight_devices_equals_one_device():
    params, lora, batch = setup(b=normal(8, (2, 3)))
    extra = {"mean": jnp.zeros(()), "n": jnp.zeros((), jnp.int32)}
    single = state_of(lora, extra=extra)
    one = jax.jit(make_train_step(per_device, ADAM))
    many = jax.pmap(make_train_step(per_device, ADAM, axis_name="d"), axis_name="d")
    states, sharded = replicated(single), jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    for _ in range(4):
        single, want = one(single, params, batch)
        states, got = many(states, replicated(params), sharded)
    for device in (0, 7):
        close(jax.tree.map(lambda x, i=device: x[i], states.lora), single.lora, rtol=1e-4, atol=1e-5)
    close(got["loss"][3], want["loss"], rtol=1e-5)
    close(states.extra["mean"][0], single.extra["mean"], rtol=1e-5)
    assert single.extra["n"] == states.extra["n"][0] == 4
    assert got["aux"]["noise"][0] != want["aux"]["noise"]  # each device drew its own, then the mean


def test_accumulation_under_shard_map_equals_one_device():
    params, lora, batch = setup(b=normal(8, (2, 3)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    state = state_of(lora, extra={"mean": jnp.zeros(())})

    def loss(params, lora, batch, key, extra):
        mean = 0.5 * extra["mean"] + 0.5 * jnp.mean(batch["x"])
        return loss_fn(params, lora, batch, key), ({"mean": mean}, None)

    one, want = jax.jit(make_train_step(loss, ADAM, accumulate=2))(state, params, batch)
    step = make_train_step(loss, ADAM, accumulate=2, axis_name="d")
    specs = dict(in_specs=(jax.P(), jax.P(), jax.P("d")), out_specs=jax.P())
    many, got = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(state, params, batch)
    close(many.lora, one.lora, rtol=1e-5, atol=1e-6)
    close([got["loss"], got["grad_norm"]], [want["loss"], want["grad_norm"]], rtol=1e-5)
    close(many.extra["mean"], one.extra["mean"], rtol=1e-5)


def test_accumulation_on_a_mesh_of_explicit_axes_equals_one_device():
    params, lora, batch = setup(b=normal(8, (2, 3)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    one, want = jax.jit(make_train_step(loss_fn, ADAM, accumulate=2))(state_of(lora), params, batch)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("d")))
        state, params = jax.device_put((state_of(lora), params), jax.NamedSharding(mesh, jax.P()))
        many, got = jax.jit(make_train_step(loss_fn, ADAM, accumulate=2))(state, params, batch)
    close(jax.device_get(many.lora), jax.device_get(one.lora), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)
