"""Checkpoints of tiny decoders, as NumPy draws them, and the logits that transformers computes with them.

The logits are in ``decoder_logits.json``: `test_presets.py` compares them with transformers, and those of
google-tunix and gemma, each in an environment of its own, must be the same.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

D, F, H, K, V, L, HD = 16, 24, 4, 2, 19, 2, 8
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
FILE = pathlib.Path(__file__).parent / "decoder_logits.json"
CASES = {  # name: family, number of key and value heads, whether the head is the embedding
    "llama": ("llama", K, False),
    "llama tied": ("llama", K, True),
    "qwen3": ("qwen3", K, True),
    "gemma": ("gemma", 1, True),
    "gemma with as many keys": ("gemma", H, True),
    "gemma2": ("gemma2", K, True),
    "gemma2 with as many keys": ("gemma2", H, True),
    "gemma3": ("gemma3", K, True),
}


def tensors_of(case):
    """``{name: array}`` as Hugging Face's checkpoints have them."""
    family, keys, tied = CASES[case]
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family in ("gemma2", "gemma3"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(L):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj": (H * HD if n == "q" else keys * HD, D) for n in "qkv"}
        shapes |= {f"{at}.self_attn.o_proj": (D, H * HD), f"{at}.mlp.down_proj": (D, F)}
        shapes |= {f"{at}.mlp.{n}_proj": (F, D) for n in ("gate", "up")} | {f"{at}.{n}": (D,) for n in norms}
        if family in ("qwen3", "gemma3"):
            shapes |= {f"{at}.self_attn.{n}_norm": (HD,) for n in "qk"}
    if not tied:
        shapes["lm_head"] = (V, D)
    rng = np.random.default_rng(0)
    made = {}
    for name in sorted(shapes):
        start = 0.0 if len(shapes[name]) > 1 or family.startswith("gemma") else 1.0
        made[f"{name}.weight"] = (start + 0.1 * rng.normal(size=shapes[name])).astype(np.float32)
    return made


def write(case, folder):
    save_file(tensors_of(case), folder / "model.safetensors", {"format": "pt"})


def logits_of(case):
    return np.array(json.loads(FILE.read_text())[case], np.float32)


def check_tree(case, tree, like, prefix, apply, folder):
    """The preset fills a tree of other code with the checkpoint, its logits are right, and all goes back."""
    import lorax_fn as lx
    from lorax_fn.interop.files import read_tensors

    write(case, folder)
    mapping = lx.mappings.preset(CASES[case][0], tree, prefix=prefix)
    params = lx.huggingface.load(folder, like, mapping=mapping)
    np.testing.assert_allclose(np.asarray(apply(params), np.float32), logits_of(case), atol=2e-5)
    lx.huggingface.save(folder / "back", params, mapping=mapping)
    old, new = (read_tensors(f / "model.safetensors") for f in (folder, folder / "back"))
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)
