"""Adapters and optimizer state laid out as their weights; copies and shares for pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from many_devices import P

import lorax_fn as lx
from lorax_fn.methods.table import METHODS

LAYOUT = lx.Layout((0,), (2, 1), (3,))  # a stack, two inputs in another order, an output


def same(one, other):
    """Whether two trees hold the same shardings: adapters are equal only where they are one object."""
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.leaves(one) == jax.tree.leaves(
        other
    )


def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))


def weight(shape=(2, 4, 6, 8), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def placed(*spec, on=None):
    return {"w": NamedSharding(mesh() if on is None else on, P(*spec))}


def specs(tree):
    return jax.tree.map(lambda at: at.spec, tree)


def test_a_follows_inputs_b_outputs_and_the_rank_is_whole():
    _, lora = lx.split({"w": weight()}, rank=2, layout={"w": LAYOUT})
    got = specs(lx.shardings(lora, placed("data", "fsdp", None, "tensor")))["w"]
    assert (got.a, got.b) == (P("data", None, "fsdp", None), P("data", None, "tensor"))
    assert type(got) is lx.LoRA and (got.alpha, got.rank, got.layout) == (32.0, 2, LAYOUT)
    short = specs(lx.shardings(lora, placed(None, ("data", "fsdp"))))["w"]
    assert (short.a, short.b) == (P(None, None, ("data", "fsdp"), None), P(None, None, None))


WANT = {
    "lora": dict(a=P("data", None, "fsdp", None), b=P("data", None, "tensor")),
    "lora_fa": dict(a=P("data", None, "fsdp", None), b=P("data", None, "tensor")),
    "dora": dict(a=P("data", None, "fsdp", None), b=P("data", None, "tensor"), magnitude=P("data", "tensor")),
    "loha": dict.fromkeys(("a1", "a2"), P("data", None, "fsdp", None))
    | dict.fromkeys(("b1", "b2"), P("data", None, "tensor")),
    "lokr": dict.fromkeys(("w1", "a", "b"), P("data", None, None)),
    "lora_xs": dict(a=P("data", None, "fsdp", None), b=P("data", None, "tensor"), core=P("data", None, None)),
    "vera": dict(a=P(None, "fsdp", None), b=P(None, "tensor"), d=P("data", None), gain=P("data", "tensor")),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_array_of_every_method_is_where_its_axes_are(method):
    shape = (2, 4, 6, 8)
    _, lora = lx.split({"w": weight(shape)}, rank=2, method=method, layout={"w": LAYOUT})
    adapter = lora["w"]
    for name, axes in adapter.axes().items():  # the sizes say whether the axes are the right ones
        sizes = np.shape(getattr(adapter, name)) if getattr(adapter, name) is not None else ()
        named = [
            (size, shape[axis]) for size, axis in zip(sizes, axes, strict=bool(sizes)) if axis is not None
        ]
        assert all(size == want for size, want in named), name
    got = lx.shardings(lora, placed("data", "fsdp", None, "tensor"))
    for name, spec in WANT[method].items():
        assert getattr(got["w"], name).spec == spec, name


def test_whole_leaves_rows_and_dropout_keys():
    params = {"table": jnp.ones((6, 4)), "bias": jnp.ones(4), "k": {"kernel": jnp.ones((4, 8))}}
    _, lora = lx.split(params, rank=2, full="bias", rows={"table": [1, 4, 5]})
    lora = lx.dropout(lora, 0.5, jax.random.key(0))
    on = mesh()
    at = {"table": ("fsdp", "tensor"), "bias": ("tensor",), "k": {"kernel": ("fsdp", "tensor")}}
    at = jax.tree.map(lambda spec: NamedSharding(on, P(*spec)), at, is_leaf=lambda x: isinstance(x, tuple))
    got = lx.shardings(lora, at)
    assert got["table"].values.spec == P(None, "tensor")
    assert got["bias"].value.spec == P("tensor")
    assert got["k/kernel"].key.spec == P()
    arrays = jax.device_put(params, at)
    assert same(lx.shardings(lora, arrays), got)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    assert same(lx.shardings(lora, abstract), got)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 5))),
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
        lx.optim.loraplus(1e-3),
        optax.adafactor(1e-3, min_dim_size_to_factor=2),
        optax.contrib.muon(1e-3),
    ],
    ids=["adam", "chain", "multisteps", "loraplus", "adafactor", "muon"],
)
def test_the_optimizers_arrays_follow_where_they_have_the_adapters_shape(tx):
    _, lora = lx.split({"w": weight((4, 8)), "b": weight((8,))}, rank=2, method="lora_fa", full="b")
    on = mesh()
    at = {"w": NamedSharding(on, P("fsdp", "tensor")), "b": NamedSharding(on, P("tensor"))}
    state = jax.eval_shape(
        lambda lora: lx.TrainState.create(
            lora=lora, tx=tx, key=jax.random.key(0), extra={"mean": jnp.ones(3)}
        ),
        lora,
    )
    got = lx.shardings(state, at)
    assert same(got.lora, lx.shardings(lora, at))
    assert (got.step.spec, got.key.spec, got.extra["mean"].spec) == (P(), P(), P())
    pairs = list(zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(got.opt_state), strict=True))
    want = {(2, 8): P(None, "tensor"), (8,): P("tensor")}
    assert all(where.spec == P() or where.spec == want[x.shape] for x, where in pairs)
    assert sum(x.shape == (2, 8) for x, _ in pairs) == sum(at.spec == P(None, "tensor") for _, at in pairs)
    assert any(x.ndim for x, _ in pairs)


def _data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_specs_that_can_not_hold_are_all_listed():
    params = {
        "q": {"kernel": weight((6, 10))},
        "k": {"kernel": weight((8, 9))},
        "v": {"kernel": weight((8, 8))},
    }
    _, lora = lx.split(params, rank=2)
    on = mesh()
    at = jax.tree.map(lambda _: NamedSharding(on, P("tensor", ("data", "fsdp"))), params)
    with pytest.raises(lx.LoraError) as caught:
        lx.shardings(lora, at)
    text = str(caught.value)
    assert "path:    k/kernel\n           q/kernel\n" in text
    assert "b: axis 1 of shape (2, 9), size 9, over data=2 * fsdp=2\n" in text and "a multiple of 4" in text
    assert "b: axis 1 of shape (2, 10), size 10" in text and "v/kernel" not in text
    at["v"]["kernel"] = NamedSharding(on, P(None, None, "data"))
    with pytest.raises(lx.LoraError, match=r"v/kernel(.|\n)*for 2 axes"):
        lx.shardings(lora, at)


def test_trees_that_do_not_belong_together_are_refused():
    params = {"w": jnp.ones((4, 8)), "v": {"kernel": jnp.ones((4, 8))}}
    _, lora = lx.split(params, rank=2)
    with pytest.raises(lx.LoraError, match=r"path: +v/kernel\n +w\n(.|\n)*SingleDeviceSharding"):
        lx.shardings(lora, params)
    with pytest.raises(lx.LoraError, match=r"no leaf in params_sh(.|\n)*v/kernel(.|\n)*one of \['w'\]"):
        lx.shardings(lora, placed("fsdp"))
    with pytest.raises(lx.LoraError, match="no adapter to shard"):
        lx.shardings(params, placed())
    other = jax.make_mesh((8,), ("fsdp",))
    with pytest.raises(lx.LoraError, match=r"path: +w\n(.|\n)*another mesh"):
        lx.shardings(lora, {"v": placed()["w"], "w": placed(on=other)["w"]})
    with pytest.raises(lx.LoraError, match=r"\(no leaf\)"):
        lx.shardings({}, {})
    assert lx.shardings({}, placed()) == {}


def test_replicate_and_unreplicate_undo_each_other_and_shard_deals_in_order():
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "n": np.int32(4)}
    copies = lx.replicate(tree)
    assert copies["w"].shape == (8, 2, 3) and copies["key"].shape == (8,)
    assert {s.device for s in copies["w"].addressable_shards} == set(jax.devices())
    back = lx.unreplicate(copies)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(_data(x), _data(y)), back, tree)
    batch = {"x": np.arange(32.0).reshape(16, 2), "y": jnp.arange(16)}
    shares = lx.shard(batch)
    np.testing.assert_array_equal(shares["x"], batch["x"].reshape(8, 2, 2))
    assert shares["y"].addressable_shards[5].data.tolist() == [[10, 11]]
    with pytest.raises(lx.LoraError, match=r"path: +n\n +x\n(.|\n)*\(15, 2\)(.|\n)*multiple of 8"):
        lx.shard({"x": np.ones((15, 2)), "n": 3})
    with pytest.raises(lx.LoraError, match=r"path: +n\n"):
        lx.unreplicate({"n": jnp.ones(())})
