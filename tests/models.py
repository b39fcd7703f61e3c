"""Models of other people's layers, in tiny random configurations, and what `usage` must find in each.

One row a model: how to make ``(fn, params, args)``, the layout of every weight that is adapted, and what
conventions alone (`split` without ``layout=``) make of it. Only wiring is written here; layers are the
frameworks' own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax_fn.types import Layout

SAME = "the same weights in the same layouts"
MODELS: dict[str, "Model"] = {}
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Model:
    """One row.

    Args:
      make: gives ``(fn, params, args)``, where array leaves of params may be abstract.
      layouts: layout of each weight that must be adapted, by path.
      targets: patterns, where the default leaves the weights in question out.
      plain: what `split` without a layout must do: find `SAME`, or only these paths, or raise a message that
        matches this text.
    """

    make: Callable[[], tuple[Callable, Any, tuple]]
    layouts: Mapping[str, Layout]
    targets: tuple[str, ...] | None = None
    plain: str | set[str] = SAME


def model(layouts: Mapping[str, str], **facts: Any) -> Callable:
    """Puts a maker in the table under its own name; layouts as words: ``"s i o"`` is stack, input, output."""

    def register(make: Callable) -> Callable:
        MODELS[make.__name__] = Model(make, {p: layout(word) for p, word in layouts.items()}, **facts)
        return make

    return register


def layout(word: str) -> Layout:
    """``"sioo"`` is axis 0 stack, 1 input, 2 and 3 outputs."""
    return Layout(*(tuple(i for i, letter in enumerate(word) if letter == role) for role in "sio"))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prefixed(prefix: str, layouts: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}" if prefix else path: word for path, word in layouts.items()}


def linen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
    params = jax.eval_shape(partial(module.init, **kwargs), KEY, *args)
    return lambda params, *args: module.apply(params, *args, **kwargs), params, args


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


# Flax NNX ---------------------------------------------------------------------------------------------


def split_nnx(make: Callable[[nnx.Rngs], nnx.Module], *args: Any) -> tuple:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda state, *args: nnx.merge(graphdef, state)(*args), state, args


@model({"layers/0/kernel": "io", "layers/3/kernel": "io"})
def nnx_linear():
    def make(rngs):
        layers = nnx.Linear(8, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs), nnx.gelu
        return nnx.Sequential(*layers, nnx.Linear(6, 5, use_bias=False, rngs=rngs))

    return split_nnx(make, normal(1, 3, 8))


@model({"layers/0/kernel": "ioo", "layers/1/kernel": "iio"})
def nnx_linear_general():
    def make(rngs):
        out = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)
        return nnx.Sequential(nnx.LinearGeneral(8, (2, 4), rngs=rngs), out)

    return split_nnx(make, normal(1, 3, 8))


def nnx_attention(use_bias: bool):
    def make(rngs):
        return nnx.MultiHeadAttention(2, 6, 8, use_bias=use_bias, decode=False, rngs=rngs)

    return split_nnx(make, normal(1, 2, 5, 6))


@model(ATTENTION)
def nnx_attention_with_biases():
    return nnx_attention(True)


@model(ATTENTION, plain="query/kernel")
def nnx_attention_without_biases():
    return nnx_attention(False)


@model({"layers/0/kernel": "iiio", "layers/1/kernel": "iiio"}, targets=("layers",))
def nnx_conv():
    def make(rngs):
        up = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 2), rngs=rngs)
        return nnx.Sequential(nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs), up)

    return split_nnx(make, normal(1, 2, 8, 8, 3))


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.mix = nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.mix(self.embed(ids)))


@model({"embed/embedding": "io", "mix/kernel": "io"}, targets=("embed", "mix"))
def nnx_tied_embedding():
    return split_nnx(NnxTied, np.array([[1, 4, 10], [0, 0, 2]]))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.silu(self.up(x)))


class NnxStack(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan` with rematerialisation."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.vmap(NnxBlock, in_axes=(0,))(rngs.split(3))

    def __call__(self, x):
        run = nnx.scan(nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


@model(prefixed("layers", stacked(BLOCK)))
def nnx_scan():
    return split_nnx(NnxStack, normal(1, 2, 4, 8))


class NnxEnsemble(NnxStack):
    """The same stack as members side by side."""

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


@model(prefixed("layers", stacked(BLOCK)))
def nnx_vmap():
    return split_nnx(NnxEnsemble, normal(1, 2, 4, 8))


# dm-haiku ---------------------------------------------------------------------------------------------


def haiku(fn: Callable, *args: Any) -> tuple:
    transformed = hk.without_apply_rng(hk.transform(fn))
    return transformed.apply, jax.eval_shape(transformed.init, KEY, *args), args


@model({"mlp/~/linear_0/w": "io", "mlp/~/linear_1/w": "io"})
def haiku_linear():
    return haiku(lambda x: hk.nets.MLP([6, 5])(x), normal(1, 3, 8))


HAIKU_ATTENTION = {f"multi_head_attention/{name}/w": "io" for name in ("query", "key", "value", "linear")}


@model(HAIKU_ATTENTION)
def haiku_attention():
    def attention(x):
        return hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(1.0), model_size=6)(x, x, x)

    return haiku(attention, normal(1, 2, 5, 6))


@model({"conv2_d/w": "iiio", "conv2_d_transpose/w": "iioi"}, targets=("conv2_d*",), plain="is open")
def haiku_conv():
    return haiku(
        lambda x: hk.Conv2DTranspose(4, 3, stride=2)(hk.Conv2D(6, 3, stride=2)(x)), normal(1, 2, 8, 8, 3)
    )


@model({"embed/embeddings": "io", "linear/w": "io"}, targets=("embed", "linear"))
def haiku_embedding():
    return haiku(lambda ids: hk.Linear(5)(hk.Embed(11, 8)(ids)), np.array([[1, 4, 10], [0, 0, 2]]))


@model({"__layer_stack_no_per_layer/linear/w": "sio", "__layer_stack_no_per_layer/linear_1/w": "sio"})
def haiku_layer_stack():
    def layers(x):
        return hk.layer_stack(3)(lambda x: x + hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(x))))(x)

    return haiku(layers, normal(1, 4, 8))


# Equinox ----------------------------------------------------------------------------------------------


def equinox(make: Callable, *args: Any, call: Callable | None = None) -> tuple:
    """A layer, called on each example; its leaves that are no arrays stay leaves."""
    params = eqx.filter_eval_shape(make, KEY)
    return call or (lambda layer, x: jax.vmap(layer)(x)), params, args


@model({"weight": "oi"})
def equinox_linear():
    return equinox(lambda key: eqx.nn.Linear(8, 6, key=key), normal(1, 3, 8))


@model({f"layers/{i}/weight": "oi" for i in range(3)})
def equinox_mlp():
    return equinox(lambda key: eqx.nn.MLP(8, 5, 7, 2, activation=jax.nn.gelu, key=key), normal(1, 3, 8))


@model({f"{name}_proj/weight": "oi" for name in ("query", "key", "value", "output")})
def equinox_attention():
    def call(attention, x):
        return jax.vmap(lambda x: attention(x, x, x))(x)

    return equinox(lambda key: eqx.nn.MultiheadAttention(2, 8, key=key), normal(1, 2, 5, 8), call=call)


@model({"layers/0/weight": "oii", "layers/2/weight": "oii"}, targets=("layers/0", "layers/2"))
def equinox_conv():
    def make(key):
        first, last = eqx.nn.Conv1d(3, 6, 3, stride=2, key=key), eqx.nn.Conv1d(6, 4, 3, groups=2, key=key)
        return eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.gelu), last])

    return equinox(make, normal(1, 2, 3, 11))


@model({"0/weight": "io", "1/weight": "oi"}, targets=("0", "1"))
def equinox_embedding():
    def make(key):
        return [eqx.nn.Embedding(11, 8, key=key), eqx.nn.Linear(8, 5, key=key)]

    def call(layers, ids):
        return jax.vmap(lambda i: layers[1](layers[0](i)))(ids)

    return equinox(make, np.array([1, 4, 10, 1]), call=call)


@model({"layers/0/weight": "soi", "layers/1/weight": "soi"})
def equinox_scan():
    def make(key):
        return eqx.filter_vmap(lambda key: eqx.nn.MLP(8, 8, 12, 1, key=key))(jax.random.split(key, 4))

    def call(stack, x):
        arrays, static = eqx.partition(stack, eqx.is_array)

        def layer(x, arrays):
            return x + jax.vmap(eqx.combine(arrays, static))(x), None

        return jax.lax.scan(layer, x, arrays)[0]

    return equinox(make, normal(1, 3, 8), call=call)


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


@model(UNET_ATTENTION | dict.fromkeys(UNET_CONVOLUTIONS, "iiio"), targets=("kernel",))
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
)
def whisper_encoder_with_convolutions():
    return whisper_encoder()
