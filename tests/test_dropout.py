"""Dropout is data: unbiased, deterministic by key, another mask for every weight, layer, use and example."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import IO, SIO, make_adapter, normal

import lorax_fn as lx

W, X = normal(1, (8, 6)), normal(2, (3, 8))
PARAMS, LORA = {"w": W}, {"w": make_adapter((8, 6), IO)}
APPLY = lx.adapt(lambda p, x: x @ p["w"], fallback="error")


def change(key, x=X, rate=0.5, lora=LORA):
    """What the dropped branch adds."""
    return APPLY(PARAMS, lx.dropout(lora, rate, key), x) - x @ W


def masks(fn, params, lora, *args, rate=0.5, key=0):
    """The changes that a function's layers see, read off identity-like adapters: 0 where dropped."""
    dropped = lx.dropout(lora, rate, jax.random.key(key))
    return np.asarray(lx.adapt(fn, fallback="error")(params, dropped, *args)) != 0


def identity(*stack):
    """An adapter whose change is the identity, so that its output shows which inputs were kept."""
    eye = jnp.broadcast_to(jnp.eye(32), (*stack, 32, 32))
    layout = lx.Layout(tuple(range(len(stack))), (len(stack),), (len(stack) + 1,))
    return lx.LoRA(eye, eye, 32.0, 32, "lora", layout)


def test_rate_zero_is_the_identity():
    """Without dropout nothing is random."""
    assert lx.dropout(LORA, 0.0, jax.random.key(0)) is LORA


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_out_of_range_raise(rate):
    with pytest.raises(lx.LoraError, match="fraction below one"):
        lx.dropout(LORA, rate, jax.random.key(0))


def test_13_mean_over_keys_is_the_undropped_change():
    """Stochastic and unbiased."""
    keys = jax.random.split(jax.random.key(1), 4000)
    changes = jax.vmap(lambda key: change(key, rate=0.25))(keys)
    want = X @ lx.delta(LORA)["w"]
    error = np.asarray(changes.std(0)) / np.sqrt(len(keys))
    assert np.all(np.abs(changes.mean(0) - want) < 5 * error)
    assert np.all(changes.std(0) > 0.01 * np.abs(want).mean())


def test_masks_have_the_rate_and_the_scale():
    kept = APPLY(
        {"w": jnp.zeros((32, 32))}, lx.dropout({"w": identity()}, 0.3, jax.random.key(5)), jnp.ones((200, 32))
    )
    assert set(np.unique(np.asarray(kept).round(4))) == {np.float32(0), np.float32(1 / 0.7).round(4)}
    assert (np.asarray(kept) == 0).mean() == pytest.approx(0.3, abs=0.02)


def test_deterministic_by_key():
    one, same, other = change(jax.random.key(1)), change(jax.random.key(1)), change(jax.random.key(2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose(jax.jit(change)(jax.random.key(1)), one, rtol=1e-4, atol=1e-5)


def test_weights_and_uses_differ():
    params = {"a": jnp.zeros((32, 32)), "b": jnp.zeros((32, 32))}
    lora = {"a": identity(), "b": identity()}
    kept = masks(
        lambda p, x: jnp.stack([x @ p["a"], x @ p["b"], x @ p["a"]]), params, lora, jnp.ones((2, 32))
    )
    assert 0.2 < (kept[0] != kept[1]).mean() < 0.8
    assert 0.2 < (kept[0] != kept[2]).mean() < 0.8


def scanned_weight(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


def constant_weight(p, x):
    return lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=4)[1]


def jitted_layers(p, x):
    layer = jax.jit(jnp.matmul)
    return jnp.stack([layer(x, p["w"]) for _ in range(4)])


def carried_weight(p, x):
    return lax.scan(lambda w, _: (w, x @ w), p["w"], None, length=4)[1]


def layers_by_number(p, x):
    return jnp.stack([x @ w for w in p["w"]])


LAYERS = {
    "scanned": (scanned_weight, (4,)),
    "by number": (layers_by_number, (4,)),
    "constant": (constant_weight, ()),
    "carried": (carried_weight, ()),
    "shared jit": (jitted_layers, ()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_its_own_mask(name):
    fn, stack = LAYERS[name]
    kept = masks(fn, {"w": jnp.zeros((*stack, 32, 32))}, {"w": identity(*stack)}, jnp.ones((2, 32)))
    for i in range(4):
        for j in range(i):
            assert 0.2 < (kept[i] != kept[j]).mean() < 0.8, (i, j)


def test_a_while_loop_draws_anew_at_each_iteration():
    def fn(p, x):
        def body(state):
            i, ys = state
            return i + 1, ys.at[i].set(x @ p["w"])

        return lax.while_loop(lambda s: s[0] < 3, body, (0, jnp.zeros((3, 2, 32))))[1]

    kept = masks(fn, {"w": jnp.zeros((32, 32))}, {"w": identity()}, jnp.ones((2, 32)))
    assert 0.2 < (kept[0] != kept[1]).mean() < 0.8 and 0.2 < (kept[1] != kept[2]).mean() < 0.8


def test_every_token_has_its_own_mask_and_a_key_an_example_works():
    kept = masks(lambda p, x: x @ p["w"], {"w": jnp.zeros((32, 32))}, {"w": identity()}, jnp.ones((2, 3, 32)))
    rows = kept.reshape(6, 32)
    assert len({row.tobytes() for row in rows}) == 6
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.vmap(change)(keys, jnp.stack([X, X, X]))
    for key, got in zip(keys, batch, strict=True):
        np.testing.assert_allclose(got, change(key), rtol=1e-4, atol=1e-5)


def test_checkpoint_recomputes_the_same_mask():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    x, lora = normal(3, (3, 6)), {"w": make_adapter((6, 6), IO)}
    params, key = {"w": normal(4, (6, 6))}, jax.random.key(0)

    def grad(fn, value):
        run = lx.adapt(fn, fallback="error")
        return jax.grad(lambda lora: jnp.sum(run(params, lx.dropout(lora, 0.5, key), x) * value))(lora)

    # The mask of the forward pass must be that of the gradient: a directional derivative tells.
    run = lx.adapt(jax.checkpoint(fn), fallback="error")

    def loss(t):
        moved = {"w": jax.tree.map(lambda a, d: a + t * d, lora["w"], lora["w"])}
        return jnp.sum(run(params, lx.dropout(moved, 0.5, key), x))

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    got = sum(
        jnp.vdot(g, p)
        for g, p in zip(jax.tree.leaves(grad(jax.checkpoint(fn), 1.0)), jax.tree.leaves(lora), strict=True)
    )
    assert float(got) == pytest.approx(float(slope), rel=2e-2)


def test_gradient_flows_through_kept_inputs_only():
    key = jax.random.key(0)
    adapter = identity()

    def loss(lora, x):
        return jnp.sum(APPLY({"w": jnp.zeros((32, 32))}, lx.dropout(lora, 0.5, key), x))

    x = jnp.ones((1, 32))
    by_lora, by_x = jax.grad(loss, (0, 1))({"w": adapter}, x)
    kept = np.asarray(APPLY({"w": jnp.zeros((32, 32))}, lx.dropout({"w": adapter}, 0.5, key), x))[0] != 0
    assert 4 < kept.sum() < 28
    np.testing.assert_array_equal(np.asarray(by_x)[0] != 0, kept)
    np.testing.assert_array_equal(np.asarray(by_lora["w"].a).any(1), kept)
    assert jax.tree.structure(by_lora) == jax.tree.structure({"w": adapter})


def test_convolution_and_stacked_experts_drop_too():
    layout = lx.Layout((), (0, 1, 2), (3,))
    w, adapter = normal(1, (3, 3, 4, 6)), make_adapter((3, 3, 4, 6), layout)
    dims = ("NHWC", "HWIO", "NHWC")
    run = lx.adapt(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=dims),
        fallback="error",
    )
    x = normal(2, (1, 5, 5, 4))
    keys = jax.random.split(jax.random.key(0), 1500)
    got = jax.vmap(lambda k: run({"w": w}, lx.dropout({"w": adapter}, 0.2, k), x))(keys)
    error = np.asarray(got.std(0)) / np.sqrt(len(keys))
    assert np.all(np.abs(got.mean(0) - run({"w": w}, {"w": adapter}, x)) < 5.5 * error)


def test_merge_of_dropped_adapters_raises():
    with pytest.raises(lx.LoraError, match="drop"):
        lx.merge(PARAMS, lx.dropout(LORA, 0.5, jax.random.key(0)))


REFUSED = {
    "outputs contracted": lambda p, x: (x @ p["w"]) @ p["w"].T,
    "whole weight": lambda p, x: x @ jnp.sin(p["w"]),
    "lookup": lambda p, x: jnp.tanh(p["w"][jnp.array([1, 2])]),
    "returned": lambda p, x: p["w"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_without_a_dropped_form_raise(name):
    run = lx.adapt(REFUSED[name], fallback="allow")
    with pytest.raises(lx.LoraError, match=re.compile("dropout.*path:    w", re.S)):
        run(PARAMS, lx.dropout(LORA, 0.5, jax.random.key(0)), X)


def test_a_ragged_product_with_dropout_raises():
    run = lx.adapt(lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 2])))
    lora = lx.dropout({"w": make_adapter((2, 8, 6), SIO)}, 0.5, jax.random.key(0))
    with pytest.raises(lx.LoraError, match="dropout"):
        run({"w": normal(1, (2, 8, 6))}, lora, X)


# What masks depend on.

TWO = {"w": jnp.zeros((32, 32))}, {"w": identity()}


def twice(p, x):
    return jnp.stack([x @ p["w"], (x + 1) @ p["w"]])


def within(wrap):
    """The same two products, the second one within something."""
    return lambda p, x: jnp.stack([x @ p["w"], wrap(lambda w, x: (x + 1) @ w)(p["w"], x)])


def amid_other_things(p, x):
    jnp.sin(x)  # dead
    x = lax.optimization_barrier(lax.stop_gradient(x) + 0)
    return twice(p, x)


UNRELATED = {
    "operations": amid_other_things,
    "jit": lambda p, x: jax.jit(twice)(p, x),
    "checkpoint": lambda p, x: jax.checkpoint(twice)(p, x),
    "jit of the second": within(jax.jit),
    "checkpoint of the second": within(jax.checkpoint),
    "nested": within(lambda f: jax.checkpoint(jax.jit(f))),
    "both operands of one jit": lambda p, x: jax.jit(lambda v, w, x: jnp.stack([x @ v, (x + 1) @ w]))(
        p["w"], p["w"], x
    ),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_masks_depend_on_the_use_alone(name):
    x = jnp.ones((2, 32))
    want = masks(twice, *TWO, x)
    assert 0.2 < (want[0] != want[1]).mean() < 0.8
    np.testing.assert_array_equal(masks(UNRELATED[name], *TWO, x), want)
    dropped = lx.dropout(TWO[1], 0.5, jax.random.key(0))
    run = jax.jit(lx.adapt(UNRELATED[name], fallback="error"))
    np.testing.assert_array_equal(np.asarray(run(TWO[0], dropped, x)) != 0, want)


def test_an_eager_loop_counts_at_its_second_call_too():
    def fn(p, x):
        looped = lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=2)[1]
        return jnp.concatenate([looped, (x @ p["w"])[None]])

    run, dropped = lx.adapt(fn, fallback="error"), lx.dropout(TWO[1], 0.5, jax.random.key(0))
    first, second = run(TWO[0], dropped, jnp.ones((2, 32))), run(TWO[0], dropped, jnp.ones((2, 32)))
    np.testing.assert_array_equal(first, second)
    kept = np.asarray(first) != 0
    assert all(0.2 < (kept[i] != kept[j]).mean() < 0.8 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_keys_of_the_old_style_draw_the_same_masks():
    np.testing.assert_array_equal(change(jax.random.PRNGKey(3)), change(jax.random.key(3)))


def test_a_traced_rate_compiles_once_and_zero_drops_nothing():
    @jax.jit
    def traced(rate):
        return change(jax.random.key(1), rate=rate)

    for rate in (0.5, 0.25):
        np.testing.assert_allclose(traced(rate), change(jax.random.key(1), rate=rate), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(traced(0.0), APPLY(PARAMS, LORA, X) - X @ W, rtol=1e-4, atol=1e-5)
    assert traced._cache_size() == 1


def test_a_refusal_within_a_jit_names_the_weight():
    run = lx.adapt(lambda p, x: jax.jit(lambda w, x: x @ w @ w.T)(p["w"], x))
    with pytest.raises(lx.LoraError, match=re.compile("dropout.*path:    w\n", re.S)):
        run(PARAMS, lx.dropout(LORA, 0.5, jax.random.key(0)), X)


def test_leaves_that_train_whole_have_nothing_to_drop():
    whole = {"w": lx.Full(W)}
    assert lx.dropout(whole, 0.5, jax.random.key(0))["w"] is whole["w"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "loha", "lokr", "lora_xs", "lora_fa"])
def test_every_low_rank_method_drops_its_inputs(method):
    params, lora = lx.split({"kernel": normal(7, (8, 6))}, rank=2, method=method)
    lora = jax.tree.map(lambda leaf: leaf + 0.3, lora)  # what starts at zero changes nothing
    run = lx.adapt(lambda p, x: x @ p["kernel"], fallback="error")
    keys = jax.random.split(jax.random.key(0), 400)
    got = jax.vmap(lambda key: run(params, lx.dropout(lora, 0.25, key), X))(keys)
    want = run(params, lora, X)
    assert np.all(got.std(0) > 1e-3)
    assert np.all(np.abs(got.mean(0) - want) < 5 * got.std(0) / np.sqrt(len(keys)))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_dropout_in_unscanned_layers_is_no_larger_a_program_than_by_hand(impl):
    """What is lowered, and for the cheaper generator what XLA makes of it, which decides the time."""
    layers, params = range(12), {"w": [normal(i, (8, 8)) for i in range(12)]}
    _, lora = lx.split(params, rank=2, layout={"*": IO}, targets=["w"])
    apply = lx.adapt(lambda params, x: [x := jnp.tanh(x @ w) for w in params["w"]][-1].sum())

    def adapted(lora, key):
        return apply(params, lx.dropout(lora, 0.1, key), X)

    def by_hand(factors, key):
        x = X
        for i, own in zip(layers, jax.random.split(key, len(layers)), strict=True):
            a, b = factors[i]
            keep = jax.random.bernoulli(own, 0.9, x.shape)
            x = jnp.tanh(x @ params["w"][i] + 16.0 * (jnp.where(keep, x / 0.9, 0.0) @ a @ b))
        return x.sum()

    key = jax.random.key(0, impl=impl)
    hand = [(lora[f"w/{i}"].a, lora[f"w/{i}"].b) for i in layers]
    ours, theirs = (jax.jit(jax.grad(f)).lower(t, key) for f, t in ((adapted, lora), (by_hand, hand)))
    lines = [lowered.as_text().count("\n") for lowered in (ours, theirs)]
    assert lines[0] <= lines[1], lines
    if impl == "rbg":
        size = [lowered.compile().as_text().count("\n") for lowered in (ours, theirs)]
        assert size[0] <= 1.2 * size[1], size


@pytest.mark.parametrize("form", ["once", "twice", "scan"])
def test_no_key_is_used_twice(form):
    """By JAX's own check."""
    programs = {
        "once": lambda p, x: x @ p["w"][0],
        "twice": lambda p, x: x @ p["v"] @ p["v"],
        "scan": lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0],
    }
    params = {"v": normal(0, (8, 8)), "w": normal(0, (2, 8, 8))}
    _, lora = lx.split(params, rank=2, layout={"v": IO, "w": SIO}, targets=["v", "w"])
    run = lx.adapt(programs[form])

    def loss(lora, key):
        return run(params, lx.dropout(lora, 0.5, key), X).sum()

    with jax.debug_key_reuse(True):
        assert jax.tree.leaves(jax.jit(jax.grad(loss))(lora, jax.random.key(0)))
