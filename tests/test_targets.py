"""Patterns name the leaves they should, layouts are taken as given, and wrong requests say what to do."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_fn.core.errors import LoraError
from lorax_fn.core.fitting import check_fits, misfits
from lorax_fn.core.layouts import Layout, WeightUse
from lorax_fn.splitting.split import split
from lorax_fn.targets.patterns import matches
from lorax_fn.targets.roles import classify


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def adapted(params, **options):
    return sorted(split(params, rank=1, **options)[1])


# Patterns ---------------------------------------------------------------------------------------------

PATH = "params/layer_1/attn/q/kernel"


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("attn/q", PATH, True),
        ("attn.q", PATH, True),
        ("q", PATH, True),
        ("layer_*", PATH, True),
        ("layer_1", PATH, True),
        ("layer_1", PATH.replace("layer_1", "layer_10"), False),
        ("params/*/kernel", PATH, True),
        ("params/*", PATH, True),
        ("*", PATH, True),
        ("*kernel", PATH, True),
        ("layer_[0-3]/attn", PATH, True),
        ("layer_[4-7]/attn", PATH, False),
        ("attn/kernel", PATH, False),
        ("att", PATH, False),
        ("ATTN", PATH, False),
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.0.*.q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers/0/self_attn", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.1", "model.layers.10.self_attn.q_proj.weight", False),
        (re.compile(r".*/(q|v)/kernel"), PATH, True),
        (re.compile(r"(q|v)/kernel"), PATH, False),
        (lambda path, leaf: path.endswith("kernel"), PATH, True),
        ("*", "", True),
    ],
)
def test_patterns(pattern, path, expected):
    assert matches(pattern, path, None) is expected


@given(st.lists(st.text("ab_01", min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_every_run_of_whole_components_matches_and_no_part_of_one_does(parts, data):
    start = data.draw(st.integers(0, len(parts) - 1))
    end = data.draw(st.integers(start + 1, len(parts)))
    path = "/".join(parts)
    assert matches("/".join(parts[start:end]), path)
    assert matches(".".join(parts[start:end]), path)
    assert not matches("/".join(parts[start:end]) + "x", path)


def test_a_pattern_of_another_type_is_refused():
    with pytest.raises(LoraError, match=r"(?s)unknown type.*got: +3.*attn/q"):
        matches(3, PATH)


# layout= ----------------------------------------------------------------------------------------------


def use(path, shape, ops, layout, source=()):
    return WeightUse(path, shape, jnp.float32, ops, layout, 1, 0, layout is not None, source)


def test_a_usage_needs_no_convention():
    plain, swapped = Layout((), (0,), (1,)), Layout((), (1,), (0,))
    params = {
        "q": shaped(8, 6), "t": shaped(6, 8), "moe": shaped(4, 8, 6), "conv": shaped(3, 8, 6),
        "table": shaped(9, 8), "tied": shaped(9, 8), "embedding": shaped(9, 8), "lm_head": shaped(8, 9),
        "norm": {"kernel": shaped(3, 8)}, "unused": shaped(2, 2),
    }  # fmt: skip
    usage = {
        u.path: u
        for u in [
            use("q", (8, 6), ("dot_general",), plain),
            use("t", (6, 8), ("dot_general",), swapped),
            use("moe", (4, 8, 6), ("ragged_dot_general",), Layout((0,), (1,), (2,))),
            use("table", (9, 8), ("gather",), plain),
            use("tied", (9, 8), ("gather", "dot_general"), plain),
            use("conv", (3, 8, 6), ("conv_general_dilated",), Layout((), (0, 1), (2,))),
            use("norm/kernel", (3, 8), ("mul",), None, ("mul at model.py:7",)),
            use("lm_head", (8, 9), ("dot_general",), plain),
            use("embedding", (9, 8), ("dot_general",), plain),
        ]
    }
    assert adapted(params, layout=usage) == ["moe", "q", "t"]
    _, lora = split(params, rank=2, layout=usage)
    assert (lora["t"].a.shape, lora["t"].b.shape) == ((8, 2), (2, 6))
    assert (lora["moe"].a.shape, lora["moe"].b.shape) == ((4, 8, 2), (4, 2, 6))
    named = adapted(params, layout=usage, targets=["table", "tied", "conv", "lm_head", "embedding"])
    assert named == ["conv", "embedding", "lm_head", "table", "tied"]
    with pytest.raises(LoraError, match=r"(?s)cannot be adapted.*norm/kernel.*mul at model\.py:7"):
        split(params, rank=1, layout=usage, targets=["norm", "q"])
    with pytest.raises(LoraError, match=r"(?s)names no weight: unused.*not used by the traced function"):
        split(params, rank=1, layout=usage, targets="unused")
    assert classify(params, usage)["tied"].reason == "embedding, also used for logits"


def test_a_usage_of_another_model_raises_for_every_leaf():
    usage = {"q": use("q", (9, 6), ("dot_general",), None), "z": use("z", (1, 1), (), None)}
    with pytest.raises(LoraError, match=r"(?s)other params.*q\n.*z\n.*\(8, 6\)\n.*missing.*\(9, 6\)"):
        split({"q": shaped(8, 6)}, layout=usage)


def test_stated_layouts_override_and_conventions_serve_the_rest():
    attn = {"q": {"kernel": shaped(8, 2, 4), "bias": shaped(2, 4)}, "k": {"kernel": shaped(8, 2, 4)}}
    params = {"attn": attn, "wq": shaped(5, 6), "lm_head": {"kernel": shaped(2, 3, 4)}}
    layout = {
        "attn": Layout((), (0,), (1, 2)),
        "wq": Layout((), (1,), (0,)),
        "lm_head": Layout((0,), (1,), (2,)),
    }
    _, lora = split(params, rank=2, layout=layout)
    assert sorted(lora) == ["attn/k/kernel", "attn/q/kernel", "wq"]
    assert lora["wq"].a.shape == (6, 2)
    assert adapted(params, layout=layout, targets="lm_head") == ["lm_head/kernel"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"kernal": Layout((), (0,), (1,))}, r"(?s)layout= matches nothing.*got: +kernal.*q/kernel"),
        ({"q": Layout((), (0,), ())}, r"(?s)not a partition.*q/kernel.*\(8, 6\)"),
        ({"q": Layout((0,), (0,), (1,))}, "not a partition"),
        ({"q": Layout((), (0,), (-1,))}, "not a partition"),
        ({"q": (0, 1)}, r"(?s)has a value that is not a Layout.*q: \(0, 1\)"),
        (Layout((), (0,), (1,)), "is not a mapping"),
    ],
)
def test_wrong_layouts(layout, message):
    with pytest.raises(LoraError, match=message):
        split({"q": {"kernel": shaped(8, 6)}}, rank=1, layout=layout)


# What was asked for -----------------------------------------------------------------------------------

NET = {
    "enc": {"q": {"kernel": shaped(8, 8), "bias": shaped(8)}, "norm": {"scale": shaped(3, 8)}},
    "dec": {"q": {"kernel": shaped(8, 8), "bias": shaped(8)}},
    "step": shaped(dtype=jnp.int32),
    "quant": {"kernel": shaped(8, 8, dtype=jnp.int8)},
}


def test_exclude_wins_over_targets_and_full_over_both():
    assert adapted(NET, targets="q", exclude="dec") == ["enc/q/kernel"]
    _, lora = split(NET, rank=1, targets="q", exclude="dec", full=["dec/q/kernel", "bias"])
    kinds = {path: type(adapter).__name__ for path, adapter in lora.items()}
    assert kinds == {
        "enc/q/kernel": "LoRA", "enc/q/bias": "Full", "dec/q/kernel": "Full", "dec/q/bias": "Full",
    }  # fmt: skip


@pytest.mark.parametrize("argument", ["targets", "exclude", "full"])
def test_a_pattern_that_matches_nothing_raises_with_the_nearest_paths(argument):
    with pytest.raises(LoraError, match=rf"(?s){argument}= matches nothing.*enc/kernal.*nearest: .*enc"):
        split(NET, rank=1, **{argument: ["q", "enc/kernal"]})


def test_every_lost_pattern_is_listed():
    with pytest.raises(LoraError, match=r"(?s)wrong_1\n.*re\.compile\('wrong_2'\)\n.*<lambda>"):
        split(NET, targets=["wrong_1", re.compile("wrong_2"), lambda path, leaf: False])


def test_a_pattern_of_non_weights_raises_and_says_why_of_each():
    with pytest.raises(
        LoraError, match=r"(?s)names no weight: norm.*enc/norm/scale.*'scale' names no w.*full="
    ):
        split(NET, targets=["q", "norm"])


def test_non_float_weights():
    assert adapted(NET) == ["dec/q/kernel", "enc/q/kernel"]
    with pytest.raises(
        LoraError, match=r"(?s)cannot be adapted.*quant/kernel.*int8.*exclude=\['quant/kernel'\]"
    ):
        split(NET, rank=1, targets=["q", "quant"])
    with pytest.raises(LoraError, match=r"(?s)full= names leaves that are not float.*step.*int32"):
        split(NET, rank=1, full="step")


@pytest.mark.parametrize(
    "params", [{}, {"scale": shaped(8)}, {"a": [1.0, "text"]}, [shaped(8, 8), shaped(8, 8)]]
)
def test_params_without_a_weight_raise(params):
    with pytest.raises(LoraError, match=r"(?s)no weight to adapt.*lx\.usage"):
        split(params)


def test_full_alone_needs_empty_targets():
    assert adapted(NET, targets=(), full="bias") == ["dec/q/bias", "enc/q/bias"]
    with pytest.raises(LoraError, match="no weight to adapt"):
        split({"bias": shaped(8), "wq": shaped(8, 8)}, full="bias")
    with pytest.raises(LoraError, match=r"(?s)no weight to adapt.*excluded"):
        split(NET, exclude="*")


def test_two_leaves_with_one_path_raise():
    with pytest.raises(LoraError, match=r"(?s)two leaves have the same path.*a/kernel"):
        split({"a/kernel": shaped(2, 2), "a": {"kernel": shaped(2, 2)}})


def test_check_fits_lists_every_misfit():
    _, lora = split(NET, rank=1)
    other = {"enc/q/kernel": shaped(8, 9), "dec/q/kernels": shaped(8, 8)}
    message = (
        r"(?s)does not fit.*dec/q/kernel\n.*enc/q/kernel\n.*no such array.*shape \(8, 9\).*shape \(8, 8\)"
    )
    with pytest.raises(LoraError, match=message):
        check_fits(other, lora)


# Keys without effect ----------------------------------------------------------------------------------

MODEL = {
    "up": {"kernel": shaped(32, 64), "bias": shaped(64)},
    "down": {"kernel": shaped(64, 32)},
    "lm_head": {"kernel": shaped(32, 100)},
    "embed": {"embedding": shaped(100, 32)},
    "norm": {"scale": shaped(32)},
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": {"upp": 8, "*": 4}}, r"(?s)rank= matches nothing.*upp.*did you mean 'up'\?"),
        ({"rank": {"*": 4, "up": 8}}, r"(?s)key of rank= decides nothing.*got: +up\n.*by '\*' before"),
        ({"alpha": {"u*": 4.0, "up/kernel": 8.0, "*": 2.0}}, r"(?s)alpha=.*up/kernel.*'u\*' before it"),
        ({"rank": {"lm_head": 8, "*": 4}}, r"(?s)it names lm_head/kernel: output head by name"),
        ({"method": {"embed": "dora", "*": "lora"}}, r"(?s)method=.*embed/embedding: embedding"),
        ({"alpha": {"norm": 99.0, "*": 8.0}}, r"(?s)norm/scale: by convention, 'scale' names no weight"),
        ({"scaling": {"bias": "rslora", "*": "lora"}}, r"(?s)scaling=.*up/bias: by convention"),
        ({"targets": ["up"], "rank": {"up": 8, "down": 2}}, r"(?s)down/kernel: a weight, but not among"),
        ({"exclude": ["down"], "init": {"down": "pissa", "*": "kaiming"}}, r"(?s)init=.*down/kernel: a w"),
        ({"exclude": ["norm"]}, r"(?s)exclude= excludes nothing.*got: +norm\n.*norm/scale: by convention"),
        ({"targets": ["up"], "exclude": ["down"]}, r"(?s)excludes nothing.*down/kernel: a weight, but not"),
        ({"rows": {"embed": [1], "embed/embedding": [2]}}, r"(?s)rows= decides nothing.*'embed' before it"),
        ({"layout": {"*": Layout((), (0,), (1,)), "up": Layout((), (1,), (0,))}}, r"layout= decides nothing"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_said(options, message):
    with pytest.raises(LoraError, match=message):
        split(MODEL, **({"rank": 4} | options))


def test_a_last_star_is_a_default_and_need_not_decide():
    assert adapted(MODEL, alpha={"up": 2.0, "down": 4.0, "*": 8.0}) == ["down/kernel", "up/kernel"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (re.compile("up"), r"(?s)must match the whole path: re\.compile\('\.\*\(\?:up\)\.\*'\) matches 2"),
        (re.compile("kernel"), r"re\.compile\('\.\*kernel'\) matches 3"),
        ("up_proj", r"did you mean 'up'"),
        ("blocks/down_proj", r"did you mean 'down'"),
        ("wte", r"did you mean 'embed'"),
        ("LM_HEAD", r"did you mean 'lm_head'"),
        ("norms", r"did you mean 'norm'"),
    ],
)
def test_near_misses_are_told_what_was_meant(pattern, message):
    with pytest.raises(LoraError, match=message):
        split(MODEL, targets=pattern)


def test_one_word_of_another_option_is_told_where_it_belongs():
    with pytest.raises(LoraError, match=r"(?s)unknown method.*do: +scaling='rslora'\."):
        split(MODEL, method="rslora")
    with pytest.raises(LoraError, match=r"(?s)unknown scaling.*do: +method='dora'\."):
        split(MODEL, scaling="dora")
    with pytest.raises(LoraError, match=r"(?s)unknown method.*do: +init='pissa:4'\."):
        split(MODEL, method="pissa:4")
    with pytest.raises(LoraError, match=r"(?s)unknown init.*do: +method='vera'\."):
        split(MODEL, init="vera")
    with pytest.raises(LoraError, match=r"(?s)not a dict of adapters.*None.*pass \{\}"):
        check_fits(MODEL, None)


# What it costs ----------------------------------------------------------------------------------------


def layers(n):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {"layers": {str(i): {name: {"kernel": shaped(64, 64)} for name in names} for i in range(n)}}


def steps(f):
    """Calls of Python functions: work that does not depend on how busy the machine is."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(trace)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def test_literal_patterns_cost_little_and_time_grows_linearly():
    work = {}
    for n in (28, 56):
        params = layers(n)
        paths = adapted(params)
        literal = {"rank": dict.fromkeys(paths, 4), "alpha": dict.fromkeys(paths, 8.0), "targets": paths}
        plain = steps(lambda params=params: split(params, rank=4))
        work[n] = steps(lambda params=params, literal=literal: split(params, **literal))
        assert work[n] <= 1.5 * plain
    assert work[56] <= 2.2 * work[28]


def test_weights_that_are_alike_are_traced_once(monkeypatch):
    calls = []
    real = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *args: calls.append(1) or real(*args))
    _, lora = split(layers(20), rank=4)
    assert len(lora) == 140 and len(calls) == 1


def test_a_wrong_lora_of_many_paths_answers_at_once_and_briefly():
    params = layers(32)
    _, lora = split(params, rank=4)
    wrong = {path.replace("kernel", "weight"): adapter for path, adapter in lora.items()}
    message = r"(?s)does not fit.*layers/0/.*and 219 more.*one of \['layers/"
    with pytest.raises(LoraError, match=message) as caught:
        check_fits({path: shaped(64, 64) for path in lora}, wrong)
    assert len(str(caught.value)) < 2500
    work = steps(lambda: misfits({path: shaped(64, 64) for path in lora}, wrong))
    assert work < 40 * len(wrong)


def test_equal_lines_of_an_error_are_said_once():
    with pytest.raises(LoraError) as caught:
        split(layers(12), rank=0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 6 + 3 and lines[6].strip() == "and 79 more"
    assert lines[7].split() == ["got:", "rank=0"]
