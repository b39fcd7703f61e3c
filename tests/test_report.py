"""The summary tells what is adapted, what it costs, and why the rest is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.report.tables import Skipped, summary
from lorax_fn.splitting.split import split
from lorax_fn.training.masks import mask
from lorax_fn.transform.usage import usage


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


NET = {
    "attn": {"q": {"kernel": shaped(8, 2, 4), "bias": shaped(2, 4)}, "k": {"kernel": shaped(8, 8)}},
    "conv": {"kernel": shaped(3, 4, 8), "bias": shaped(8)},
    "embed": {"embedding": shaped(9, 8)},
    "int": {"kernel": shaped(8, 8, dtype=jnp.int8)},
    "lm_head": {"kernel": shaped(8, 9)},
    "ln": {"scale": shaped(8)},
    "mix": {"kernel": shaped(2, 3, 4)},
}


OPEN = "not among targets, or left open by conventions: no bias says which axes it contracts"


def report():
    return summary(*split(NET, rank=2, targets="q", full="ln", scaling="rslora", alpha=8))


def test_rows_and_totals():
    q, ln = report().rows
    assert (q.path, q.shape, q.method, q.rank, q.alpha, q.trainable) == (
        "attn/q/kernel",
        (8, 2, 4),
        "LoRA",
        2,
        8.0,
        32,
    )
    assert q.scale == pytest.approx(8 / 2**0.5)
    assert (ln.path, ln.method, ln.rank, ln.scale, ln.trainable) == ("ln/scale", "Full", None, None, 8)
    assert report().trainable == 40
    assert report().total == 64 + 8 + 64 + 96 + 8 + 72 + 72 + 8 + 24  # float leaves
    assert report().percent == pytest.approx(100 * 40 / 416)


def test_every_other_leaf_of_two_axes_has_its_reason():
    assert report().skipped == (
        Skipped("attn/k/kernel", (8, 8), "a weight, but not among targets, or excluded"),
        Skipped("attn/q/bias", (2, 4), "by convention, 'bias' names no weight"),
        Skipped("conv/kernel", (3, 4, 8), "convolution"),
        Skipped("embed/embedding", (9, 8), "embedding"),
        Skipped("int/kernel", (8, 8), "not float (int8)"),
        Skipped("lm_head/kernel", (8, 9), "output head by name"),
        Skipped("mix/kernel", (2, 3, 4), OPEN),
    )


def test_text():
    lines = str(report()).splitlines()
    assert lines[0].split() == [
        "path",
        "shape",
        "method",
        "rank",
        "alpha",
        "scale",
        "trainable",
        "total",
        "percent",
    ]
    assert lines[1].split() == ["attn/q/kernel", "(8,", "2,", "4)", "LoRA", "2", "8", "5.65685"] + [
        "32",
        "64",
        "50.000",
    ]
    assert lines[2].split() == ["ln/scale", "(8,)", "Full", "-", "-", "-", "8", "8", "100.000"]
    assert lines[3].split() == ["all", "of", "params", "40", "416", "9.615"]
    assert lines[4] == "not adapted:" and len(lines) == 12
    assert {len(line) for line in lines[:4]} == {len(lines[0])}


def test_html_is_escaped():
    html = summary(*split({"<b>": {"kernel": shaped(8, 6)}}, rank=2))._repr_html_()
    assert "<table>" in html and "&lt;b&gt;/kernel" in html and "<b>" not in html
    assert "not adapted" not in html and "<td>28</td><td>48</td><td>58.333</td>" in html


def test_ranks_along_a_stack_count_no_pads():
    layout = {"w": Layout((0,), (1,), (2,))}
    found = summary(*split({"w": shaped(5, 8, 6)}, rank=[0, 0, 4, 4, 2], alpha=8.0, layout=layout))
    assert found.trainable == 10 * (8 + 6)
    assert found.rows[0].scale == (0.0, 0.0, 2.0, 2.0, 4.0)
    assert "2x0 2x4 1x2" in str(found) and "2x0 2x2 1x4" in str(found)


def test_no_adapters_and_a_wrong_lora():
    params, lora = split({"w": shaped(8, 6)}, rank=2)
    assert str(summary(params, {})).splitlines()[1].split() == ["all", "of", "params", "0", "48", "0.000"]
    assert summary({}, {}).percent == 0.0
    with pytest.raises(LoraError, match=r"(?s)does not fit.*w\n.*no such array"):
        summary({"v": shaped(8, 6)}, lora)


# What it counts and why -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "numbers"), [("lora", 28), ("dora", 34), ("lora_fa", 12), ("lora_xs", 4), ("vera", 8)]
)
def test_what_trains_is_what_the_mask_says(method, numbers):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    params, lora = split({"w": {"kernel": w}}, rank=2, method=method)
    trains = jax.tree.map(lambda x, on: x.size if on else 0, lora, mask(lora))
    assert summary(params, lora).trainable == sum(jax.tree.leaves(trains)) == numbers


def test_reasons_go_by_the_layout_that_split_was_given():
    def fn(params, x):
        return (x @ params["a"]["kernel"]) * jnp.sin(params["b"]["kernel"]).max()

    params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}
    layout = usage(fn, params, jnp.ones((1, 4)))
    _, lora = split(params, rank=2, layout=layout)
    assert summary(params, lora).skipped[0].reason == "a weight, but not among targets, or excluded"
    assert (
        summary(params, lora, layout=layout)
        .skipped[0]
        .reason.startswith("used by sin, reduce_max: no low-rank layout")
    )


def test_what_is_too_small_for_the_rank_is_listed():
    params = {"q": {"kernel": shaped(64, 64)}, "gate": {"kernel": shaped(8, 1)}}
    assert summary(*split(params, rank=16)).skipped == (
        Skipped(
            "gate/kernel",
            (8, 1),
            "too small for the rank of the others: at most 1; or excluded",
        ),
    )
