"""The oracle matrix: rules x transformations x dtypes, compared with the same function on merged weights.

``fallback="error"`` throughout: nothing here may build a weight. Everything of one row and dtype is one
compilation, in which each transformation has weights, adapters and inputs of its own, so that the
gradients tell the transformations apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import RULE_CASES, normal

import lorax_fn as lx


def zeros_of(fn, p, x):
    return jnp.zeros_like(jax.eval_shape(fn, p, x))


def in_scan(fn):
    return lambda p, x, on: lax.scan(lambda c, x: (c, fn(p, x)), 0, x[None])[1][0]


def in_cond(fn):
    return lambda p, x, on: lax.cond(on, fn, lambda p, x: zeros_of(fn, p, x), p, x)


def in_while(fn):
    def run(p, x, on):
        return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, fn(p, x)), (0, zeros_of(fn, p, x)))[1]

    return run


# What happens inside the adapted function; the whole is then jitted, differentiated and vmapped.
INSIDE = {
    "plain": lambda fn: lambda p, x, on: fn(p, x),
    "jit": lambda fn: lambda p, x, on: jax.jit(fn)(p, x),
    "vmap": lambda fn: lambda p, x, on: jax.vmap(fn, (None, 0))(p, x[None])[0],
    "scan": in_scan,
    "checkpoint": lambda fn: lambda p, x, on: jax.checkpoint(fn)(p, x),
    "cond": in_cond,
}
LEFT_OUT = {("ragged", "vmap")}  # JAX itself has no vmap of a ragged_dot
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def close(got, want, tol, what):
    want = np.asarray(want, np.float32)
    largest = np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tol, atol=tol * largest, err_msg=what)


def cotangent(y):
    return normal(5, y.shape).astype(y.dtype)


def differentiable(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


@functools.cache
def oracle(name):
    """Value, gradient by the adapter and gradient by x (None for ids) of the merged function, in float32."""
    case = next(c for c in RULE_CASES if c.name == name)

    def loss(adapter, x):
        y = case.fn({"w": adapter.weight(case.weight)}, x)
        return jnp.sum(y.astype(jnp.float32) * cotangent(y).astype(jnp.float32)), y

    by = (0, 1) if differentiable(case.input) else 0
    (_, y), grads = jax.jit(jax.value_and_grad(loss, by, has_aux=True), compiler_options=FAST)(
        case.adapter, case.input
    )
    return (y, *grads) if differentiable(case.input) else (y, grads, None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda c: c.name)
def test_every_rule_under_every_transformation(case, dtype):
    modes = {m: wrap(case.fn) for m, wrap in INSIDE.items() if (case.name, m) not in LEFT_OUT}
    x = case.input.astype(dtype) if differentiable(case.input) else case.input
    params = {m: {"w": case.weight.astype(dtype)} for m in modes}
    lora = {f"{m}/w": case.adapter for m in modes}
    xs, on = {m: x for m in modes}, jnp.array(True)
    tol = max(case.tol, 1e-5 if dtype == jnp.float32 else 0.03)

    def everything(params, xs, on):
        return {m: run(params[m], xs[m], on) for m, run in modes.items()}

    adapted = lx.adapt(everything, fallback="error")
    in_a_while = lx.adapt(in_while(case.fn), fallback="error")
    plain = lx.adapt(case.fn, fallback="error")

    def loss(lora, xs):
        ys = adapted(params, lora, xs, on)
        return sum(jnp.sum((y * cotangent(y)).astype(jnp.float32)) for y in ys.values()), ys

    def run(lora, xs):
        _, pull, ys = jax.vjp(loss, lora, xs, has_aux=True)
        by_lora, by_x = pull(jnp.float32(1))
        one, batch = {"w": case.adapter}, {}
        if "vmap" in modes:
            batch = jax.vmap(lambda x: plain(params["plain"], one, x))(jnp.stack([x, x]))
        loop = in_a_while(params["plain"], one, x, on)
        return ys, by_lora, by_x, batch, loop

    ys, by_lora, by_x, batch, loop = jax.jit(run, compiler_options=FAST)(lora, xs)
    y, want_lora, want_x = oracle(case.name)
    for mode in modes:
        assert ys[mode].dtype == (jnp.bfloat16 if case.name == "cast down" else dtype)
        close(ys[mode], y, tol, f"value in {mode}")
        for part in ("a", "b"):
            got, want = getattr(by_lora[f"{mode}/w"], part), getattr(want_lora, part)
            assert got.dtype == jnp.float32
            close(got, want, 4 * tol, f"gradient by {part} in {mode}")
        if want_x is not None:
            close(by_x[mode], want_x, 4 * tol, f"gradient by x in {mode}")
    if "vmap" in modes:
        close(batch, jnp.stack([y, y]), tol, "value under vmap")
    close(loop, y, tol, "value in while")
    close(plain(params["plain"], {"w": case.adapter}, x), y, tol, "eager value")
