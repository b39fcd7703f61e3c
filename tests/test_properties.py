"""Drawn programs against the oracle: einsums, layouts, dtypes and nestings of control flow.

Eager and jitted once a draw at most, sizes from a pool of four, so CI's draws take seconds.
LORAX_FN_EXAMPLES=2000 draws more.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from rule_cases import make_adapter, normal

import lorax_fn as lx

EXAMPLES = int(os.environ.get("LORAX_FN_EXAMPLES", "15"))
many = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
some = settings(max_examples=max(EXAMPLES // 5, 1), suppress_health_check=[HealthCheck.too_slow])
SIZES = dict(zip("abcdefgh", (2, 3, 3, 2, 1, 3, 2, 2), strict=True))
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 0.04}


def close(got, want, tol):
    want = np.asarray(want, np.float32)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=tol, atol=tol * np.abs(want).max() + 1e-30
    )


@st.composite
def layouts(draw, ndim):
    """Every axis a role; at least one input and one output."""
    roles = draw(st.permutations(["inputs", "outputs"] + draw(st.lists(
        st.sampled_from(["stack", "inputs", "outputs"]), min_size=ndim - 2, max_size=ndim - 2))))  # fmt: skip
    parts = {kind: [i for i, r in enumerate(roles) if r == kind] for kind in ("stack", "inputs", "outputs")}
    return lx.Layout(**{kind: tuple(draw(st.permutations(axes))) for kind, axes in parts.items()})


@st.composite
def einsums(draw):
    """``"x,w->y"``: each letter of the weight is shared and kept, shared and summed, or its own."""
    letters = draw(st.permutations("abcdefgh"))
    w = letters[: draw(st.integers(2, 4))]
    kinds = [draw(st.sampled_from(["batch", "summed", "free"])) for _ in w]
    tokens = letters[len(w) : len(w) + draw(st.integers(0, 2))]
    x = draw(st.permutations([c for c, kind in zip(w, kinds, strict=True) if kind != "free"] + list(tokens)))
    y = draw(
        st.permutations([c for c, kind in zip(w, kinds, strict=True) if kind != "summed"] + list(tokens))
    )
    left = draw(st.booleans())
    return "".join(w), "".join(x), "".join(y), left


def product(w, x, y, left):
    if left:
        return lambda p, value: jnp.einsum(f"{w},{x}->{y}", p["w"], value)
    return lambda p, value: jnp.einsum(f"{x},{w}->{y}", value, p["w"])


def sizes(letters):
    return tuple(SIZES[c] for c in letters)


@many
@given(einsums(), st.data(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_any_einsum_with_any_layout(spec, data, dtype):
    """The factors of every two-operand einsum, whichever letters it uses."""
    w, x, _, _ = spec
    layout = data.draw(layouts(len(w)))
    fn = product(*spec)
    weight, adapter, value = normal(1, sizes(w)), make_adapter(sizes(w), layout), normal(2, sizes(x))
    got = lx.adapt(fn, fallback="error")({"w": weight.astype(dtype)}, {"w": adapter}, value.astype(dtype))
    want = fn({"w": adapter.weight(weight)}, value)
    assert got.dtype == dtype and got.shape == want.shape
    close(got, want, TOLERANCE[dtype])


@some
@given(einsums(), st.data())
def test_gradients_of_any_einsum(spec, data):
    w, x, _, _ = spec
    layout = data.draw(layouts(len(w)))
    fn = product(*spec)
    weight, adapter, value = normal(1, sizes(w)), make_adapter(sizes(w), layout), normal(2, sizes(x))
    run = lx.adapt(fn, fallback="error")

    def weighted(y):
        return jnp.sum(y * normal(3, y.shape))

    got = jax.grad(lambda a, v: weighted(run({"w": weight}, {"w": a}, v)), (0, 1))(adapter, value)
    want = jax.grad(lambda a, v: weighted(fn({"w": a.weight(weight)}, v)), (0, 1))(adapter, value)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other, 1e-4)


# Nestings of control flow around one layer.

WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda w, x: lax.scan(lambda c, _: (f(w, c), None), x, length=2)[0],
    "fori": lambda f: lambda w, x: lax.fori_loop(0, 2, lambda _, c: f(w, c), x),
    "carry": lambda f: lambda w, x: lax.scan(lambda c, _: ((c[0], f(*c)), None), (w, x), length=2)[0][1],
    "cond": lambda f: lambda w, x: lax.cond(x[0, 0] > 0, f, lambda w, x: x @ w.T, w, x),
    "vmap": lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, jnp.stack([2 * x, x]))[1],
    "twice": lambda f: lambda w, x: f(w, f(w, x)),
}
VIEWS = {
    "as is": lambda w: w,
    "transposed": lambda w: w.T,
    "scaled": lambda w: w * 0.5,
    "reversed": lambda w: w[::-1],
    "halves swapped": lambda w: jnp.concatenate([w[:, 2:], w[:, :2]], 1),
    "rows taken": lambda w: lax.dynamic_slice_in_dim(jnp.concatenate([w, w]), 1, 4),
}


def nested(wrappers, views):
    def layer(w, x):
        for view in views:
            w = VIEWS[view](w)
        return jnp.tanh(x @ w)

    for name in wrappers:
        layer = WRAPPERS[name](layer)
    return lambda p, x: layer(p["w"], x)


nestings = st.lists(st.sampled_from(list(WRAPPERS)), max_size=3)
view_lists = st.lists(st.sampled_from(list(VIEWS)), max_size=2)


@settings(some, max_examples=max(EXAMPLES // 4, 1))
@given(nestings, view_lists, st.booleans(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_any_nesting_of_control_flow(wrappers, views, swapped, dtype):
    layout = lx.Layout((), (1,), (0,)) if swapped else lx.Layout((), (0,), (1,))
    weight, adapter, x = normal(1, (4, 4), 0.5), make_adapter((4, 4), layout), normal(2, (3, 4))
    fn = nested(wrappers, views)
    run = lx.adapt(fn, fallback="error")

    def both(adapter, weight, x):
        y, pull = jax.vjp(lambda a: run({"w": weight}, {"w": a}, x), adapter)
        return y, pull(jnp.ones_like(y))[0]

    y, grad = jax.jit(both)(adapter, weight.astype(dtype), x.astype(dtype))
    want, pull = jax.vjp(lambda a: fn({"w": a.weight(weight)}, x), adapter)
    tol = 1e-4 if dtype == jnp.float32 else 0.25  # up to 16 saturating layers: errors of bfloat16 compound
    close(y, want, tol)
    if dtype == jnp.float32:
        for one, other in zip(
            jax.tree.leaves(grad), jax.tree.leaves(pull(jnp.ones_like(want))[0]), strict=True
        ):
            close(one, other, 1e-3)


@some
@given(einsums())
def test_usage_finds_a_layout_that_adapts(spec):
    """What `usage` finds, `adapt` serves; what it does not serve, it does not claim."""
    w, x, _, _ = spec
    fn = product(*spec)
    weight, value = normal(1, sizes(w)), normal(2, sizes(x))
    use = lx.usage(fn, {"w": weight}, value)["w"]
    assert use.shape == weight.shape
    if use.layout is None:
        return
    adapter = make_adapter(weight.shape, use.layout)
    assert use.served and use.layout.ndim == weight.ndim
    got = lx.adapt(fn, fallback="error")({"w": weight}, {"w": adapter}, value)
    close(got, fn({"w": adapter.weight(weight)}, value), 2e-5)
