"""Every preset against tiny random models of transformers and diffusers. `make test-peft`.

A tree is made by the preset's names from the tensors of a checkpoint: each tensor has one place in it, and
each pair of the preset names a tensor of some variant. Weights go in and out again unchanged; an adapter that
PEFT made of all linear layers, convolutions and embeddings is loaded by the preset, and the merged weights
are those that PEFT merges.
"""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from decoders import CASES, HD, TOKENS, logits_of, tensors_of
from preset_models import MODELS, OLDER, gemma3, gemma3_with_images, lm, model_of, torch

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors

pytestmark = [pytest.mark.extra_env, pytest.mark.filterwarnings("ignore")]
peft = pytest.importorskip("peft", reason="peft is not installed: make test-peft", exc_type=ImportError)
FLAX = json.loads((pathlib.Path(__file__).parent / "flax_trees.json").read_text())


def pairs_of(mapping):
    """``(regex of a tensor's name, the pair)`` for each pair of a preset, and one for its bias."""
    for name, path in mapping.items():
        module, mark = re.fullmatch(r"(.*?)(\^[TE])?", name).groups()
        tensor = module.removesuffix("=") if module.endswith(("=", ".bias")) else f"{module}.weight"
        yield re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(tensor))), name, path, mark
        if not module.endswith(("=", ".bias")):
            bias = re.escape(f"{module}.bias")
            found = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", bias))
            yield found, name, path.rpartition("/")[0] + "/bias", "bias"


def ours(x, path, mark):
    """A tensor of torch on the axes of a Flax tree, by the leaf's name alone."""
    if not path.endswith("kernel") or mark == "^T":
        return x
    return np.moveaxis(x, (0, 1), (-1, -2))


def tree_of(tensors, mapping):
    """``{path: array}`` by a preset's names, and the pairs that were used; every tensor must have a place."""
    tree, used, stacks = {}, set(), {}
    for tensor, x in tensors.items():
        found = [(m, *pair) for regex, *pair in pairs_of(mapping) if (m := regex.fullmatch(tensor))]
        assert len(found) == 1, (tensor, found)
        ((match, name, path, mark),) = found
        used.add(name)
        values = match.groupdict()
        leaf = re.sub(r"\{(\w)\}", lambda m, values=values: values[m[1]], path)
        if "e" in values:  # experts are entries of one leaf
            stacks.setdefault(leaf, {})[int(values["e"])] = ours(x, leaf, mark)
        else:
            assert leaf not in tree, leaf
            tree[leaf] = ours(x, leaf, mark)
    tree |= {leaf: np.stack([found[i] for i in range(len(found))]) for leaf, found in stacks.items()}
    return tree, used


def checkpoint(model, folder):
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    return read_tensors(file)


def abstract(tree):
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in tree.items()}


def adapted_by_peft(model, skip):
    """A LoRA adapter of random numbers on every layer that PEFT can adapt, but for tied and skipped ones."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding, Conv1D)
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in kinds and counts.get(id(module.weight)) == 1 and not re.search(skip, name)
    ]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=5, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model, names


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", MODELS)
def test_a_preset_names_every_tensor_and_takes_the_adapters_of_peft(family, tmp_path):
    mapping, used = lx.mappings.preset(family), set()
    for number, make in enumerate(MODELS[family]):
        folder = tmp_path / str(number)
        model = model_of(make)
        tensors = checkpoint(model, folder / "theirs")
        tree, names = tree_of(tensors, mapping)
        used |= names
        params = lx.huggingface.load(folder / "theirs", abstract(tree), mapping=mapping)
        for path, want in tree.items():
            np.testing.assert_array_equal(params[path], want, err_msg=path)
        config = json.loads((folder / "theirs" / "config.json").read_text())
        lx.huggingface.save(folder / "ours", params, mapping=mapping, config=config)
        back = read_tensors(folder / "ours" / "model.safetensors")
        assert back.keys() == tensors.keys()
        for name, want in tensors.items():
            np.testing.assert_array_equal(back[name], want, err_msg=name)

        # of a dense layer's MLP PEFT would go on to the experts of all others: see the tests of experts below
        adapted, targets = adapted_by_peft(model, r"\.mlp\." if family == "qwen3_moe" else r"^$")
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        merged = checkpoint(adapted.merge_and_unload(), folder / "merged")
        now = lx.mappings.preset("vit5") if family == "vit" else mapping
        lora = lx.peft.load(folder / "adapter", params, mapping=now)
        assert len(lora) == len(targets)
        lx.huggingface.save(folder / "mine", lx.merge(params, lora), mapping=mapping)
        changed = 0
        for name, got in read_tensors(folder / "mine" / "model.safetensors").items():
            np.testing.assert_allclose(got, merged[name], atol=2e-6, err_msg=name)
            changed += bool(np.abs(got - tensors[name]).max() > 1e-3)
        assert changed == len(targets)
    assert set(mapping) - used == OLDER.get(family, set())


@pytest.mark.parametrize("family", FLAX)
def test_the_trees_of_flax_models_are_those_of_the_presets(family, tmp_path):
    """Names and shapes of the last Flax models of transformers and diffusers; torch has the checkpoints."""
    name, _, number = family.partition(" ")
    model = model_of(MODELS[name][int(number or 0)])
    tensors = checkpoint(model, tmp_path)
    like = {}
    for path, shape in FLAX[family].items():
        for i in range(2) if "{}" in path else [0]:
            if path.split("/")[0] not in OLDER.get(name, ()):
                like[path.replace("{}", str(i))] = jax.ShapeDtypeStruct(shape, "float32")
    mapping = lx.mappings.preset(name)
    params = lx.huggingface.load(tmp_path, like, mapping=mapping)
    assert sum(x.size for x in params.values()) == sum(x.size for x in tensors.values())
    if name == "gpt2":  # whose kernels Flax stores (out, in), and c_proj is square
        want = tensors["transformer.h.1.attn.c_proj.weight"].T
        np.testing.assert_array_equal(params["transformer/h/1/attn/c_proj/kernel"], want)


def test_the_language_model_of_gemma_3_with_images(tmp_path):
    tensors = checkpoint(model_of(gemma3_with_images), tmp_path)
    mapping = lx.mappings.preset("gemma3", theirs="language_model.")
    text = {name: x for name, x in tensors.items() if name.startswith("language_model.")}
    tree, _ = tree_of(text, mapping)
    params = lx.huggingface.load(tmp_path, abstract(tree), mapping=mapping, strict=False)
    for path, want in tree.items():
        np.testing.assert_array_equal(params[path], want, err_msg=path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_act_in_transformers_as_they_do_here(family, tmp_path):
    """One module for each expert in the file, which PEFT fuses again for the model in memory."""
    model = model_of(MODELS[family][0])
    mapping = lx.mappings.preset(family)
    tree, _ = tree_of(checkpoint(model, tmp_path / "theirs"), mapping)
    params = lx.huggingface.load(tmp_path / "theirs", abstract(tree), mapping=mapping)
    layout = mapping.layouts_of(params)
    assert len(layout) == 3 * (2 if family == "mixtral" else 1)
    _, lora = lx.split(params, 2, alpha=5.0, targets=["experts"], layout=layout)
    lora = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape) * 0.3, lora)
    lx.peft.save(tmp_path / "adapter", lora, params=params, mapping=mapping, target="vllm", max_lora_rank=8)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    lx.huggingface.save(tmp_path / "merged", lx.merge(params, lora), mapping=mapping, config=config)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        base = model(tokens).logits
        want = type(model).from_pretrained(tmp_path / "merged").eval()(tokens).logits
        got = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(tokens).logits
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (base - want).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_adapters_of_experts_made_in_peft_load_here(family, tmp_path):
    """PEFT turns the targets into parameters of all experts, fuses gate and up, and doubles their rank."""
    model = model_of(MODELS[family][0])
    tensors = checkpoint(model, tmp_path / "theirs")
    mapping, now = lx.mappings.preset(family), lx.mappings.preset(f"{family}5")
    tree, _ = tree_of(tensors, mapping)
    params = lx.huggingface.load(tmp_path / "theirs", abstract(tree), mapping=mapping)
    experts = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", *experts])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    merged = checkpoint(adapted.merge_and_unload(), tmp_path / "merged")
    lora = lx.peft.load(tmp_path / "adapter", params, mapping=now)
    got = lx.merge(params, lora)
    lx.huggingface.save(tmp_path / "mine", got, mapping=mapping)
    changed = set()
    for name, x in read_tensors(tmp_path / "mine" / "model.safetensors").items():
        np.testing.assert_allclose(x, merged[name], atol=2e-6, err_msg=name)
        changed |= {name.split(".")[-2]} if np.abs(x - tensors[name]).max() > 1e-3 else set()
    assert changed == {"q_proj", *experts}
    lx.peft.save(
        tmp_path / "again", lora, params=params, mapping=now, config=lx.peft.config(tmp_path / "adapter")
    )
    old, new = (read_tensors(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)


def decoder(case):
    family, keys, tied = CASES[case]
    kind = {"llama": "Llama", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}[
        family
    ]
    options = dict(num_key_value_heads=keys, head_dim=HD, tie_word_embeddings=tied, rms_norm_eps=1e-6)
    options["rope_parameters"] = dict(
        rope_type="default", rope_theta=1e6 if kind in ("Llama", "Qwen3") else 1e4
    )
    if family == "gemma":
        options["hidden_act"] = "gelu_pytorch_tanh"
    if family in ("gemma2", "gemma3"):
        last = "full_attention" if family == "gemma2" else "sliding_attention"
        options |= dict(query_pre_attn_scalar=HD, sliding_window=3, layer_types=["sliding_attention", last])
    if family == "gemma2":
        options |= dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    if family == "gemma3":
        del options["rope_parameters"]
        return gemma3(**options)
    return lm(kind, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_logits_that_other_code_must_reproduce_are_those_of_transformers(case):
    model = decoder(case).eval()
    state = {name: torch.tensor(x) for name, x in tensors_of(case).items()}
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        got = model(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(got, logits_of(case), atol=5e-6)
