"""GPTQ: its codes are those of the paper's algorithm in float64, and lose less of what weights compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx
from lorax_fn.quantization.formats import NF4

RNG = np.random.default_rng(0)
# 80 inputs, more than go in one run, of 12 directions and a little noise
X = RNG.normal(size=(160, 12)) @ RNG.normal(size=(12, 80)) + 0.1 * RNG.normal(size=(160, 80))
X = X.astype(np.float32)
SHAPES = {"up": (80, 24), "layers": (2, 24, 24), "out": (2, 12, 8)}
DAMPING = 0.05


@functools.cache
def params_of():
    rng = np.random.default_rng(1)
    weights = {path: rng.normal(size=shape) / np.sqrt(shape[-2]) for path, shape in SHAPES.items()}
    return {path: jnp.asarray(w, jnp.float32) for path, w in weights.items()} | {"bias": jnp.ones(8)}


def model(params, x):
    """A dense weight, a scan, and an attention output that contracts heads and their width."""
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params["up"], params["layers"])
    return jnp.einsum("thk,hkd->td", x.reshape(-1, 2, 12), params["out"]) + params["bias"][None]


@functools.cache
def layout_of():
    return lx.usage(model, params_of(), X)


@functools.cache
def inputs_of():
    """What each stack entry of each weight contracts, in float64."""
    p = {path: np.asarray(w, np.float64) for path, w in params_of().items()}
    found, x = {"up": [X.astype(np.float64)], "layers": []}, X @ p["up"]
    for w in p["layers"]:
        found["layers"].append(x)
        x = np.tanh(x @ w)
    return found | {"out": [x]}


def matrices(x, path):
    """[s, n, m] in float64."""
    stack = SHAPES[path][0] if path == "layers" else 1
    return np.asarray(x, np.float64).reshape(stack, -1, SHAPES[path][-1])


def of_the_paper(w, scales, x, table):
    """Algorithm 1 with one input a block, by the inverse itself; order and scales as the docstring says."""
    h = x.T @ x
    order = np.argsort(-np.diag(h), kind="stable")
    h = h[order][:, order] + DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    h += np.diag((np.diag(x.T @ x) == 0)[order])
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, scales, rounded = w[order].copy(), scales[order], np.empty_like(w)
    for i in range(len(w)):
        nearest = np.abs(w[i][:, None] - scales[i][:, None] * table).argmin(1)
        rounded[order[i]] = table[nearest] * scales[i]
        w[i + 1 :] -= np.outer(upper[i, i + 1 :], (w[i] - rounded[order[i]]) / upper[i, i])
    return rounded


def test_codes_are_those_of_the_algorithm_in_float64_and_lose_less():
    params, options = params_of(), {"block": 8, "layout": layout_of(), "targets": list(SHAPES)}
    made = lx.quantization.gptq(model, params, [X[:80], X[80:]], damping=DAMPING, **options)
    plain = lx.quantize(params, **options)
    assert made["bias"] is params["bias"]
    for path, inputs in inputs_of().items():
        q, nearest = made[path], plain[path]
        ones = dataclasses.replace(q, codes=jnp.full_like(q.codes, 0xFF))  # all codes stand for 1
        w, scales, got, by_nearest = (
            matrices(x, path) for x in (params[path], ones.dense(), q.dense(), nearest.dense())
        )
        for i, x in enumerate(inputs):
            np.testing.assert_allclose(got[i], of_the_paper(w[i], scales[i], x, NF4), atol=1e-5)
            lost, before = (np.linalg.norm(x @ (given[i] - w[i])) for given in (got, by_nearest))
            assert lost < 0.8 * before, (path, i, lost / before)
        same = [dataclasses.replace(x, codes=None) for x in (q, nearest)]
        assert jax.tree.all(jax.tree.map(np.array_equal, *same))  # scales, format, axes


def linear(params, x):
    return x @ params["kernel"].astype(x.dtype)


@pytest.mark.parametrize(("x", "damping"), [(np.eye(80, dtype=np.float32), 0.01), (X, 1e8)])
def test_inputs_that_do_not_correlate_give_the_codes_of_quantize(x, damping):
    params = {"kernel": params_of()["up"]}
    made = lx.quantization.gptq(linear, params, [x], "int8", double=False, damping=damping)
    plain = lx.quantize(params, "int8", double=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, made, plain))


def test_an_input_that_is_always_zero_and_a_block_of_zeros():
    w = np.asarray(params_of()["up"].astype(jnp.bfloat16)).copy()
    w[8:16, 0] = 0
    x = X * (np.arange(80) != 3)
    options = {"block": 8, "double": False}
    made = lx.quantization.gptq(linear, {"kernel": w}, [x], "int4", damping=DAMPING, **options)["kernel"]
    assert made.dtype == jnp.bfloat16
    got = dataclasses.replace(made, dtype=np.dtype(np.float32)).dense()
    wide = w.astype(np.float64)
    scales = np.repeat(np.abs(wide).reshape(10, 8, 24).max(1) / 7, 8, axis=0)
    want = of_the_paper(wide, scales, x.astype(np.float64), np.arange(-7.0, 8.0))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(got[8:16, 0], 0)
    nearest = lx.quantize({"kernel": w}, "int4", **options)["kernel"]
    np.testing.assert_array_equal(made.dense()[3], nearest.dense()[3])


def test_an_expert_without_tokens_is_rounded_to_the_nearest_and_said(caplog):
    rng = np.random.default_rng(2)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 80, 24)), jnp.float32)}
    layout = {"kernel": lx.Layout((0,), (1,), (2,))}

    def experts(params, x):
        return jnp.einsum("ebn,enm->ebm", x, params["kernel"])

    x = np.stack([X, 0 * X, X])
    with caplog.at_level("WARNING", "lorax_fn"):
        made = lx.quantization.gptq(
            experts, params, [x], "int8", double=False, layout=layout, damping=DAMPING
        )["kernel"]
    assert "kernel: stack entries [1]" in caplog.text
    plain = lx.quantize(params, "int8", double=False, layout=layout)["kernel"]
    np.testing.assert_array_equal(made.codes[1], plain.codes[1])
    for entry in (0, 2):
        alone = {"kernel": params["kernel"][entry]}
        want = lx.quantization.gptq(linear, alone, [X], "int8", double=False, damping=DAMPING)["kernel"]
        np.testing.assert_array_equal(made.codes[entry], want.codes)


def test_errors_name_the_weights():
    params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}

    def straight(p, x):
        return x @ p["a"]["kernel"] @ p["b"]["kernel"]

    def hidden(p, x):
        return x @ p["a"]["kernel"] + lax.stop_gradient(x @ p["b"]["kernel"])

    def looked_up(p, x):
        return x @ p["a"]["kernel"] + p["b"]["kernel"][np.array([0, 1, 2, 3])]

    x = jnp.eye(4)
    both = r"(?s)path: +a/kernel\n +b/kernel"
    with pytest.raises(lx.LoraError, match=r"(?s)path: +b/kernel\n +got: +zero: no batch"):
        lx.quantization.gptq(hidden, params, [x])
    with pytest.raises(lx.LoraError, match=r"(?s)path: +b/kernel\n +got: +rows looked up"):
        lx.quantization.gptq(looked_up, params, [x])
    with pytest.raises(lx.LoraError, match=both + r"\n +got: +not finite"):
        lx.quantization.gptq(straight, params, [x * jnp.nan])
    with pytest.raises(lx.LoraError, match=both + r"\n +got: +not positive definite.*damping=1e-12"):
        lx.quantization.gptq(straight, params, [jnp.ones((1, 4))], damping=1e-12)
    with pytest.raises(
        lx.LoraError, match=r"(?s)needs concrete weights.*a/kernel.*lx.quantize gives the same"
    ):
        lx.quantization.gptq(straight, jax.eval_shape(lambda: params), [x])
    with pytest.raises(lx.LoraError, match=r"(?s)needs concrete weights.*a/kernel"):
        jax.jit(lambda p: lx.quantization.gptq(straight, p, [x]))(params)
    with pytest.raises(lx.LoraError, match="quantized already"):
        lx.quantization.gptq(straight, lx.quantize(params), [x])
    with pytest.raises(lx.LoraError, match=r"(?s)more than once.*at_once=1 of 2"):
        lx.quantization.gptq(straight, params, iter([x]), at_once=1)
    for damping in (0.0, -1, True, float("nan"), "0.1"):
        with pytest.raises(lx.LoraError, match="damping= is not valid"):
            lx.quantization.gptq(straight, params, [x], damping=damping)
    with pytest.raises(lx.LoraError, match="unknown format"):
        lx.quantization.gptq(straight, params, [x], "q4_1")
