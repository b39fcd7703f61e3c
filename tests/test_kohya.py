"""Files for image programs: key layouts, LyCORIS' methods, alphas and scales, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors
from lorax_fn.interop.kohya_keys import ldm_name

Q, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.2.conv1"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
PARAMS = {
    f"{Q}.weight": jnp.ones((8, 6)),
    f"{OUT}.weight": jnp.ones((8, 8)),
    f"{CONV}.weight": jnp.ones((4, 6, 3, 3)),
}


def rng():
    return np.random.default_rng(0)


def normal(*shape):
    return rng().normal(size=shape).astype(np.float32)


def lora_of(**options):
    layout = {"conv1": lx.Layout((), (1, 2, 3), (0,))}
    _, lora = lx.split(PARAMS, 2, alpha=3.0, targets=["to_q", "to_out", "conv1"], layout=layout, **options)
    return jax.tree.map(lambda x: x + normal(*x.shape), lora)


def loaded(tensors, path, **options):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return lx.kohya.load(path, PARAMS, **options)


@pytest.mark.parametrize("style", ["kohya", "diffusers", "comfyui"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_every_style_and_method_goes_out_and_in(tmp_path, style, method):
    lora = lora_of(method=method)
    file = tmp_path / "a.safetensors"
    if style == "diffusers" and method in ("loha", "lokr"):
        with pytest.raises(lx.LoraError, match="reads neither LoHa"):
            lx.kohya.save(file, lora, params=PARAMS, style=style)
        return
    lx.kohya.save(file, lora, params=PARAMS, style=style)
    back = lx.kohya.load(file, PARAMS)
    want, got = lx.merge(PARAMS, lora), lx.merge(PARAMS, back)
    for path in PARAMS:
        np.testing.assert_allclose(got[path], want[path], atol=2e-5)
    lx.kohya.save(tmp_path / "b.safetensors", back, params=PARAMS, style=style)
    one, other = read_tensors(file), read_tensors(tmp_path / "b.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=0 if method != "lokr" else 1e-5)


def test_keys_and_alphas_are_those_of_kohya(tmp_path):
    lora = lora_of(scaling="rslora")
    lx.kohya.save(tmp_path / "a.safetensors", lora, params=PARAMS)
    tensors = read_tensors(tmp_path / "a.safetensors")
    name = "lora_unet_up_blocks_1_resnets_2_conv1"
    assert tensors[f"{name}.lora_down.weight"].shape == (2, 6, 3, 3)
    assert tensors[f"{name}.lora_up.weight"].shape == (4, 2, 1, 1)
    assert tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] / 2 == pytest.approx(
        3.0 / 2**0.5
    )


def test_all_key_layouts_give_one_change(tmp_path):
    down, up = normal(2, 6), normal(8, 2)
    want = 1.5 * up @ down  # alpha 3 over rank 2
    names = {
        "lora_unet_" + Q.replace(".", "_"): ("lora_down.weight", "lora_up.weight"),
        "lora_unet_" + ldm_name(Q)[0].replace(".", "_"): ("lora_down.weight", "lora_up.weight"),
        f"diffusion_model.{Q}": ("lora_down.weight", "lora_up.weight"),
        f"diffusion_model.{ldm_name(Q)[0]}": ("lora_A.weight", "lora_B.weight"),
        f"unet.{Q}": ("lora.down.weight", "lora.up.weight"),
        Q: ("lora_A.weight", "lora_B.weight"),
    }
    for i, (name, (a, b)) in enumerate(names.items()):
        tensors = {f"{name}.{a}": down, f"{name}.{b}": up, f"{name}.alpha": np.float32(3.0)}
        (got,) = lx.delta(loaded(tensors, tmp_path / f"{i}.safetensors")).values()
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
    old = f"unet.{Q.replace('attn1.to_q', 'attn1.processor.to_q_lora')}"
    lora = loaded({f"{old}.down.weight": down, f"{old}.up.weight": up}, tmp_path / "o.safetensors")
    (got,) = lx.delta(lora).values()
    np.testing.assert_allclose(got, up @ down, atol=1e-5)  # without alpha the scale is 1


def test_a_core_in_the_middle_is_multiplied_in(tmp_path):
    name = "lora_unet_" + CONV.replace(".", "_")
    down, mid, up = normal(2, 6, 1, 1), normal(2, 2, 3, 3), normal(4, 2, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    (got,) = lx.delta(loaded(tensors, tmp_path / "a.safetensors")).values()
    want = np.einsum("or,rshw,sn->onhw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_lokr_of_two_whole_factors_has_scale_one_whatever_its_alpha(tmp_path):
    name = "lora_unet_" + OUT.replace(".", "_")
    w1, w2 = normal(2, 2), normal(4, 4)
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": np.float32(7.0)}
    (got,) = lx.delta(loaded(tensors, tmp_path / "a.safetensors")).values()
    np.testing.assert_allclose(got, np.kron(w1, w2), atol=1e-5)


def test_components_share_a_file(tmp_path):
    file = tmp_path / "a.safetensors"
    text = {"encoder.layers.0.self_attn.q_proj.weight": jnp.ones((4, 4))}
    lx.kohya.save(file, lora_of(), params=PARAMS)
    encoder = lx.split(text, 1)[1]
    lx.kohya.save(file, encoder, params=text, component="text_encoder", keep_others=True)
    assert len(lx.kohya.load(file, PARAMS)) == 3
    assert len(lx.kohya.load(file, text, component="text_encoder")) == 1


def pair(name, factors):
    return {f"{name}.lora_down.weight": factors[0], f"{name}.lora_up.weight": factors[1]}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda n, t: {f"{n}.lora_down.weight": t[0]}, "other half"),
        (lambda n, t: pair(n, t) | {f"{n}.lora_up.weight": normal(7, 2)}, r"shape: .*\(7, 2\)"),
        (lambda n, t: pair(f"{n}x", t), "(?s)extra: .*nearest"),
        (lambda n, t: pair(n, (t[0] * np.nan, t[1])), "not finite"),
        (lambda n, t: {f"{n}.glora_a": t[0]}, "known layout"),
        (lambda n, t: pair(n, t) | {f"{n}.dora_scale": np.ones((1, 6), "f4")}, "norms by inputs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, edit, match):
    name = "lora_unet_" + Q.replace(".", "_")
    with pytest.raises(lx.LoraError, match=match):
        loaded(edit(name, (normal(2, 6), normal(8, 2))), tmp_path / "a.safetensors")


def test_what_has_no_form_in_such_a_file_is_refused(tmp_path):
    whole = {f"{Q}.weight": lx.Full(jnp.ones((8, 6)))}
    with pytest.raises(lx.LoraError, match="alone"):
        lx.kohya.save(tmp_path / "a.safetensors", lora_of(exclude="to_q") | whole, params=PARAMS)
    with pytest.raises(lx.LoraError, match="component"):
        lx.kohya.load(tmp_path / "a.safetensors", PARAMS, component="vae")
