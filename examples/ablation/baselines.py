"""Two baselines beside LoRA: bottleneck adapters (Houlsby et al., 2019) and prefix tuning (Li & Liang, 2021).

Both are leaves beside the frozen ones, which `lx.split(params, full=...)` trains whole, and a model that uses
them.
"""

import jax
import jax.numpy as jnp
from study import minilm


def with_bottlenecks(params: dict, layers: int, size: int = 32) -> dict:
    """Adds two adapters per layer, ``x + gelu(x @ down + bias) @ up + bias``, which start at zero."""
    made = {}
    for i in range(2 * layers):
        n = params["layer_0"]["query"]["kernel"].shape[0]
        down = jax.random.normal(jax.random.key(i), (n, size)) / n**0.5
        made[f"{i}"] = {
            "down": down,
            "bias": jnp.zeros(size),
            "up": jnp.zeros((size, n)),
            "out_bias": jnp.zeros(n),
        }
    return {**params, "bottleneck": made}


def with_prefixes(params: dict, layers: int, length: int = 16) -> dict:
    """Adds keys and values of ``length`` positions to each layer, without the paper's network behind them."""
    n = params["layer_0"]["query"]["kernel"].shape[0]
    made = {}
    for i in range(layers):
        k, v = jax.random.normal(jax.random.key(i), (2, length, n))
        made[f"{i}"] = {"key": k, "value": 0.1 * v}
    return {**params, "prefix": made}


def logits(params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """`minilm.logits`, through the bottlenecks and prefixes that ``params`` has."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def narrow(x, i):
        if "bottleneck" not in params:
            return x
        p = params["bottleneck"][f"{i}"]
        return x + jax.nn.gelu(x @ p["down"] + p["bias"]) @ p["up"] + p["out_bias"]

    def with_prefix(x, i, name):
        if "prefix" not in params:
            return x
        p = params["prefix"][f"{i}"][name]
        return jnp.concatenate([jnp.broadcast_to(p, (len(x), *p.shape)), x], 1)

    table = params["embeddings"]
    x = table["word"][ids] + table["position"][: ids.shape[1]] + table["token_type"][0]
    x = norm(x, table["norm"])
    more = params["prefix"]["0"]["key"].shape[0] if "prefix" in params else 0
    seen = jnp.pad(mask, ((0, 0), (more, 0)), constant_values=1.0)
    hidden = jnp.where(seen, 0.0, -1e9)[:, None, None, :]
    for i in range(sum(name.startswith("layer_") for name in params)):
        p = params[f"layer_{i}"]
        q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
        k, v = with_prefix(k, i, "key"), with_prefix(v, i, "value")
        q, k, v = (y.reshape(*y.shape[:2], minilm.HEADS, -1) for y in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + hidden
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = norm(x + narrow(dense(mixed, p["out"]), 2 * i), p["norm_attention"])
        inner = jax.nn.gelu(dense(x, p["up"]), approximate=False)
        x = norm(x + narrow(dense(inner, p["down"]), 2 * i + 1), p["norm"])
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return pooled @ params["head"]["table"] + params["head"]["bias"]
