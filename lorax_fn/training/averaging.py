"""Means over micro-batches and devices, each part counted as often as it weighs.

A loss is a mean over something: over examples, or over the tokens that a mask leaves. Where all parts of
a batch hold as much of it, the mean over the whole is the mean of the parts. Where they do not, part ``i``
weighs ``w_i``, which ``weight(batch)`` gives, and the mean of the whole is ``sum_i w_i x_i / sum_i w_i``.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_array, is_float, named_leaves

# what a step computes from one part of a batch: gradients, extra, and the metrics
Part = tuple[PyTree, PyTree, dict]


def weight_of(weight: Callable | None, batch: PyTree) -> jax.Array | None:
    """What ``batch`` weighs, a float32 scalar; None where every part weighs the same."""
    if weight is None:
        return None
    found = weight(batch)
    number = is_array(found) or isinstance(found, bool | int | float)
    if not number or np.shape(found) != ():
        raise error(
            "weight(batch) is not a number.",
            got=f"shape {np.shape(found)}" if number else f"a {type(found).__name__}",
            want="a scalar: how much of what the loss is a mean over this batch holds",
            do='weight=lambda batch: batch["mask"].sum().',
        )
    return jnp.asarray(found).astype(jnp.float32)


def over_micro_batches(
    gradient: Callable,
    batch: PyTree,
    key: jax.Array,
    extra: PyTree,
    zeros: PyTree,
    *,
    count: int,
    weight: Callable | None,
) -> tuple[Part, jax.Array | None]:
    """Runs ``gradient(batch, key, extra)`` on ``count`` micro-batches, one after the other.

    Args:
      gradient: gives gradients, extra and metrics of one micro-batch.
      batch: leaves ``[B, ...]``.
      key: micro-batch ``i`` gets ``fold_in(key, i)``.
      extra: goes from one micro-batch to the next. With ``weight`` that holds for its other leaves alone: all
        start from the same floats, whose means are taken, as those of one batch are.
      zeros: float zeros in which gradients, and with ``weight`` the floats of extra, are summed.
      count: how many micro-batches.
      weight: what a micro-batch weighs, or None.

    Returns:
      The means, and the sum of all weights.
    """

    def body(carry, inputs):
        sums, last = carry
        micro, index = inputs
        given = last if weight is None else _with_floats(last, extra)
        grads, new, metrics = gradient(micro, jax.random.fold_in(key, index), given)
        weighs = weight_of(weight, micro)
        parts = grads, (None if weight is None else _floats(new))
        sums = jax.tree.map(lambda total, x: total + _times(x, weighs), sums, parts)
        return (sums, new), (metrics, weighs)

    inputs = (micro_batches(batch, count), jnp.arange(count, dtype=jnp.int32))
    carry, stacked = jax.lax.scan(body, (zeros, extra), inputs)
    sums, new = carry
    metrics: Any = stacked[0]
    weights: Any = stacked[1]
    if weight is None:
        grads = jax.tree.map(lambda total: total / count, sums[0])
        return (grads, new, jax.tree.map(lambda m: jnp.mean(m, 0) if is_float(m) else m[-1], metrics)), None
    total = jnp.sum(weights)
    grads, floats = jax.tree.map(lambda x: _divided(x, total), sums)
    floats = jax.tree.map(
        lambda x, old: jnp.where(total > 0, x, old).astype(old.dtype), floats, _floats(extra)
    )

    def mean(m):
        along = weights.reshape(-1, *(1,) * (m.ndim - 1))
        return _divided(jnp.sum(_times(m, along), 0), total).astype(m.dtype) if is_float(m) else m[-1]

    return (grads, _with_floats(new, floats), jax.tree.map(mean, metrics)), total


def over_devices(part: Part, before: PyTree, weighs: jax.Array | None, axis_name: Hashable | None) -> Part:
    """The mean over ``axis_name`` of every float leaf; what no device has any of stays as it was ``before``.

    Args:
      part: what one device has computed.
      before: extra at the beginning of the step.
      weighs: what the part weighs, or None.
      axis_name: the mapped axis, or None where there is one part.
    """
    if weighs is None:
        if axis_name is None:
            return part
        return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name) if is_float(x) else x, part)
    total = weighs if axis_name is None else jax.lax.psum(weighs, axis_name)

    def mean(x):
        if not is_float(x):
            return x
        if axis_name is None:
            return jnp.where(total > 0, x, jnp.zeros_like(x))
        return _divided(jax.lax.psum(_times(x, weighs), axis_name), total).astype(x.dtype)

    def kept(x, old):
        return jnp.where(total > 0, mean(x), old).astype(x.dtype) if is_float(x) else x

    grads, extra, metrics = part
    return jax.tree.map(mean, grads), jax.tree.map(kept, extra, before), jax.tree.map(mean, metrics)


def micro_batches(batch: PyTree, count: int) -> PyTree:
    """``[B, ...]`` leaves as ``[count, B / count, ...]``."""
    named = [(path, np.shape(leaf)) for path, leaf in named_leaves(batch, "batch")]
    wrong = [(path, shape) for path, shape in named if not shape or shape[0] % count]
    if wrong:
        raise error(
            "the batch can't be split.",
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=f"axis 0 a multiple of accumulate={count}",
            do="change the batch size or accumulate; keep what is not a batch out of it.",
        )

    def split(x):
        # examples i, i + count, ...: axis 0 keeps its sharding (explicit mesh axes allow no other split), and
        # the devices of one mesh together take the same examples as a single device does
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def zeros_to_sum(trained: PyTree, extra: PyTree, weight: Callable | None) -> PyTree:
    """Where `over_micro_batches` sums: sums of many 16-bit numbers would lose the small ones."""
    parts = trained, (None if weight is None else _floats(extra))
    return jax.tree.map(lambda x: jnp.zeros_like(x, _wide(x)), parts)


def _wide(x: Any) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _times(x: jax.Array, weighs: jax.Array | None) -> jax.Array:
    """``weighs * x`` in float32 at least; what weighs nothing counts nothing, though it be NaN."""
    x = x.astype(_wide(x))
    if weighs is None:
        return x
    return jnp.where(weighs > 0, x * weighs.astype(x.dtype), jnp.zeros_like(x))


def _divided(x: jax.Array, total: jax.Array) -> jax.Array:
    """``x / total``, and 0 where nothing was counted."""
    return x / jnp.where(total > 0, total, jnp.ones_like(total)).astype(x.dtype)


def _floats(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if is_float(x) else None, tree)


def _with_floats(tree: PyTree, floats: PyTree) -> PyTree:
    """``tree`` with the float leaves of another one."""
    return jax.tree.map(lambda x, other: other if is_float(x) else x, tree, floats)
