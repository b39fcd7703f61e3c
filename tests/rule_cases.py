"""Small functions of one weight, one or more for each rule of the transform: the rows of the oracle matrix.

Every row runs in test_matrix.py under every transformation, in two dtypes, and is compared with the
same function on merged weights. The rows work in any float dtype, so constants take the weight's.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorax_fn as lx


@dataclasses.dataclass(frozen=True)
class Case:
    """``fn({"w": weight of shape}, x)``; ``x`` is a shape of normal numbers or an integer array."""

    name: str
    fn: Callable[[dict, Any], Any]
    shape: tuple[int, ...]
    layout: lx.Layout
    x: Any
    tol: float = 1e-5

    @property
    def weight(self) -> jax.Array:
        return normal(9, self.shape, 0.3)

    @property
    def input(self) -> jax.Array:
        return normal(1, self.x) if isinstance(self.x, tuple) else jnp.asarray(self.x)

    @property
    def adapter(self) -> lx.LoRA:
        return make_adapter(self.shape, self.layout)


@cache
def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * _normal(seed, tuple(shape)))


def make_adapter(shape, layout, rank=2, alpha=4.0, seed=0) -> lx.LoRA:
    """A LoRA with both factors far from zero."""
    stack, n, m = layout.shapes(shape)
    a, b = normal(seed, (*stack, *n, rank), 0.3), normal(seed + 1, (*stack, rank, *m), 0.3)
    return lx.LoRA(a, b, alpha, rank, "lora", layout)


IO, OI = lx.Layout((), (0,), (1,)), lx.Layout((), (1,), (0,))
SIO = lx.Layout((0,), (1,), (2,))
X, XS, IDS = (2, 3, 8), (3, 8), np.array([[0, 1, 7], [5, 7, 7]])
OUT_OF_BOUNDS = np.array([[0, 99], [5, -3]])
ROWS_OF_COPIES = lax.GatherDimensionNumbers((2, 3), (0,), (0,))
MASK = np.array([True, False, True, True, False, True, False, True])
HWIO = lx.Layout((), (0, 1, 2), (3,))
NHWC = ("NHWC", "HWIO", "NHWC")


def _einsum(name, spec, shape, layout, x):
    return Case(name, lambda p, x: jnp.einsum(spec, x, p["w"]), shape, layout, x)


def _dot(dims, left=False):
    def fn(p, x):
        return lax.dot_general(p["w"], x, dims) if left else lax.dot_general(x, p["w"], dims)

    return fn


def _ramp(p, *shape):
    """Constants of the weight's dtype along one axis."""
    return jnp.arange(1, 9).astype(p["w"].dtype).reshape(shape)


DOTS = [
    Case("dense", lambda p, x: x @ p["w"], (8, 6), IO, X),
    Case("dense vector", lambda p, x: x @ p["w"], (8, 6), IO, (8,)),
    Case("left", lambda p, x: p["w"] @ x, (6, 8), OI, (8, 3)),
    Case("left transposed", lambda p, x: p["w"].T @ x, (8, 6), IO, (8, 3)),
    Case("out in", lambda p, x: x @ p["w"].T, (6, 8), OI, X),
    Case("outputs contracted", lambda p, x: x @ p["w"].T, (6, 8), IO, X),
    Case("outputs contracted left", lambda p, x: p["w"] @ x, (6, 8), IO, (8, 3)),
    _einsum("attention query", "btd,dhk->bthk", (8, 2, 3), lx.Layout((), (0,), (1, 2)), X),
    _einsum("attention out", "bthk,hkd->btd", (4, 5, 6), lx.Layout((), (0, 1), (2,)), (2, 3, 4, 5)),
    _einsum("attention heads out", "bthk,hkd->bthd", (4, 5, 6), lx.Layout((0,), (1,), (2,)), (2, 3, 4, 5)),
    _einsum("batch over an input", "bthk,hkd->bthd", (4, 5, 6), lx.Layout((), (0, 1), (2,)), (2, 3, 4, 5)),
    _einsum("part of the inputs", "btk,hkd->bthd", (4, 5, 6), lx.Layout((), (0, 1), (2,)), (2, 3, 5)),
    _einsum("batch over an output", "btd,tdh->bth", (3, 8, 5), lx.Layout((), (1,), (0, 2)), X),
    _einsum("permuted contraction", "bijk,jbnmk->imn", (4, 2, 5, 6, 3), lx.Layout((), (0, 1, 4), (2, 3)),
            (2, 3, 4, 3)),
    _einsum("experts", "etd,edh->eth", (2, 8, 4), SIO, X),
    _einsum("experts free", "btd,edh->bteh", (3, 8, 4), SIO, X),
    _einsum("experts summed", "bte,edh->btdh", (8, 5, 4), SIO, X),
    _einsum("experts mixed", "bed,edh->bh", (3, 8, 4), SIO, X),
    _einsum("qkv stacked", "bsd,kdnh->kbsnh", (3, 8, 2, 4), lx.Layout((0,), (1,), (2, 3)), X),
    _einsum("vector against inputs", "d,dh->h", (8, 5), IO, (8,)),
    _einsum("outer", "bt,dh->btdh", (3, 4), IO, (2, 3)),
    Case("complicated left", _dot((((4,), (2,)), ((2, 0), (1, 4))), True), (3, 2, 1, 4, 5),
         lx.Layout((0, 2), (4,), (1, 3)), (2, 1, 5, 3, 3, 2, 2)),
    Case("complicated right", _dot((((4,), (2,)), ((2, 0), (1, 4)))), (2, 1, 5, 3, 3, 2, 2),
         lx.Layout((1, 4), (2,), (0, 3, 5, 6)), (3, 2, 1, 4, 5)),
    Case("complicated, batch in A and B", _dot((((4,), (2,)), ((2, 0), (1, 4)))), (2, 1, 5, 3, 3, 2, 2),
         lx.Layout((), (1, 2), (0, 3, 4, 5, 6)), (3, 2, 1, 4, 5)),
    Case("ragged", lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 0, 5])), (3, 8, 5), SIO, (6, 8)),
    Case("precision", lambda p, x: jnp.dot(x, p["w"], precision="highest", preferred_element_type=x.dtype),
         (8, 6), IO, X),
]  # fmt: skip

LOOKUPS = [
    Case("lookup", lambda p, i: jnp.tanh(p["w"][i]), (8, 6), IO, IDS),
    Case("lookup of columns", lambda p, i: jnp.tanh(p["w"][:, i]), (6, 8), IO, IDS),
    Case("take, zeros out of bounds",
         lambda p, i: jnp.take(p["w"], i, axis=0, mode="fill", fill_value=0), (8, 6), IO, OUT_OF_BOUNDS),
    Case("take along a repeated axis, out of bounds",
         lambda p, i: jnp.take(jnp.broadcast_to(p["w"], (6, 8, 6)), i, axis=0, mode="fill", fill_value=2),
         (8, 6), IO, OUT_OF_BOUNDS),
    Case("gather by small numbers along a repeated axis, out of bounds",
         lambda p, i: lax.gather(jnp.broadcast_to(p["w"], (300, 8, 6)), i.astype(jnp.uint8)[..., None],
                                 ROWS_OF_COPIES, (1, 8, 6), mode="fill", fill_value=0),
         (8, 6), IO, OUT_OF_BOUNDS),
    Case("take, clipped", lambda p, i: jnp.take(p["w"], i, axis=0, mode="clip"), (8, 6), IO, OUT_OF_BOUNDS),
    Case("one hot", lambda p, i: jax.nn.one_hot(i, 8, dtype=p["w"].dtype) @ p["w"], (8, 6), IO, IDS),
    Case("tied", lambda p, i: jnp.tanh(p["w"][i] * 2) @ p["w"].T, (8, 6), IO, IDS),
    Case("tied, outputs first", lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T, (8, 6), OI, IDS),
    Case("experts gathered",
         lambda p, i: jnp.einsum("td,tdh->th", jnp.ones((3, 8), p["w"].dtype), p["w"][i]), (3, 8, 5), SIO,
         np.array([0, 2, 1])),
    Case("indexed by a scalar", lambda p, i: jnp.ones((2, 8), p["w"].dtype) @ p["w"][i], (3, 8, 5), SIO,
         np.array(2)),
]  # fmt: skip


def _conv(name, shape, padding="SAME", x=(2, 7, 6, 4), layout=HWIO, dims=NHWC, stride=None, **options):
    def fn(p, x):
        strides = stride or (1,) * (x.ndim - 2)
        return lax.conv_general_dilated(x, p["w"], strides, padding, dimension_numbers=dims, **options)

    return Case(name, fn, shape, layout, x)


def _conv_transposed(p, x, **options):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC, **options)


CONVOLUTIONS = [
    _conv("conv", (3, 3, 4, 6)),
    _conv("conv 1-D", (2, 4, 6), "VALID", (2, 7, 4), lx.Layout((), (0, 1), (2,)), ("NWC", "WIO", "NWC")),
    _conv("conv 1-D strided", (3, 4, 6), "SAME", (2, 7, 4), lx.Layout((), (0, 1), (2,)),
          ("NWC", "WIO", "NWC"), (2,)),
    _conv("conv 3-D", (2, 2, 1, 3, 4), "SAME", (2, 4, 3, 3, 3), lx.Layout((), (0, 1, 2, 3), (4,)),
          ("NDHWC", "DHWIO", "NDHWC")),
    _conv("conv strides, kernel dilation", (3, 2, 4, 6), "VALID", stride=(2, 1), rhs_dilation=(1, 2)),
    _conv("conv explicit padding, input dilation", (3, 2, 4, 6), ((1, 2), (0, 1)), lhs_dilation=(2, 2)),
    _conv("conv groups", (3, 3, 2, 6), feature_group_count=2),
    _conv("conv groups strided", (3, 3, 2, 6), feature_group_count=2, stride=(2, 2), rhs_dilation=(2, 1)),
    _conv("conv depthwise", (3, 3, 1, 8), feature_group_count=4),
    _conv("conv NCHW", (5, 4, 3, 3), x=(2, 4, 7, 6), layout=lx.Layout((), (1, 2, 3), (0,)), dims=None),
    _conv("conv window in outputs", (3, 3, 4, 6), layout=lx.Layout((), (2,), (0, 1, 3))),
    _conv("conv groups, window in outputs", (3, 3, 2, 6), layout=lx.Layout((), (2,), (0, 1, 3)),
          feature_group_count=2),
    Case("conv transposed", _conv_transposed, (3, 3, 4, 6), HWIO, (2, 5, 4, 4)),
    Case("conv transposed, kernel too", partial(_conv_transposed, transpose_kernel=True), (3, 3, 6, 4),
         lx.Layout((), (0, 1, 3), (2,)), (2, 5, 4, 4)),
]  # fmt: skip


def _over_layers(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


VIEWS = [
    Case("reshape inputs", lambda p, x: x @ p["w"].reshape(20, 6), (4, 5, 6), lx.Layout((), (0, 1), (2,)),
         (3, 20)),
    Case("reshape outputs", lambda p, x: x @ p["w"].reshape(8, 8), (8, 2, 4), lx.Layout((), (0,), (1, 2)), X),
    Case("reshape into heads", lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(8, 2, 3)), (8, 6),
         IO, X),
    Case("split outputs", lambda p, x: sum(x @ w for w in jnp.split(p["w"], 2, 1)), (8, 8), IO, X),
    Case("split inputs", lambda p, x: sum(a @ w for a, w in zip(jnp.split(x, 2, -1),
         jnp.split(p["w"], [4], 0), strict=True)), (8, 8), IO, X),
    Case("layers by number", lambda p, x: x @ p["w"][1] @ p["w"][0], (2, 8, 8), SIO, X),
    Case("layers by iteration", lambda p, x: sum(x @ w for w in p["w"]), (3, 8, 8), SIO, X),
    Case("stack", lambda p, x: _over_layers({"w": jnp.stack(
        [p["w"], p["w"] * 0.5, jnp.eye(8, dtype=x.dtype)])}, x), (8, 8), IO, X),
    Case("concatenate outputs", lambda p, x: x @ jnp.concatenate(
        [p["w"], p["w"] * 2, jnp.ones((8, 3), x.dtype)], 1), (8, 8), IO, X),
    Case("concatenate inputs", lambda p, x: x @ jnp.concatenate([p["w"][:3], p["w"][3:] * 2], 0), (8, 8),
         IO, X),
    Case("concatenate layers", lambda p, x: _over_layers({"w": jnp.concatenate([p["w"][1:], p["w"]])}, x),
         (2, 8, 8), SIO, X),
    Case("slice inputs", lambda p, x: x[..., 2:6] @ p["w"][2:6], (8, 6), IO, X),
    Case("slice both, strided", lambda p, x: x[..., ::2] @ p["w"][::2, 1:5], (8, 6), IO, X),
    Case("slice layers", lambda p, x: _over_layers({"w": p["w"][1:]}, x), (3, 8, 8), SIO, X),
    Case("dynamic layer", lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], 1, 0, keepdims=False),
         (3, 8, 8), SIO, X),
    Case("dynamic inputs", lambda p, x: x[..., :4] @ lax.dynamic_slice_in_dim(
        p["w"], jnp.argmax(x[0, 0, :3]), 4, 0), (8, 6), IO, X),
    Case("dynamic outputs", lambda p, x: x @ lax.dynamic_slice_in_dim(p["w"], 2, 4, 1), (8, 6), IO, X),
    Case("squeeze and expand", lambda p, x: x @ p["w"][None, :, None].squeeze((0, 2)), (8, 6), IO, X),
    Case("squeeze a size-1 axis", lambda p, x: x @ p["w"].squeeze(1), (8, 1, 6), lx.Layout((), (0, 1), (2,)),
         X),
    Case("broadcast", lambda p, x: jnp.einsum("btd,bdh->bth", x, jnp.broadcast_to(
        p["w"][None], (2, 8, 6))), (8, 6), IO, X),
    Case("tile", lambda p, x: x @ jnp.tile(p["w"], (1, 2)), (8, 6), IO, X),
    Case("pad", lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), (8, 6), IO, X),
    Case("pad both sides", lambda p, x: x @ jnp.pad(p["w"], ((2, 0), (1, 2))), (6, 6), IO, X),
    Case("sum over inputs", lambda p, x: x * p["w"].sum(0)[0], (8, 6), IO, X),
    Case("sum over outputs", lambda p, x: x @ p["w"].sum(2), (8, 6, 3), lx.Layout((), (0,), (1, 2)), X),
    Case("sum over a stack", lambda p, x: x @ p["w"].sum(0), (2, 8, 30), SIO, X),
    Case("stack merged with inputs", lambda p, x: x @ p["w"].reshape(8, 30), (2, 4, 30), SIO, X),
    Case("stack merged with outputs", lambda p, x: x @ p["w"].reshape(8, 60), (8, 2, 30),
         lx.Layout((1,), (0,), (2,)), X),
    Case("added to an array", lambda p, x: x @ (jnp.ones((8, 6), x.dtype) - p["w"]), (8, 6), IO, X),
    Case("two of them added", lambda p, x: x @ (p["w"] + p["w"][::-1]), (8, 6), IO, X),
    Case("rows overwritten", lambda p, x: x @ lax.dynamic_update_slice_in_dim(
        p["w"], jnp.ones((2, 6), x.dtype), 3, 0), (8, 6), IO, X),
    Case("written into rows", lambda p, x: x @ lax.dynamic_update_slice_in_dim(
        jnp.ones((8, 6), x.dtype), p["w"], 2, 0), (5, 6), IO, X),
    Case("reverse", lambda p, x: x @ p["w"][::-1, ::-1], (8, 6), IO, X),
    Case("inputs masked", lambda p, x: x @ jnp.where(MASK[:, None], p["w"], 0), (8, 6), IO, X),
    Case("outputs masked", lambda p, x: x @ jnp.where(MASK[:6], p["w"], jnp.ones((8, 6), x.dtype)), (8, 6),
         IO, X),
    Case("a mask picks of two", lambda p, x: x @ jnp.where(~MASK[:, None], p["w"], 2 * p["w"][::-1]), (8, 6),
         IO, X),
    Case("layers masked", lambda p, x: _over_layers({"w": jnp.where(
        MASK[:3, None, None], p["w"], -p["w"][::-1])}, x), (3, 8, 8), SIO, X),
    Case("a number picks of two", lambda p, x: x @ jnp.where(x[0, 0, 0] > 0, p["w"], p["w"][::-1]), (8, 6),
         IO, X),
    Case("a number picks per example", lambda p, x: jax.vmap(lambda x: x @ jnp.where(
        x[0, 0] > 0, p["w"], 2 * p["w"][::-1]))(x), (8, 6), IO, X),
    Case("branches return it", lambda p, x: x @ lax.cond(
        x[0, 0, 0] > 0, lambda w: w * 2, lambda w: w[::-1], p["w"]), (8, 6), IO, X),
    Case("a branch returns an array", lambda p, x: x @ lax.cond(
        x[0, 0, 0] > 0, lambda w: w[:, :4], lambda w: jnp.ones((8, 4), w.dtype), p["w"]), (8, 6), IO, X),
    Case("branches return layers", lambda p, x: x @ lax.switch(
        jnp.argmax(x[0, 0, :3]), [lambda w: w[0], lambda w: jax.jit(jnp.negative)(w[2]), lambda w: w[1]],
        p["w"]), (3, 8, 5), SIO, X),
]  # fmt: skip


def _constrained(p, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return x @ lax.with_sharding_constraint(p["w"], NamedSharding(mesh, PartitionSpec(None, "data")))


@jax.jit
def _scaled_transpose(w):
    return w.T * 2


SCALES = [
    Case("scalar", lambda p, x: x @ (p["w"] * 0.5), (8, 6), IO, X),
    Case("vmapped scale", lambda p, x: jax.vmap(lambda x: x @ (p["w"] * x[0, 0]))(x), (8, 6), IO, (3, 2, 8)),
    Case("scalar array", lambda p, x: x @ (p["w"] * x[0, 0, 0]), (8, 6), IO, X),
    Case("divided", lambda p, x: x @ (p["w"] / 3), (8, 6), IO, X),
    Case("negative", lambda p, x: x @ (-p["w"]), (8, 6), IO, X),
    Case("along inputs", lambda p, x: x @ (p["w"] * _ramp(p, 8, 1)), (8, 6), IO, X),
    Case("along outputs", lambda p, x: x @ (p["w"] / _ramp(p, 1, 8)), (6, 8), IO, (2, 6)),
    Case("along a stack", lambda p, x: _over_layers({"w": p["w"] * (2 / _ramp(p, 8, 1, 1)[:3])}, x),
         (3, 3, 3), SIO, (2, 3)),
    Case("cast up", lambda p, x: (x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(x.dtype),
         (8, 6), IO, X),
    Case("cast down", lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), (8, 6), IO, X, 0.03),
    Case("sharding constraint", _constrained, (8, 6), IO, X),
    Case("barrier", lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))), (8, 6), IO, X),
    Case("copy", lambda p, x: x @ jnp.copy(p["w"]), (8, 6), IO, X),
    Case("stop gradient", lambda p, x: x @ (lax.stop_gradient(p["w"])) + x @ p["w"],
         (8, 6), IO, X),
    Case("checkpoint name", lambda p, x: x @ checkpoint_name(p["w"], "w"), (8, 6), IO, X),
    Case("used twice", lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (8, 6), IO, X),
    Case("inner jit returns it", lambda p, x: x @ _scaled_transpose(p["w"]), (6, 8), OI, X),
    Case("vmapped weight", lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (2, 8, 6), SIO, X),
    Case("scanned weight", _over_layers, (3, 8, 8), SIO, X),
    Case("scanned stack of stacks", lambda p, x: lax.scan(lambda c, w: (_over_layers({"w": w}, c), None), x,
         p["w"])[0], (2, 2, 8, 8), lx.Layout((0, 1), (2,), (3,)), X),
]  # fmt: skip

RULE_CASES = DOTS + LOOKUPS + CONVOLUTIONS + VIEWS + SCALES
