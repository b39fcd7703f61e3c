"""A small model for tests of sweeps, and the separate run that each lane is compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx

KEY = jax.random.key(7)
STEPS = 20


def init(layers=2, width=8):
    keys = jax.random.split(jax.random.key(0), layers)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(k, (width, width), jnp.float32) / width**0.5,
            "bias": jnp.zeros(width, jnp.float32),
        }
        for i, k in enumerate(keys)
    }


def model(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x


apply = lx.adapt(model)


def loss_fn(params, lora, batch, key):
    return jnp.mean((apply(params, lora, batch["x"]) - batch["y"]) ** 2)


def batches(seed=0, count=5, width=8):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = rng.normal(size=(6, width)).astype("f4")
        made.append({"x": x, "y": np.tanh(x[:, ::-1]).astype("f4")})
    return made


def adam(lane):
    return optax.adam(lane["lr"])


def constant(lane):
    return optax.adam(1e-2)


def separate(lane, tx, *, params=None, loss=loss_fn, data=None, split=None, extra=None, steps=STEPS, key=KEY):
    """One configuration by itself, as the docstring of `lx.sweep` writes it down."""
    params = init() if params is None else params
    own = jax.random.fold_in(key, lane.get("seed", 0))
    names = ("rank", "alpha", "scaling", "method", "init", "targets", "exclude", "full", "rows", "layout")
    asked = {**(split or {}), **{name: lane[name] for name in names if name in lane}}
    params, lora = lx.split(params, key=own, **asked)

    def lane_loss(params, lora, batch, key, *given):
        if lane.get("dropout"):
            lora = lx.dropout(lora, lane["dropout"], jax.random.fold_in(key, 0x5EED))
        return loss(params, lora, batch, key, *given)

    state = lx.TrainState.create(lora=lora, tx=tx(lane), key=own, extra=extra)
    step = jax.jit(lx.make_train_step(lane_loss, tx(lane)))
    data, losses = batches() if data is None else data, []
    for i in range(steps):
        state, metrics = step(state, params, data[i % len(data)])
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, np.array(losses)


def assert_lane_is(result, i, state, losses):
    np.testing.assert_allclose(result.curves["loss"][i], losses[:, 0], rtol=1e-4)
    np.testing.assert_allclose(result.curves["grad_norm"][i], losses[:, 1], rtol=1e-3, atol=1e-6)
    mine = result.lora(i)
    assert mine.keys() == state.lora.keys()
    for path, adapter in state.lora.items():
        assert jax.tree.structure(mine[path]) == jax.tree.structure(adapter)
        for a, b in zip(jax.tree.leaves(mine[path]), jax.tree.leaves(adapter), strict=True):
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def assert_lanes_are_runs(lanes, tx, **options):
    """Every lane of one sweep is its own separate run; returns the result."""
    loss, data, extra = (
        options.pop(n, d) for n, d in (("loss", loss_fn), ("data", batches()), ("extra", None))
    )
    params, split = options.pop("params", None), options.pop("split", {})
    params = init() if params is None else params
    result = lx.sweep(
        loss,
        params,
        lanes,
        data,
        steps=STEPS,
        tx=tx,
        key=KEY,
        split=split,
        extra=extra,
        progress=False,
        **options,
    )
    for i, lane in enumerate(lanes):
        run = separate(lane, tx, params=params, loss=loss, data=data, split=split, extra=extra)
        assert_lane_is(result, i, *run)
    return result
