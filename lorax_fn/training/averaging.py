"""Weighted means over micro-batches and devices.

A loss is a mean over something, such as examples or the tokens of a mask. If all parts of a batch contain
equally many of them, the mean over the whole is the mean over the parts. If not, part ``i`` has a weight
``w_i``, given by ``weight(batch)``, and the mean over the whole is ``sum_i w_i x_i / sum_i w_i``.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_array, is_float, named_leaves

# What a step computes from one part of a batch: gradients, extra, and metrics.
Part = tuple[PyTree, PyTree, dict]


def weight_of(weight: Callable | None, batch: PyTree) -> jax.Array | None:
    """The weight of ``batch``, a float32 scalar; None if all parts have the same weight."""
    if weight is None:
        return None
    found = weight(batch)
    number = is_array(found) or isinstance(found, bool | int | float)
    if not number or np.shape(found) != ():
        raise error(
            "weight(batch) is not a number.",
            got=f"shape {np.shape(found)}" if number else f"a {type(found).__name__}",
            want="a scalar: how many of the elements that the loss averages over are in this batch",
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
      gradient: returns gradients, extra and metrics of one micro-batch.
      batch: leaves ``[B, ...]``.
      key: micro-batch ``i`` gets ``fold_in(key, i)``.
      extra: passed from one micro-batch to the next. With ``weight``, every micro-batch starts from the same
        float leaves instead, and their means are taken.
      zeros: zeros in which gradients, and with ``weight`` the float leaves of extra, are summed.
      count: how many micro-batches.
      weight: the weight of a micro-batch as a function of it, or None.

    Returns:
      The means, and the sum of all weights or None.
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
        # Metrics are [count, ...]; the weights [count] become [count, 1, ...].
        along = weights.reshape(-1, *(1,) * (m.ndim - 1))
        return _divided(jnp.sum(_times(m, along), 0), total).astype(m.dtype) if is_float(m) else m[-1]

    return (grads, _with_floats(new, floats), jax.tree.map(mean, metrics)), total


def over_devices(part: Part, before: PyTree, weighs: jax.Array | None, axis_name: Hashable | None) -> Part:
    """The mean over ``axis_name`` of every float leaf; if the total weight is 0, extra stays as ``before``.

    Args:
      part: what one device has computed.
      before: extra at the beginning of the step.
      weighs: the weight of the part, or None.
      axis_name: the mapped axis, or None if there is only one part.
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


def check_divisible(batch: PyTree, count: int, problem: str, *, want: str, do: str) -> None:
    """Raises a `LoraError` if axis 0 of a leaf can't be split into ``count`` equal parts."""
    named = [(path, np.shape(leaf)) for path, leaf in named_leaves(batch, "batch")]
    wrong = [(path, shape) for path, shape in named if not shape or shape[0] % count]
    if wrong:
        raise error(
            problem,
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=want,
            do=f"{do}; remove leaves that have no batch axis.",
        )


def micro_batches(batch: PyTree, count: int) -> PyTree:
    """``[B, ...]`` leaves as ``[count, B / count, ...]``."""
    check_divisible(
        batch,
        count,
        "the batch can't be split.",
        want=f"axis 0 a multiple of accumulate={count}",
        do="change the batch size or accumulate",
    )

    def split(x):
        # [B, ...] -> [B / count, count, ...] -> [count, B / count, ...]: micro-batch i has the examples i,
        # i + count, ... So axis 0 keeps its sharding (explicit mesh axes allow no other split), and a mesh of
        # devices takes the same examples as a single device.
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def zeros_to_sum(trained: PyTree, extra: PyTree, weight: Callable | None) -> PyTree:
    """The initial sums of `over_micro_batches`, in float32 or wider, since 16-bit sums lose small numbers."""
    parts = trained, (None if weight is None else _floats(extra))
    return jax.tree.map(lambda x: jnp.zeros_like(x, _wide(x)), parts)


def _wide(x: Any) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _times(x: jax.Array, weighs: jax.Array | None) -> jax.Array:
    """``weighs * x`` in float32 or wider, and 0 where ``weighs`` is 0, even if ``x`` is NaN."""
    x = x.astype(_wide(x))
    if weighs is None:
        return x
    return jnp.where(weighs > 0, x * weighs.astype(x.dtype), jnp.zeros_like(x))


def _divided(x: jax.Array, total: jax.Array) -> jax.Array:
    """``x / total``, and 0 where the total is 0."""
    return x / jnp.where(total > 0, total, jnp.ones_like(total)).astype(x.dtype)


def _floats(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if is_float(x) else None, tree)


def _with_floats(tree: PyTree, floats: PyTree) -> PyTree:
    """``tree`` with the float leaves of another one."""
    return jax.tree.map(lambda x, other: other if is_float(x) else x, tree, floats)
