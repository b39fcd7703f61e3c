"""Ragged products under `jax.vmap`: JAX itself takes them only if all operands are mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import SIO, normal

import lorax_fn as lx

SIZES = jnp.array([1, 2, 0, 3], jnp.int32)
LANES = 3
SPREAD = jnp.array([1.0, 0.5, 2.0])


def plain(params, x):
    return lax.ragged_dot(x, params["w"], SIZES)


def scanned(params, x):
    return lax.scan(lambda c, _: (c, plain(params, x)), 0, None, length=2)[1][0]


def lanes_of(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf * s for s in SPREAD]), tree)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mapped", ["lora", "x", "params"])
@pytest.mark.parametrize("fn", [plain, scanned])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_each_lane_is_its_own_call(method, fn, mapped):
    """In values, and in gradients of a linear loss, whose cotangent no lane maps."""
    params, lora = lx.split({"w": normal(0, (4, 8, 5))}, rank=2, layout={"w": SIO}, method=method)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    given = {"params": params, "lora": lora, "x": normal(1, (6, 8))}
    apply = lx.adapt(fn, fallback="error")

    def run(params, lora, x):
        return apply(params, lora, x), jax.grad(lambda *args: apply(*args).sum(), (1, 2))(params, lora, x)

    axes = tuple(0 if name == mapped else None for name in given)
    many = {**given, mapped: lanes_of(given[mapped])}
    got = jax.jit(jax.vmap(run, axes))(*many.values())
    for i in range(LANES):
        one = jax.jit(run)(*{**given, mapped: jax.tree.map(lambda leaf, i=i: leaf[i], many[mapped])}.values())
        for number, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True)):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5, err_msg=f"leaf {number} of lane {i}")


def test_a_rule_of_derivatives_stays_linear():
    """The tangent of a ragged product is one too, and JAX transposes it."""

    @jax.custom_jvp
    def product(w, x):
        return lax.ragged_dot(x, w, SIZES)

    @product.defjvp
    def rule(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return product(w, x), lax.ragged_dot(dx, w, SIZES) + lax.ragged_dot(x, dw, SIZES)

    params, lora = lx.split({"w": normal(0, (4, 8, 5))}, rank=2, layout={"w": SIO})
    lora, x = jax.tree.map(lambda leaf: leaf + 0.1, lora), normal(1, (6, 8))

    def loss(run):
        return jax.jit(jax.grad(lambda lora, x: jnp.sin(run(params, lora, x)).sum(), (0, 1)))

    got = loss(lx.adapt(lambda p, x: product(p["w"], x)))(lora, x)
    want = loss(lambda p, lora, x: product(lx.merge(p, lora)["w"], x))(lora, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_stored_experts():
    params = lx.quantize({"w": normal(0, (4, 8, 5))}, "nf4", block=4, layout={"w": SIO})
    params, lora = lx.split(params, rank=2, layout={"w": SIO})
    lora, x = jax.tree.map(lambda leaf: leaf + 0.1, lora), normal(1, (LANES, 6, 8))
    apply = lx.adapt(plain, fallback="error")
    got = jax.vmap(apply, (None, None, 0))(params, lora, x)
    want = [plain(lx.dequantize(lx.merge(params, lora, requantize=False)), row) for row in x]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_without_a_vmap_it_costs_what_it_costs_by_hand():
    """What ties the operands together is gone from the compiled program."""
    params, lora = lx.split({"w": normal(0, (4, 8, 5))}, rank=2, layout={"w": SIO})

    def by_hand(params, lora, x):
        h = lax.ragged_dot(x, lora["w"].a * lora["w"].scale, SIZES)
        return plain(params, x) + lax.ragged_dot(h, lora["w"].b, SIZES)

    def costs(fn):
        compiled = jax.jit(fn).lower(params, lora, normal(1, (6, 8))).compile()
        found = compiled.cost_analysis()
        return found["flops"], found["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes

    assert costs(lx.adapt(plain)) == costs(by_hand)
