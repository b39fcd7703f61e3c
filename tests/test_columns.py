"""DoRA's scaled outputs: every derivative equals that of the merged weights, with no product twice."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

N, M, LAYERS = 6, 8, 3


def with_bias(params, x):
    bias = params["up"]["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.tanh(x @ params["up"]["kernel"] + bias) @ params["down"]["kernel"]


def without_bias(params, x):
    return jax.nn.silu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]["kernel"]) @ w["down"]["kernel"], None


def with_heads(params, x):
    """Outputs of two axes, which the program transposes after the product."""
    y = jnp.einsum("btn,nhk->bkth", x, params["up"]["kernel"].reshape(N, 2, M // 2))
    return jnp.tanh(y).transpose(0, 2, 3, 1).reshape(*x.shape[:2], M) @ params["down"]["kernel"]


def scanned(params, x):
    return jax.lax.scan(layer, x, params)[0]


def checkpointed(params, x):
    kept = jax.checkpoint_policies.dots_saveable
    return jax.lax.scan(jax.checkpoint(layer, policy=kept), x, params)[0]


PROGRAMS = [with_bias, without_bias, with_heads, scanned, checkpointed]


def made(program, dtype=jnp.float32, method="dora", n=N, m=M, rank=2):
    """Params and adapters; of DoRA's outputs, one has magnitude 0, one almost, and one is negative."""
    rng = np.random.default_rng(0)

    def normal(*shape, size=0.5):
        return jnp.asarray(size * rng.normal(size=shape), dtype)

    if program in (scanned, checkpointed):
        params = {"up": {"kernel": normal(LAYERS, n, m)}, "down": {"kernel": normal(LAYERS, m, n)}}
        layout = {f"{name}/kernel": lx.Layout((0,), (1,), (2,)) for name in params}
    else:
        params = {"up": {"kernel": normal(n, m), "bias": normal(m)}, "down": {"kernel": normal(m, n)}}
        layout = {f"{name}/kernel": lx.Layout((), (0,), (1,)) for name in params}
    params, lora = lx.split(params, rank, alpha=4.0, method=method, layout=layout)
    lora = jax.tree.map(lambda x: normal(*x.shape), lora)
    if method == "dora":
        few = jnp.asarray([0.0, 1e-20, -0.7], dtype)
        lora = {
            path: dataclasses.replace(adapter, magnitude=adapter.magnitude.at[..., :3].set(few))
            for path, adapter in lora.items()
        }
    return params, lora, normal(2, 5, n, size=1.0)


def close(got, want, share):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= share * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()


def derivatives(run, lora, x):
    """Value, gradients, a derivative forward, and how the gradients change, forward and backward."""

    def loss(lora, x):
        return jnp.sum(jnp.sin(run(lora, x).astype(jnp.float32)))

    ones = jax.tree.map(jnp.ones_like, (lora, x))
    grads = jax.grad(loss, (0, 1))
    curved = jax.grad(lambda *at: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(grads(*at))), (0, 1))
    return {
        "value": run(lora, x),
        "gradients": grads(lora, x),
        "of x alone": jax.grad(loss, 1)(lora, x),
        "forward": jax.jvp(loss, (lora, x), ones),
        "forward over backward": jax.jvp(grads, (lora, x), ones)[1],
        "backward over backward": curved(lora, x),
    }


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_derivative_is_that_of_the_merged_weights(program):
    params, lora, x = made(program)
    adapted = lx.adapt(program, fallback="error")
    got = jax.jit(functools.partial(derivatives, lambda lora, x: adapted(params, lora, x)))(lora, x)
    merged = functools.partial(derivatives, lambda lora, x: program(lx.merge(params, lora), x))
    want = jax.jit(merged)(lora, x)
    for name in want:
        close(got[name], want[name], 2e-5)


def test_adapters_of_a_batch_and_of_a_vmap():
    params, lora, x = made(without_bias)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), lora)

    def gradients(run):
        grad = jax.grad(lambda lora, x: jnp.sum(jnp.sin(run(lora, x))), (0, 1))
        return jax.vmap(grad, (0, None))(two, x)

    adapted = lx.adapt(without_bias, fallback="error")
    merged = gradients(lambda lora, x: without_bias(lx.merge(params, lora), x))
    close(gradients(lambda lora, x: adapted(params, lora, x)), merged, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "share"), [pytest.param(jnp.bfloat16, 0.03, marks=pytest.mark.slow), (jnp.float16, 0.004)]
)
def test_half_precision(dtype, share):
    """Errors are those of sums of rounded products."""
    params, lora, x = made(without_bias, dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, lora, x))

    def grads(params, lora, x):
        run = lx.adapt(without_bias, fallback="error")
        return jax.grad(lambda lora: jnp.sum(jnp.sin(run(params, lora, x).astype(jnp.float32))))(lora)

    got, want = grads(params, lora, x), grads(*wide)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    close(got, want, share)


@pytest.mark.parametrize("program", [with_bias, scanned], ids=lambda program: program.__name__)
def test_a_step_has_the_products_of_lora_and_those_of_the_norm(program):
    """The products of dc with u = c * dy are those that dB has already, and XLA finds that they are equal."""

    def dots(method):
        params, lora, x = made(program, method=method, n=64, m=128, rank=4)
        adapted = lx.adapt(program, fallback="error")
        step = jax.jit(jax.grad(lambda lora, x: jnp.sum(jnp.sin(adapted(params, lora, x)))))
        return len(re.findall(r" dot\(", step.lower(lora, x).compile().as_text() or ""))

    assert dots("dora") == dots("lora") + 2 * 3  # W^T A, A^T A and its product with B, for two weights
