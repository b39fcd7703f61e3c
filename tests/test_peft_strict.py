"""What `lx.peft` refuses: files that do not fit, unknown mathematics, what no server would serve."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors

PARAMS = {
    **{
        f"model.layers.{i}.{n}.weight": jnp.ones((6, 4)) * 0.1 for i in range(2) for n in ("q_proj", "v_proj")
    },
    "model.embed_tokens.weight": jnp.ones((9, 4)),
    "lm_head.weight": jnp.ones((9, 4)) * 0.5,
    "model.norm.weight": jnp.ones(4),
}


def lora_of(rank=2, targets=("q_proj", "v_proj"), **options):
    _, lora = lx.split(PARAMS, rank, targets=targets, **options)
    leaves, tree = jax.tree.flatten(lora)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def saved(folder, lora=None, **options):
    lx.peft.save(folder, lora_of() if lora is None else lora, params=PARAMS, **options)
    return folder


def edited(folder, config=None, tensors=None, remove=(), drop=()):
    facts = lx.peft.config(folder) | (config or {})
    (folder / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in facts.items() if k not in remove})
    )
    old = {k: np.array(v) for k, v in read_tensors(folder / "adapter_model.safetensors").items()}
    save_file(
        {k: v for k, v in (old | (tensors or {})).items() if k not in drop},
        folder / "adapter_model.safetensors",
    )
    return folder


KEY = "base_model.model.model.layers.0.q_proj"


def refused(folder, match, **options):
    with pytest.raises(lx.LoraError, match=match):
        lx.peft.load(folder, PARAMS, **options)


# The file and the tree -----------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_keys_are_all_listed(tmp_path):
    folder = edited(
        saved(tmp_path),
        tensors={"base_model.model.model.layers.7.q_proj.lora_A.weight": np.ones((2, 4), np.float32),
                 "base_model.model.model.layers.7.q_proj.lora_B.weight": np.ones((6, 2), np.float32),
                 f"{KEY}.lora_A.weight": np.ones((2, 5), np.float32)},
        drop=["base_model.model.model.layers.1.v_proj.lora_B.weight"],
    )  # fmt: skip
    refused(
        folder, r"(?s)missing: .*layers\.1\.v_proj\.lora_B.*extra: .*layers\.7.*nearest.*shape: .*\(5, 2\)"
    )


def test_a_targeted_module_without_keys_is_missing(tmp_path):
    keys = [f"{KEY}.lora_{x}.weight" for x in "AB"]
    folder = edited(saved(tmp_path), drop=keys)
    refused(folder, r"(?s)missing: .*layers\.0\.q_proj: targeted")
    assert len(lx.peft.load(folder, PARAMS, strict=False)) == 3


def test_a_wrong_prefix_is_an_error_and_never_the_base(tmp_path):
    old = read_tensors(saved(tmp_path) / "adapter_model.safetensors")
    save_file(
        {k.removeprefix("base_model.model."): np.array(v) for k, v in old.items()},
        tmp_path / "adapter_model.safetensors",
    )
    refused(tmp_path, r"does not begin with 'base_model\.model\.'")


def test_tensors_that_are_not_finite_or_empty_are_refused(tmp_path):
    bad = np.ones((2, 4), np.float32)
    bad[0, 0] = np.nan
    refused(edited(saved(tmp_path), tensors={f"{KEY}.lora_A.weight": bad}), "not finite")
    refused(edited(saved(tmp_path), tensors={f"{KEY}.lora_A.weight": np.ones((0, 4), np.float32)}), "empty")
    refused(
        edited(saved(tmp_path), tensors={f"{KEY}.lora_A.weight": np.ones((2, 4), np.int32)}), "not a float"
    )


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    (saved(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "pickle.*runs the code")


# The config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"lora_alpha": 1e40}, "lora_alpha"),
        ({"r": 0}, "r=0"),
        ({"r": 2**62}, "r=4611686018427387904"),
        ({"r": 3}, "rank 2, where the config says 3"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"use_future_variant": True}, "use_future_variant"),
        ({"future_scale": 2.0}, "future_scale"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"rank_pattern": {"no_such": 4}}, "no_such"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"rank_pattern": {"((a+)+)+": 4}}, "forever"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"target_parameters": 3}, "target_parameters"),
        ({"bias": "some"}, "bias='some'"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
    ],
)  # fmt: skip
def test_configs_that_are_wrong_or_not_understood_raise(tmp_path, config, match):
    refused(edited(saved(tmp_path), config), match)


def test_a_missing_alpha_is_an_error_and_never_a_default(tmp_path):
    refused(edited(saved(tmp_path), remove=["lora_alpha"]), "no lora_alpha")


def test_a_missing_rank_is_that_of_the_tensors_and_inference_mode_freezes_nothing(tmp_path):
    lora = lx.peft.load(edited(saved(tmp_path), {"inference_mode": True}, remove=["r"]), PARAMS)
    assert {x.rank for x in lora.values()} == {2} and all(jax.tree.leaves(lx.mask(lora)))


def test_harmless_unknown_fields_warn_and_known_ones_do_not(tmp_path):
    folder = edited(saved(tmp_path), {"author": "somebody", "task_type": "CAUSAL_LM", "use_later": False})
    with pytest.warns(lx.LoraFileWarning, match="author, use_later"):
        assert len(lx.peft.load(folder, PARAMS)) == 4


def test_json_that_is_none_is_an_error(tmp_path):
    saved(tmp_path)
    for text in ('{"r": NaN}', "[" * 100_000, "[]", "\x00", '{"a":'):
        (tmp_path / "adapter_config.json").write_text(text)
        refused(tmp_path, "cannot be read")


def test_other_fields_are_kept_and_handed_back(tmp_path):
    config = {"task_type": "CAUSAL_LM", "revision": "main", "lora_dropout": 0.1, "peft_version": "0.21.2"}
    saved(tmp_path, config=config, base_model="org/base")
    found = lx.peft.config(tmp_path)
    assert config.items() <= found.items() and found["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("patterns", "module", "want"),
    [
        ({"q_proj": 4, "layers.0.q_proj": 8}, "model.layers.0.q_proj", 4),
        ({"layers.0.q_proj": 8, "q_proj": 4}, "model.layers.0.q_proj", 8),
        ({"_proj": 4}, "model.layers.0.q_proj", 1),
        ({r"layers\.[01]\..*": 4}, "model.layers.0.q_proj", 4),
        ({"layers.1.q_proj": 4}, "model.layers.11.q_proj", 1),
        ({"^q_proj": 4}, "q_proj", 4),
    ],
)
def test_patterns_match_in_the_order_and_the_way_of_peft(patterns, module, want):
    from lorax_fn.interop.peft_config import value_of

    assert value_of(module, patterns, 1) == want


def test_a_mapping_may_speak_of_leaves_that_are_not_adapted(tmp_path):
    """The file is the same with and without params; but each adapted leaf needs a pair."""
    params = {"layers": {n: {"kernel": jnp.ones((2, 4, 6))} for n in "qkv"}, "norm": {"scale": jnp.ones(4)}}
    mapping = {f"model.layers.{{i}}.{n}_proj": f"layers/{n}/kernel" for n in "qkv"}
    mapping["model.norm"] = "norm/scale"
    layout = {n: lx.Layout((0,), (1,), (2,)) for n in "qkv"}
    _, lora = lx.split(params, 2, targets=["q", "v"], layout=layout)
    lx.peft.save(tmp_path / "a", lora, mapping=mapping)
    lx.peft.save(tmp_path / "b", lora, mapping=mapping, params=params)
    one, two = (read_tensors(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert len(one) == 8 and one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert lx.peft.config(tmp_path / "b")["target_modules"] == ["q_proj", "v_proj"]
    for folder in "ab":
        back = lx.peft.load(tmp_path / folder, params, mapping=mapping, layout=layout)
        assert back.keys() == lora.keys()
    with pytest.raises(lx.LoraError, match="(?s)no pair of mapping= names these leaves.*layers/v/kernel"):
        lx.peft.save(tmp_path / "c", lora, mapping={k: v for k, v in mapping.items() if "v_proj" not in k})


# Servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_server_gets_one_accepted_rank_by_exact_zeros(tmp_path, target):
    lora = lora_of(rank={"q_proj": 2, "*": 3})
    saved(tmp_path, lora, target=target, max_lora_rank=16)
    config, tensors = lx.peft.config(tmp_path), read_tensors(tmp_path / "adapter_model.safetensors")
    assert (
        config["r"] == 8 and config["target_modules"] == ["q_proj", "v_proj"] and not config["rank_pattern"]
    )
    assert tensors[f"{KEY}.lora_A.weight"].shape == (8, 4) and not tensors[f"{KEY}.lora_A.weight"][2:].any()
    for path, dw in lx.delta(lx.peft.load(tmp_path, PARAMS)).items():
        np.testing.assert_allclose(dw, lora[path].delta(), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lora_of, {}, "max_lora_rank"),
        (lora_of, {"max_lora_rank": 17}, "cannot be started"),
        (lambda: lora_of(4), {"max_lora_rank": 1}, "larger than vllm's"),
        (lambda: lora_of(method="dora"), {"max_lora_rank": 8}, "DoRA"),
        (lambda: lora_of(full=["norm"]), {"max_lora_rank": 8}, "trained whole"),
        (lambda: lora_of(targets=["lm_head", "q_proj"]), {"max_lora_rank": 8}, "(?s)lm_head.*output head"),
        (lambda: lora_of(targets=["embed_tokens", "q_proj"]), {"max_lora_rank": 8}, "(?s)embed.*embedding"),
        (lambda: lora_of(2, method="loha"), {"max_lora_rank": 8}, "LoHa"),
    ],
)
def test_what_a_server_refuses_is_refused_before_anything_is_written(tmp_path, make, options, match):
    with pytest.raises(lx.LoraError, match=match):
        lx.peft.save(tmp_path / "a", make(), params=PARAMS, target="vllm", **options)
    assert not (tmp_path / "a").exists()


EXPERTS = {
    "layers/experts/gate_up": jnp.zeros((2, 3, 4, 12)),
    "layers/experts/down": jnp.zeros((2, 3, 6, 4)),
}
PER_EXPERT = {
    f"model.layers.{{i}}.mlp.experts.{{e}}.{n}_proj": f"layers/experts/{path}"
    for n, path in (("gate", "gate_up[0/2]"), ("up", "gate_up[1/2]"), ("down", "down"))
}


def experts_lora():
    layout = {"*": lx.Layout((0, 1), (2,), (3,))}
    lora = lx.split(EXPERTS, 2, targets=["experts"], layout=layout)[1]
    return jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), lora)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_server_gets_one_module_for_each_expert(tmp_path, target):
    lora = experts_lora()
    lx.peft.save(tmp_path, lora, mapping=PER_EXPERT, target=target, max_lora_rank=8)
    config, tensors = lx.peft.config(tmp_path), read_tensors(tmp_path / "adapter_model.safetensors")
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert not config["target_parameters"] and len(tensors) == 2 * 3 * 3 * 2
    scale = config["lora_alpha"] / config["r"]
    for i, e, (name, path, half) in itertools.product(
        range(2), range(3), (("gate", "gate_up", 0), ("up", "gate_up", 1), ("down", "down", None))
    ):
        key = f"base_model.model.model.layers.{i}.mlp.experts.{e}.{name}_proj"
        got = scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        want = lora[f"layers/experts/{path}"].delta()[i, e].T
        want = want if half is None else jnp.split(want, 2)[half]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_experts_in_one_parameter_are_refused_by_servers_with_the_pairs_to_write(tmp_path):
    mapping = {
        f"model.layers.{{i}}.mlp.experts.{n}_proj=": f"layers/experts/{n}" for n in ("gate_up", "down")
    }
    lora = experts_lora()
    lx.peft.save(tmp_path / "peft", lora, mapping=mapping)  # PEFT itself takes them
    for given in (mapping, None):
        with pytest.raises(
            lx.LoraError, match=r"(?s)one module for each expert.*\.\{e\}\.gate_proj.*\[1/2\]"
        ):
            lx.peft.save(tmp_path / "a", lora, mapping=given, target="vllm", max_lora_rank=8)
    assert not (tmp_path / "a").exists()


# Other causes of broken adapters -------------------------------------------------------------------------


def test_rslora_and_several_alphas_survive_the_way_out_and_in(tmp_path):
    lora = lora_of(scaling="rslora", alpha={"q_proj": 5.0, "*": 7.5})
    back = lx.peft.load(saved(tmp_path, lora), PARAMS)
    assert [x.scale for x in back.values()] == [lora[p].scale for p in back]
    assert lx.peft.config(tmp_path)["use_rslora"] is True


def test_fused_projections_are_cut_and_joined_as_the_mapping_says(tmp_path):
    """gate_up: halves one after the other, and interleaved by groups."""
    rng = np.random.default_rng(0)
    fused = {"mlp.gate_up_proj.weight": jnp.asarray(rng.normal(size=(8, 4)).astype(np.float32))}
    _, lora = lx.split(fused, 2, key=jax.random.key(1))
    lora = {p: lx.LoRA(x.a, x.b + 1.0, x.alpha, x.rank, x.scaling, x.layout) for p, x in lora.items()}
    lx.peft.save(tmp_path / "fused", lora, params=fused)
    want = lora["mlp.gate_up_proj.weight"].delta()
    for mark, groups in (("", 1), ("@2", 2)):
        mapping = {f"mlp.gate_up_proj[{i}/2{mark}]": f"{n}/kernel" for i, n in enumerate(("gate", "up"))}
        params = {n: {"kernel": jnp.zeros((4, 4))} for n in ("gate", "up")}
        parts = lx.peft.load(tmp_path / "fused", params, mapping=mapping)
        rows = want.reshape(groups, 2, -1, 4)
        for i, name in enumerate(("gate", "up")):
            np.testing.assert_allclose(parts[f"{name}/kernel"].delta(), rows[:, i].reshape(4, 4).T, atol=1e-5)
        lx.peft.save(tmp_path / "again", parts, mapping=mapping)
        old, new = (read_tensors(tmp_path / f / "adapter_model.safetensors") for f in ("fused", "again"))
        assert all(np.array_equal(old[k], new[k]) for k in old | new)


def test_parts_of_other_factors_are_joined_exactly_at_the_sum_of_ranks(tmp_path):
    params = {n: {"kernel": jnp.zeros((4, 6))} for n in "qkv"}
    _, lora = lx.split(params, rank={"q": 1, "*": 2})
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    mapping = {f"attn.qkv[{i}/3]": f"{n}/kernel" for i, n in enumerate("qkv")}
    lx.peft.save(tmp_path, lora, mapping=mapping)
    whole = {"attn.qkv.weight": jnp.zeros((18, 4))}
    got = lx.peft.load(tmp_path, whole)["attn.qkv.weight"]
    want = np.concatenate([lora[f"{n}/kernel"].delta().T for n in "qkv"])
    assert got.rank == 5
    np.testing.assert_allclose(got.delta(), want, atol=1e-4)


def test_expert_axes_are_not_transposed_and_square_ones_follow_the_layout(tmp_path):
    rng = np.random.default_rng(0)
    params = {"experts.down_proj": jnp.zeros((3, 4, 4))}
    for layout in (lx.Layout((0,), (2,), (1,)), lx.Layout((0,), (1,), (2,))):
        a, b = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((3, 4, 2), (3, 2, 4)))
        lora = {"experts.down_proj": lx.LoRA(a, b, 4.0, 2, "lora", layout)}
        mapping = {"experts.down_proj=": "experts.down_proj"}
        lx.peft.save(tmp_path, lora, params=params, mapping=mapping)
        back = lx.peft.load(tmp_path, params, mapping=mapping, layout={"experts.down_proj": layout})
        np.testing.assert_allclose(
            back["experts.down_proj"].delta(), lora["experts.down_proj"].delta(), atol=1e-6
        )


def test_an_alpha_that_is_an_array_is_saved_as_its_number(tmp_path):
    lora = {p: dataclasses.replace(x, alpha=jnp.float32(5.0)) for p, x in lora_of().items()}
    back = lx.peft.load(saved(tmp_path, lora), PARAMS)
    assert {x.alpha for x in back.values()} == {5.0}
    assert lx.peft.config(tmp_path)["lora_alpha"] == 5


def test_load_leaves_the_callers_tree_alone_and_two_adapters_do_not_meet(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", lora_of(3))
    before = dict(PARAMS)
    one, two = lx.peft.load(first, PARAMS), lx.peft.load(second, PARAMS)
    assert PARAMS == before or all(PARAMS[k] is before[k] for k in before)
    assert {x.rank for x in one.values()} == {2} and {x.rank for x in two.values()} == {3}


def test_kinds_that_one_file_cannot_hold_together_are_refused(tmp_path):
    mixed = lora_of() | lora_of(method="dora", targets=["q_proj"])
    with pytest.raises(lx.LoraError, match="one kind"):
        lx.peft.save(tmp_path, mixed)
    with pytest.raises(lx.LoraError, match="no adapter"):
        lx.peft.save(tmp_path, {})
    with pytest.raises(lx.LoraError, match="unstack"):
        lx.peft.save(tmp_path, lx.stack([lora_of(), lora_of()]))
    with pytest.raises(lx.LoraError, match="dropout"):
        lx.peft.save(tmp_path, lx.dropout(lora_of(), 0.5, jax.random.key(0)))


def test_methods_without_a_form_of_their_own_are_saved_as_the_lora_that_they_are(tmp_path):
    for method in ("lora_fa", "lora_xs"):
        lora = lora_of(method=method)
        back = lx.peft.load(saved(tmp_path, lora), PARAMS)
        for path, dw in lx.delta(back).items():
            np.testing.assert_allclose(dw, lora[path].delta(), atol=1e-5)
