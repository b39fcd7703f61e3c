"""Files that PEFT itself wrote: loaded as they are, they give PEFT's merged weights and outputs, and go back.

The data were made by running PEFT and are no part of the repository; without them this file is skipped.
"""

import filecmp
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import CASES, GOLDEN, NETWORKS, turned

import lorax_fn as lx
from lorax_fn.interop.files import read_tensors

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no PEFT golden data beside the repository")


def base_of(case):
    return {
        name: jnp.asarray(x)
        for name, x in read_tensors(GOLDEN / f"base_{CASES[case][0]}.safetensors").items()
    }


def as_stored(fn):
    """The network on weights as torch has them: turned inside the function."""

    def run(params, x):
        def kernel(name, w):
            plain = w.ndim < 2 or not name.endswith(".weight") or name.endswith(("embed.weight", ".c.weight"))
            if plain:
                return w
            return jnp.moveaxis(w, (0, 1), (-1, -2)) if w.ndim > 2 else w.T

        return fn({name: kernel(name, w) for name, w in params.items()}, x)

    return run


@pytest.mark.parametrize("case", CASES)
def test_loaded_files_give_the_weights_and_outputs_of_peft(case):
    base, count = CASES[case]
    params = base_of(case)
    io, out = np.load(GOLDEN / f"base_{base}_io.npz"), np.load(GOLDEN / case / "out.npz")
    lora = lx.peft.load(GOLDEN / case, params)
    assert len(lora) == count
    merged = lx.merge(params, lora)
    for name, want in read_tensors(GOLDEN / case / "merged.safetensors").items():
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=1e-6, err_msg=name)
        assert (np.abs(merged[name] - params[name]).max() > 1e-3) == (name in lora), name
    fn = as_stored(NETWORKS[base])
    np.testing.assert_allclose(lx.adapt(fn)(params, lora, io["x"]), out["y"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(fn(merged, io["x"]), out["y_merged"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_again_is_the_same_file(case, tmp_path):
    params = base_of(case)
    first, theirs = lx.peft.load(GOLDEN / case, params), lx.peft.config(GOLDEN / case)
    lx.peft.save(tmp_path / "a", first, params=params, config=theirs)
    second = lx.peft.load(tmp_path / "a", params)
    lx.peft.save(tmp_path / "b", second, params=params, config=lx.peft.config(tmp_path / "a"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False), name
    if case == "lora_bias":  # becomes a bias trained whole, which is the same model
        return
    was, now = (read_tensors(f / "adapter_model.safetensors") for f in (GOLDEN / case, tmp_path / "a"))
    assert was.keys() == now.keys() and all(np.array_equal(was[k], now[k]) for k in was)
    assert lx.peft.config(tmp_path / "a") == theirs


def test_a_mapping_takes_the_same_file_into_another_tree():
    """Scanned layers, inputs before outputs, heads apart: dW is the same, on the axes of that tree."""
    case = "all_linear"
    base = base_of(case)
    names = {"q_proj": (2, 4), "k_proj": (2, 2), "v_proj": (2, 2)}

    def stacked(module, shape=None):
        ws = [turned(base[f"model.layers.{i}.{module}.weight"]) for i in range(3)]
        return jnp.stack([w.reshape(w.shape[0], *shape) if shape else w for w in ws])

    params = {"layers": {n: {"kernel": stacked(f"attn.{n}", s)} for n, s in names.items()}}
    params["layers"] |= {"o": {"kernel": stacked("attn.o_proj").reshape(3, 2, 2, 8)}}
    params["layers"] |= {n: {"kernel": stacked(n)} for n in ("up", "down")}
    params["layers"]["c"] = {"kernel": jnp.stack([base[f"model.layers.{i}.c.weight"] for i in range(3)])}
    mapping = {f"model.layers.{{i}}.attn.{n}": f"layers/{n}/kernel" for n in names}
    mapping |= {f"model.layers.{{i}}.{n}": f"layers/{n}/kernel" for n in ("up", "down")}
    mapping |= {"model.layers.{i}.attn.o_proj": "layers/o/kernel", "model.layers.{i}.c^T": "layers/c/kernel"}
    layout = {n: lx.Layout((0,), (1,), (2, 3)) for n in names} | {"o": lx.Layout((0,), (1, 2), (3,))}
    lora = lx.peft.load(GOLDEN / case, params, mapping=mapping, layout=layout)
    plain = lx.delta(lx.peft.load(GOLDEN / case, base))
    for name, dw in lx.delta(lora).items():
        module = name.split("/")[1]
        owner = {"o": "attn.o_proj", **{n: f"attn.{n}" for n in names}}.get(module, module)
        for i in range(3):
            want = plain[f"model.layers.{i}.{owner}.weight"]
            want = want if module == "c" else want.T
            np.testing.assert_allclose(dw[i].reshape(want.shape), want, atol=1e-6, err_msg=name)
    assert {x.rank for x in lora.values()} == {
        json.loads((GOLDEN / case / "adapter_config.json").read_text())["r"]
    }


def test_the_other_tree_writes_the_same_tensors(tmp_path):
    case = "linear_r2"
    base = base_of(case)
    params = {
        "layers": {
            n: jnp.stack([base[f"model.layers.{i}.attn.{n}_proj.weight"].T for i in range(3)]) for n in "qv"
        }
    }
    mapping = {f"model.layers.{{i}}.attn.{n}_proj": f"layers/{n}" for n in "qv"}
    layout = {"*": lx.Layout((0,), (1,), (2,))}
    lora = lx.peft.load(GOLDEN / case, params, mapping=mapping, layout=layout)
    lx.peft.save(tmp_path, lora, mapping=mapping)
    was, now = (read_tensors(f / "adapter_model.safetensors") for f in (GOLDEN / case, tmp_path))
    assert was.keys() == now.keys() and all(np.array_equal(was[k], now[k]) for k in was)
