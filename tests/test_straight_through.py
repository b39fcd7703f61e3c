"""merge_aware: the forward of the requantized merge, the gradient of W + dW; small changes survive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lx
from lorax_fn.quantization.blocks import encode, nudged

FORMATS = ("nf4", "int4", "int8", "q4_1", "q8_0")
LAYOUT = lx.Layout((0,), (1,), (2,))
SHAPE = (2, 128, 48)


def stored(format, shape=SHAPE, layout=LAYOUT, double=True):
    w = jax.random.normal(jax.random.key(0), shape)
    double = double and format in ("nf4", "int4", "int8")
    return encode(w, layout, format, 32 if format.startswith("q") else 64, double)


def small(shape=SHAPE, size=0.004):
    """A change of rank 1 of that size, in norms of the weight."""
    a, b = (jax.random.normal(jax.random.key(i), (shape[0], n, 1)) for i, n in ((1, shape[1]), (2, shape[2])))
    return size * a @ jnp.swapaxes(b, 1, 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_unbiased_rounding_keeps_a_small_change_and_what_does_not_change(format, double):
    q, change = stored(format, double=double), small()
    w = q.dense()
    change = change.at[1, :, :5].set(0.0)
    new = jax.jit(nudged)(q, change)
    assert jax.tree.structure(new) == jax.tree.structure(q)
    np.testing.assert_array_equal(new.scales, q.scales)
    done = new.dense() - w
    np.testing.assert_array_equal(done[1, :, :5], 0.0)
    np.testing.assert_allclose(jnp.sum(done * change) / jnp.sum(change * change), 1.0, atol=0.25)
    # from the place alone, and in both directions
    np.testing.assert_array_equal(jax.jit(nudged)(q, change).codes, new.codes)
    assert (done > 0).any() and (done < 0).any()
    same = nudged(q, jnp.zeros_like(change))
    jax.tree.map(np.testing.assert_array_equal, same, q)


@pytest.mark.parametrize("format", [pytest.param("nf4", marks=pytest.mark.slow), "int4", "int8"])
def test_the_mean_over_many_weights_is_the_number(format):
    """A constant added to 98 thousand weights: their mean moves by it, within four standard errors."""
    q = stored(format, (1, 256, 384))
    for constant in (0.003, -0.02):
        done = nudged(q, jnp.full(q.shape, constant)).dense() - q.dense()
        inside = np.abs(np.asarray(q.dense())) < 1.5  # the largest of a block cannot grow
        done = np.asarray(done)[inside]
        assert abs(done.mean() - constant) < 4 * done.std() / np.sqrt(done.size)


def test_a_large_change_gets_scales_of_its_own_and_the_nearest_codes():
    q = stored("nf4")
    for change in (5.0 * small(size=1.0), -q.dense() * 3.0):
        new, fresh = nudged(q, change), q.store(q.dense() + change)
        jax.tree.map(np.testing.assert_array_equal, new, fresh)
    zeros = encode(jnp.zeros(SHAPE), LAYOUT, "int4", 64, True)
    np.testing.assert_allclose(nudged(zeros, small()).dense(), small(), atol=0.004)


@pytest.fixture(scope="module")
def pair():
    w = {"kernel": jax.random.normal(jax.random.key(3), (64, 24)) / 8, "bias": jnp.zeros(24)}
    params, lora = lx.split(lx.quantize(w), rank=3, full="bias")
    lora["kernel"] = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(4), x.shape), lora["kernel"]
    )
    return params, lora


def apply(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None])


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "vera",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora_fa", "loha", "lokr", "lora_xs")),
    ],
)
def test_forward_is_that_of_the_merge_and_the_gradient_goes_straight_through(method, pair):
    params = pair[0]
    _, lora = lx.split(params, rank=3, method=method)
    lora = jax.tree.map(lambda x: x + 0.03, lora)
    x = jax.random.normal(jax.random.key(5), (7, 64))
    run = lx.adapt(apply, fallback="error")

    @jax.jit
    @jax.value_and_grad
    def aware(lora, x):
        return jnp.sum(run(*lx.quantization.merge_aware(params, lora), x) ** 2)

    def by_hand(lora, x):
        w = lx.merge({"kernel": lx.dequantize(params)["kernel"]}, lora)["kernel"]
        through = w + jax.lax.stop_gradient(rounded["kernel"].dense() - w)
        return jnp.sum(apply({**params, "kernel": through}, x) ** 2)

    rounded = lx.merge(params, lora, requantize="unbiased")
    assert (rounded["kernel"].dense() != params["kernel"].dense()).any()
    value, gradient = aware(lora, x)
    want, wanted = jax.value_and_grad(by_hand)(lora, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3), gradient, wanted)
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_no_cotangent_of_a_weight_is_built(pair):
    params, lora = pair
    run = lx.adapt(apply, fallback="error")

    def loss(lora, x, aware):
        return jnp.sum(run(*(lx.quantization.merge_aware(params, lora) if aware else (params, lora)), x))

    def flops(tokens, aware):
        grad = jax.jit(jax.grad(lambda lora, x: loss(lora, x, aware)))
        return grad.lower(lora, jnp.ones((tokens, 64))).compile().cost_analysis()["flops"]

    def per_token(aware):
        return (flops(512, aware) - flops(256, aware)) / 256

    # the factors count twice; the cotangent of the weight would be 2 * 64 * 24 a token
    assert per_token(True) - per_token(False) < 0.7 * 2 * 64 * 24


def test_a_scanned_stack_of_layers(pair):
    w = {"layers": {"kernel": jax.random.normal(jax.random.key(6), (3, 64, 64)) / 8}}
    layout = {"*": lx.Layout((0,), (1,), (2,))}
    params, lora = lx.split(lx.quantize(w, "int4", layout=layout), rank=(2, 0, 2), layout=layout)
    lora = jax.tree.map(lambda x: x + 0.02 * (x != 0).astype(x.dtype), lora)

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]

    x = jax.random.normal(jax.random.key(7), (5, 64))
    got = jax.jit(lambda lora, x: lx.adapt(scanned)(*lx.quantization.merge_aware(params, lora), x))(lora, x)
    merged = lx.merge(params, lora, requantize="unbiased")
    np.testing.assert_allclose(got, scanned(lx.dequantize(merged), x), rtol=1e-4, atol=1e-5)


def test_entries_without_a_change_keep_their_codes_under_any_rounding(pair):
    layout = {"*": LAYOUT}
    params, lora = lx.split({"w": stored("nf4")}, rank=(2, 0), layout=layout)
    lora = jax.tree.map(lambda x: x.at[0].add(0.3), lora)
    for requantize in (True, "unbiased"):
        merged = lx.merge(params, lora, requantize=requantize)["w"]
        for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(params["w"]), strict=True):
            np.testing.assert_array_equal(new[1], old[1])
        assert (merged.codes[0] != params["w"].codes[0]).any()


def test_training_that_sees_the_rounding_keeps_the_gain_after_the_merge():
    """Nearest codes lose a small change, and unbiased ones keep it; the loss is that of the merged model."""
    keys = jax.random.split(jax.random.key(8), 4)
    w = {"kernel": jax.random.normal(keys[0], (256, 64)) / 16}
    params, lora = lx.split(lx.quantize(w), rank=4, alpha=4.0)
    along, shift = (jax.random.normal(key, (1, n)) for key, n in ((keys[1], 256), (keys[2], 64)))
    x = jax.random.normal(keys[3], (128, 1)) @ along  # as features of real models, far from white
    wanted = x @ (lx.dequantize(params)["kernel"] + 0.0015 * along.T @ shift)
    run = lx.adapt(lambda params, x: x @ params["kernel"])

    def loss(params, lora):
        return jnp.mean((run(params, lora, x) - wanted) ** 2)

    tx = optax.adam(1e-3)

    @jax.jit
    def step(lora, opt_state):
        gradient = jax.grad(lambda lora: loss(*lx.quantization.merge_aware(params, lora)))(lora)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(lora, updates), opt_state

    opt_state = tx.init(lora)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            lora, opt_state = step(lora, opt_state)
    before = float(loss(params, {}))
    with pytest.warns(lx.LoraMergeWarning, match=r"kernel \(nf4\): .*(?s:.)*merge_aware"):
        nearest = lx.merge(params, lora, requantize=True)
    merged = lx.merge(params, lora, requantize="unbiased")
    assert before - float(loss(merged, {})) > 0.9 * before
    assert before - float(loss(nearest, {})) < 0.5 * before
    assert lx.surviving(params, lora, merged)["kernel"] > 0.8


def test_errors_say_what_to_do(pair):
    params, lora = pair
    aware = lx.quantization.merge_aware
    with pytest.raises(lx.LoraError, match="there is nothing to round"):
        aware(lx.dequantize(params), lora)
    with pytest.raises(lx.LoraError, match=r"(?s)kernel.*DoRA.*method=\"lora\""):
        aware(*lx.split(params, rank=2, method="dora"))
    with pytest.raises(lx.LoraError, match="under dropout"):
        aware(params, lx.dropout(lora, 0.5, jax.random.key(0)))
    with pytest.raises(lx.LoraError, match="requantize= is not valid"):
        lx.merge(params, lora, requantize="nearest")
    assert aware(params, lora)[1]["bias"] is lora["bias"]
