"""`mask` and `train_only`: which leaves train, and that no other leaf moves or has state."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.whole import Full
from lorax_fn.training.masks import mask, train_only

LAYOUT = Layout(inputs=(0,), outputs=(1,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen(Adapter):
    """A method with one of every kind of array field."""

    frozen = ("shared",)

    shared: Any
    vector: Any
    seed: Any
    ids: Any


def lora_of(n=3, m=2, r=2, dtype=jnp.float32):
    a = jnp.arange(n * r, dtype=dtype).reshape(n, r) / 8
    return LoRA(a, jnp.ones((r, m), dtype), alpha=4.0, rank=r, scaling="lora", layout=LAYOUT)


def frozen_one():
    return Frozen(jnp.ones(3), jnp.ones(2), jax.random.key(1), jnp.arange(2, dtype=jnp.int32))


def mixed_tree():
    params = {"w": jnp.ones((3, 2)), "n": jnp.zeros((), jnp.int32), "act": jnp.tanh, "none": None}
    return {"lora": {"w": lora_of(), "v": frozen_one(), "b": Full(jnp.ones(2))}, "params": params}


def test_mask_names_the_leaves_that_train():
    tree = mixed_tree()
    got = mask(tree)
    assert got["lora"]["v"] == Frozen(shared=False, vector=True, seed=False, ids=False)
    assert (got["lora"]["w"].a, got["lora"]["w"].b, got["lora"]["b"].value) == (True, True, True)
    assert got["params"] == {"w": False, "n": False, "act": False, "none": None}
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert all(type(flag) is bool for flag in jax.tree.leaves(got))


def test_mask_of_an_abstract_tree_is_the_same():
    tree = mixed_tree()["lora"]
    abstract, concrete = mask(jax.eval_shape(lambda: tree)), mask(tree)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(concrete)


def test_mask_of_params_alone_and_of_one_adapter():
    assert jax.tree.leaves(mask({"w": jnp.ones(2), "l": [jnp.ones(1)]})) == [False, False]
    assert jax.tree.leaves(mask(lora_of())) == [True, True]
    assert mask({}) == {}


def test_mask_keeps_the_boxes_of_flax():
    box = nn.Partitioned(jnp.ones((2, 2)), names=(None, "m"))
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for tree in (box, state):
        got = mask({"p": tree, "lora": lora_of()})
        assert jax.tree.structure(got) == jax.tree.structure({"p": tree, "lora": lora_of()})
        assert not any(jax.tree.leaves(got["p"]))


def float_tree():
    return {"params": {"w": jnp.full((3, 2), 100.0)}, "lora": {"w": lora_of(), "b": Full(jnp.ones(2))}}


def test_other_leaves_get_exactly_zero_and_adapters_what_the_optimizer_gives():
    tree = float_tree()
    grads = jax.tree.map(lambda x: x + 1, tree)
    tx, plain = train_only(optax.adam(0.1)), optax.adam(0.1)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam alone fails under strict
        want, _ = plain.update(grads["lora"], plain.init(tree["lora"]), tree["lora"])
    np.testing.assert_array_equal(updates["params"]["w"], np.zeros((3, 2)))
    jax.tree.map(np.testing.assert_array_equal, updates["lora"], want)


def test_masked_alone_passes_raw_gradients_which_is_the_trap():
    tree = float_tree()
    tx = optax.masked(optax.sgd(0.1), mask)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_array_equal(updates["params"]["w"], np.full((3, 2), 100.0))


def test_leaves_that_do_not_train_have_no_state():
    lora = mixed_tree()["lora"]
    tree = {"lora": lora, "params": {"w": jnp.ones((3, 2)), "n": jnp.zeros((), jnp.int32)}}
    state = train_only(optax.adam(0.1)).init(tree)
    shapes = sorted(x.shape for x in jax.tree.leaves(state))
    assert shapes == sorted([(), *2 * [(3, 2), (2, 2), (2,), (2,)]])


def test_keys_and_integers_are_no_obstacle():
    tree = {"v": frozen_one(), "n": jnp.arange(3)}
    tx = train_only(optax.sgd(1.0))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_array_equal(updates["v"].ids, [0, 0])
    np.testing.assert_array_equal(updates["n"], [0, 0, 0])
    np.testing.assert_array_equal(updates["v"].vector, [-1.0, -1.0])


def test_global_norm_clip_sees_only_what_trains():
    tree = float_tree()
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    updates, _ = train_only(chain).update(tree, train_only(chain).init(tree), tree)
    want, _ = chain.update(tree["lora"], chain.init(tree["lora"]), tree["lora"])
    jax.tree.map(np.testing.assert_array_equal, updates["lora"], want)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)


def test_extra_arguments_reach_the_optimizer():
    tree = float_tree()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = train_only(optax.chain(optax.sgd(1.0), plateau))
    state = tx.init(tree)
    for _ in range(4):
        _, state = tx.update(tree, state, tree, value=jnp.float32(1.0))
    assert optax.tree_utils.tree_get(state, "scale") < 1.0


def test_extra_arguments_of_the_same_structure_are_masked_too():
    def update(updates, state, params=None, *, grad, **_):
        return jax.tree.map(lambda u, g: u + g, updates, grad), state

    tx = train_only(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    tree = float_tree()
    updates, _ = tx.update(tree, tx.init(tree), tree, grad=tree)
    np.testing.assert_array_equal(updates["lora"]["b"].value, [2.0, 2.0])


def test_inject_hyperparams_keeps_a_rate_that_can_be_read_and_changed():
    tree = float_tree()
    tx = train_only(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    state = tx.init(tree)
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0.25))
    updates, _ = tx.update(tree, state, tree)
    np.testing.assert_array_equal(updates["lora"]["b"].value, [-0.25, -0.25])


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.gradient_transformation()])
def test_multisteps_inside(wrap):
    tree = float_tree()
    tx = train_only(wrap(optax.MultiSteps(optax.sgd(1.0), 2)))
    state = tx.init(tree)
    first, state = tx.update(tree, state, tree)
    second, _ = tx.update(tree, state, tree)
    np.testing.assert_array_equal(first["lora"]["b"].value, [0.0, 0.0])
    np.testing.assert_array_equal(second["lora"]["b"].value, [-1.0, -1.0])
    np.testing.assert_array_equal(second["params"]["w"], np.zeros((3, 2)))


def test_inside_a_partition_of_optax():
    tree = float_tree()["lora"]
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "b" if path[-1].name == "b" else "a", tree)
    tx = optax.partition({"a": train_only(optax.sgd(1.0)), "b": train_only(optax.sgd(16.0))}, labels)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_array_equal(updates["w"].b, np.full((2, 2), -16.0))
    np.testing.assert_array_equal(updates["b"].value, [-1.0, -1.0])


def test_something_that_is_no_optimizer_is_refused():
    with pytest.raises(LoraError, match=r"not an optimizer(.|\n)*adam(.|\n)*call it first"):
        train_only(optax.adam)
