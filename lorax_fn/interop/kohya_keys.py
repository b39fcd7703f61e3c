"""What Kohya, LyCORIS, ComfyUI and diffusers call a module: their names are made from ours, never parsed.

In ``lora_unet_down_blocks_0_attentions_0_proj_in`` dots and underscores look the same. So all possible names
of every module of the tree are listed, and a file's keys are looked up among them.
"""

import re
from collections.abc import Iterable

from lorax_fn.core.errors import error

COMPONENTS = {  # component of a pipeline: what Kohya's keys begin with
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_COMFY = {"unet": "diffusion_model", "transformer": "diffusion_model"}
STYLES = ("kohya", "diffusers", "comfyui")

# The end of a key, and the part that it is.
SUFFIXES = {
    **dict.fromkeys(
        (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight"), "down"
    ),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight"), "up"),
    **dict.fromkeys((".lora_linear_layer.down.weight",), "down"),
    **dict.fromkeys((".lora_linear_layer.up.weight",), "up"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    **{
        f".{name}": name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{
        f".{name}": name
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    },
    ".lokr_t2": "lokr_t2",
}


def check_component(component: str) -> None:
    if component not in COMPONENTS:
        raise error(
            "unknown component.",
            got=repr(component),
            want=f"one of {', '.join(COMPONENTS)}",
            do='component="unet".',
        )


def is_of_another(key: str, component: str) -> bool:
    """Whether a key is of another component of the same pipeline, which this tree has nothing to do with."""
    own = (*COMPONENTS[component], f"{component}.", f"{_COMFY.get(component, component)}.")
    others = {
        prefix
        for name, prefixes in COMPONENTS.items()
        for prefix in (*prefixes, f"{name}.", f"{_COMFY.get(name, name)}.")
    }
    return not key.startswith(own) and key.startswith(tuple(others - set(own)))


def written_name(module: str, component: str, style: str) -> str:
    """What a module is called in a file of one style."""
    if style == "kohya":
        return COMPONENTS[component][0] + module.replace(".", "_")
    return f"{component if style == 'diffusers' else _COMFY.get(component, component)}.{module}"


def names_of(module: str, component: str) -> list[str]:
    """All names that a module may have in a file."""
    modules = [module]
    if component == "unet" and (older := ldm_name(module)) is not None:
        modules += older
    names = []
    for name in modules:
        names += [prefix + name.replace(".", "_") for prefix in COMPONENTS[component]]
        names += [f"{component}.{name}", f"{_COMFY.get(component, component)}.{name}", name]
    processor = re.fullmatch(r"(.*\.(?:attn1|attn2))\.(to_q|to_k|to_v|to_out)(\.0)?", module)
    if processor is not None:  # diffusers before PEFT
        names += [
            f"{component}.{processor[1]}.processor.{processor[2]}",
            f"{processor[1]}.processor.{processor[2]}",
        ]
    encoder = re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", module)
    if encoder is not None:
        names.append(f"{component}.{encoder[1]}.to_{encoder[2]}")
    return list(dict.fromkeys(names))


def split_key(key: str) -> tuple[str, str] | None:
    """``(module's name, part)``, or None where the end says nothing."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if key.endswith(suffix):
            return key[: -len(suffix)], SUFFIXES[suffix]
    return None


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def ldm_name(module: str) -> list[str] | None:
    """The name of a UNet's module in the original code, two layers in each block: ``input_blocks.4.1...``."""
    if module in _TOP:
        return [_TOP[module]]
    match = re.fullmatch(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
        module,
    )
    if match is None:
        return None
    side, block, kind, j, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    if side == "mid":
        return [f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"]
    if kind == "downsamplers":
        return [f"input_blocks.{3 * block + 3}.0.op"]
    if kind == "upsamplers":  # after the attention where there is one
        return [f"output_blocks.{3 * block + 2}.{k}.conv" for k in (1, 2)]
    inner = 1 if kind == "attentions" else 0
    number = 3 * block + j + (1 if side == "down" else 0)
    return [f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}.{rest}"]


def known_ends() -> Iterable[str]:
    """The ends of keys that are read, for error messages."""
    return sorted(SUFFIXES)
