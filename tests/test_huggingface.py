"""`lx.huggingface` without transformers: layouts, stacks, shards, quantizing, memory, and what is refused."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors


def rng():
    return np.random.default_rng(0)


TENSORS = {
    "model.embed_tokens.weight": rng().normal(size=(7, 8)),
    **{f"model.layers.{i}.self_attn.q_proj.weight": rng().normal(size=(8, 8)) + i for i in range(3)},
    **{f"model.layers.{i}.self_attn.q_proj.bias": rng().normal(size=8) + i for i in range(3)},
    **{f"model.layers.{i}.mlp.gate_up_proj.weight": rng().normal(size=(12, 8)) + i for i in range(3)},
}
TENSORS = {name: x.astype(np.float32) for name, x in TENSORS.items()}
MAPPING = {
    "model.embed_tokens": "embed/embedding",
    "model.layers.{i}.self_attn.q_proj": "layers/q/kernel",
    "model.layers.{i}.mlp.gate_up_proj[0/2]": "layers/gate/kernel",
    "model.layers.{i}.mlp.gate_up_proj[1/2]": "layers/up/kernel",
}
LIKE = {
    "embed": {"embedding": jax.ShapeDtypeStruct((7, 8), "float32")},
    "layers": {
        "q": {
            "kernel": jax.ShapeDtypeStruct((3, 8, 2, 4), "bfloat16"),
            "bias": jax.ShapeDtypeStruct((3, 2, 4), "float32"),
        },
        "gate": {"kernel": jax.ShapeDtypeStruct((3, 8, 6), "float32")},
        "up": {"kernel": jax.ShapeDtypeStruct((3, 8, 6), "float32")},
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_stacks_heads_biases_and_fused_halves_come_in_and_go_out_again(folder, tmp_path):
    params = lx.huggingface.load(folder, LIKE, mapping=MAPPING)
    q = params["layers"]["q"]
    assert q["kernel"].dtype == jnp.bfloat16 and q["bias"].dtype == jnp.float32
    for i in range(3):
        at = f"model.layers.{i}"
        want = TENSORS[f"{at}.self_attn.q_proj.weight"].T.reshape(8, 2, 4)
        np.testing.assert_allclose(q["kernel"][i].astype(jnp.float32), want, rtol=8e-3)
        np.testing.assert_array_equal(q["bias"][i].reshape(-1), TENSORS[f"{at}.self_attn.q_proj.bias"])
        gate, up = np.split(TENSORS[f"{at}.mlp.gate_up_proj.weight"], 2)
        np.testing.assert_array_equal(params["layers"]["gate"]["kernel"][i], gate.T)
        np.testing.assert_array_equal(params["layers"]["up"]["kernel"][i], up.T)
    lx.huggingface.save(tmp_path / "again", params, mapping=MAPPING, shard_bytes=700)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS) and len(set(index["weight_map"].values())) > 2
    back = lx.huggingface.load(tmp_path / "again", LIKE, mapping=MAPPING)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, back)), strict=True))
    lx.huggingface.save(tmp_path / "again", params, mapping=MAPPING)
    assert [f.name for f in (tmp_path / "again").iterdir()] == ["model.safetensors"]


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(Q1), r"(?s)missing: .*layers\.1\.self_attn\.q_proj.*nearest"),
        (lambda t: t.update({"model.extra.weight": np.ones(3)}), r"(?s)extra: .*model\.extra\.weight"),
        (lambda t: t.update({"model.embed_tokens.weight": np.ones((8, 7))}), r"(?s)shape: .*\(8, 7\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path, edit, match):
    tensors = dict(TENSORS)
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(lx.LoraError, match=match):
        lx.huggingface.load(tmp_path, LIKE, mapping=MAPPING)


def test_a_tied_head_and_buffers_are_no_surplus(tmp_path):
    more = {
        "lm_head.weight": TENSORS["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(TENSORS | more, tmp_path / "model.safetensors")
    lx.huggingface.load(tmp_path, LIKE, mapping=MAPPING)
    save_file(TENSORS | {"lm_head.weight": more["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(lx.LoraError, match=r"extra: .*lm_head"):
        lx.huggingface.load(tmp_path, LIKE, mapping=MAPPING)


def test_names_may_lack_the_first_part(tmp_path):
    save_file({k.removeprefix("model."): v for k, v in TENSORS.items()}, tmp_path / "model.safetensors")
    lx.huggingface.load(tmp_path, LIKE, mapping=MAPPING)


def test_shardings_place_what_is_read(folder):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P("x") if x.shape[0] % 2 == 0 else jax.P()), LIKE
    )
    where["layers"]["gate"]["kernel"] = jax.NamedSharding(mesh, jax.P(None, "x"))
    params = lx.huggingface.load(folder, LIKE, mapping=MAPPING, shardings=where)
    gate = params["layers"]["gate"]["kernel"]
    assert gate.sharding.spec == jax.P(None, "x")
    plain = lx.huggingface.load(folder, LIKE, mapping=MAPPING)["layers"]["gate"]["kernel"]
    np.testing.assert_array_equal(gate, plain)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_on_the_way_is_quantizing_afterwards(tmp_path, format):
    tensors = {
        f"l.{i}.up.weight": rng().normal(size=(96, 128)).astype(np.float32) * (i + 1) for i in range(2)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    layout = {"up": lx.Layout((0,), (1,), (2,))}
    for like, mapping in (
        ({"up": {"kernel": jax.ShapeDtypeStruct((2, 128, 96), "float32")}}, {"l.{i}.up": "up/kernel"}),
        ({f"l.{i}.up.weight": jax.ShapeDtypeStruct((96, 128), "float32") for i in range(2)}, None),
    ):
        how = {"layout": layout} if mapping else {}
        got = lx.huggingface.load(tmp_path, like, mapping=mapping, quantize=format, **how)
        want = lx.quantize(lx.huggingface.load(tmp_path, like, mapping=mapping, **how), format, **how)
        assert all(
            isinstance(x, lx.Quantized)
            for x in jax.tree.leaves(got, is_leaf=lambda x: isinstance(x, lx.Quantized))
        )
        for a, b in zip(*map(jax.tree.leaves, map(lx.dequantize, (got, want))), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_no_more_than_the_tree_and_one_tensor_is_in_memory(tmp_path):
    """32 tensors of 8 MiB into one stacked leaf, and into 4 bits: measured in a process of its own."""
    script = """
        import sys, resource, numpy as np, jax, lorax_fn as lx
        from safetensors.numpy import save_file
        folder, quantize = sys.argv[1], sys.argv[2] or None
        like = {"up": {"kernel": jax.ShapeDtypeStruct((32, 1024, 2048), "float32")}}
        small = {"up": {"kernel": jax.ShapeDtypeStruct((1, 1024, 2048), "float32")}}
        layout = {"up": lx.Layout((0,), (1,), (2,))}
        mapping = {"l.{i}.up": "up/kernel"}
        load = lambda like: lx.huggingface.load(
            folder, like, mapping=mapping, layout=layout, quantize=quantize, strict=False)
        load(small)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        params = load(like)
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, size / 2**20)
    """
    for shard in range(4):
        tensors = {f"l.{shard * 8 + i}.up.weight": np.ones((2048, 1024), np.float32) for i in range(8)}
        save_file(tensors, tmp_path / f"model-{shard}.safetensors")
    where = {f"l.{i}.up.weight": f"model-{i // 8}.safetensors" for i in range(32)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for quantize, most in (("", 256 + 64), ("nf4", 33 + 80)):  # whole in 16 bits it would be 128
        run = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), quantize]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        grown, size = map(float, done.stdout.split())
        assert grown < most, (quantize, grown, size)


def test_presets_of_other_trees_give_their_layouts():
    like = {f"layers/{i}/attn/{n}_proj/w": jax.ShapeDtypeStruct(s, "float32") for i in range(2)
            for n, s in (("q", (8, 2, 4)), ("o", (2, 4, 8)))}  # fmt: skip
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), like)
    preset = lx.mappings.preset("llama", "tunix")
    _, lora = lx.split(params, 2, layout=preset.layouts_of(params))
    with pytest.raises(lx.LoraError, match="no such preset"):
        lx.mappings.preset("llama", "mine")
    assert {p: x.layout.inputs for p, x in lora.items() if "/0/" in p} == {
        "layers/0/attn/q_proj/w": (0,), "layers/0/attn/o_proj/w": (0, 1)
    }  # fmt: skip


def test_gemmas_fused_keys_and_values_are_parts_of_one_leaf(tmp_path):
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    name = "model.layers.0.self_attn.{}_proj.weight"
    tensors = {name.format(n): rng().normal(size=s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"q_einsum": (2, 8, 4), "kv_einsum": (2, 1, 8, 4), "attn_vec_einsum": (2, 4, 8)}
    like = {"layer_0": {"attn": {n: {"w": jax.ShapeDtypeStruct(x, "float32")} for n, x in sizes.items()}}}
    mapping = lx.mappings.preset("gemma", "gemma")
    params = lx.huggingface.load(tmp_path, like, mapping=mapping)["layer_0"]["attn"]
    want = {n: x for (n, _), x in zip(shapes.items(), tensors.values(), strict=True)}
    np.testing.assert_array_equal(params["kv_einsum"]["w"][0, 0], want["k"].T)
    np.testing.assert_array_equal(params["kv_einsum"]["w"][1, 0], want["v"].T)
    np.testing.assert_array_equal(params["q_einsum"]["w"][1], want["q"][4:].T)
    np.testing.assert_array_equal(params["attn_vec_einsum"]["w"].reshape(8, 8), want["o"].T)
    lx.huggingface.save(tmp_path / "out", {"layer_0": {"attn": params}}, mapping=mapping)
    for name, x in read_tensors(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(x, tensors[name])


# A proposal from names and shapes ------------------------------------------------------------------------


def test_infer_mapping_proposes_what_a_preset_would_say():
    shapes = {name: x.shape for name, x in TENSORS.items() if "gate_up" not in name}
    shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (6, 8) for i in range(3) for n in ("gate", "up")}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), LIKE)
    found = lx.mappings.infer_mapping(shapes, params)
    assert found == {
        "model.embed_tokens": "embed/embedding",
        "model.layers.{i}.self_attn.q_proj": "layers/q/kernel",
        "model.layers.{i}.self_attn.q_proj.bias": "layers/q/bias",
        "model.layers.{i}.mlp.gate_proj": "layers/gate/kernel",
        "model.layers.{i}.mlp.up_proj": "layers/up/kernel",
    }


def test_infer_mapping_refuses_to_guess_between_equals():
    with pytest.raises(lx.LoraError, match="(?s)no mapping follows.*one/kernel"):
        lx.mappings.infer_mapping(
            {"x.proj_1.weight": (4, 4), "x.proj_2.weight": (4, 4)}, {"one": {"kernel": jnp.ones((4, 4))}}
        )
