"""A Llama in Flax Linen, and the reader that fills it from a GGUF file.

The model is plain Linen without any code for LoRA; only the reader uses lorax_fn, for quantized blocks. The
layers are scanned, so each kernel is one array ``[layers, in, out]``, and the program has one layer however
deep the model is.

Shapes: `B` batch, `T` tokens, `D` width, `H` query heads, `K` key/value heads, `d` head width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models import gguf_blocks

import lorax_fn as lx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama; the defaults are a toy for tests.

    Args:
      vocab: number of tokens.
      width: ``D``, size of the residual stream.
      hidden: size of the MLP's inner layer.
      layers: number of blocks.
      heads: ``H`` query heads, ``width // heads`` wide each.
      kv_heads: ``K`` key/value heads; each serves ``heads // kv_heads`` query heads.
      rope_theta: base of the rotary wavelengths.
      norm_eps: epsilon of RMSNorm.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    vocab: int = 64
    width: int = 32
    hidden: int = 48
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    remat: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def rope_angles(length: int, head_width: int, theta: float) -> jax.Array:
    """Angles of the rotary embedding, position times frequency: ``[T, d // 2]`` float32.

    Equation (15) of Su et al., "RoFormer" (https://arxiv.org/abs/2104.09864).
    """
    pairs = jnp.arange(0, head_width, 2, dtype=jnp.float32)
    frequencies = 1.0 / jnp.float32(theta) ** (pairs / head_width)
    return jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs ``(x[i], x[i + d/2])`` by their angles: "rotate half", the pairing of Hugging Face.

    Args:
      x: ``[B, T, heads, d]`` queries or keys.
      angles: ``[T, d // 2]``.

    Returns:
      ``[B, T, heads, d]`` in ``x``'s dtype.
    """
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        c = self.config
        batch, length, _ = x.shape
        q = nn.Dense(c.heads * c.head_width, use_bias=False, name="q")(x)
        k = nn.Dense(c.kv_heads * c.head_width, use_bias=False, name="k")(x)
        v = nn.Dense(c.kv_heads * c.head_width, use_bias=False, name="v")(x)
        q = rotate(q.reshape(batch, length, c.heads, c.head_width), angles)
        k = rotate(k.reshape(batch, length, c.kv_heads, c.head_width), angles)
        v = v.reshape(batch, length, c.kv_heads, c.head_width)
        # Query head h attends with key head h // group: split H into (K, group) instead of repeating keys.
        q = q.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_width)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) * c.head_width**-0.5
        if mask is None:
            mask = jnp.tri(length, dtype=bool)[None, None]
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        attended = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores).astype(v.dtype), v)
        return nn.Dense(c.width, use_bias=False, name="o")(attended.reshape(batch, length, c.width))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (https://arxiv.org/abs/2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = nn.Dense(c.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(c.hidden, use_bias=False, name="up")(x)
        return nn.Dense(c.width, use_bias=False, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each applied after RMSNorm and added to the residual stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        c = self.config
        x = x + Attention(c, name="attn")(nn.RMSNorm(epsilon=c.norm_eps, name="attn_norm")(x), angles, mask)
        x = x + MLP(c, name="mlp")(nn.RMSNorm(epsilon=c.norm_eps, name="mlp_norm")(x))
        return x, None  # scan's (carry, output)


class Llama(nn.Module):
    """Maps tokens to logits: ``model.apply(params, tokens [B, T] int32) -> [B, T, vocab]``.

    Touvron et al., "LLaMA" (https://arxiv.org/abs/2302.13971), with the embedding table tied to the head.
    A ``mask [B, 1, T, T]`` takes the place of the causal one: `lorax_fn.data.attention_mask` keeps sequences
    that share a row apart. Positions need not start anew, since rotary scores depend on distances alone.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.width, name="embed")
        # Inside a scan the compiler cannot share work between passes, so remat needs no barrier here.
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        angles = rope_angles(tokens.shape[1], c.head_width, c.rope_theta)
        x, _ = layers(c, name="layers")(embed(tokens), angles, mask)
        return embed.attend(nn.RMSNorm(epsilon=c.norm_eps, name="norm")(x))


STACKED = lx.Layout(stack=(0,), inputs=(1,), outputs=(2,))
TABLE = lx.Layout(inputs=(1,), outputs=(0,))  # of the tied embedding, as the head contracts it

# The GGUF names of one block's tensors, and their places under ``params/layers``.
_BLOCK = {
    "attn_norm": ("attn_norm", "scale"),
    "attn_q": ("attn", "q", "kernel"),
    "attn_k": ("attn", "k", "kernel"),
    "attn_v": ("attn", "v", "kernel"),
    "attn_output": ("attn", "o", "kernel"),
    "ffn_norm": ("mlp_norm", "scale"),
    "ffn_gate": ("mlp", "gate", "kernel"),
    "ffn_up": ("mlp", "up", "kernel"),
    "ffn_down": ("mlp", "down", "kernel"),
}


def permute_heads(w: np.ndarray, heads: int) -> np.ndarray:
    """Moves halves to neighbors, as llama.cpp's converter does with the rows of q and k.

    Its RoPE turns the pairs ``(x[2i], x[2i + 1])``, that of Hugging Face ``(x[i], x[i + d/2])``.

    Args:
      w: ``[heads * d, D]``, rows are outputs.
      heads: number of heads.

    Returns:
      The same rows in llama.cpp's order.
    """
    rows, columns = w.shape
    return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermute_heads(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute_heads`: neighbors to halves, for `rotate`."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_gguf(path: str | Path, keep_blocks: bool = False) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Llama from a GGUF file: quantized blocks become float32, or stay as they are.

    Args:
      path: a ``.gguf`` file of architecture "llama" with tied embeddings.
      keep_blocks: make no float copy of Q4_1 and Q8_0 blocks: their weights are `lorax_fn.Quantized`, for
        `lorax_fn.adapt`.

    Returns:
      The config, and the variables of ``Llama(config)``: ``{"params": {...}}``, float32 JAX arrays or
      quantized leaves.

    Raises:
      ValueError: another architecture, or tensors that `Llama` has no place for; or, to be kept, layers of
        one weight in blocks of several kinds.
    """
    import gguf

    reader = gguf.GGUFReader(path)

    def fact(name: str) -> Any:
        return reader.fields[name].contents()

    if fact("general.architecture") != "llama":
        raise ValueError(f"got architecture {fact('general.architecture')!r}, want 'llama'")
    config = LlamaConfig(
        vocab=fact("llama.vocab_size"),
        width=fact("llama.embedding_length"),
        hidden=fact("llama.feed_forward_length"),
        layers=fact("llama.block_count"),
        heads=fact("llama.attention.head_count"),
        kv_heads=fact("llama.attention.head_count_kv"),
        rope_theta=fact("llama.rope.freq_base"),
        norm_eps=fact("llama.attention.layer_norm_rms_epsilon"),
    )
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def take(name: str) -> Any:
        """Float32 or `gguf_blocks.Parts`; GGUF stores linear weights as ``[out, in]``."""
        tensor = stored.pop(f"{name}.weight")
        kind = tensor.tensor_type.name
        if keep_blocks and kind in gguf_blocks.KINDS:
            return gguf_blocks.take_apart(tensor.data, kind)
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def take_block(layer: int, name: str) -> Any:
        def turned(rows: np.ndarray) -> np.ndarray:
            if name in ("attn_q", "attn_k"):
                rows = unpermute_heads(rows, config.heads if name == "attn_q" else config.kv_heads)
            return rows.T  # Linen's [in, out]; the vector of a norm stays as it is

        return jax.tree.map(turned, take(f"blk.{layer}.{name}"))

    def leaf(weight: Any, layout: lx.Layout) -> Any:
        if isinstance(weight, gguf_blocks.Parts):
            return gguf_blocks.put_together(weight, layout)
        return jnp.asarray(weight)

    layers: dict[str, Any] = {}
    for name, keys in _BLOCK.items():
        stack = [take_block(layer, name) for layer in range(config.layers)]
        if len({jax.tree.structure(weight) for weight in stack}) > 1:
            raise ValueError(f"the layers of {name} are in blocks of several kinds: they cannot be one stack")
        node = layers
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf(jax.tree.map(lambda *parts: np.stack(parts), *stack), STACKED)
    params = {
        "embed": {"embedding": leaf(take("token_embd"), TABLE)},
        "layers": layers,
        "norm": {"scale": jnp.asarray(take("output_norm"))},
    }
    if stored:
        raise ValueError(
            f"no place for the tensors {sorted(stored)}: Llama here has no biases and a tied head"
        )
    return config, {"params": params}
