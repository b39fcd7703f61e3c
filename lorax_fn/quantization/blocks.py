"""Weights in 4 or 8 bits: blocks of codes with one scale each, and `Quantized`, the pytree that holds them.

w = value(code) * scale               value: NF4's table, or an integer; the largest |w| of a block gets the
                                      largest value
scale = map(code') * group + offset   double quantization: scales are codes too, in groups
w = code * scale + minimum            GGUF's Q4_1; scale and minimum in float16

Dettmers et al., "QLoRA" (https://arxiv.org/abs/2305.14314), section 3. Two codes are packed into one byte,
because `jnp.int4` takes a whole byte on CPU and GPU, and cannot represent NF4.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import Stored
from lorax_fn.quantization.formats import GROUP, READ, code_as_float, from_dynamic, to_dynamic
from lorax_fn.quantization.packing import cut, folded, pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Stored):
    """A weight of 4 or 8 bits, one leaf with the weight's shape and dtype.

    Every array has the weight's axes in the same order, so that stacks can be scanned and shardings carry
    over. Blocks run along one input axis, and second-level groups of 256 scales along one output axis: the
    last axis that is at least as long as a block or group, or else the longest.

    Args:
      codes: int8 in the weight's shape; or, for 4 bits, uint8 with two codes per byte, the first in the high
        half, and thus half as long (rounded up) along ``block_axis``.
      scales: one per block along ``block_axis``: float32; uint8 with double quantization; float16 in GGUF.
      groups: float32, one per 256 scales along ``group_axis``; None without double quantization.
      offset: float32, the mean scale of each stack entry; None without double quantization.
      minimum: float16, the value of code 0 in each block; None except in ``"q4_1"``.
      format: ``"nf4"``, ``"int4"`` or ``"int8"``; or ``"q4_1"`` or ``"q8_0"`` for blocks of a GGUF file.
      block: how many weights share a scale.
      shape: the weight's shape.
      dtype: the weight's dtype.
      layout: which axes of the weight are stack, inputs and outputs.
      block_axis: the input axis along which blocks run and codes are packed.
      group_axis: the output axis along which groups run.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> q = lx.quantize({"kernel": jnp.ones((128, 32), jnp.bfloat16)}, "nf4")["kernel"]
      >>> q.shape, q.dtype, q.codes.shape, q.scales.shape
      ((128, 32), dtype(bfloat16), (64, 32), (2, 32))
      >>> bool((q.dense() == 1).all())
      True
    """

    codes: Any
    scales: Any
    groups: Any
    offset: Any
    minimum: Any
    format: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    block_axis: int = dataclasses.field(metadata={"static": True})
    group_axis: int = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """The weight as an array. All operations are elementwise, so XLA fuses them into one loop."""
        _check_axes(self)
        return _dense(jax.lax.stop_gradient(self))

    def entry(self, axis: int) -> "Quantized | None":
        """This weight after its arrays lost stack axis ``axis``, as in a loop; None for any other axis."""
        if axis not in self.layout.stack:
            return None
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        block, group = (i - (i > axis) for i in (self.block_axis, self.group_axis))
        layout = self.layout.without(axis)
        return dataclasses.replace(self, shape=shape, layout=layout, block_axis=block, group_axis=group)

    def stacked(self, axis: int, size: int) -> "Quantized":
        """This weight after its arrays got a stack axis ``axis`` of ``size``: the inverse of `entry`."""

        def moved(axes):
            return tuple(i + (i >= axis) for i in axes)

        layout = self.layout
        layout = Layout((axis, *moved(layout.stack)), moved(layout.inputs), moved(layout.outputs))
        block, group = moved((self.block_axis, self.group_axis))
        shape = (*self.shape[:axis], size, *self.shape[axis:])
        return dataclasses.replace(self, shape=shape, layout=layout, block_axis=block, group_axis=group)

    def store(self, w: jax.Array) -> "Quantized":
        return encode(w, self.layout, self.format, self.block, self.groups is not None)


def encode(w: Any, layout: Layout, format: str, block: int, double: bool) -> Quantized:
    """Quantizes a weight. Blocks run along its own axes, and stack entries are independent."""
    form, shape = READ[format], tuple(w.shape)
    axis, across = _axis(layout.inputs, shape, block), _axis(layout.outputs, shape, GROUP)
    wide, minimum = w.astype(jnp.float32), None
    # The minimum and the scales have the weight's axes, with one number per block along ``axis``.
    if form.minimum:
        minimum = folded(wide, axis, block).min(axis + 1)
        wide = wide - _spread(minimum, axis, block, shape[axis])
        minimum = minimum.astype(form.scales)
    scales = _largest(jnp.abs(wide), axis, block)
    codes = form.encode(wide * _spread(_inverse(scales), axis, block, shape[axis]) * form.top)
    if form.bits == 4:
        codes = pack(codes, axis)
    scales = (scales / form.top).astype(form.scales)
    groups = offset = None
    if double:
        # The offset has one number per stack entry, and size 1 along all other axes.
        inner = tuple(i for i in range(len(shape)) if i not in layout.stack)
        offset = jnp.mean(scales, inner, keepdims=True)
        groups = _largest(jnp.abs(scales - offset), across, GROUP)
        scales = to_dynamic((scales - offset) * _spread(_inverse(groups), across, GROUP, shape[across]))
    arrays = (codes, scales, groups, offset, minimum)
    return Quantized(*arrays, format, block, shape, np.dtype(w.dtype), layout, axis, across)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x for nonnegative numbers, finite at 0. bitsandbytes, too, multiplies by the inverse."""
    return 1.0 / jnp.maximum(x, jnp.finfo(jnp.float32).tiny)


def read_scales(q: Quantized) -> jax.Array:
    """The scale of each code, float32 in the weight's shape."""
    scales = q.scales
    if q.groups is not None:
        group = _spread(q.groups, q.group_axis, GROUP, q.shape[q.group_axis])
        scales = from_dynamic(scales) * group + q.offset
    return _spread(code_as_float(scales), q.block_axis, q.block, q.shape[q.block_axis])


def _codes(q: Quantized) -> jax.Array:
    """One code per weight, on the weight's axes."""
    axis = q.block_axis
    return unpack(q.codes, axis, q.shape[axis]) if READ[q.format].bits == 4 else q.codes


def with_codes(q: Quantized, codes: jax.Array) -> Quantized:
    """The same scales with other codes, given unpacked on the weight's axes."""
    return dataclasses.replace(q, codes=pack(codes, q.block_axis) if READ[q.format].bits == 4 else codes)


def nudged(q: Quantized, change: jax.Array) -> Quantized:
    """``q`` with ``change`` added and rounded without bias, at the existing scales.

    A number between two codes is rounded to either of them, with probabilities that make its mean the number
    itself (stochastic rounding, Gupta et al., https://arxiv.org/abs/1502.02551). The random numbers are a
    hash of the position, so the same change gives the same codes. Codes of numbers that do not change stay.
    If the change is so large that the range of the scales would cut off more than rounding takes, the whole
    weight is instead quantized again, to the nearest codes.

    Args:
      q: the weight.
      change: float32 on the weight's axes.

    Returns:
      A weight of the same structure.
    """
    _check_axes(q)
    form, scales = READ[q.format], read_scales(q)
    # Work in units of the scale. A block of zeros has none, so everything added to it is cut off.
    some = scales != 0
    value = form.decode(_codes(q)) + jnp.where(some, change / jnp.where(some, scales, 1.0), change)
    bottom = 0.0 if form.minimum else -form.top
    inside = jnp.where(some, jnp.clip(value, bottom, form.top), 0.0)
    code = form.encode(inside)
    near = form.decode(code)
    towards = jnp.sign(inside - near).astype(jnp.int32)
    other = (code.astype(jnp.int32) + towards).astype(code.dtype)
    gap = jnp.abs(form.decode(other) - near)
    codes = jnp.where(_chance(q.shape) * gap < jnp.abs(inside - near), other, code)
    beyond = (value - inside) * jnp.where(some, scales, 1.0)
    cut, rounded = jnp.sum(jnp.square(beyond)), jnp.sum(jnp.square(gap * scales)) / 12.0

    def again():
        return dataclasses.replace(q.store(_dense(q).astype(jnp.float32) + change), dtype=q.dtype)

    return jax.lax.cond(cut > rounded, again, lambda: with_codes(q, codes))


def _chance(shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers in (0, 1) that depend only on the position, by the finalizer of MurmurHash3."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        place = place * np.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = (place ^ (place >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        place = (place ^ (place >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        place = place ^ (place >> np.uint32(16))
    return ((place >> np.uint32(8)).astype(jnp.float32) + 0.5) * np.float32(2**-24)


@functools.partial(jax.jit, inline=True)  # one fused program, even outside of jit
def _dense(q: Quantized) -> jax.Array:
    w = READ[q.format].decode(_codes(q)) * read_scales(q)
    if q.minimum is not None:
        w = w + _spread(code_as_float(q.minimum), q.block_axis, q.block, q.shape[q.block_axis])
    # XLA may drop a cast to bfloat16 and back, but not reduce_precision, so every use sees the same weight.
    kind = jnp.finfo(q.dtype)
    return jax.lax.reduce_precision(w, kind.nexp, kind.nmant).astype(q.dtype)


def _axis(axes: tuple[int, ...], shape: tuple[int, ...], size: int) -> int:
    """The last of ``axes`` that is at least ``size`` long, or else the longest."""
    return next((i for i in reversed(axes) if shape[i] >= size), max(axes, key=lambda i: shape[i]))


def _largest(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The largest of each run of ``size`` neighbors along ``axis``, for nonnegative ``x``."""
    return folded(x, axis, size).max(axis + 1)


def _spread(x: jax.Array, axis: int, size: int, length: int) -> jax.Array:
    """Repeats each element ``size`` times along ``axis``, cut to ``length``: block values per element."""
    shape = (*x.shape[: axis + 1], size, *x.shape[axis + 1 :])
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return cut(x.reshape(*shape[:axis], -1, *shape[axis + 2 :]), axis, length)


def _check_axes(q: Quantized) -> None:
    if np.ndim(q.codes) != len(q.shape):
        raise error(
            "a quantized weight lost or gained an axis outside lorax_fn.",
            got=f"codes of shape {np.shape(q.codes)}",
            want=f"codes of {len(q.shape)} axes, like the weight's shape {q.shape}",
            do="in a loop or vmap over a stack axis, call q.entry(axis).dense().",
        )
