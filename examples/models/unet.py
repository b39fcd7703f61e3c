"""A small UNet for diffusion in Flax Linen, with the blocks and names of the `UNet2DModel` of diffusers.

The model is plain Linen without any code for LoRA: convolutions, attention in the middle, and linear layers
for the time. `tests/test_example_models.py` compares outputs with diffusers.

Shapes: `B` images, `H`, `W` pixels, `C` channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet.

    Args:
      channels: of the images.
      widths: channels of each level; every level but the last halves the image.
      groups: of the group norms.
      classes: number of classes that it is told of; 0 is none.
    """

    channels: int = 1
    widths: tuple[int, ...] = (16, 32)
    groups: int = 8
    classes: int = 0


def sinusoids(t: jax.Array, size: int) -> jax.Array:
    """Cosines and sines of the time at ``size / 2`` frequencies: ``[B] -> [B, size]``."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class Resnet(nn.Module):
    """Two convolutions with the time added in between, beside a shortcut."""

    width: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        h = nn.silu(nn.GroupNorm(self.groups, epsilon=1e-5, name="norm1")(x))
        h = nn.Conv(self.width, (3, 3), name="conv1")(h)
        h = h + nn.Dense(self.width, name="time_emb_proj")(nn.silu(time))[:, None, None]
        h = nn.silu(nn.GroupNorm(self.groups, epsilon=1e-5, name="norm2")(h))
        h = nn.Conv(self.width, (3, 3), name="conv2")(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Every pixel attends to all, by one head."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = nn.GroupNorm(self.groups, epsilon=1e-5, name="group_norm")(x).reshape(len(x), -1, width)
        q, k, v = (nn.Dense(width, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) * width**-0.5)
        return x + nn.Dense(width, name="to_out.0")(jnp.einsum("bts,bsd->btd", weights, v)).reshape(x.shape)


class UNet(nn.Module):
    """Maps noisy images, times and classes to images: ``apply(params, x [B, H, W, C], t [B], label [B])``.

    Ho et al., "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239).
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
        c = self.config
        first, last = c.widths[0], c.widths[-1]
        time = nn.Dense(4 * first, name="time_embedding.linear_1")(sinusoids(t, first))
        time = nn.Dense(4 * first, name="time_embedding.linear_2")(nn.silu(time))
        if c.classes:
            time = time + nn.Embed(c.classes, 4 * first, name="class_embedding")(label)
        x = nn.Conv(first, (3, 3), name="conv_in")(x)
        skips = [x]
        for i, width in enumerate(c.widths):
            x = Resnet(width, c.groups, name=f"down_blocks.{i}.resnets.0")(x, time)
            skips.append(x)
            if i < len(c.widths) - 1:
                down = nn.Conv(
                    width,
                    (3, 3),
                    (2, 2),
                    padding=((1, 1), (1, 1)),
                    name=f"down_blocks.{i}.downsamplers.0.conv",
                )
                x = down(x)
                skips.append(x)
        x = Resnet(last, c.groups, name="mid_block.resnets.0")(x, time)
        x = Attention(c.groups, name="mid_block.attentions.0")(x)
        x = Resnet(last, c.groups, name="mid_block.resnets.1")(x, time)
        for i, width in enumerate(reversed(c.widths)):
            for j in range(2):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = Resnet(width, c.groups, name=f"up_blocks.{i}.resnets.{j}")(x, time)
            if i < len(c.widths) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = nn.Conv(width, (3, 3), name=f"up_blocks.{i}.upsamplers.0.conv")(x)
        x = nn.silu(nn.GroupNorm(c.groups, epsilon=1e-5, name="conv_norm_out")(x))
        return nn.Conv(c.channels, (3, 3), name="conv_out")(x)


def params_from(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a `UNet` from tensors with the names and shapes of `UNet2DModel`.

    Args:
      tensors: arrays by name.
      like: the variables to fill, abstract or not.

    Returns:
      ``{"params": {...}}``, float32 JAX arrays.
    """

    def filled(path: tuple, leaf: Any) -> jax.Array:
        *modules, kind = (key.key for key in path[1:])
        kind = "weight" if kind in ("kernel", "scale", "embedding") else kind
        array = np.asarray(tensors[".".join([*modules, kind])], np.float32)
        if path[-1].key == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        assert array.shape == leaf.shape, (path, array.shape, leaf.shape)
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(filled, like)
