"""`trainable`, `value_and_grad` and `apply_gradients`: a loop of one's own trains as a step does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lx
from lorax_fn.core.frozen import tell

KEY = jax.random.key(3)
PARAMS = {"up": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
X = jax.random.normal(jax.random.key(1), (8, 6))
ADAPTED = lx.adapt(lambda params, x: x @ params["up"]["kernel"])
DECAY = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.01, momentum=0.9))


def loss_fn(params, lora, x, key=None):
    return jnp.mean((ADAPTED(params, lora, x) - 1) ** 2)


def split(method="lora"):
    params, lora = lx.split(PARAMS, rank=2, method=method)
    return params, jax.tree.map(jnp.copy, lora)


def state_of(lora, tx, **kwargs):
    return lx.TrainState.create(lora=jax.tree.map(jnp.copy, lora), tx=tx, key=KEY, **kwargs)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("method", ["lora", "lora_fa", "vera", "lora_xs", "dora"])
def test_a_loop_of_ones_own_is_the_step_and_frozen_factors_stay(method):
    """Decoupled weight decay would shrink a frozen factor, whose gradient is zero."""
    params, lora = split(method)
    state, step = state_of(lora, DECAY), jax.jit(lx.make_train_step(loss_fn, DECAY))
    by_halves = state_of(lora, DECAY)

    @jax.jit
    def halves(state):
        loss, grads = lx.value_and_grad(loss_fn)(params, state.lora, X)
        return lx.apply_gradients(state, grads, DECAY, value=loss), loss

    own, mask = lora, lx.mask(lora)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = DECAY.init(lx.trainable(lora))
    for _ in range(3):
        state, metrics = step(state, params, X)
        by_halves, loss = halves(by_halves)
        value, grads = lx.value_and_grad(loss_fn)(params, own, X)
        trained = lx.trainable(own)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = DECAY.update(grads, opt_state, trained)
        own = lx.with_trainable(own, optax.apply_updates(trained, updates))
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(value, metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), by_halves.lora, state.lora
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, state.lora)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.lora, lora)
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)
    for frozen, old, new in zip(*map(jax.tree.leaves, (mask, lora, own)), strict=True):
        assert frozen or new is old


@pytest.mark.parametrize("method", ["lora", "lora_fa", "vera", "lora_xs", "bank"])
def test_a_loop_by_the_whole_lora_is_told_that_its_frozen_factors_may_decay(method, caplog):
    """At its first trace, with what to do; the steps and what trains say nothing."""
    params, lora = split("lora" if method == "bank" else method)
    whole = (lambda bank: loss_fn(params, bank[0], X)) if method == "bank" else None
    bank = lx.bank([lora])
    caplog.set_level("WARNING", "lorax_fn")
    tell.cache_clear()
    step = jax.jit(lx.make_train_step(loss_fn, DECAY))
    step(state_of(lora, DECAY), params, X)
    lx.value_and_grad(loss_fn)(params, lora, X)
    jax.jvp(lambda x: loss_fn(params, lora, x), (X,), (X,))
    assert not caplog.records
    grad = jax.jit(jax.grad(whole or (lambda lora: loss_fn(params, lora, X))))
    for _ in range(2):
        grad(bank if method == "bank" else lora)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (method != "lora")
    assert all("weight decay" in text and "lx.trainable(lora)" in text for text in told)


@pytest.mark.parametrize("tx", [optax.adamw(0.1), DECAY], ids=["adamw", "sgd"])
def test_updates_by_these_gradients_can_not_be_added_to_the_whole_lora(tx):
    params, lora = split("lora_fa")
    _, grads = lx.value_and_grad(loss_fn)(params, lora, X)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises((TypeError, ValueError), match="NoneType"):
            updates, _ = tx.update(grads, tx.init(lora), lora)
            optax.apply_updates(lora, updates)


def test_the_value_is_all_that_the_loss_returned():
    params, lora = split()
    with_aux = lx.value_and_grad(lambda p, q, x: (loss_fn(p, q, x), {"n": x.shape[0]}))
    (loss, aux), grads = with_aux(params, lora, X)
    want, plain = jax.value_and_grad(loss_fn, argnums=1)(params, lora, X)
    assert aux == {"n": 8}
    np.testing.assert_allclose(loss, want)
    same(grads, plain)
    with pytest.raises(lx.LoraError, match=r"not a float scalar(.|\n)*\(8,\)"):
        lx.value_and_grad(lambda p, q, x: ADAPTED(p, q, x).sum(1))(params, lora, X)
    with pytest.raises(lx.LoraError, match="not a dict of adapters"):
        lx.value_and_grad(loss_fn)(lora, params, X)


def test_whole_gradients_will_do_and_others_are_refused():
    params, lora = split("lora_fa")
    tx = optax.sgd(0.1)
    _, grads = lx.value_and_grad(loss_fn)(params, lora, X)
    whole = jax.grad(loss_fn, argnums=1)(params, lora, X)
    state = state_of(lora, tx)
    same(lx.apply_gradients(state, whole, tx).lora, lx.apply_gradients(state, grads, tx).lora)
    assert lx.apply_gradients(state, grads, tx).step == 1
    with pytest.raises(
        lx.LoraError, match=r"not the trainable leaves(.|\n)*up/kernel/b\n(.|\n)*lx.trainable"
    ):
        lx.apply_gradients(state, {}, tx)
    with pytest.raises(lx.LoraError, match=r"up/kernel/a\n +got: +a leaf that is not trainable"):
        lx.with_trainable(lora, lora)


def aliases():
    c = optax.contrib
    plain = """
        adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb
        lars lion nadam nadamw noisy_sgd novograd optimistic_adam optimistic_adam_v2
        optimistic_gradient_descent polyak_sgd radam rmsprop rprop sgd sign_sgd signum sm3 yogi
        acprop ademamix adopt cocob dadapt_adamw dog dowg madgrad momo momo_adam muon prodigy
        schedule_free_adamw schedule_free_sgd simplified_ademamix
    """
    table = {name: lambda name=name: getattr(optax, name, None) or getattr(c, name) for name in plain.split()}
    table = {name: lambda get=get: get()(0.01) for name, get in table.items()}
    ascend = optax.chain(c.normalize(), optax.sgd(0.1))
    return table | {
        "sam": lambda: c.sam(optax.adamw(0.01), ascend),
        "sam_of_three": lambda: c.sam(optax.sgd(0.01), ascend, sync_period=3),
        "mechanize": lambda: c.mechanize(optax.adamw(0.01)),
        "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
        "reduce_on_plateau": lambda: optax.chain(optax.adam(0.01), c.reduce_on_plateau()),
        "multi_steps": lambda: optax.MultiSteps(optax.adamw(0.01), 2),
        "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(0.01), 3),
        "flatten": lambda: optax.flatten(optax.adam(0.01)),
        "clipped": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    }


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning")  # optax's own, of noisy_sgd
@pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", aliases())
def test_every_optimizer_of_optax_trains(name):
    """Every one with a plain ``update(grads, state, params)``; galore takes no tree that holds None."""
    params, lora = split("lora_fa")
    tx = aliases()[name]()
    state = state_of(lora, tx)
    trained = {path: np.asarray(adapter.b) for path, adapter in lora.items()}
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    for _ in range(3):
        state, metrics = step(state, params, X)
    b = state.lora["up/kernel"].b
    assert np.isfinite(b).all() and (b != trained["up/kernel"]).any()
    np.testing.assert_array_equal(state.lora["up/kernel"].a, lora["up/kernel"].a)


def test_old_style_keys_drop_inputs_in_a_step():
    params, lora = split()

    def dropping(params, lora, x, key):
        return loss_fn(params, lx.dropout(lora, 0.5, key), x)

    tx = optax.sgd(0.1)
    lora["up/kernel"] = jax.tree.map(lambda x: x + 0.1, lora["up/kernel"])
    step = jax.jit(lx.make_train_step(dropping, tx))
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.PRNGKey(0))
    first = step(state, params, X)[1]["loss"]
    other = step(lx.TrainState.create(lora=lora, tx=tx, key=jax.random.PRNGKey(1)), params, X)[1]["loss"]
    assert np.isfinite(first) and first != other and first != loss_fn(params, lora, X)
