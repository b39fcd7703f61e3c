"""What a train step refuses, and what it says then."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import ADAM, KEY, loss_fn, setup, state_of

import lorax_fn as lx
from lorax_fn.core.errors import LoraError
from lorax_fn.training.step import TrainState, make_train_step


def test_an_equinox_module_is_refused_with_the_remedy():
    _, lora, batch = setup()
    model = eqx.nn.MLP(4, 3, 4, 1, key=jax.random.key(0))
    step = make_train_step(loss_fn, ADAM)
    with pytest.raises(LoraError, match=r"arrays only(.|\n)*activation(.|\n)*eqx.partition(.|\n)*nnx.split"):
        step(state_of(lora), model, batch)
    # jit inspects arguments before the step runs: the error is JAX's, and names the leaf
    with pytest.raises(TypeError, match=r"at path params.activation"):
        jax.jit(step)(state_of(lora), model, batch)
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, lora, batch, key):
        model = eqx.combine(arrays, static)
        return jnp.mean((jax.vmap(model)(batch["x"]) + lora["bias"].value[None]) ** 2)

    assert np.isfinite(jax.jit(make_train_step(loss, ADAM))(state_of(lora), arrays, batch)[1]["loss"])


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (lambda loss: loss[None], r"shape \(1,\), dtype float32(.|\n)*want a scalar|want: +a scalar"),
        (lambda loss: loss.astype(jnp.int32), r"dtype int32(.|\n)*want: +a scalar"),
        (lambda loss: (loss, 1, 2), r"a tuple of 3(.|\n)*loss or \(loss, aux\)"),
        (lambda loss: {"loss": loss}, r"a dict(.|\n)*want: +a scalar"),
        (lambda loss: (loss[None], {}), r"shape \(1,\)"),
    ],
)
def test_a_loss_of_another_form_is_refused(out, text):
    params, lora, batch = setup()
    with pytest.raises(LoraError, match=text):
        make_train_step(lambda *args: out(loss_fn(*args)), ADAM)(state_of(lora), params, batch)


def test_extra_of_another_form_is_refused():
    params, lora, batch = setup()
    state = state_of(lora, extra={"m": jnp.zeros(2), "n": jnp.zeros(())})

    def loss(result):
        return make_train_step(lambda p, lora, b, k, e: (loss_fn(p, lora, b, k), result(e)), ADAM)

    with pytest.raises(LoraError, match=r"as the state holds extra"):
        loss(lambda e: jnp.zeros(2))(state, params, batch)
    with pytest.raises(LoraError, match=r"path: +m\n +n\n +got: +\(3,\) float32\n +nothing"):
        loss(lambda e: ({"m": jnp.zeros(3)}, None))(state, params, batch)


def test_a_forgotten_extra_and_one_too_many_are_told():
    params, lora, batch = setup()

    def with_extra(params, lora, batch, key, extra):
        return loss_fn(params, lora, batch, key), (extra, None)

    with pytest.raises(LoraError, match=r"missing(.|\n)*'extra'(.|\n)*no extra(.|\n)*create\(..., extra="):
        jax.jit(make_train_step(with_extra, ADAM))(state_of(lora), params, batch)
    with pytest.raises(LoraError, match=r"too many(.|\n)*holds extra(.|\n)*without extra="):
        jax.jit(make_train_step(loss_fn, ADAM))(state_of(lora, extra=jnp.ones(())), params, batch)
    make_train_step(lambda *args: with_extra(*args), ADAM)(state_of(lora, extra=jnp.ones(())), params, batch)


def test_a_state_of_consumed_adapters_is_refused():
    params, lora, batch = setup()
    step = jax.jit(make_train_step(loss_fn, ADAM), donate_argnums=0)
    step(TrainState.create(lora=lora, tx=ADAM, key=KEY), params, batch)
    with pytest.raises(LoraError, match=r"consumed this lora(.|\n)*w/b(.|\n)*jnp.copy"):
        TrainState.create(lora=lora, tx=ADAM, key=KEY)


@pytest.mark.parametrize(
    "use",
    [
        lambda params, lora: lx.adapt(lambda p: p["w"])(params, lora),
        lambda params, lora: lx.merge(params, lora),
        lambda params, lora: lx.delta({"w": lora["w"]}),
        lambda params, lora: lx.summary(params, lora),
        lambda params, lora: lx.dropout(lora, 0.5, KEY),
        lambda params, lora: lx.trainable(lora),
        lambda params, lora: lx.value_and_grad(lambda p, q: 0.0)(params, lora),
        lambda params, lora: lx.bank([{"w": lora["w"]}]),
        lambda params, lora: lx.stack([lora]),
        lambda params, lora: lx.combine([(1.0, {"w": lora["w"]})]),
        lambda params, lora: lx.checkpoint.save("/nowhere", lora),
    ],
)
def test_every_verb_says_that_a_step_has_consumed_its_adapters(use):
    """And not that some array of some shape has been deleted."""
    params, lora, _ = setup()
    for leaf in jax.tree.leaves(lora):
        leaf.delete()
    with pytest.raises(LoraError, match=r"consumed this lora(.|\n)*w/b(.|\n)*last step(.|\n)*jnp.copy"):
        use(params, lora)


def test_a_step_that_is_not_jitted_and_its_half_refuse_a_consumed_state():
    params, lora, batch = setup()
    state = state_of(lora)
    grads = jax.tree.map(jnp.ones_like, lx.trainable(lora))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    with pytest.raises(LoraError, match="consumed this state"):
        make_train_step(loss_fn, ADAM)(state, params, batch)
    with pytest.raises(LoraError, match="consumed this state"):
        lx.apply_gradients(state, grads, ADAM)


def test_a_batch_that_does_not_divide_names_every_leaf():
    params, lora, batch = setup()
    batch["n"] = jnp.zeros(())
    with pytest.raises(
        LoraError, match=r"path: +n\n +x\n +y\n(.|\n)*\(16, 4\)(.|\n)*multiple of accumulate=3"
    ):
        make_train_step(loss_fn, ADAM, accumulate=3)(state_of(lora), params, batch)


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True, "2"])
def test_accumulate_is_a_count(accumulate):
    with pytest.raises(LoraError, match="accumulate is not a count"):
        make_train_step(loss_fn, ADAM, accumulate=accumulate)


def test_create_refuses_what_can_not_train():
    _, lora, _ = setup()
    dropped = {"w": dataclasses.replace(lora["w"], key=KEY, rate=0.1), "bias": lora["bias"]}
    for bad, text in [
        (list(lora.values()), "not a dict of adapters"),
        (lora | {"u": jnp.ones(2), "v": 1}, r"u: \w+\n +v: int\n"),
        (dropped, r"dropout(.|\n)*path: +w\n"),
        ({}, "lora has no trainable leaf"),
    ]:
        with pytest.raises(LoraError, match=text):
            TrainState.create(lora=bad, tx=ADAM, key=KEY)
    for key in (0, None, jnp.zeros(2), jax.random.split(KEY, 2)):
        with pytest.raises(LoraError, match=r"not a single PRNG key(.|\n)*jax.random.key"):
            TrainState.create(lora=lora, tx=ADAM, key=key)
    TrainState.create(lora=lora, tx=ADAM, key=jax.random.PRNGKey(0))
