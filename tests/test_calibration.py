"""Sums of x^T x read off a function for every way to use a weight, against the inputs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx
from lorax_fn.calibration.gradients import mean_gradients
from lorax_fn.calibration.inputs import input_products

DENSE, OUT_IN = lx.Layout((), (0,), (1,)), lx.Layout((), (1,), (0,))
STACKED, CONV = lx.Layout((0,), (1,), (2,)), lx.Layout((), (0, 1, 2), (3,))
WHICH = np.array([0, 1, 1, 0, 2, 2, 1])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, IMAGE = normal(0, 7, 5), normal(1, 2, 8, 8, 6)


def covariance(fn, w, x, layout, basis=None):
    """[s, n, n] of one weight, with the identity as the basis."""
    stack, n, _ = layout.shapes(w.shape)
    eye = jnp.broadcast_to(jnp.eye(int(np.prod(n))), (*stack, int(np.prod(n)), int(np.prod(n))))
    probes = {"w": eye.reshape(*stack, *n, -1)}
    found = input_products(fn, {"w": w}, {"w": layout})([x], probes)["w"]
    return np.asarray(found).reshape(-1, int(np.prod(n)), int(np.prod(n)))


def of(*inputs):
    """What the covariances should be: one per stack entry."""
    return np.stack([np.asarray(x, np.float64).T @ np.asarray(x, np.float64) for x in inputs])


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def patches(x):
    """The windows that `conv` sees, by loops: [B * 4 * 4, 3 * 3 * channels]."""
    x = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 1), (0, 0)))
    windows = [
        x[b, i : i + 3, j : j + 3].reshape(-1)
        for b in range(2)
        for i in range(0, 8, 2)
        for j in range(0, 8, 2)
    ]
    return np.stack(windows)


@jax.custom_jvp
def times(w, x):
    return x @ w


times.defjvp(lambda primals, tangents: (times(*primals), tangents[1] @ primals[0] + primals[1] @ tangents[0]))
WIDE = np.concatenate([X, 2 * X], 1)
ROWS = np.arange(1.0, 6.0, dtype=np.float32)
# name -> (fn, the weight, x, its layout, its inputs as matrices, one per stack entry)
CASES = {
    "dense": (lambda p, x: x @ p["w"], (5, 4), X, DENSE, [X]),
    "in a jit": (jax.jit(lambda p, x: x @ p["w"]), (5, 4), X, DENSE, [X]),
    "under checkpoint": (jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"])), (5, 4), X, DENSE, [X]),
    "under vmap": (lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), (5, 4), X, DENSE, [X]),
    "turned": (lambda p, x: x @ p["w"].T, (4, 5), X, OUT_IN, [X]),
    "both ways": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (5, 4), X, DENSE, [X]),
    "twice": (lambda p, x: x @ p["w"] - (2 * x) @ p["w"], (5, 4), X, DENSE, [np.concatenate([X, 2 * X])]),
    "in a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, y: y + x @ p["w"], jnp.zeros((7, 4))),
        (5, 4),
        X,
        DENSE,
        [np.concatenate([X, X, X])],
    ),
    "in a branch": (
        lambda p, x: lax.cond(x.sum() < 99.0, lambda w: x @ w, lambda w: 2 * x @ w, p["w"]),
        (5, 4),
        X,
        DENSE,
        [X],
    ),
    "in a custom_jvp": (lambda p, x: jnp.tanh(times(p["w"], x)), (5, 4), X, DENSE, [X]),
    "rows scaled": (lambda p, x: x @ (p["w"] * ROWS[:, None]), (5, 4), X, DENSE, [X * ROWS[None]]),
    "side by side": (
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((5, 3)), p["w"]], 1),
        (5, 4),
        X,
        DENSE,
        [np.concatenate([X, X])],
    ),
    "on top of itself": (
        lambda p, x: jnp.concatenate([x, 2 * x], 1) @ jnp.concatenate([p["w"]] * 2),
        (5, 4),
        X,
        DENSE,
        [np.concatenate([X, 2 * X])],
    ),
    "q, k and v in one": (
        lambda p, x: jnp.einsum("td,dkm->tkm", x, p["w"]),
        (5, 3, 4),
        X,
        lx.Layout((1,), (0,), (2,)),
        [X] * 3,
    ),
    "two input axes": (
        lambda p, x: jnp.einsum("thk,hkd->td", x.reshape(7, 2, 5), p["w"]),
        (2, 5, 4),
        jnp.asarray(WIDE),
        lx.Layout((), (0, 1), (2,)),
        [WIDE],
    ),
    "experts by ragged_dot": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([3, 4])),
        (2, 5, 4),
        X,
        STACKED,
        [X[:3], X[3:]],
    ),
    "experts by index": (
        lambda p, x: jnp.einsum("td,tdm->tm", x, p["w"][WHICH]),
        (3, 5, 4),
        X,
        STACKED,
        [X[WHICH == i] for i in range(3)],
    ),
    "convolution": (lambda p, x: conv(x, p["w"]), (3, 3, 6, 4), IMAGE, CONV, [patches(IMAGE)]),
    "grouped convolution": (
        lambda p, x: conv(x, p["w"], 2),
        (3, 3, 3, 4),
        IMAGE,
        CONV,
        [np.concatenate([patches(IMAGE[..., :3]), patches(IMAGE[..., 3:])])],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_covariances_are_those_of_what_each_weight_contracts(name):
    fn, shape, x, layout, inputs = CASES[name]
    want = of(*inputs)
    got = covariance(fn, normal(2, *shape), x, layout)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_scanned_and_carried_weights_have_one_statistic_an_entry():
    w = normal(3, 3, 5, 5)

    def fn(p, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return lax.scan(step, x, p["w"])[0]

    inputs = [np.asarray(X, np.float64)]
    for entry in np.asarray(w, np.float64)[:-1]:
        inputs.append(np.tanh(inputs[-1] @ entry))
    np.testing.assert_allclose(covariance(fn, w, X, STACKED), of(*inputs), atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    x, w = normal(4, 512, 5).astype(jnp.bfloat16), normal(5, 5, 4).astype(jnp.bfloat16)
    want = of(np.asarray(x, np.float64))
    got = covariance(lambda p, x: x @ p["w"], w, x, DENSE)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * want.max())  # of bfloat16: 4e-3


def test_a_tap_changes_no_output():
    """So that what comes after a tapped weight sees the base model, to the bit."""
    fn, w = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": normal(6, 5, 4), "b": normal(7, 4, 3)}
    both = {"a": jnp.eye(5), "b": jnp.eye(4)}
    found = input_products(fn, w, dict.fromkeys("ab", DENSE))([X], both)
    want = of(np.tanh(np.asarray(X, np.float64) @ np.asarray(w["a"], np.float64)))[0]
    np.testing.assert_allclose(found["b"], want, atol=1e-5)


def test_static_leaves_pass_and_batches_of_other_shapes_add_up():
    params = {"w": normal(8, 5, 4), "act": jnp.tanh, "n": 2}

    def fn(params, batch):
        assert params["n"] == 2 and batch["train"] is True
        return params["act"](batch["x"] @ params["w"])

    batches = ({"x": x, "train": True} for x in (X[:2], X[2:4], X[4:]))
    found = input_products(fn, params, {"w": DENSE})(batches, {"w": jnp.eye(5)})["w"]
    np.testing.assert_allclose(found, of(X)[0], atol=1e-5)


def test_mean_gradients_are_those_of_the_loss():
    params = {"w": normal(9, 5, 4).astype(jnp.bfloat16), "b": jnp.ones(4)}

    def loss(p, x):
        return jnp.mean(jnp.square(x @ p["w"].astype(jnp.float32) + p["b"][None]))

    found = mean_gradients(loss, params, [X[:3], X[3:]], ["w"])
    wide = {"w": params["w"].astype(jnp.float32), "b": params["b"]}
    want = (jax.grad(loss)(wide, X[:3])["w"] + jax.grad(loss)(wide, X[3:])["w"]) / 2
    assert list(found) == ["w"] and found["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["w"], want, atol=0.01 * np.abs(want).max())
    with pytest.raises(lx.LoraError, match=r"(?s)LoRA-GA needs a loss.*\(7, 5\)"):
        mean_gradients(lambda p, x: x * p["b"][None], {"b": jnp.ones(5)}, [X], ["b"])


def test_what_cannot_be_read_off_says_so_with_the_path():
    def run(fn, w=(5, 4), layout=DENSE, batches=(X,)):
        params = {"w": normal(1, *w), "other": jnp.ones((5, 4))}
        return input_products(fn, params, {"w": layout})(batches, {"w": jnp.eye(w[0])})

    with pytest.raises(lx.LoraError, match=r"(?s)no inputs.*path: +w\n.*not used"):
        run(lambda p, x: x @ p["other"])
    with pytest.raises(lx.LoraError, match=r"(?s)no inputs.*path: +w\n.*looked up by index"):
        run(lambda p, x: p["w"][jnp.array([1, 2])])
    with pytest.raises(lx.LoraError, match=r"(?s)no low-rank rule.*path: +w\n.*sin"):
        run(lambda p, x: x @ p["w"] @ jnp.sin(p["w"]).T)
    with pytest.raises(lx.LoraError, match=r"(?s)no output to differentiate.*int32"):
        run(lambda p, x: jnp.argmax(x @ p["w"], -1))
    with pytest.raises(lx.LoraError, match=r"(?s)no batches.*path: +w"):
        run(lambda p, x: x @ p["w"], batches=[])
