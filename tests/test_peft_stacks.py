"""LoHa, LoKr and VeRA of scanned layers and fused weights, in files with one adapter per module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors

L = 3
SCANNED = {"layers": {"q": {"kernel": jnp.ones((L, 8, 2, 6))}, "o": {"kernel": jnp.ones((L, 12, 8))}}}
LAYOUT = {"q": lx.Layout((0,), (1,), (2, 3)), "o": lx.Layout((0,), (1,), (2,))}
MAPPING = {"h.{i}.q_proj": "layers/q/kernel", "h.{i}.o_proj": "layers/o/kernel"}
UNROLLED = {
    f"h.{i}.{n}.weight": jnp.ones(s) for i in range(L) for n, s in (("q_proj", (12, 8)), ("o_proj", (8, 12)))
}
METHODS = ("loha", "lokr", "vera")


def filled(lora):
    """Adapters of other numbers everywhere, but for factors that must stay as they are."""
    rng = np.random.default_rng(0)

    def new(adapter):
        names = {n for n, x in vars(adapter).items() if n not in adapter.frozen and hasattr(x, "shape")}
        arrays = {
            n: jnp.asarray(rng.normal(size=getattr(adapter, n).shape), "float32") for n in sorted(names)
        }
        return dataclasses.replace(adapter, **arrays)

    return {path: new(adapter) for path, adapter in lora.items()}


def scanned(method, **options):
    options |= {} if method == "vera" else {"alpha": 5.0}
    return filled(lx.split(SCANNED, 2, method=method, layout=LAYOUT, **options)[1])


def tensors(folder):
    return read_tensors(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_scanned_layers_are_one_module_each(method, tmp_path):
    lora = scanned(method)
    lx.peft.save(tmp_path / "a", lora, mapping=MAPPING)
    plain = lx.delta(lx.peft.load(tmp_path / "a", UNROLLED))
    assert len(plain) == 2 * L
    for path, dw in lx.delta(lora).items():
        name = path.split("/")[1]
        for i in range(L):
            want = dw[i].reshape(dw.shape[1], -1).T
            np.testing.assert_allclose(plain[f"h.{i}.{name}_proj.weight"], want, atol=1e-5)
    back = lx.peft.load(tmp_path / "a", SCANNED, mapping=MAPPING, layout=LAYOUT)
    assert jax.tree.structure(back) == jax.tree.structure(lora) or method == "lokr"
    for path, dw in lx.delta(lora).items():
        np.testing.assert_allclose(back[path].delta(), dw, atol=1e-5)
    lx.peft.save(tmp_path / "b", back, mapping=MAPPING)
    one, two = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_scanned_layers_go_into_kohyas_files(method, tmp_path):
    lora = scanned(method)
    lx.kohya.save(tmp_path / "a.safetensors", lora, mapping=MAPPING)
    back = lx.kohya.load(tmp_path / "a.safetensors", SCANNED, mapping=MAPPING, layout=LAYOUT)
    for path, dw in lx.delta(lora).items():
        np.testing.assert_allclose(back[path].delta(), dw, atol=1e-5)


FUSED = {"attn.qkv.weight": jnp.ones((18, 8))}
PARTS = {n: {"kernel": jnp.ones((8, 6))} for n in "qkv"}
THIRDS = {f"attn.qkv[{i}/3]": f"{n}/kernel" for i, n in enumerate("qkv")}


def test_a_fused_loha_is_cut_into_parts_and_joined_again(tmp_path):
    lora = filled(lx.split(FUSED, 2, method="loha")[1])
    lx.peft.save(tmp_path / "a", lora)
    parts = lx.peft.load(tmp_path / "a", PARTS, mapping=THIRDS)
    for name, want in zip("qkv", jnp.split(lora["attn.qkv.weight"].delta(), 3), strict=True):
        np.testing.assert_allclose(parts[f"{name}/kernel"].delta(), want.T, atol=1e-5)
    lx.peft.save(tmp_path / "b", parts, mapping=THIRDS)
    one, two = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_lohas_of_their_own_are_joined_at_the_sum_of_ranks(tmp_path):
    """Of three leaves in one module of theirs, and of three modules in one leaf of ours."""
    lora = filled(lx.split(PARTS, {"q": 1, "*": 2}, method="loha")[1])
    want = np.concatenate([lora[f"{n}/kernel"].delta().T for n in "qkv"])
    lx.peft.save(tmp_path / "a", lora, mapping=THIRDS)
    whole = lx.peft.load(tmp_path / "a", FUSED)["attn.qkv.weight"]
    assert whole.rank == 5
    np.testing.assert_allclose(whole.delta(), want, atol=1e-4)

    lx.peft.save(tmp_path / "b", lora, mapping={n: f"{n}/kernel" for n in "qkv"})
    mapping = {n: f"qkv/kernel[{i}/3]" for i, n in enumerate("qkv")}
    params = {"qkv": {"kernel": jnp.ones((8, 18))}}
    whole = lx.peft.load(tmp_path / "b", params, mapping=mapping)["qkv/kernel"]
    np.testing.assert_allclose(whole.delta(), want.T, atol=1e-4)


@pytest.mark.parametrize("method", ["lokr", "vera"])
def test_parts_of_other_products_are_refused_with_the_remedy(method, tmp_path):
    lx.peft.save(tmp_path, filled(lx.split(FUSED, 2, method=method)[1]))
    with pytest.raises(lx.LoraError, match="(?s)fused weight, whose parts are no .*merge_and_unload"):
        lx.peft.load(tmp_path, PARTS, mapping=THIRDS)
    with pytest.raises(lx.LoraError, match="(?s)part of a fused weight.*attn.qkv.*lx.merge"):
        lx.peft.save(tmp_path, lx.split(PARTS, 2, method=method)[1], mapping=THIRDS)


@pytest.mark.parametrize("method", METHODS)
def test_experts_and_uneven_layers_are_refused_with_the_remedy(method, tmp_path):
    lora = scanned(method)
    experts = {"experts.down": jnp.ones((3, 8, 6))}
    layout = {"experts.down": lx.Layout((0,), (1,), (2,))}
    stacked = lx.split(experts, 2, method=method, layout=layout)[1]
    with pytest.raises(lx.LoraError, match=r"(?s)is a stack, such as experts.*experts\.\{e\}\.w1"):
        lx.peft.save(tmp_path, stacked, mapping={"experts.down=": "experts.down"})
    lx.peft.save(tmp_path, stacked, mapping={"experts.{e}.w": "experts.down"})  # and the remedy works
    lx.peft.save(tmp_path, lora, mapping=MAPPING)
    old = {k: v.copy() for k, v in tensors(tmp_path).items()}
    save_file({k: v for k, v in old.items() if ".1.q_proj" not in k}, tmp_path / "adapter_model.safetensors")
    facts = lx.peft.config(tmp_path)
    assert "h.1.q_proj" in facts["target_modules"]
    with pytest.raises(lx.LoraError, match="(?s)2 of 3 layers.*one leaf per layer"):
        lx.peft.load(tmp_path, SCANNED, mapping=MAPPING, layout=LAYOUT, strict=False)
    if method == "vera":
        return
    import json

    save_file(old, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts | {"alpha_pattern": {"h.2.q_proj": 7}}))
    with pytest.raises(lx.LoraError, match="(?s)several ranks or alphas.*one leaf per layer"):
        lx.peft.load(tmp_path, SCANNED, mapping=MAPPING, layout=LAYOUT)
