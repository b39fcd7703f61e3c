"""A BERT in Flax Linen, and the reader that fills it: all-MiniLM-L6-v2 is one.

The model is plain Linen without any code for LoRA. The layers are scanned, so each kernel is one array
``[layers, in, out]``. `tests/test_example_models.py` compares it with the `BertModel` of transformers.

Shapes: `B` texts, `T` tokens, `D` width.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import torch_layers


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT; the defaults are those of all-MiniLM-L6-v2.

    Args:
      vocab: number of tokens.
      width: ``D``.
      layers: number of blocks.
      heads: number of attention heads.
      hidden: size of the MLP's inner layer.
      positions: the longest text.
    """

    vocab: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    positions: int = 512


class Block(nn.Module):
    """Attention and MLP, each added to the stream and followed by a norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, hidden: jax.Array) -> tuple[jax.Array, None]:
        c = self.config

        def heads(name: str) -> jax.Array:
            return nn.Dense(c.width, name=name)(x).reshape(*x.shape[:2], c.heads, -1)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (c.width // c.heads) ** -0.5
        scores = jnp.where(hidden[:, None, None], jnp.finfo(scores.dtype).min, scores)
        attended = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = nn.LayerNorm(epsilon=1e-12, name="norm1")(x + nn.Dense(c.width, name="out")(attended))
        h = nn.gelu(nn.Dense(c.hidden, name="up")(x), approximate=False)
        return nn.LayerNorm(epsilon=1e-12, name="norm2")(x + nn.Dense(c.width, name="down")(h)), None


class Bert(nn.Module):
    """Maps tokens to hidden states: ``model.apply(params, ids [B, T], mask [B, T]) -> [B, T, D]``.

    Devlin et al., "BERT" (https://arxiv.org/abs/1810.04805). ``mask`` is True where there is a token.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocab, c.width, name="words")(ids)
        x = x + self.param("positions", nn.initializers.normal(0.02), (c.positions, c.width))[: ids.shape[1]]
        x = x + self.param("types", nn.initializers.normal(0.02), (2, c.width))[0]
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        return layers(c, name="layers")(x, ~mask)[0]


def sentence_embedding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the tokens of a text, of length one: ``[B, T, D] -> [B, D]``."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}


def params_from(tensors: Mapping[str, Any], config: BertConfig) -> dict[str, Any]:
    """Variables of ``Bert(config)`` from tensors with the names and shapes of `BertModel`.

    Args:
      tensors: arrays by name; linear weights are ``[out, in]``.
      config: the sizes.

    Returns:
      ``{"params": {...}}``, float32 JAX arrays.
    """

    get = functools.partial(torch_layers.array, tensors)
    layers = torch_layers.modules(tensors, _LAYER, config.layers)
    norm = "embeddings.LayerNorm"
    params = {
        "words": {"embedding": get("embeddings.word_embeddings.weight")},
        "positions": get("embeddings.position_embeddings.weight"),
        "types": get("embeddings.token_type_embeddings.weight"),
        "norm": {"scale": get(f"{norm}.weight"), "bias": get(f"{norm}.bias")},
        "layers": layers,
    }
    return {"params": jax.tree.map(jnp.asarray, params)}
