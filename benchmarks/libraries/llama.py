"""A Llama in plain Flax Linen, with room for another linear layer; its weights are those of SmolLM2-135M."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from libraries.problem import Problem

VOCAB, THETA, EPSILON = 49152, 1e5, 1e-5


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of ``[B, T, heads, d]``: the pairs are ``(x[i], x[i + d/2])``."""
    half = x.shape[-1] // 2
    rates = jnp.float32(THETA) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), rates)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal; ``[B, T, width]`` from the products of q, k and v, whose heads serve groups of queries."""
    groups, each = problem.kv_heads or problem.heads, problem.width // problem.heads
    q, k, v = (x.reshape(*x.shape[:2], -1, each) for x in (q, k, v))
    grouped = rotated(q).reshape(*q.shape[:2], groups, -1, each)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, rotated(k)) * each**-0.5
    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    mixed = jnp.einsum("bkgts,bskd->btkgd", nn.softmax(jnp.where(causal, scores, -1e30)), v)
    return mixed.reshape(*q.shape[:2], problem.width)


class Block(nn.Module):
    problem: Problem
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x, _):
        def linear(name, x):
            return self.dense(self.problem.shapes[name][1], use_bias=False, name=name)(x)

        h = nn.RMSNorm(epsilon=EPSILON, name="norm_1")(x)
        x = x + linear("o", attention(self.problem, *(linear(name, h) for name in "qkv")))
        h = nn.RMSNorm(epsilon=EPSILON, name="norm_2")(x)
        return x + linear("down", nn.silu(linear("gate", h)) * linear("up", h)), None


class Llama(nn.Module):
    """``ids [B, T] -> logits [B, T, vocab]``: layers are scanned, not checkpointed, and the head is tied."""

    problem: Problem
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, ids, past=None):
        embed = nn.Embed(VOCAB, self.problem.width, name="embed")
        layers = nn.scan(
            Block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.problem.layers,
        )
        x, _ = layers(self.problem, self.dense, name="layers")(embed(ids), None)
        return embed.attend(nn.RMSNorm(epsilon=EPSILON, name="norm")(x))
