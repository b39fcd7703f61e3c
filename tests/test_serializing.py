"""Adapters in the serializers of others: the same numbers come back, or an error does."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import lorax_fn as lx
from lorax_fn.methods.table import METHODS


def adapters(**kwargs):
    kwargs = {"rank": 2, "alpha": 4.0, "scaling": "rslora"} | kwargs
    params = {name: {"kernel": jnp.full((4, 6), 0.5)} for name in METHODS}
    params |= {"embed": jnp.ones((5, 4)), "bias": jnp.ones(3)}
    return lx.split(
        params,
        targets=list(METHODS),
        method={name: name for name in METHODS},
        full=["bias"],
        rows={"embed": [1, 3]},
        **kwargs,
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_flax_writes_every_method_and_reads_it_back_with_its_optimizer():
    params, lora = adapters()
    lora = jax.tree.map(lambda x: x + 0.25, lora)
    state = lx.TrainState.create(lora=lora, tx=optax.adam(0.1), key=jax.random.key(0))
    tree = {"lora": lora, "opt": state.opt_state}
    assert {path: type(x) for path, x in serialization.to_state_dict(lora).items()} == {p: dict for p in lora}
    blank = jax.tree.map(jnp.zeros_like, tree)
    got = serialization.from_bytes(blank, serialization.to_bytes(tree))
    assert_same(got, tree)
    for path, merged in jax.tree_util.tree_leaves_with_path(lx.merge(params, got["lora"])):
        want = dict(jax.tree_util.tree_leaves_with_path(lx.merge(params, lora)))[path]
        np.testing.assert_array_equal(merged, want)


@pytest.mark.parametrize("other", [{"alpha": 8.0}, {"scaling": "lora"}, {"rank": 1}])
def test_flax_refuses_adapters_with_other_facts(other):
    stored = serialization.to_bytes(adapters()[1])
    with pytest.raises(lx.LoraError, match=r"not of the same kind(.|\n)*alpha"):
        serialization.from_bytes(adapters(**other)[1], stored)
    state = serialization.to_state_dict(adapters()[1])
    del state["lora/kernel"]["b"]
    with pytest.raises(lx.LoraError, match=r"got: +arrays \['a', "):
        serialization.from_state_dict(adapters()[1], state)


def test_flax_may_be_imported_after_the_adapters_are_made():
    """In a process of its own: this one has Flax loaded long since."""
    script = """
        import sys, jax.numpy as jnp, lorax_fn as lx
        params, lora = lx.split({"w": {"kernel": jnp.ones((4, 3))}}, rank=2)
        assert "flax" not in sys.modules
        from flax import serialization
        assert set(serialization.to_state_dict(lora)["w/kernel"]) >= {"a", "b", "static"}
        print("held")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


def test_a_function_of_adapters_is_exported_with_every_method():
    params, lora = adapters()
    lora = jax.tree.map(lambda x: x + 0.25, lora)

    @jax.jit
    def merged(lora):
        return lx.merge(params, lora), lora

    blob = jax.export.export(merged)(lora).serialize()
    exported = jax.export.deserialize(bytearray(blob))
    assert_same(exported.call(lora), merged(lora))
    other = lora | {"lora/kernel": dataclasses.replace(lora["lora/kernel"], alpha=8.0)}
    with pytest.raises(ValueError, match="tree"):  # JAX compares alpha, as it compares structures
        exported.call(other)


def test_pickle_and_a_class_that_a_notebook_defines_twice():
    _, lora = adapters()
    assert_same(pickle.loads(pickle.dumps(lora)), lora)
    from lorax_fn.core.adapters import register

    for _ in range(2):

        @register
        class Own(lx.Adapter):
            value: jax.Array

        assert serialization.to_state_dict(Own(jnp.ones(2))).keys() == {"value", "static"}


def test_the_structure_of_an_adapter_is_found_once(monkeypatch):
    """A jitted call flattens every adapter, so what cannot change is kept, for this adapter alone."""
    adapter = adapters()[1]["lora/kernel"]
    first = jax.tree.structure(adapter)
    with monkeypatch.context() as patch:
        patch.setattr("lorax_fn.core.adapters.is_number", None)  # a call would raise
        assert jax.tree.structure(adapter) == first
        for other in (jax.tree.map(lambda x: x, adapter), copy.copy(adapter), copy.deepcopy(adapter)):
            assert jax.tree.structure(other) == first
    other = dataclasses.replace(adapter, alpha=8.0)
    assert jax.tree.structure(other) != first and len(jax.tree.leaves(other)) == 2
    live = dataclasses.replace(adapter, alpha=jnp.float32(8.0))
    assert len(jax.tree.leaves(live)) == 3 and float(jax.tree.map(lambda x: x, live).alpha) == 8.0
    back = dataclasses.replace(live, alpha=4.0)
    assert jax.tree.structure(back) == first


def test_equinox_leaves_hold_no_alpha(tmp_path):
    """A trap that the documentation names: what is read has the facts of the tree that it is read into."""
    import equinox as eqx

    (_, four), (_, eight) = adapters(), adapters(alpha=8.0)
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", four)
    got = eqx.tree_deserialise_leaves(tmp_path / "x.eqx", eight)["lora/kernel"]
    assert got.alpha == 8.0
    assert "tree_serialise_leaves" in lx.checkpoint.__doc__
