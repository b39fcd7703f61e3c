"""Exports of an adapted function whose batch has a symbolic size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from rule_cases import IO, SIO, make_adapter, normal

import lorax_fn as lx

W = normal(1, (6, 6))
STACKED = {"w": normal(2, (3, 6, 6))}, {"w": make_adapter((3, 6, 6), SIO)}
ONE = {"w": W}, {"w": make_adapter((6, 6), IO)}
FUNCTIONS = {
    "product and bias": (lambda p, x: jnp.tanh(x @ p["w"] + jnp.ones((1, 1, 6))), *ONE),
    "both ways": (lambda p, x: (x @ p["w"]) @ p["w"].T, *ONE),
    "einsum": (lambda p, x: jnp.einsum("btd,hdk->btk", x, p["w"].reshape(1, 6, 6)), *ONE),
    "experts": (lambda p, x: jnp.einsum("btd,edf->btef", x, p["w"]), *STACKED),
    "scan": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], *STACKED),
    "jit and checkpoint": (lambda p, x: jax.checkpoint(jax.jit(lambda w, x: x @ w))(p["w"], x), *ONE),
    "vmap": (lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), *ONE),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_symbolic_batch_exports(name, grads):
    fn, params, lora = FUNCTIONS[name]
    run = lx.adapt(fn, fallback="error")
    factors = {path: (adapter.a, adapter.b) for path, adapter in lora.items()}

    def call(factors, x):
        with_factors = {
            path: lx.LoRA(a, b, lora[path].alpha, lora[path].rank, "lora", lora[path].layout)
            for path, (a, b) in factors.items()
        }
        return run(params, with_factors, x)

    if grads:
        call_ = jax.grad(lambda factors, x: jnp.sum(jnp.square(call(factors, x))))
    else:
        call_ = call
    batch = export.symbolic_shape("b, t, 6")
    exported = export.export(jax.jit(call_))(factors, jax.ShapeDtypeStruct(batch, jnp.float32))
    x = normal(3, (2, 5, 6))
    for got, want in zip(
        jax.tree.leaves(exported.call(factors, x)), jax.tree.leaves(call_(factors, x)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
