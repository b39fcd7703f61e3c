"""Laws of split, merge and delta, the published counts, and every message for bad input."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.whole import Full
from lorax_fn.report.tables import summary
from lorax_fn.splitting.merge import delta, merge
from lorax_fn.splitting.split import split


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def small_net():
    return {
        "a": {"kernel": normal(0, 8, 6), "bias": normal(1, 6)},
        "b": {"kernel": normal(2, 6, 4)},
        "count": jnp.int32(3),
        "key": jax.random.key(7),
        "table": np.ones((5, 8), np.float32),
        "name": "a leaf that is no array",
    }


def trained(lora, seed=5):
    """The same adapters with B filled, as training would."""
    return {
        path: LoRA(ad.a, normal(seed, *ad.b.shape), ad.alpha, ad.rank, ad.scaling, ad.layout)
        for path, ad in lora.items()
    }


# Laws -------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def weights(draw):
    """A layout with its axes in any order, a shape, and a rank that fits."""
    counts = [draw(st.integers(low, 2)) for low in (0, 1, 1)]
    ndim = sum(counts)
    order = draw(st.permutations(range(ndim)))
    s, i = counts[0], counts[0] + counts[1]
    layout = Layout(order[:s], order[s:i], order[i:])
    shape = tuple(draw(SIZES) for _ in range(ndim))
    _, n, m = layout.shapes(shape)
    return layout, shape, draw(st.integers(1, min(math.prod(n), math.prod(m))))


@settings(max_examples=10)  # each one compiles
@given(weights(), st.sampled_from(["lora", "rslora"]), st.sampled_from([0.0, 0.5, 32.0]))
def test_merge_adds_the_scaled_product_on_the_weights_own_axes(weight, scaling, alpha):
    layout, shape, rank = weight
    w = normal(0, *shape)
    params, lora = split({"w": w}, rank, alpha=alpha, scaling=scaling, layout={"w": layout})
    stack, n, m = layout.shapes(shape)
    assert lora["w"].a.shape == (*stack, *n, rank) and lora["w"].b.shape == (*stack, rank, *m)
    np.testing.assert_array_equal(merge(params, lora)["w"], w)
    lora = trained(lora)
    letters = "abcdefgh"[: len(shape)]
    s, i, o = ("".join(letters[k] for k in axes) for axes in (layout.stack, layout.inputs, layout.outputs))
    a, b = np.asarray(lora["w"].a, np.float64), np.asarray(lora["w"].b, np.float64)
    dw = (
        np.einsum(f"{s}{i}r,{s}r{o}->{letters}", a, b)
        * alpha
        / (rank if scaling == "lora" else math.sqrt(rank))
    )
    np.testing.assert_allclose(delta(lora)["w"], dw, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merge(params, lora)["w"], np.asarray(w) + dw, rtol=1e-5, atol=1e-5)


@settings(max_examples=6)
@given(weights())
def test_abstract_and_traced_splits_agree_with_the_eager_one(weight):
    layout, shape, rank = weight
    options = {"rank": rank, "layout": {"w": layout}}
    _, eager = split({"w": jnp.ones(shape)}, **options)
    _, abstract = split({"w": shaped(*shape)}, **options)
    _, traced = jax.eval_shape(lambda params: split(params, **options), {"w": shaped(*shape)})
    assert jax.tree.structure(eager) == jax.tree.structure(abstract) == jax.tree.structure(traced)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(traced)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(eager)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(abstract)
    ]


def test_split_returns_the_very_tree_and_merge_the_very_leaves():
    net = small_net()
    params, lora = split(net, rank=2)
    assert params is net
    assert list(lora) == ["a/kernel", "b/kernel"]
    merged = merge(params, trained(lora))
    assert jax.tree.structure(merged) == jax.tree.structure(net)
    assert merged["a"]["bias"] is net["a"]["bias"] and merged["table"] is net["table"]
    assert merged["key"] is net["key"] and merged["count"] is net["count"] and merged["name"] is net["name"]
    assert merged["a"]["kernel"] is not net["a"]["kernel"]
    assert merge(params, {}) is params
    part = merge(params, {path: ad for path, ad in trained(lora).items() if path == "b/kernel"})
    assert part["a"]["kernel"] is net["a"]["kernel"]


def test_split_under_jit_equals_split():
    net = {"a": {"kernel": normal(0, 8, 6)}}
    _, traced = jax.jit(lambda params: split(params, rank=2))(net)
    _, eager = split(net, rank=2)
    np.testing.assert_allclose(traced["a/kernel"].a, eager["a/kernel"].a, rtol=1e-6)


def test_values_do_not_depend_on_other_targets_nor_on_the_process():
    net = small_net()
    _, one = split(net, rank=2, targets="b")
    _, two = split(net, rank={"a": 4, "*": 2})
    np.testing.assert_array_equal(one["b/kernel"].a, two["b/kernel"].a)
    key = jax.random.fold_in(jax.random.key(0), np.uint32(zlib.crc32(b"b/kernel")))
    bound = 1 / math.sqrt(6)
    np.testing.assert_array_equal(
        one["b/kernel"].a, jax.random.uniform(key, (6, 2), jnp.float32, -bound, bound)
    )
    _, other = split(net, rank=2, targets="b", key=jax.random.key(1))
    assert not np.array_equal(one["b/kernel"].a, other["b/kernel"].a)


def test_kaiming_fills_its_bound_and_stack_entries_differ():
    layout = {"w": Layout((0,), (1, 2), (3,))}
    _, lora = split({"w": jnp.ones((3, 16, 4, 9))}, rank=8, layout=layout)
    a = np.asarray(lora["w"].a)
    assert a.shape == (3, 16, 4, 8) and 0.122 < abs(a).max() <= 0.125
    assert abs(a.mean()) < 0.01 and abs(a.std() - 0.125 / math.sqrt(3)) < 0.003
    assert not np.array_equal(a[0], a[1])
    assert not lora["w"].b.any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "zero_a"])
def test_every_init_starts_as_the_base_model(init):
    net = {"a": {"kernel": normal(0, 8, 6)}}
    params, lora = split(net, rank=3, init=init, dtype=jnp.bfloat16)
    adapter = lora["a/kernel"]
    assert adapter.a.dtype == adapter.b.dtype == jnp.bfloat16
    assert adapter.a.any() != adapter.b.any()
    np.testing.assert_array_equal(merge(params, lora)["a"]["kernel"], net["a"]["kernel"])


def test_merge_accumulates_in_float32_and_casts_once():
    w = normal(0, 8, 6, dtype=jnp.bfloat16)
    params, lora = split({"w": w}, rank=2)
    lora = trained(lora)
    exact = np.asarray(w, np.float32) + np.asarray(delta(lora)["w"])
    assert merge(params, lora)["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merge(params, lora)["w"], jnp.asarray(exact, jnp.bfloat16))
    np.testing.assert_allclose(merge(params, lora, dtype=jnp.float32)["w"], exact, rtol=1e-6)
    assert merge({"w": shaped(8, 6)}, lora, dtype=jnp.bfloat16)["w"] == shaped(8, 6, dtype=jnp.bfloat16)


def test_numpy_weights_are_weights():
    w = np.ones((8, 6), np.float32)
    params, lora = split({"w": w}, rank=2)
    assert params["w"] is w
    np.testing.assert_allclose(merge(params, trained(lora))["w"], w + delta(trained(lora))["w"], rtol=1e-6)


def test_full_is_a_copy_in_dtype_and_merges_back():
    net = small_net() | {"scale": normal(3, 4, dtype=jnp.bfloat16)}
    params, lora = split(net, rank=2, full=["bias", "scale", "table"])
    assert lora["scale"].value.dtype == jnp.float32
    pointers = lora["a/bias"].value.unsafe_buffer_pointer(), net["a"]["bias"].unsafe_buffer_pointer()
    assert pointers[0] != pointers[1]
    np.testing.assert_array_equal(lora["a/bias"].value, net["a"]["bias"])
    lora = lora | {"scale": Full(lora["scale"].value + 1.0)}
    merged = merge(params, lora)["scale"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, (net["scale"].astype(jnp.float32) + 1.0).astype(jnp.bfloat16))
    assert "scale" not in delta(lora) and "a/kernel" in delta(lora)
    _, abstract = split({"w": shaped(8, 6), "b": shaped(6)}, rank=2, full="b")
    assert abstract["b"].value == shaped(6)


# rank, alpha, scaling ---------------------------------------------------------------------------------


def test_mappings_first_match_wins():
    net = {
        "enc": {"q": {"kernel": shaped(8, 8)}, "k": {"kernel": shaped(8, 8)}},
        "dec": {"kernel": shaped(8, 8)},
    }
    _, lora = split(
        net,
        rank={"enc/q": 2, "enc": np.int64(4), "*": 6},
        alpha={"dec": lambda rank: 2 * rank, "*": 8},
        scaling={"enc": "rslora", "*": "lora"},
    )
    assert {path: ad.rank for path, ad in lora.items()} == {
        "enc/q/kernel": 2, "enc/k/kernel": 4, "dec/kernel": 6,
    }  # fmt: skip
    assert [lora[f"{name}/kernel"].scale for name in ("enc/k", "dec")] == [4.0, 2.0]
    assert lora["enc/q/kernel"].scale == 8 / math.sqrt(2)
    assert lora["enc/q/kernel"].a.shape == (8, 2)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "zero_a"])
def test_a_rank_for_each_stack_entry(init):
    layout = {"w": Layout((0,), (1,), (2,))}
    ranks = [0, 1, 3, 2]
    params, lora = split({"w": normal(0, 4, 5, 6)}, rank=ranks, alpha=6.0, init=init, layout=layout)
    adapter = lora["w"]
    assert adapter.rank == (0, 1, 3, 2) and adapter.a.shape == (4, 5, 3) and adapter.b.shape == (4, 3, 6)
    np.testing.assert_allclose(adapter.scale, [0.0, 6.0, 2.0, 3.0])
    filled = adapter.b if init == "zero_a" else adapter.a
    for layer, rank in enumerate(ranks):
        assert not adapter.a[layer, :, rank:].any() and not adapter.b[layer, rank:].any()
        entry = filled[layer, :rank] if init == "zero_a" else filled[layer, :, :rank]
        assert np.all(np.asarray(entry) != 0)
    dw = delta(trained(lora))["w"]
    assert not dw[0].any()
    b = trained(lora)["w"].b
    np.testing.assert_allclose(dw[2], 2.0 * adapter.a[2] @ b[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merge(params, lora)["w"], params["w"])


def test_alpha_as_a_function_of_ranks_that_differ():
    layout = {"w": Layout((0, 1), (2,), (3,))}
    _, lora = split({"w": shaped(2, 2, 8, 8)}, rank=(0, 1, 2, 4), alpha=lambda rank: 3 * rank, layout=layout)
    assert lora["w"].alpha == (0.0, 3.0, 6.0, 12.0)
    np.testing.assert_allclose(lora["w"].scale, [[0.0, 3.0], [3.0, 3.0]])


# Published counts, on shapes alone ---------------------------------------------------------------------


def llama_7b():
    linear = {name: (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    linear |= {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
    layer = {name: {"kernel": shaped(*shape)} for name, shape in linear.items()}
    layer |= {"input_norm": {"scale": shaped(4096)}}
    layers = {f"layers_{i}": layer for i in range(32)}
    ends = {"embed": {"embedding": shaped(32000, 4096)}, "lm_head": {"kernel": shaped(4096, 32000)}}
    return {"params": layers | ends}


def test_llama_7b_rank_16_on_all_linear_weights():
    params, lora = split(llama_7b(), rank=16)
    assert len(lora) == 224
    assert summary(params, lora).trainable == 39_976_960


def test_gpt3_rank_4_on_query_and_value():
    def heads(*shape):
        return {"kernel": shaped(96, *shape), "bias": shaped(96, *shape[1:])}

    attention = {name: heads(12288, 96, 128) for name in ("q", "k", "v")}
    net = {"attn": attention, "mlp": heads(12288, 49152)}
    params, lora = split(net, rank=4, targets=["q", "v"])
    assert sorted(lora) == ["attn/q/kernel", "attn/v/kernel"]
    assert summary(params, lora).trainable == 18_874_368


# Bad input --------------------------------------------------------------------------------------------

TWO = {"a": {"kernel": shaped(8, 6)}, "b": {"kernel": shaped(3, 40)}}
STACKED = {"w": Layout((0,), (1,), (2,))}
BOTH = r"(?s)a/kernel\n +b/kernel\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, BOTH + r".*rank=0.*an int of 1 or more"),
        ({"rank": -4}, BOTH + r".*rank=-4"),
        ({"rank": 2.5}, BOTH + r".*rank=2\.5.*an int of 1"),
        ({"rank": True}, BOTH + r".*rank=True"),
        ({"rank": "16"}, BOTH + r".*rank='16'"),
        ({"rank": {"a": 4, "*": 2.5}}, r"(?s)path: +b/kernel\n +got: +rank=2\.5"),
        ({"rank": [1, 2]}, BOTH + r".*not stacked"),
        ({"rank": 7}, BOTH + r".*\(8, 6\).*\(3, 40\).*at most 6.*at most 3"),
        ({"rank": 7}, r"rank=\{'a/kernel': 6, 'b/kernel': 3, '\*': 7\}"),
        ({"rank": 5, "targets": ["a", "b"]}, r"(?s)path: +b/kernel\n.*rank=\{'b/kernel': 3, '\*': 5\}"),
        ({"rank": {"b": 5, "*": 2}}, r"rank=\{'b/kernel': 3, '\*': 2\}"),
        ({"rank": {"a": 4}}, r"(?s)rank= has no key for these targets.*b/kernel.*'\*': 16"),
        ({"rank": {"c": 4, "*": 1}}, r"(?s)rank= matches nothing.*got: +c"),
        ({"alpha": math.nan}, BOTH + r".*alpha=nan.*finite"),
        ({"alpha": math.inf}, BOTH + r".*alpha=inf"),
        ({"alpha": "8"}, BOTH + r".*alpha='8'"),
        ({"alpha": True}, BOTH + r".*alpha=True"),
        ({"alpha": None}, BOTH + r".*alpha=None"),
        ({"alpha": lambda rank: math.nan}, BOTH + r".*alpha=nan"),
        ({"method": "lara"}, BOTH + r".*'lara'.*'lora', 'lora_fa'.*method='lora'"),
        ({"init": "kaming"}, BOTH + r".*'kaming'.*'kaiming', 'loftq'.*'orthogonal', 'pissa'.*init='kaiming'"),
        ({"scaling": {"a": "lora", "*": "rs"}}, r"(?s)unknown scaling.*path: +b/kernel\n.*'rs'.*'rslora'"),
        ({"rows": [1]}, r"rows= is not a mapping"),
        ({"rows": {"c": [1]}}, r"rows= matches nothing"),
        ({"rows": {"a": [1]}}, r"(?s)also adapted or trained whole.*path: +a/kernel"),
        ({"rows": {"a": [8], "b": [-1]}}, BOTH + r".*0 to 7, not \[8\].*0 to 2, not \[-1\]"),
        ({"rows": {"a": [1, 2, 1]}}, r"(?s)path: +a/kernel\n.*each id once: \[1\] repeat"),
        ({"rows": {"a": [], "b": 3.0}}, BOTH + r".*one or more ints"),
        ({"method": {"a": "lokr", "*": "lora"}, "rank": {"a": 4, "*": 2}}, r"(?s)path: +a/kernel.*at most 3"),
        ({"method": {"b": "lokr", "*": "lora"}, "rank": 1}, r"(?s)path: +b/kernel\n.*divisor.*, not \[3\]"),
        ({"dtype": jnp.int8}, "float dtype"),
        ({"key": 0}, r"(?s)key= is not a single PRNG key.*got: +0.*jax\.random\.key\(0\)"),
    ],
)  # fmt: skip
def test_bad_options_name_every_path_and_a_remedy(options, message):
    with pytest.raises(LoraError, match=message):
        split(TWO, **({"rank": 2} | options))


def test_the_remedy_can_be_pasted():
    for rank in (7, {"a/kernel": 9, "*": 5}):
        with pytest.raises(LoraError) as caught:
            split(TWO, rank=rank)
        remedy = eval(str(caught.value).split("rank=")[-1])  # noqa: S307
        assert {path: ad.rank for path, ad in split(TWO, rank=remedy)[1].items()} == {
            "a/kernel": 6,
            "b/kernel": 3,
        }


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2], r"4 ints, one per stack entry, not 2"),
        ([1, 2, 3, -1], "ints of 0"),
        ([1, 2, 3, 2.5], "ints of 0"),
        ([0, 0, 0, 0], r"one entry above 0.*exclude="),
        ([1, 2, 3, 9], r"(?s)larger.*at most 5.*rank=\{'w': \(1, 2, 3, 5\), '\*': \(1, 2, 3, 9\)\}"),
    ],
)  # fmt: skip
def test_bad_rank_sequences(ranks, message):
    with pytest.raises(LoraError, match=message):
        split({"w": shaped(4, 5, 6)}, rank=ranks, layout=STACKED)


def test_nothing_is_built_before_every_check(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda *args: pytest.fail("built too early"))
    with pytest.raises(LoraError):
        split(
            {"a": {"kernel": jnp.ones((8, 6))}, "b": {"kernel": jnp.ones((3, 40))}},
            rank=4,
            targets=["a", "b"],
        )


def test_merge_of_a_wrong_lora_lists_everything_and_gives_nothing(monkeypatch):
    params, lora = split(small_net(), rank=2)
    wrong = {"a/kernel": lora["b/kernel"], "c/kernel": lora["a/kernel"], "count": Full(jnp.ones(()))}
    wrong["b/kernel"] = LoRA(
        *(getattr(lora["b/kernel"], name) for name in ("a", "b", "alpha", "rank", "scaling", "layout")),
        key=jax.random.key(0), rate=0.1,
    )  # fmt: skip
    monkeypatch.setattr(LoRA, "weight", lambda *args: pytest.fail("merged too early"))
    paths, reasons = (
        r"a/kernel\n.*c/kernel\n.*count\n.*b/kernel\n",
        r"shape \(8, 6\).*no such array.*int32.*dropout",
    )
    message = rf"(?s)does not fit.*{paths}.*{reasons}"
    with pytest.raises(LoraError, match=message):
        merge(params, wrong)
    with pytest.raises(LoraError, match=r"(?s)under dropout.*b/kernel"):
        delta(wrong)


@pytest.mark.parametrize("verb", [lambda lora: merge(small_net(), lora), delta])
def test_what_is_no_lora_is_refused(verb):
    with pytest.raises(LoraError, match=r"(?s)not a dict of adapters.*got: +list"):
        verb([1])
    with pytest.raises(LoraError, match=r"(?s)not a dict of adapters.*a: dict.*params, lora = lx\.split"):
        verb({"a": {"kernel": jnp.ones(2)}})
