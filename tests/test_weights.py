"""`weight=`: micro-batches and devices combine to the mean of the whole batch, whatever each holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lx

KEY, TX = jax.random.key(0), optax.sgd(1.0)
PARAMS = {"up": {"kernel": jax.random.normal(jax.random.key(1), (6, 4))}}
ADAPTED = lx.adapt(lambda params, x: x @ params["up"]["kernel"])


def count(batch):
    return batch["mask"].sum()


def make(mask, dtype=jnp.float32):
    """A masked mean as the loss, as an aux and as a running statistic; 0 / 0 where all is masked."""
    params, lora = lx.split(PARAMS, rank=2, dtype=dtype)
    lora["up/kernel"] = jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), lora["up/kernel"])
    mask = jnp.asarray([int(c) for c in mask], jnp.float32)
    x = jax.random.normal(jax.random.key(2), (len(mask), 6))
    batch = {"x": x, "y": jax.random.normal(jax.random.key(3), (len(mask), 4)), "mask": mask}

    def loss_fn(params, lora, batch, key, extra):
        def mean(x):
            return (x * batch["mask"]).sum() / batch["mask"].sum()

        error = jnp.sum((ADAPTED(params, lora, batch["x"]) - batch["y"]) ** 2, 1)
        new = {"mean": 0.9 * extra["mean"] + 0.1 * mean(batch["x"][:, 0]), "n": extra["n"] + 1}
        return mean(error), (new, {"x": mean(batch["x"][:, 1]), "count": jnp.int32(len(batch["mask"]))})

    extra = {"mean": jnp.float32(2), "n": jnp.int32(0)}
    state = lx.TrainState.create(lora=lora, tx=TX, key=KEY, extra=extra)
    return loss_fn, state, params, batch


def whole(mask):
    loss_fn, state, params, batch = make(mask)
    return jax.jit(lx.make_train_step(loss_fn, TX))(state, params, batch)


def step_of(kind, loss_fn, state, params, batch, weight=count):
    """``(state, metrics)`` of one step of each kind, each with as many parts as it can have."""
    if kind == "accumulate":
        return jax.jit(lx.make_train_step(loss_fn, TX, accumulate=4, weight=weight))(state, params, batch)
    if kind.startswith("pmap"):
        accumulate = 2 if kind == "pmap-accumulate" else 1
        devices = jax.devices()[: len(batch["mask"]) // 2]
        step = lx.pmap_train_step(loss_fn, TX, weight=weight, accumulate=accumulate, devices=devices)
        given = lx.replicate(state, devices), lx.replicate(params, devices), lx.shard(batch, devices)
        return lx.unreplicate(step(*given))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if kind == "mesh":
        step = lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules={}, accumulate=2, weight=weight)
        return step(state, params, batch)
    step = lx.make_train_step(loss_fn, TX, axis_name="data", accumulate=2, weight=weight)
    specs = dict(in_specs=(jax.P(), jax.P(), jax.P("data")), out_specs=jax.P())
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))(state, params, batch)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mask", ["11101011", "11110000", "11101110"])
@pytest.mark.parametrize("kind", ["accumulate", "pmap", "pmap-accumulate", "shard_map", "mesh"])
def test_the_parts_combine_to_the_mean_of_the_whole_batch(kind, mask):
    """Also where a whole part is masked, whose loss is 0 / 0: it counts nothing."""
    want, wanted = whole(mask)
    got, metrics = step_of(kind, *make(mask))
    close(jax.device_get(got.lora), jax.device_get(want.lora))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6)
    close(float(metrics["aux"]["x"]), float(wanted["aux"]["x"]))
    close(float(got.extra["mean"]), float(want.extra["mean"]))


@pytest.mark.parametrize("kind", ["accumulate", "pmap"])
def test_without_a_weight_every_part_counts_the_same(kind):
    """Which is not the mean over the mask: what `weight` is for."""
    want, _ = whole("11101011")
    got, _ = step_of(kind, *make("11101011"), weight=None)
    assert np.abs(got.lora["up/kernel"].b - want.lora["up/kernel"].b).max() > 1e-3


@pytest.mark.parametrize("kind", ["one", "accumulate", "pmap"])
def test_a_batch_that_weighs_nothing_moves_nothing(kind):
    loss_fn, state, params, batch = make("00000000")
    if kind == "one":
        got, metrics = jax.jit(lx.make_train_step(loss_fn, TX, weight=count))(state, params, batch)
    else:
        got, metrics = step_of(kind, *make("00000000"))
    close(jax.device_get(got.lora), jax.device_get(make("00000000")[1].lora))
    assert metrics["loss"] == metrics["grad_norm"] == 0 and got.extra["mean"] == 2.0


def test_sixteen_bits_and_weights_of_any_number():
    loss_fn, state, params, batch = make("11101011", jnp.bfloat16)
    by_int = lx.make_train_step(loss_fn, TX, accumulate=4, weight=lambda b: b["mask"].astype(int).sum())
    got, metrics = jax.jit(by_int)(state, params, batch)
    _, wanted = whole("11101011")
    assert got.lora["up/kernel"].b.dtype == jnp.bfloat16
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=2e-2)
    for weight in (lambda b: b["mask"], lambda b: "much", lambda b: None):
        with pytest.raises(lx.LoraError, match=r"not a number(.|\n)*batch\[\"mask\"\].sum\(\)"):
            lx.make_train_step(loss_fn, TX, weight=weight)(state, params, batch)
