"""Rows of `model_table.MODELS`: layers of Flax Linen, and whole blocks made of them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from model_table import linen, model, normal, prefixed

# Flax Linen -------------------------------------------------------------------------------------------


@model({"params/layers_0/kernel": "io", "params/layers_3/kernel": "io"})
def linen_dense():
    return linen(
        nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.gelu, nn.Dense(5, use_bias=False)]), normal(1, 3, 8)
    )


@model({"params/layers_0/kernel": "ioo", "params/layers_1/kernel": "iio"})
def linen_dense_general():
    return linen(nn.Sequential([nn.DenseGeneral((2, 4)), nn.DenseGeneral(5, axis=(-2, -1))]), normal(1, 3, 8))


@model({"params/kernel": "sio"})
def linen_dense_general_batched():
    return linen(nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), normal(1, 3, 2, 8))


ATTENTION = {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"}


def linen_attention(use_bias: bool):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, use_bias=use_bias)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    return linen(module, normal(1, 2, 5, 6), mask=mask)


@model(prefixed("params", ATTENTION))
def linen_attention_with_biases():
    return linen_attention(True)


@model(prefixed("params", ATTENTION), plain="query/kernel")
def linen_attention_without_biases():
    return linen_attention(False)


class LinenBlock(nn.Module):
    """The pre-norm transformer block of the Linen examples."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=self.use_bias, name="attn")(y, y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(y)))


BLOCK = {**prefixed("attn", ATTENTION), "up/kernel": "io", "down/kernel": "io"}


def stacked(layouts: Mapping[str, str]) -> dict[str, str]:
    return {path: "s" + word for path, word in layouts.items()}


class LinenScanned(nn.Module):
    use_bias: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        scan = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(block(self.use_bias, name="layers"), x)[0]


@model(prefixed("params/layers", stacked(BLOCK)))
def linen_scan():
    return linen(LinenScanned(), normal(1, 2, 4, 8))


@model(prefixed("params/layers", stacked(BLOCK)), plain="attn/query/kernel")
def linen_scan_of_remat_without_biases():
    return linen(LinenScanned(use_bias=False, remat=True), normal(1, 2, 4, 8))


@model(prefixed("params", BLOCK))
def linen_remat():
    return linen(nn.remat(LinenBlock, policy=jax.checkpoint_policies.dots_saveable)(), normal(1, 2, 4, 8))


@model(prefixed("params", stacked(BLOCK)))
def linen_vmap():
    members = nn.vmap(
        LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    )
    return linen(members(), normal(1, 2, 4, 8))


class LinenTied(nn.Module):
    """One table for lookup and logits."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(nn.Dense(8, name="mix")(embed(ids)))


@model({"params/embed/embedding": "io", "params/mix/kernel": "io"}, targets=("embed", "mix"))
def linen_tied_embedding():
    return linen(LinenTied(), np.array([[1, 4, 10], [0, 0, 2]]))


@model({"params/mix/kernel": "io"})
def linen_tied_embedding_by_default():
    return linen_tied_embedding()


# Linen convolutions ----------------------------------------------------------------------------------


def linen_layers(*layers: Any, x: jax.Array):
    return linen(nn.Sequential(list(layers)), x)


@model(
    {"params/layers_0/kernel": "iiio", "params/layers_2/kernel": "iiio"},
    targets=("layers_0", "layers_2"),
)
def linen_conv():
    return linen_layers(
        nn.Conv(6, (3, 3), strides=2),
        nn.GroupNorm(2),
        nn.Conv(4, (3, 3), kernel_dilation=2, padding="VALID"),
        x=normal(1, 2, 12, 12, 4),
    )


@model(
    {"params/layers_0/kernel": "iio", "params/layers_1/kernel": "iio"},
    targets=("layers_0", "layers_1"),
)
def linen_conv_grouped():
    return linen_layers(
        nn.Conv(6, (3,), feature_group_count=2),
        nn.Conv(12, (3,), feature_group_count=6),
        x=normal(1, 2, 7, 4),
    )


@model(
    {"params/layers_0/kernel": "iiio", "params/layers_1/kernel": "iioi"},
    targets=("layers_0", "layers_1"),
    plain="is open",
)
def linen_conv_transpose():
    return linen_layers(
        nn.ConvTranspose(6, (3, 3), strides=(2, 2)),
        nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True),
        x=normal(1, 2, 4, 4, 5),
    )


# Whole blocks ----------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Top-2 of four experts: tokens sorted by expert, two grouped products, weighted sum."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        gate, up, down = (self.param(f"w_{name}", init, shape) for name, shape in
                          (("gate", (4, 8, 12)), ("up", (4, 8, 12)), ("down", (4, 12, 8))))  # fmt: skip
        weights, experts = jax.lax.top_k(jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(x)), 2)
        order = jnp.argsort(experts.reshape(-1))
        rows = x[order // 2]
        sizes = jnp.bincount(experts.reshape(-1), length=4).astype(jnp.int32)
        h = nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
        y = jax.lax.ragged_dot(h, down, sizes)[jnp.argsort(order)]
        return (y.reshape(-1, 2, 8) * weights[:, :, None]).sum(1)


@model(
    {"params/router/kernel": "io", **{f"params/w_{name}": "sio" for name in ("gate", "up", "down")}},
    plain={"params/router/kernel"},
)
def mixture_of_experts():
    return linen(Experts(), normal(1, 10, 8))


class UNetBlock(nn.Module):
    """Diffusion style: residual block with time embedding, attention over pixels, down, up, skip."""

    @nn.compact
    def __call__(self, x, time):
        h = nn.Conv(8, (3, 3), name="conv_in")(nn.silu(nn.GroupNorm(2)(x)))
        h = h + nn.Dense(8, name="time")(nn.silu(time))[:, None, None, :]
        h = nn.Conv(8, (3, 3), name="conv_out")(nn.silu(nn.GroupNorm(2)(h)))
        h = h + nn.Conv(8, (1, 1), name="skip")(x)
        tokens = nn.GroupNorm(2)(h).reshape(h.shape[0], -1, 8)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(tokens, tokens).reshape(h.shape)
        down = nn.Conv(12, (3, 3), strides=2, name="down")(h)
        up = nn.ConvTranspose(8, (4, 4), strides=(2, 2), name="up")(down)
        return nn.Conv(4, (3, 3), name="merge")(jnp.concatenate([h, up], -1))


UNET_ATTENTION = {"params/time/kernel": "io", **prefixed("params/attn", ATTENTION)}
UNET_CONVOLUTIONS = [
    f"params/{name}/kernel" for name in ("conv_in", "conv_out", "skip", "down", "up", "merge")
]


def unet(*convolutions):
    return linen(UNetBlock(), normal(1, 2, 8, 8, 4), normal(2, 2, 6))


@model(UNET_ATTENTION)
def unet_block():
    return unet()


# conv_out has as many channels on both sides: by its name and bias it may be a transposed convolution.
@model(
    UNET_ATTENTION | dict.fromkeys(UNET_CONVOLUTIONS, "iiio"),
    targets=("kernel",),
    plain=r"(?s)is open.*conv_out",
)
def unet_block_with_convolutions():
    return unet()


class Encoder(nn.Module):
    """Whisper style: two 1-D convolutions, the second strided, sinusoids, scanned blocks."""

    @nn.compact
    def __call__(self, mel):
        x = nn.gelu(nn.Conv(8, (3,), name="conv1")(mel))
        x = nn.gelu(nn.Conv(8, (3,), strides=2, name="conv2")(x))
        angle = np.arange(x.shape[1])[:, None] / 100.0 ** (np.arange(4, dtype=np.float32)[None, :] / 4)
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], -1, dtype=np.float32)[None]
        return nn.LayerNorm()(LinenScanned(name="blocks")(x))


ENCODER_BLOCKS = prefixed("params/blocks/layers", stacked(BLOCK))


@model(ENCODER_BLOCKS)
def whisper_encoder():
    return linen(Encoder(), normal(1, 2, 10, 5))


@model(
    ENCODER_BLOCKS | {"params/conv1/kernel": "iio", "params/conv2/kernel": "iio"},
    targets=("conv*", "attn", "up", "down"),
    plain=r"(?s)is open.*conv2",
)
def whisper_encoder_with_convolutions():
    return whisper_encoder()
