"""Rows of `model_table.MODELS`: layers of Flax NNX, dm-haiku and Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
from flax import nnx
from model_table import KEY, model, normal, prefixed
from models_linen import ATTENTION, BLOCK, stacked

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
    """Layers made by `nnx.vmap`, run by `nnx.scan` with rematerialization."""

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
