"""Every verb on quantized leaves, against the same verb on the weights that they stand for; LoftQ."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import meta

import lorax_fn as lx
from lorax_fn.core.stored import by_entry
from lorax_fn.methods.table import METHODS

LAYOUT = {"l/kernel": lx.Layout((0,), (1,), (2,)), "q/kernel": lx.Layout((), (0,), (1,))}


def tree(getkey):
    return {
        "l": {"kernel": jax.random.normal(getkey(), (2, 64, 8)).astype(jnp.bfloat16)},
        "q": {"kernel": jax.random.normal(getkey(), (64, 8)), "bias": jnp.zeros(8)},
    }


def moved(lora):
    """Adapters that change something: every number that trains is off its start."""
    mask = lx.mask(lora)
    return jax.tree.map(lambda x, m: x + 0.1 if m else x, lora, mask)


def assert_close(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        tol = 1e-2 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def both():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    q = lx.quantize(tree(lambda: next(keys)), layout=LAYOUT)
    return q, lx.dequantize(q)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_split_and_merge_as_on_the_weights_themselves(both, method):
    q, plain = both
    rank = {"lokr": 2}.get(method, 4)
    frozen, lora = lx.split(q, rank=rank, method=method, layout=LAYOUT)
    assert frozen is q
    assert_close(lora, lx.split(plain, rank=rank, method=method, layout=LAYOUT)[1])
    lora = moved(lora)
    merged = lx.merge(q, lora)
    assert_close(merged, lx.merge(plain, lora))
    assert merged["q"]["bias"] is q["q"]["bias"]


def test_whole_leaves_and_rows_start_from_the_dense_weight(both):
    q, plain = both
    _, lora = lx.split(q, targets=(), full="l", rows={"q/kernel": [3, 5]}, layout=LAYOUT)
    np.testing.assert_array_equal(lora["l/kernel"].value, plain["l"]["kernel"].astype(jnp.float32))
    np.testing.assert_array_equal(lora["q/kernel"].values, plain["q"]["kernel"][np.array([3, 5])])
    assert_close(lx.merge(q, lora), plain)


def test_merge_without_adapters_gives_arrays_of_the_dtype_asked(both):
    q, plain = both
    assert_close(lx.merge(q, {}), plain)
    assert lx.merge(q, {}, dtype=jnp.float16)["l"]["kernel"].dtype == jnp.float16


def test_requantize_keeps_the_format_and_reports_the_error(both, caplog):
    q, plain = both
    _, lora = lx.split(q, rank=4, targets="q", layout=LAYOUT)
    lora = moved(lora)
    with caplog.at_level(logging.WARNING, "lorax_fn"):
        merged = lx.merge(q, lora, requantize=True)
    new, want = merged["q"]["kernel"], lx.merge(plain, lora)["q"]["kernel"]
    assert merged["l"]["kernel"] is q["l"]["kernel"]
    assert jax.tree.structure(new) == jax.tree.structure(q["q"]["kernel"])
    again = lx.quantize({"kernel": want})["kernel"]
    assert np.mean(np.asarray(new.codes != again.codes)) < 0.01

    def share(x):
        return float(jnp.linalg.norm(x) / jnp.linalg.norm(want))

    line = f"q/kernel: {share(new.dense() - want):.3%}, {share(want - plain['q']['kernel']):.3%}"
    assert [line in record.getMessage() for record in caplog.records] == [True]
    with caplog.at_level(logging.WARNING, "lorax_fn"):
        jax.eval_shape(lambda q, lora: lx.merge(q, lora, requantize=True), q, lora)  # no numbers: no report
    assert len(caplog.records) == 1


def test_summary_shows_format_and_bytes(both):
    q, plain = both
    _, lora = lx.split(q, rank=2, targets="q", layout=LAYOUT)
    table = lx.summary(q, lora)
    row, skipped = table.rows[0], {s.path: s for s in table.skipped}
    assert (row.format, row.nbytes) == ("nf4", q["q"]["kernel"].nbytes) and row.nbytes == 256 + 8 + 4 + 4
    assert (skipped["l/kernel"].format, skipped["l/kernel"].nbytes) == ("nf4", q["l"]["kernel"].nbytes)
    assert table.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    assert "stored" in str(table) and f"(nf4, {q['l']['kernel'].nbytes:,} bytes)" in str(table)
    assert "stored" not in str(lx.summary(plain, lora)) and table.total == lx.summary(plain, lora).total


def test_abstract_leaves_are_planned(both):
    q, _ = both
    abstract = jax.eval_shape(lambda: q)
    for options in ({"method": "dora"}, {"targets": (), "full": "q"}, {"targets": (), "rows": {"q": [1]}}):
        frozen, lora = lx.split(abstract, rank=2, layout=LAYOUT, **options)
        concrete = lx.split(q, rank=2, layout=LAYOUT, **options)[1]
        assert frozen is abstract and jax.tree.structure(lora) == jax.tree.structure(concrete)
        assert lx.merge(frozen, lora)["q"]["kernel"].shape == (64, 8)
        again = lx.merge(frozen, lora, requantize=True)["q"]["kernel"]
        assert again.codes == abstract["q"]["kernel"].codes
        assert lx.summary(frozen, lora).nbytes == lx.summary(q, concrete).nbytes


@pytest.mark.parametrize("init", ["pissa", "pissa:2", "olora", "loftq", lx.inits.loftq("int4")])
def test_inits_that_take_a_part_of_w_refuse_rounded_weights(both, init):
    with pytest.raises(lx.LoraError, match=r"l/kernel\n +q/kernel[^$]*float weights for init="):
        lx.split(both[0], rank=2, layout=LAYOUT, init=init)


def test_to_plain_tells_rounding_from_rank(both, getkey):
    q, _ = both
    frozen, lora = lx.split(q, rank=2, layout=LAYOUT)
    assert lx.ranks.to_plain(q, frozen, lora) == lora
    copy = jax.tree.map(jnp.copy, q)
    assert lx.ranks.to_plain(copy, frozen, lora)["q/kernel"] is lora["q/kernel"]
    params = tree(getkey)
    rounded, lora = lx.split(params, rank=2, layout=LAYOUT, init="loftq:1")
    with pytest.raises(lx.LoraError, match=r"quantized after[^$]*l/kernel\n +q/kernel"):
        lx.ranks.to_plain(params, rounded, lora)


def test_one_stack_entry_is_dense_at_a_time(both):
    w = both[0]["l"]["kernel"]
    seen = []

    def norm(w, layout):
        seen.append((w.shape, layout))
        return jnp.abs(w.astype(jnp.float32)).sum(0)

    sums = by_entry(norm, w, LAYOUT["l/kernel"])
    assert seen == [((64, 8), lx.Layout((), (0,), (1,)))]
    np.testing.assert_allclose(sums, jnp.abs(w.dense().astype(jnp.float32)).sum(1), rtol=1e-5)


# Containers -------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(64, 8, rngs=rngs)


def test_containers_stay():
    state = nnx.state(Linear(nnx.Rngs(0)))
    boxed = {"kernel": meta.Partitioned(jnp.ones((64, 8)), names=("in", "out"))}
    module = eqx.nn.Linear(64, 8, key=jax.random.key(0))
    for params, get in (
        (state, lambda p: p["layer"]["kernel"].get_value()),
        (boxed, lambda p: p["kernel"].value),
        (module, lambda p: p.weight),
    ):
        q = lx.quantize(params)
        assert type(q) is type(params) and isinstance(get(q), lx.Quantized)
        assert jax.tree.structure(lx.dequantize(q)) == jax.tree.structure(params)
        frozen, lora = lx.split(q, rank=2)
        np.testing.assert_array_equal(get(lx.merge(frozen, lora)), get(q).dense())


# LoftQ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loftq_starts_nearer_and_nearer_than_rounding_alone(getkey, format):
    params = tree(getkey)
    plain = lx.dequantize(lx.quantize(params, format, layout=LAYOUT))

    def errors(found):
        pairs = [(found[k]["kernel"], params[k]["kernel"]) for k in ("l", "q")]
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
        return np.array([float(jnp.linalg.norm(a - b)) for a, b in wide])

    last = errors(plain)
    for turns in (1, 3):
        init = lx.inits.loftq(format, iterations=turns)
        frozen, lora = lx.split(params, rank=4, alpha=2.0, layout=LAYOUT, init=init)
        assert frozen["l"]["kernel"].format == format and frozen["l"]["kernel"].dtype == jnp.bfloat16
        now = errors(lx.merge(frozen, lora, dtype=jnp.float32))
        assert (now < last).all()
        last = now
    assert (now < 0.9 * errors(plain)).all()


def test_loftq_lowers_the_loss_of_the_first_step(getkey):
    w = {"kernel": jax.random.normal(getkey(), (64, 32)) / 8}
    x = jax.random.normal(getkey(), (128, 64))
    apply = lx.adapt(lambda params, x: x @ params["kernel"])

    def loss(params, lora):
        return float(jnp.mean(jnp.square(apply(params, lora, x) - x @ w["kernel"])))

    loft, plain = loss(*lx.split(w, rank=8, init="loftq")), loss(*lx.split(lx.quantize(w), rank=8))
    assert loft < 0.6 * plain


def test_loftq_is_planned_on_shapes_and_refuses_what_it_cannot(getkey):
    params = tree(getkey)
    frozen, lora = lx.split(
        jax.eval_shape(lambda: params), rank=(2, 0), targets="l", layout=LAYOUT, init="loftq:1"
    )
    concrete, adapters = lx.split(params, rank=(2, 0), targets="l", layout=LAYOUT, init="loftq:1")
    assert jax.tree.structure((frozen, lora)) == jax.tree.structure((concrete, adapters))
    assert not adapters["l/kernel"].a[1].any() and frozen["l"]["kernel"].codes.shape == (2, 32, 8)
    with pytest.raises(lx.LoraError, match="alpha above 0"):
        lx.split(params, rank=2, alpha=0.0, layout=LAYOUT, init="loftq")
    with pytest.raises(lx.LoraError, match="unknown format"):
        lx.inits.loftq("fp4")
    for turns in (0, True, 1.0):
        with pytest.raises(lx.LoraError, match="iterations are not a count"):
            lx.inits.loftq(iterations=turns)
    with pytest.raises(lx.LoraError, match="unknown init"):
        lx.split(params, rank=2, layout=LAYOUT, init="loftq:0")


def test_a_quantized_weight_keeps_the_layout_that_it_was_quantized_by():
    """Names that no convention knows, and an (out, in) weight: `split` needs to be told nothing again."""
    layout = {"0": lx.Layout((), (1,), (0,)), "1": lx.Layout((0,), (2,), (1,))}
    params = lx.quantize(
        [jnp.ones((6, 8)), jnp.ones((3, 6, 8))], "int8", block=4, layout=layout, targets=("0", "1")
    )
    _, lora = lx.split(params, rank=2)
    assert {path: adapter.layout for path, adapter in lora.items()} == layout
