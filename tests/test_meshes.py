"""Sharded base weights in, the plain model's sharding out: Auto and Explicit mesh axes, eager and jitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_fn as lx


def auto_model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"])
    x = jax.lax.with_sharding_constraint(x @ params["down"]["kernel"], P("data", None, None))

    def body(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, params["layers"]["kernel"])[0]


def explicit_model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"])
    # Both operands are sharded along the contracted axis: explicit axes ask for the result's sharding.
    x = jnp.einsum("btf,fd->btd", x, params["down"]["kernel"], out_sharding=P("data", None, None))

    def body(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, params["layers"]["kernel"])[0]


MODELS = {AxisType.Auto: auto_model, AxisType.Explicit: explicit_model}


@pytest.mark.parametrize("kind", MODELS, ids=str)
def test_sharded_weights_give_the_merged_models_values_gradients_and_sharding(kind):
    mesh, fn = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3), MODELS[kind]
    fsdp = "fsdp" if kind == AxisType.Auto else None  # explicit: a reshard by hand

    def put(seed, shape, *spec):
        value = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.3
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        params = {
            "up": {"kernel": put(0, (8, 16), fsdp, "tensor")},
            "down": {"kernel": put(1, (16, 8), "tensor", fsdp)},
            "layers": {"kernel": put(2, (3, 8, 8), None, fsdp, None)},
        }
        x = put(3, (4, 2, 8), "data")
        params, lora = lx.split(params, rank=2, alpha=2.0, layout=lx.usage(fn, params, x))
        assert len(lora) == 3
        noise = np.random.default_rng(4)
        lora = jax.tree.map(lambda a: a + 0.3 * noise.normal(size=a.shape).astype(np.float32), lora)
        adapted = lx.adapt(fn, fallback="error")

        plain = jax.jit(fn)(params, x)
        merged = jax.jit(lambda lora, x: fn(lx.merge(params, lora), x))(lora, x)
        for run in (adapted, jax.jit(adapted)):
            out = run(params, lora, x)
            np.testing.assert_allclose(out, merged, atol=1e-5)
            assert out.sharding.is_equivalent_to(plain.sharding, out.ndim)
            assert jax.typeof(out) == jax.typeof(plain)

        def squares(run):
            return jax.jit(jax.grad(lambda lora: jnp.sum(jnp.square(run(lora)))))

        got = squares(lambda lora: adapted(params, lora, x))(lora)
        want = squares(lambda lora: fn(lx.merge(params, lora), x))(lora)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_whole_weight_is_gathered_that_the_plain_model_does_not_gather():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(jnp.ones((32, 64)), NamedSharding(mesh, P(None, "tensor")))
    x = jax.device_put(jnp.ones((4, 8, 32)), NamedSharding(mesh, P("data")))
    params, lora = lx.split({"kernel": w}, rank=2)
    adapted = lx.adapt(lambda params, x: x @ params["kernel"], fallback="error")
    grad = jax.jit(jax.grad(lambda lora, params, x: jnp.sum(jnp.square(adapted(params, lora, x)))))
    text = grad.lower(lora, params, x).compile().as_text()
    assert "f32[32,16]" in text  # each device holds its share of W
    assert "f32[32,64]" not in text  # and none ever holds the whole
