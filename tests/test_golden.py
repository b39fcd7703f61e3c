"""Adapters built by hand from PEFT's tensors, against PEFT's own merged weights and its PiSSA start.

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


def adapted_modules(case):
    """``{module: (weight, adapter, PEFT's merged weight)}``, all with inputs before outputs."""
    config = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    base = tensors(f"base_{'conv' if case == 'conv' else 'net'}.safetensors")
    merged, saved = tensors(f"{case}/merged.safetensors"), tensors(f"{case}/adapter_model.safetensors")
    modules = {}
    for key in saved:
        if ".lora_A." not in key and not key.endswith(".lora_embedding_A"):
            continue
        name = key.removeprefix(PREFIX).rpartition(".lora_")[0]
        embedding = key.endswith("_A")
        # Conv1D of GPT-2 ("c") and embeddings store (in, out), everything else (out, in)
        stored = (lambda x: jnp.asarray(x)) if embedding or name.endswith(".c") else turned
        w, target = stored(base[f"{name}.weight"]), stored(merged[f"{name}.weight"])
        b = saved[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        layout = lx.Layout((), tuple(range(w.ndim - 1)), (w.ndim - 1,))
        facts = (turned(saved[key]), turned(b).reshape(b.shape[1], -1))
        facts += (float(config["lora_alpha"]), config["r"], "lora", layout)
        magnitude = saved.get(f"{PREFIX}{name}.lora_magnitude_vector")
        adapter = lx.LoRA(*facts) if magnitude is None else lx.DoRA(*facts, magnitude=jnp.asarray(magnitude))
        modules[name] = (w, adapter, target)
    return modules


COUNTS = {"linear_r2": 6, "dora_linear": 9, "conv": 3, "embedding": 4, "conv1d_gpt2": 3, "all_linear": 21}


@pytest.mark.parametrize("case", COUNTS)
def test_merged_weights_are_those_of_peft(case):
    modules = adapted_modules(case)
    assert len(modules) == COUNTS[case]
    params = {name: w for name, (w, _, _) in modules.items()}
    lora = {name: adapter for name, (_, adapter, _) in modules.items()}
    for name, got in lx.merge(params, lora).items():
        w, _, want = modules[name]
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=name)
        assert np.abs(np.asarray(want) - np.asarray(w)).max() > 1e-3, name


@pytest.mark.parametrize("case", COUNTS)
def test_adapted_products_are_those_of_weights_merged_by_peft(case):
    for name, (w, adapter, merged) in adapted_modules(case).items():
        if w.ndim == 2:
            x = np.random.default_rng(0).normal(size=(5, w.shape[0])).astype(np.float32)

            def fn(params, x):
                return x @ params["w"]
        else:
            x = np.random.default_rng(0).normal(size=(2, 6, 5)[: w.ndim - 1] + w.shape[-2:-1])
            x = x.astype(np.float32)
            dims = ("NHWC", "HWIO", "NHWC") if w.ndim == 4 else ("NWC", "WIO", "NWC")
            stride = (2,) * (w.ndim - 2)

            def fn(params, x, dims=dims, stride=stride):
                return lax.conv_general_dilated(x, params["w"], stride, "SAME", dimension_numbers=dims)

        got = lx.adapt(fn, fallback="error")({"w": w}, {"w": adapter}, x)
        want = fn({"w": merged}, x)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * 4, err_msg=name)


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


def conv_net(params, biases, x):
    """The network of the conv data: three convolutions, the middle one 1 x 1, with tanh between."""
    nchw, nch = ("NCHW", "HWIO", "NCHW"), ("NCH", "HIO", "NCH")
    x = lax.conv_general_dilated(x, params["conv"], (1, 1), [(1, 1)] * 2, dimension_numbers=nchw)
    x = jnp.tanh(x + biases["conv"][None, :, None, None])
    x = lax.conv_general_dilated(x, params["pw"], (1, 1), "VALID", dimension_numbers=nchw)
    x = jnp.tanh(x + biases["pw"][None, :, None, None]).reshape(2, 8, 20)
    x = lax.conv_general_dilated(x, params["conv1"], (2,), "VALID", dimension_numbers=nch)
    return x + biases["conv1"][None, :, None]


def test_outputs_of_the_adapted_network_are_those_of_peft():
    modules, base = adapted_modules("conv"), tensors("base_conv.safetensors")
    params = {name: w for name, (w, _, _) in modules.items()}
    lora = {name: adapter for name, (_, adapter, _) in modules.items()}
    biases = {name: jnp.asarray(base[f"{name}.bias"]) for name in modules}
    io, out = np.load(GOLDEN / "base_conv_io.npz"), np.load(GOLDEN / "conv" / "out.npz")
    x = jnp.asarray(io["x"])
    np.testing.assert_allclose(conv_net(params, biases, x), io["y"], rtol=0, atol=TOLERANCE)
    got = lx.adapt(conv_net, fallback="error")(params, lora, biases, x)
    np.testing.assert_allclose(got, out["y"], rtol=0, atol=TOLERANCE)
    merged = conv_net(lx.merge(params, lora), biases, x)
    np.testing.assert_allclose(merged, out["y_merged"], rtol=0, atol=TOLERANCE)
    assert np.abs(out["y"] - io["y"]).max() > 1e-3
