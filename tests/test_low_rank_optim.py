"""Optimizers that know of A and B: their formulae by hand, and how they compose with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lx

STACKED = lx.Layout((0,), (1,), (2, 3))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lora_of(cls=lx.LoRA, rank=3, seed=0):
    a, b = normal(seed, 2, 5, 3), normal(seed + 1, 2, 3, 2, 2)
    return {"w": cls(a, b, 6.0, rank, "lora", STACKED), "bias": lx.Full(normal(seed + 2, 4))}


def updates_of(tx, lora, grads, steps=3):
    state, out = tx.init(lora), None
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            out, state = tx.update(grads, state, lora)
    return out


def test_loraplus_multiplies_what_b_moves_by_and_nothing_else():
    lora, grads = lora_of(), lora_of(seed=7)
    plain = updates_of(optax.adamw(0.1, weight_decay=0.2), lora, grads)
    faster = updates_of(lx.optim.loraplus(optax.adamw(0.1, weight_decay=0.2), ratio=8), lora, grads)
    np.testing.assert_array_equal(faster["w"].a, plain["w"].a)
    np.testing.assert_array_equal(faster["w"].b, 8 * plain["w"].b)
    np.testing.assert_array_equal(faster["bias"].value, plain["bias"].value)
    same = updates_of(lx.optim.loraplus(optax.adamw(0.1, weight_decay=0.2), ratio=1), lora, grads)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    for lr in (0.1, lambda step: 0.1):
        jax.tree.map(
            np.testing.assert_array_equal,
            updates_of(lx.optim.loraplus(lr), lora, grads)["w"].b,
            16 * updates_of(optax.adam(lr), lora, grads)["w"].b,
        )


def test_loraplus_composes():
    lora, grads = lora_of(), lora_of(seed=7)
    injected = optax.inject_hyperparams(lx.optim.loraplus)(tx_or_lr=0.1, ratio=4.0)
    with jax.numpy_dtype_promotion("standard"):
        state = injected.init(lora)
    assert float(state.hyperparams["ratio"]) == 4.0
    state.hyperparams["ratio"] = jnp.asarray(2.0)
    with jax.numpy_dtype_promotion("standard"):
        two, _ = injected.update(grads, state, lora)
    one = updates_of(optax.adam(0.1), lora, grads, steps=1)
    np.testing.assert_allclose(two["w"].b, 2 * one["w"].b, rtol=1e-6)
    np.testing.assert_allclose(two["w"].a, one["w"].a, rtol=1e-6)
    every_second = optax.MultiSteps(lx.optim.loraplus(optax.sgd(1.0), 3.0), 2)
    for tx in (
        every_second.gradient_transformation(),
        lx.optim.loraplus(optax.MultiSteps(optax.sgd(1.0), 2), 3.0),
    ):
        assert not np.asarray(updates_of(tx, lora, grads, steps=1)["w"].b).any()
        second = updates_of(tx, lora, grads, steps=2)
        np.testing.assert_allclose(second["w"].b, -3 * grads["w"].b, rtol=1e-6)
    chained = lx.train_only(
        optax.chain(optax.clip_by_global_norm(1e9), lx.optim.loraplus(optax.sgd(1.0), 3.0))
    )
    tree = {"lora": lora, "params": {"w": jnp.ones(2)}}
    updates, _ = chained.update(tree, chained.init(tree), tree)
    np.testing.assert_array_equal(updates["lora"]["w"].b, -3 * lora["w"].b)
    np.testing.assert_array_equal(updates["params"]["w"], [0.0, 0.0])


def test_loraplus_refuses_what_is_no_optimizer():
    with pytest.raises(lx.LoraError, match=r"(?s)optimizer or a learning rate.*str"):
        lx.optim.loraplus("adam")


@pytest.mark.parametrize("cls", [lx.LoRA, lx.DoRA])
def test_riemannian_is_its_equation_for_each_stack_entry(cls):
    lora, grads = lora_of(cls), lora_of(cls, seed=7)
    got = updates_of(lx.optim.riemannian(damping=0.01), lora, grads, steps=1)
    for i in range(2):
        a, b = np.asarray(lora["w"].a[i], np.float64), np.asarray(lora["w"].b[i], np.float64).reshape(3, 4)
        ga, gb = np.asarray(grads["w"].a[i]), np.asarray(grads["w"].b[i]).reshape(3, 4)
        want_a = ga @ np.linalg.inv(b @ b.T + 0.01 * np.eye(3))
        want_b = np.linalg.inv(a.T @ a + 0.01 * np.eye(3)) @ gb
        np.testing.assert_allclose(got["w"].a[i], want_a, rtol=1e-4, atol=1e-4 * np.abs(want_a).max())
        np.testing.assert_allclose(got["w"].b[i].reshape(3, 4), want_b, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got["bias"].value, grads["bias"].value)


def test_riemannian_steps_depend_on_the_product_alone():
    """A and B exchanged for 3 A and B / 3 give the same dW after a step, as the paper has it."""
    w, x, y = normal(1, 5, 4), normal(2, 7, 5), normal(3, 7, 4)
    layout = lx.Layout((), (0,), (1,))

    def stepped(factor):
        lora = {"w": lx.LoRA(factor * normal(4, 5, 2), normal(5, 2, 4) / factor, 2.0, 2, "lora", layout)}
        grads = jax.grad(lambda lora: jnp.mean(jnp.square(x @ lora["w"].weight(w) - y)))(lora)
        tx = optax.chain(lx.optim.riemannian(damping=0.0), optax.sgd(0.1))
        updates, _ = tx.update(grads, tx.init(lora), lora)
        return lx.delta(optax.apply_updates(lora, updates))["w"]

    np.testing.assert_allclose(stepped(3.0), stepped(1.0), rtol=1e-4, atol=1e-5)


def test_riemannian_names_what_it_cannot_serve():
    lora, tx = lora_of(lx.LoRAFA), lx.optim.riemannian()
    with pytest.raises(lx.LoraError, match=r"(?s)path: +w\n.*LoRAFA.*lora_fa_gradient"):
        tx.update(lora, tx.init(lora), lora)
    with pytest.raises(lx.LoraError, match="no params"):
        tx.update(lora_of(), tx.init(lora))


@pytest.mark.parametrize("rank", [3, (3, 1)], ids=str)
def test_lora_fa_gradient_is_its_equation_inside_a_train_step(rank):
    lora = lora_of(lx.LoRAFA, rank)
    if rank != 3:
        pad = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
        a, b = lora["w"].a * pad[:, None, :], lora["w"].b * pad[:, :, None, None]
        lora["w"] = lx.LoRAFA(a, b, 6.0, rank, "lora", STACKED)
    w, x = normal(8, 2, 5, 2, 2), normal(9, 2, 6, 5)

    def loss_fn(params, lora, batch, key):
        return jnp.mean(jnp.square(jnp.einsum("sti,sijk->stjk", batch, lora["w"].weight(params["w"]))))

    grads = jax.grad(lambda lora: loss_fn({"w": w}, lora, x, None))(lora)
    tx = optax.chain(lx.optim.lora_fa_gradient(lora), optax.sgd(1.0))
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    state, _ = jax.jit(lx.make_train_step(loss_fn, tx))(state, {"w": w}, x)
    np.testing.assert_array_equal(state.lora["w"].a, lora["w"].a)
    for i in range(2):
        r = rank if rank == 3 else rank[i]
        a, g = np.asarray(lora["w"].a[i], np.float64)[:, :r], np.asarray(grads["w"].b[i]).reshape(3, 4)[:r]
        s = 6.0 / r
        want = np.array(lora["w"].b[i]).reshape(3, 4)
        want[:r] -= np.linalg.inv(a.T @ a + 1e-8 * np.eye(r)) @ g / s**2
        np.testing.assert_allclose(state.lora["w"].b[i].reshape(3, 4), want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_fa_gradient", "riemannian"])
def test_low_rank_gradients_compose(name):
    """In a chain, under inject_hyperparams and in MultiSteps: what they give alone, and then optax."""
    cls = lx.LoRAFA if name == "lora_fa_gradient" else lx.LoRA
    lora, grads = lora_of(cls), lora_of(cls, seed=7)
    make = {
        "lora_fa_gradient": lambda x=1e-8: lx.optim.lora_fa_gradient(lora, x),
        "riemannian": lx.optim.riemannian,
    }[name]
    alone = updates_of(make(), lora, grads, steps=1)
    assert np.abs(alone["w"].b - grads["w"].b).max() > 0.01

    def near(got, want):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)

    chained = optax.chain(make(), optax.sgd(0.5))
    near(updates_of(chained, lora, grads, 1), jax.tree.map(lambda g: -0.5 * g, alone))
    injected = optax.inject_hyperparams(lambda x, lr: optax.chain(make(x), optax.sgd(lr)))(x=1e-2, lr=0.5)
    with jax.numpy_dtype_promotion("standard"):
        state = injected.init(lora)
        first = injected.update(grads, state, lora)[0]
        state.hyperparams["lr"] = jnp.asarray(0.25)
        state.hyperparams["x"] = jnp.asarray(1.0)
        second = injected.update(grads, state, lora)[0]
    near(first, updates_of(optax.chain(make(1e-2), optax.sgd(0.5)), lora, grads, 1))
    near(second, updates_of(optax.chain(make(1.0), optax.sgd(0.25)), lora, grads, 1))
    every_second = optax.MultiSteps(chained, 2).gradient_transformation()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates_of(every_second, lora, grads, 1)))
    near(updates_of(every_second, lora, grads, 2), jax.tree.map(lambda g: -0.5 * g, alone))


def test_frozen_factors_stay_bit_equal_under_adamw_outside_a_train_step():
    """Decay would move them by lr * 0.5 a step; `train_only` is what holds them, around any chain."""
    lora, grads = lora_of(lx.LoRAFA), lora_of(lx.LoRAFA, seed=7)
    inner = optax.chain(lx.optim.lora_fa_gradient(lora), optax.adamw(0.1, weight_decay=0.5))
    for tx in map(lx.train_only, (inner, optax.MultiSteps(inner, 1).gradient_transformation())):
        state, now = tx.init(lora), lora
        for _ in range(3):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(grads, state, now)
            now = optax.apply_updates(now, updates)
        np.testing.assert_array_equal(now["w"].a, lora["w"].a)
        assert np.abs(now["w"].b - lora["w"].b).max() > 0.1
