"""Files for image programs against diffusers' own loader, on a tiny random UNet and text encoder."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

torch = pytest.importorskip("torch", reason="torch is not installed: make test-peft", exc_type=ImportError)
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.extra_env, pytest.mark.filterwarnings("ignore")]
LINEAR = ("to_q", "to_out.0", "proj_in", "ff.net.2", "time_emb_proj")
CONV = ("conv1", "downsamplers.0.conv", "conv_in")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4, use_linear_projection=True,
    )  # fmt: skip


def text_encoder():
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=19
    )
    return transformers.CLIPTextModel(config)


def params_of(model):
    return {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}


def adapters(params, ends, **options):
    def wanted(path, w):
        return path.removesuffix(".weight").endswith(ends) and w.ndim > 1

    conv, linear = lx.Layout((), (1, 2, 3), (0,)), lx.Layout((), (1,), (0,))
    layout = {path: conv if w.ndim == 4 else linear for path, w in params.items() if wanted(path, w)}
    _, lora = lx.split(
        params,
        rank={re.compile(r".*(to_q|q_proj)\.weight"): 3, "*": 2},
        alpha=5.0,
        targets=wanted,
        layout=layout,
        **options,
    )
    leaves, tree = jax.tree.flatten(lora)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) * 0.1 for x in leaves])


def into_diffusers(path, model, component):
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    if component == "unet":
        pipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    else:
        pipeline.load_lora_into_text_encoder(state, alphas, model, prefix=component, metadata=metadata)
    return {
        name.removesuffix(".lora_A.default_0.weight"): module.scaling["default_0"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def check(model, params, lora, atol=1e-5):
    """Every weight that diffusers merges is ours."""
    model.fuse_lora() if hasattr(model, "fuse_lora") else [
        m.merge() for m in model.modules() if hasattr(m, "lora_A")
    ]
    merged = lx.merge(params, lora)
    seen = 0
    for name, p in model.named_parameters():
        path = name.replace(".base_layer.", ".")
        if path in merged:
            np.testing.assert_allclose(merged[path], p.detach().numpy(), atol=atol, err_msg=path)
            seen += path in lora
    assert seen == len(lora)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_diffusers_loads_a_unet_file_of_ours(style, tmp_path):
    model = unet()
    params = params_of(model)
    lora = adapters(params, LINEAR + CONV if style == "diffusers" else LINEAR)
    lx.kohya.save(tmp_path / "a.safetensors", lora, params=params, style=style)
    again = lx.kohya.load(tmp_path / "a.safetensors", params)
    for path, x in lora.items():
        np.testing.assert_allclose(lx.delta(again)[path], x.delta(), atol=1e-6)
    into_diffusers(tmp_path / "a.safetensors", model, "unet")
    check(model, params, lora)


def test_diffusers_loads_a_text_encoder_file_of_ours(tmp_path):
    model = text_encoder()
    params = params_of(model)
    lora = adapters(params, ("q_proj", "v_proj", "out_proj", "fc1"))
    lx.kohya.save(tmp_path / "a.safetensors", lora, component="text_encoder", params=params)
    into_diffusers(tmp_path / "a.safetensors", model, "text_encoder")
    check(model, params, lora)


def test_a_file_of_diffusers_loads_here(tmp_path):
    peft = pytest.importorskip("peft")
    model = unet()
    params = params_of(model)
    model.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v", "conv1"], rank_pattern={"to_q": 3})
    )
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.1
    from peft.utils import get_peft_model_state_dict

    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=json.loads(json.dumps(config, default=str)),
    )
    lora = lx.kohya.load(tmp_path / "pytorch_lora_weights.safetensors", params)
    check(model, params, lora)
