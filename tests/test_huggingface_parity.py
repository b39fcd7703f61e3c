"""Checkpoints of transformers, in and out: tiny random models whose logits must agree. `make test-peft`."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import MODELS, D, H, K, L, hf, inputs, logits, model_of, torch

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors

pytestmark = [pytest.mark.extra_env, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def loose_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def like_of(folder, mapping):
    """The tree that a Flax program would have: shapes turned by hand, from the file's names."""
    like = {}
    for name, x in read_tensors(folder / "model.safetensors").items():
        path = name.replace(".", "/").removesuffix("/weight")
        known = (p.rpartition("/") for p in mapping.values())
        last = next((leaf for owner, _, leaf in known if _matches(owner, path)), "")
        shape = x.shape
        if name.endswith(".weight"):
            path = f"{path}/{last}"
            conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            if last == "kernel" and not conv1d:
                shape = (*shape[2:], shape[1], shape[0])
        like[path] = jax.ShapeDtypeStruct(shape, "float32")
    return like


def _matches(owner, path):
    return re.fullmatch(re.sub(r"\{\w\}", r"\\d+", owner), path) is not None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", MODELS)
def test_logits_are_theirs_and_a_merged_model_goes_back(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "theirs")
    mapping = lx.mappings.preset(family)
    like = like_of(tmp_path / "theirs", mapping)
    params = lx.huggingface.load(tmp_path / "theirs", like, mapping=mapping)
    fn, x = MODELS[family][1], inputs(family)
    np.testing.assert_allclose(fn(params, x), logits(model, family, x), atol=1e-4)

    _, lora = lx.split(params, rank=2, targets=lambda path, w: w.ndim == 2 and path.endswith("kernel"))
    lora = jax.tree.map(lambda a: a + 0.05, lora)
    merged = lx.merge(params, lora)
    want = lx.adapt(fn)(params, lora, x)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    lx.huggingface.save(tmp_path / "ours", merged, mapping=mapping, config=config, shard_bytes=4000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(again, family, x), want, atol=1e-4)
    assert np.abs(want - logits(model, family, x)).max() > 1e-2
    # and the adapter alone, in PEFT
    peft = pytest.importorskip("peft")
    lx.peft.save(tmp_path / "adapter", lora, params=params, mapping=mapping)
    if family != "vit":  # whose modules have other names in memory than in files
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        np.testing.assert_allclose(logits(adapted, family, x), want, atol=1e-4)


def test_shards_go_into_scanned_layers_in_the_trees_own_dtype(tmp_path):
    """One leaf for all layers, heads apart: entry by entry."""
    model = model_of("llama")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    shapes = {"q": (L, D, H, D // H), "k": (L, D, K, D // H), "o": (L, H, D // H, D), "down": (L, 24, D)}
    like = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    mapping = {f"model.layers.{{i}}.self_attn.{n}_proj": n for n in "qko"}
    mapping["model.layers.{i}.mlp.down_proj"] = "down"
    layout = {n: lx.Layout((0,), (1,), (2, 3)) for n in "qk"} | {"o": lx.Layout((0,), (1, 2), (3,))}
    layout["down"] = lx.Layout((0,), (1,), (2,))
    params = lx.huggingface.load(tmp_path, like, mapping=mapping, layout=layout, strict=False)
    state = model.state_dict()
    for i in range(L):
        for name in "qko":
            want = state[f"model.layers.{i}.self_attn.{name}_proj.weight"].numpy().T
            got = params[name][i].astype(jnp.float32).reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=8e-3, atol=1e-6)


def test_weights_of_bitsandbytes_are_their_codes(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    how = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = hf.LlamaForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=how, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "four")
    mapping = {"model.layers.{i}.mlp.down_proj": "down_{i}", "model.layers.{i}.self_attn.q_proj": "q_{i}"}
    like = {
        "down_0": jax.ShapeDtypeStruct((256, 128), "float32"),
        "q_0": jax.ShapeDtypeStruct((128, 2, 64), "float32"),
    }
    layout = {"down_*": lx.Layout((), (0,), (1,)), "q_*": lx.Layout((), (0,), (1, 2))}
    params = lx.huggingface.load(tmp_path / "four", like, mapping=mapping, layout=layout, strict=False)
    from bitsandbytes import functional

    for path, module in (("down_0", "mlp.down_proj"), ("q_0", "self_attn.q_proj")):
        weight = model.get_submodule(f"model.layers.0.{module}").weight
        want = functional.dequantize_4bit(weight.data, weight.quant_state).float().numpy().T
        assert isinstance(params[path], lx.Quantized)
        size = sum(x.nbytes for x in jax.tree.leaves(params[path]))
        assert 8 * size / want.size == 4.5  # the scales of the second level are numbers here
        np.testing.assert_array_equal(lx.dequantize(params)[path].reshape(want.shape), want)
