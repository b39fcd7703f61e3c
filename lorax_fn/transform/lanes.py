"""Products of many adapters under `jax.vmap`, each lane at its own rank.

Lanes of different ranks are padded to the widest, and a `jax.vmap` of the product would multiply the padding
too. Where the ranks are known, the padding is cut off. Then either lanes of similar rank form one product of
that width, or the factors of all lanes lie side by side in one matrix, and a mask leaves each lane its own
columns: more operations, but results that need not be put together, which on a TPU takes longer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

Product = Callable[[Any, Any, Any, Any], Any]


class Lanes(NamedTuple):
    """The ranks of lanes: ``(how many lanes, their widest rank)`` for each run of neighbors, in order."""

    runs: tuple[tuple[int, int], ...]
    side_by_side: bool = False


class Halves(NamedTuple):
    """A product in steps: ``first(x, first) -> h``, ``scaled(h, columns, own) -> h``, ``second(h, second)``.

    ``columns`` is a scale with a last axis, the rank, and ``own`` ``[rank]`` says which columns of ``h`` to
    keep.
    """

    first: Callable[[Any, Any], Any]
    scaled: Callable[[Any, Any, Any], Any]
    second: Callable[[Any, Any], Any]

    def over_examples(self) -> "Halves":
        """The same for ``x`` with a leading axis."""
        by_first = (0, None)
        return Halves(
            jax.vmap(self.first, by_first),
            jax.vmap(self.scaled, (0, None, None)),
            jax.vmap(self.second, by_first),
        )


def by_lane(product: Product, lanes: Lanes, axes: tuple[int, int], halves: Halves) -> Product:
    """``product(x, first, second, scale)`` that leaves the padding out under a `jax.vmap` over lanes.

    The `vmap` over lanes is the one that maps over ``scale``. It has to be inside `jax.grad`, as in
    ``grad(lambda lora: vmap(loss)(lora).sum())``; a gradient inside of it would not see the rule.

    Args:
      product: what a single lane computes.
      lanes: the lanes' ranks, and which form their products take.
      axes: the axis of the rank in ``first`` and in ``second``.
      halves: the same as ``product``, in steps.
    """
    mapped = custom_vmap(product)
    counts = [count for count, _ in lanes.runs]

    @mapped.def_vmap
    def rule(size, batched, x, first, second, scale):
        at = tuple(0 if is_mapped else None for is_mapped in batched)
        if not any(batched[1:]):  # a vmap over examples, say: lanes may come later
            inner = by_lane(jax.vmap(product, at), lanes, axes, halves.over_examples())
            return inner(x, first, second, scale), True
        if not all(batched[1:]) or size != sum(counts):
            return jax.vmap(product, at)(x, first, second, scale), True
        firsts, seconds = (cut(array, lanes, axis) for array, axis in ((first, axes[0]), (second, axes[1])))
        if lanes.side_by_side:
            return _side_by_side(x, at[0], firsts, seconds, scale, lanes, axes, halves), True
        xs, scales = lax.split(x, counts) if batched[0] else [x] * len(counts), lax.split(scale, counts)
        made = []
        for x, first, second, by in zip(xs, firsts, seconds, scales, strict=True):
            if len(by) == 1:
                made.append(product(x[0] if batched[0] else x, first[0], second[0], by[0])[None])
            else:
                made.append(jax.vmap(product, at)(x, first, second, by))
        return jnp.concatenate(made), True

    return mapped


def _side_by_side(x, at, firsts, seconds, scale, lanes, axes, halves):
    """One product of all lanes with the factors of all. What diverges in one lane must not reach another.

    A zero does not mask infinity or NaN, in a product or in its gradients. So columns of other lanes are
    chosen away, not multiplied by zero; and where one product sums over lanes, what is not finite counts as
    zero. A lane with such a ``second`` gets a scale of NaN instead; one with such a ``first``, or with such
    inputs or results, gets NaN by itself.
    """
    fine = jnp.concatenate([jnp.isfinite(x).all(range(1, x.ndim)) for x in seconds])
    scale = jnp.where(fine.reshape(-1, *[1] * (scale.ndim - 1)), scale, jnp.full((), jnp.nan, scale.dtype))
    columns, own = _columns(scale, lanes)
    shrink = _guarded(halves.first if at is None else jax.vmap(halves.first, (0, None)), first=True)
    h = jax.vmap(halves.scaled, (at, 0, 0))(shrink(x, _merged(firsts, axes[0])), columns, own)
    return _guarded(jax.vmap(halves.second, (0, None)), first=False)(h, _merged(seconds, axes[1]))


def _guarded(product: Callable[[Any, Any], Any], *, first: bool) -> Callable[[Any, Any], Any]:
    """``product(x, factor)``, where what is not finite counts as zero in sums that go over all lanes.

    Those are sums over the columns of a factor, which for a ``first`` are only in the gradient of ``x``, and
    sums over tokens, in the gradient of a factor.
    """

    @jax.custom_vjp
    def guarded(x, factor):
        return product(x, factor if first else _finite(factor))

    def forward(x, factor):
        return guarded(x, factor), (x, factor)

    def backward(saved, cotangent):
        x, factor = saved
        factor = _finite(factor)
        (to_x,) = jax.vjp(lambda x: product(x, factor), x)[1](cotangent)
        x, cotangent = (_finite(x), cotangent) if first else (x, _finite(cotangent))
        (to_factor,) = jax.vjp(lambda factor: product(x, factor), factor)[1](cotangent)
        return to_x, to_factor

    guarded.defvjp(forward, backward)
    return guarded


def _finite(x: jax.Array) -> jax.Array:
    """``x`` with zeros in place of what is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def cut(array: jax.Array, lanes: Lanes, axis: int) -> list[jax.Array]:
    """The factors ``[lanes, ...]`` run by run, each cut to its rank along ``axis`` of a single lane's."""
    parts = lax.split(array, [count for count, _ in lanes.runs])
    ranks = [rank for _, rank in lanes.runs]
    return [lax.slice_in_dim(x, 0, rank, axis=axis + 1) for x, rank in zip(parts, ranks, strict=True)]


def _merged(runs: list[jax.Array], axis: int) -> jax.Array:
    """The factors of all lanes along one axis, that of the rank."""

    def merged(x):
        x = jnp.moveaxis(x, 0, axis)  # the lanes, right before their ranks
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jnp.concatenate([merged(x) for x in runs], axis)


def _columns(scale: jax.Array, lanes: Lanes) -> tuple[jax.Array, np.ndarray]:
    """Each lane's scale in its own columns, ``[lanes, ..., columns]``, and the mask of these columns."""
    ranks = np.repeat([rank for _, rank in lanes.runs], [count for count, _ in lanes.runs])
    own = np.repeat(np.arange(len(ranks)), ranks) == np.arange(len(ranks))[:, None]
    kept = own.reshape(len(ranks), *[1] * (scale.ndim - 1), -1)
    return jnp.where(kept, scale[..., None], jnp.zeros((), scale.dtype)), own
