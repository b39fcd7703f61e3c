"""One token of each row through a Llama with a cache of keys and values, each row with its own adapter.

The model is a plain function of one row and one token; it knows nothing of adapters or batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from models.llama import LlamaConfig, rope_angles

import lorax_fn as lx


def new_cache(config: LlamaConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """Keys and values ``[rows, layers, length, K, d]``, all zero."""
    shape = (rows, config.layers, length, config.kv_heads, config.head_width)
    return {name: jnp.zeros(shape) for name in "kv"}


def next_logits(config: LlamaConfig, params: Any, cache: Any, token: Any, position: Any) -> tuple[Any, Any]:
    """Logits ``[vocab]`` after one token at ``position``, and the cache with its keys and values.

    ``params`` are those of `models.llama.Llama`; ``cache`` is that of one row, ``[layers, length, K, d]``.
    """
    c, p = config, params["params"]
    length = cache["k"].shape[1]
    angles = rope_angles(length, c.head_width, c.rope_theta)[position]

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + c.norm_eps) * scale

    def rotate(x):  # [heads, d]
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def layer(x, inputs):
        w, keys, values = inputs
        h = norm(x, w["attn_norm"]["scale"])
        q, k, v = (h @ w["attn"][name]["kernel"] for name in "qkv")
        keys = keys.at[position].set(rotate(k.reshape(c.kv_heads, -1)))
        values = values.at[position].set(v.reshape(c.kv_heads, -1))
        q = rotate(q.reshape(c.heads, -1)).reshape(c.kv_heads, -1, c.head_width)
        scores = jnp.einsum("kgd,skd->kgs", q, keys) * c.head_width**-0.5
        seen = (jnp.arange(length) <= position)[None, None]
        share = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
        x = x + jnp.einsum("kgs,skd->kgd", share, values).reshape(-1) @ w["attn"]["o"]["kernel"]
        h = norm(x, w["mlp_norm"]["scale"])
        inner = jax.nn.silu(h @ w["mlp"]["gate"]["kernel"]) * (h @ w["mlp"]["up"]["kernel"])
        return x + inner @ w["mlp"]["down"]["kernel"], {"k": keys, "v": values}

    x = p["embed"]["embedding"][token]
    x, cache = jax.lax.scan(layer, x, (p["layers"], cache["k"], cache["v"]))
    return norm(x, p["norm"]["scale"]) @ p["embed"]["embedding"].T, cache


def make_step(config: LlamaConfig) -> Any:
    """``step(params, bank, cache, slots, tokens, positions, temperatures, key) -> (tokens, cache)``, jitted.

    One program for all rows, whatever adapters they use: ``slots [rows]`` are data, -1 is the base. A
    temperature of 0 takes the likeliest token. The cache is donated.
    """
    apply = lx.adapt(lambda params, *args: next_logits(config, params, *args), fallback="error")

    def step(params, bank, cache, slots, tokens, positions, temperatures, key):
        def row(slot, cache, token, position, temperature, key):
            logits, cache = apply(params, bank[slot], cache, token, position)
            warm = jnp.where(temperature > 0, temperature, 1.0)
            drawn = jax.random.categorical(key, logits / warm)
            return jnp.where(temperature > 0, drawn, logits.argmax()).astype(jnp.int32), cache

        keys = jax.random.split(key, slots.shape[0])
        return jax.vmap(row)(slots, cache, tokens, positions, temperatures, keys)

    return jax.jit(step, donate_argnums=2)
