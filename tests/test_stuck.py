"""Adapters that can never move are said, by `split` as a warning and by `summary`; no other adapter is."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
ZEROS = jnp.zeros((8, 6))


def fn(params, x):
    return x @ params["o"]["kernel"]


STUCK = [
    ("lora", "pissa"),
    ("lora", "loftq"),
    ("dora", "pissa"),
    ("lora_xs", "kaiming"),
    ("lora_fa", "olora"),
]
MOVE = [
    ("lora", "kaiming"),
    ("lora", "zero_a"),
    ("lora", "olora"),
    ("dora", "kaiming"),
    ("lora_fa", "kaiming"),
]


def moves(params, lora):
    """The oracle: whether a gradient of what trains is anything but zero."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
    grads = jax.grad(lambda lora: jnp.sum(jnp.cos(lx.adapt(fn)(params, lora, x) + 1.0)))(lora)
    trains = jax.tree.map(lambda g, on: on and bool(jnp.any(g != 0)), grads, lx.mask(lora))
    return any(jax.tree.leaves(trains))


@pytest.mark.parametrize(("method", "init"), STUCK)
def test_a_weight_of_zeros_is_said_where_factors_are_made_of_it(method, init):
    with pytest.warns(lx.LoraStuckWarning, match=r"(?s)never move.*o/kernel.*exclude=\['o/kernel'\]"):
        params, lora = lx.split({"o": {"kernel": ZEROS}}, rank=2, method=method, init=init)
    assert not moves(params, lora)
    assert "can never move:\n  o/kernel" in str(lx.summary(params, lora))
    assert "can never move" in lx.summary(params, lora)._repr_html_()
    params, lora = lx.split({"o": {"kernel": W}}, rank=2, method=method, init=init)
    assert moves(params, lora) and "never" not in str(lx.summary(params, lora))


@pytest.mark.parametrize(("method", "init"), MOVE)
def test_what_can_move_is_not_said(method, init):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, lora = lx.split({"o": {"kernel": ZEROS}}, rank=2, method=method, init=init)
    assert moves(params, lora) and "never" not in str(lx.summary(params, lora))


def test_stack_entries_are_named_and_shapes_cost_nothing(monkeypatch):
    layout = {"w": lx.Layout((0,), (1,), (2,))}
    w = jnp.stack([W, ZEROS, W, ZEROS])
    with pytest.warns(lx.LoraStuckWarning, match="in stack entries 1, 3"):
        lx.split({"w": w}, rank=2, init="pissa", layout=layout)
    with pytest.warns(lx.LoraStuckWarning, match="in stack entries 1$|in stack entries 1\n"):
        lx.split({"w": w}, rank=[2, 1, 2, 0], init="pissa", layout=layout)
    monkeypatch.setattr(jax, "jvp", lambda *args: pytest.fail("asked of shapes"))
    lx.split({"w": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32)}, rank=2, init="pissa", layout=layout)


def test_both_factors_at_zero_are_said_by_summary():
    params, lora = lx.split({"o": {"kernel": W}}, rank=2)
    assert "never" not in str(lx.summary(params, lora))
    dead = jax.tree.map(jnp.zeros_like, lora)
    assert not moves(params, dead) and "all that trains is multiplied by zeros" in str(
        lx.summary(params, dead)
    )
