"""Adapters built by hand from PEFT's tensors, against PEFT's merged weights, outputs and PiSSA start.

The data were made by running PEFT and are no part of the repository; without them this file is skipped.
"""

import json
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no PEFT golden data beside the repository")
TOLERANCE = 2e-6
PREFIX = "base_model.model."


def tensors(path):
    """The float32 tensors of a safetensors file: an 8-byte length, a JSON header, then the bytes."""
    raw = (GOLDEN / path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    assert {fact["dtype"] for fact in header.values()} == {"F32"}
    return {
        name: np.frombuffer(body[slice(*fact["data_offsets"])], np.float32).reshape(fact["shape"])
        for name, fact in header.items()
    }


def turned(x):
    """Torch's (out, in, *window) as JAX's (*window, in, out)."""
    return jnp.asarray(np.moveaxis(x, (0, 1), (-1, -2)) if x.ndim > 2 else x.T)


def test_pissa_starts_where_peft_starts():
    """Singular vectors have a sign each: residuals, products and column norms do not."""
    saved, base = tensors("init_pissa/tensors.safetensors"), tensors("base_net.safetensors")
    names = sorted(key.removesuffix(".W_res") for key in saved if key.endswith(".W_res"))
    assert len(names) == 6
    params0 = {name: turned(base[f"{name}.weight"]) for name in names}
    scale, rank = float(saved[f"{names[0]}.scaling"]), len(saved[f"{names[0]}.A"])
    layout = {"*": lx.Layout((), (0,), (1,))}
    params, lora = lx.split(params0, rank, alpha=scale * rank, init="pissa", targets="*", layout=layout)
    for name in names:
        a, b = turned(saved[f"{name}.A"]), turned(saved[f"{name}.B"])
        np.testing.assert_allclose(params[name], turned(saved[f"{name}.W_res"]), atol=TOLERANCE)
        np.testing.assert_allclose(lora[name].a @ lora[name].b, a @ b, atol=TOLERANCE)
        np.testing.assert_allclose(
            np.linalg.norm(lora[name].a, axis=0), np.linalg.norm(a, axis=0), atol=TOLERANCE
        )


# Whole networks: the adapted one and the merged one against the outputs that PEFT's had ------------------


def net(params, ids):
    """The network of most of the data, token by token: three layers and a head, with tanh only."""

    def dense(name, x):
        bias = params.get(f"{name}.bias")
        return x @ params[f"{name}.weight"] + (0.0 if bias is None else bias[None, None])

    x = params["model.embed.weight"][ids]
    for i in range(3):
        q, k, v, o = (f"model.layers.{i}.attn.{name}_proj" for name in "qkvo")
        x = x + dense(q, x) + dense(o, jnp.tanh(dense(k, x) * dense(v, x)))
        x = x + dense(f"model.layers.{i}.down", jnp.tanh(dense(f"model.layers.{i}.up", x)))
        x = x + dense(f"model.layers.{i}.c", x)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    scale, shift = (params[f"model.norm.{name}"][None, None] for name in ("weight", "bias"))
    return dense("model.head", x * scale + shift)


def moe(params, x):
    """Three experts, each with a batch of its own."""
    h = x @ params["lin.weight"] + params["lin.bias"][None, None]
    return jnp.tanh(h @ params["experts.gate_up_proj"]) @ params["experts.down_proj"]


def conv(params, x):
    """Three convolutions, the middle one 1 x 1, with tanh between."""
    nchw, nch = ("NCHW", "HWIO", "NCHW"), ("NCH", "HIO", "NCH")
    x = lax.conv_general_dilated(x, params["conv.weight"], (1, 1), [(1, 1)] * 2, dimension_numbers=nchw)
    x = jnp.tanh(x + params["conv.bias"][None, :, None, None])
    x = lax.conv_general_dilated(x, params["pw.weight"], (1, 1), "VALID", dimension_numbers=nchw)
    x = jnp.tanh(x + params["pw.bias"][None, :, None, None]).reshape(2, 8, 20)
    x = lax.conv_general_dilated(x, params["conv1.weight"], (2,), "VALID", dimension_numbers=nch)
    return x + params["conv1.bias"][None, :, None]


NETWORKS = {"net": net, "moe": moe, "conv": conv}
# case: its base, and how many leaves it adapts
CASES = {
    "linear_r2": ("net", 6),
    "all_linear": ("net", 21),
    "dora_linear": ("net", 9),
    "embedding": ("net", 4),
    "conv1d_gpt2": ("net", 3),
    "lora_bias": ("net", 6),
    "modules_to_save": ("net", 10),
    "conv": ("conv", 3),
    "experts_one": ("moe", 2),
}


def params_of(path):
    """Weights with inputs before outputs, by torch's names; all else as torch has it."""
    return {
        name: turned(x)
        if x.ndim > 1 and name.endswith(".weight") and not name.endswith(("embed.weight", ".c.weight"))
        else jnp.asarray(x)
        for name, x in tensors(path).items()
    }


def adapters(case):
    """Every adapter of a case by the name of its parameter."""
    config = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    base = tensors(f"base_{CASES[case][0]}.safetensors")
    saved = {key.removeprefix(PREFIX): x for key, x in tensors(f"{case}/adapter_model.safetensors").items()}
    alpha, rank, lora = float(config["lora_alpha"]), config["r"], {}
    for key, x in saved.items():
        name, _, part = key.rpartition(".lora_")
        if part == "A.weight" and name == "experts":
            lora["experts.down_proj"] = expert_adapter(x, saved["experts.lora_B.weight"], alpha, rank)
        elif part in ("A.weight", "embedding_A"):
            b = saved[f"{name}.lora_{part.replace('A', 'B')}"]
            layout = lx.Layout((), tuple(range(x.ndim - 1)), (x.ndim - 1,))
            facts = (turned(x), turned(b).reshape(b.shape[1], -1), alpha, rank, "lora", layout)
            magnitude = saved.get(f"{name}.lora_magnitude_vector")
            lora[f"{name}.weight"] = (
                lx.LoRA(*facts) if magnitude is None else lx.DoRA(*facts, magnitude=jnp.asarray(magnitude))
            )
        elif part == "B.bias":  # of PEFT's lora_bias, scaled as B is
            lora[f"{name}.bias"] = lx.Full(jnp.asarray(base[f"{name}.bias"] + alpha / rank * x))
        elif not name:  # modules_to_save
            lora[key] = lx.Full(turned(x) if x.ndim > 1 else jnp.asarray(x))
    return lora


def expert_adapter(a, b, alpha, rank):
    """PEFT stores A expert-major and B rank-major, and takes a parameter for [expert, out, in]."""
    a = np.moveaxis(a.reshape(-1, rank, a.shape[1]), 1, 2)
    b = np.transpose(b.reshape(b.shape[0], rank, -1), (2, 1, 0))
    return lx.LoRA(jnp.asarray(a), jnp.asarray(b), alpha, rank, "lora", lx.Layout((0,), (2,), (1,)))


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_and_outputs_are_those_of_peft(case):
    base, count = CASES[case]
    fn, params, lora = NETWORKS[base], params_of(f"base_{base}.safetensors"), adapters(case)
    io, out = np.load(GOLDEN / f"base_{base}_io.npz"), np.load(GOLDEN / case / "out.npz")
    assert len(lora) == count and np.abs(out["y"] - io["y"]).max() > 1e-3
    np.testing.assert_allclose(fn(params, io["x"]), io["y"], rtol=0, atol=TOLERANCE)
    got = lx.adapt(fn, fallback="error")(params, lora, io["x"])
    np.testing.assert_allclose(got, out["y"], rtol=0, atol=TOLERANCE)
    merged = lx.merge(params, lora)
    np.testing.assert_allclose(fn(merged, io["x"]), out["y_merged"], rtol=0, atol=TOLERANCE)
    for name, want in params_of(f"{case}/merged.safetensors").items():
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=TOLERANCE, err_msg=name)
        assert (np.abs(merged[name] - params[name]).max() > 1e-3) == (name in lora), name
