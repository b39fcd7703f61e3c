"""Inits that leave the weight as it is: random numbers in one factor, zeros in the other.

Each returns the same object ``w`` that it was given. Ranks that differ along a stack are a tuple; the factors
then have the largest rank, and the method zeroes the padding.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, used_ranks
from lorax_fn.core.trees import is_tracer
from lorax_fn.inits.base import Init

ROW = 2**16  # drawing so many numbers takes half a millisecond, compiling a draw for one shape 150
LARGE = 2**24  # the numbers above which a longer row would take memory that counts


@dataclasses.dataclass(frozen=True, repr=False)
class Kaiming(Init):
    """``A ~ U(-1/sqrt(n), 1/sqrt(n))``, ``B = 0``: the adapted function starts as the base function.

    This is ``kaiming_uniform_(a=sqrt(5))`` in the reference implementation of Hu et al.
    (https://arxiv.org/abs/2106.09685), and the default of `lorax_fn.split`. ``n`` is the product of the input
    axes of one stack entry.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((64, 8))}, rank=4, init=lx.inits.kaiming)  # or "kaiming"
      >>> bool(abs(lora["kernel"].a).max() <= 1 / 8), float(abs(lora["kernel"].b).max())
      (True, 0.0)
    """

    name = "kaiming"

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        del scale
        shape_a, shape_b = factor_shapes(w.shape, layout, rank)
        bound = 1.0 / math.sqrt(math.prod(layout.shapes(w.shape)[1]))
        a = drawn(partial(jax.random.uniform, minval=-bound, maxval=bound), key, shape_a)
        return a.astype(dtype), zeros(shape_b, dtype, a), w


@dataclasses.dataclass(frozen=True, repr=False)
class Gaussian(Init):
    """``A ~ N(0, 1/r^2)``, ``B = 0``, as PEFT's ``init_lora_weights="gaussian"``.

    If ranks differ along a stack, each entry has its own deviation.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((4096, 8))}, rank=4, init="gaussian")
      >>> bool(abs(lora["kernel"].a.std() - 1 / 4) < 0.01)
      True
    """

    name = "gaussian"

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        del scale
        shape_a, shape_b = factor_shapes(w.shape, layout, rank)
        a = drawn(jax.random.normal, key, shape_a)
        a = a / _rank_of_each_entry(rank, layout, w.shape, len(shape_a))
        return a.astype(dtype), zeros(shape_b, dtype, a), w


@dataclasses.dataclass(frozen=True, repr=False)
class ZeroA(Init):
    """``A = 0``, ``B ~ U(-1/sqrt(r), 1/sqrt(r))``: `Kaiming` with the roles of the factors exchanged.

    B's fan-in is the rank. The adapted function starts as the base function here too.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 64))}, rank=4, init="zero_a")
      >>> float(abs(lora["kernel"].a).max()), bool(0.4 < abs(lora["kernel"].b).max() <= 0.5)
      (0.0, True)
    """

    name = "zero_a"
    zero_a = True

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        del scale
        shape_a, shape_b = factor_shapes(w.shape, layout, rank)
        bound = 1.0 / np.sqrt(_rank_of_each_entry(rank, layout, w.shape, len(shape_b)))
        b = drawn(partial(jax.random.uniform, minval=-1.0, maxval=1.0), key, shape_b) * bound
        return zeros(shape_a, dtype, b), b.astype(dtype), w


@dataclasses.dataclass(frozen=True, repr=False)
class Orthogonal(Init):
    """Both factors are nonzero, but their product is zero, as they use orthogonal halves of the rank.

    ``A = G1 Q[1::2] / 10`` and ``B = Q[0::2]^T G2 / 10`` with a random rotation ``Q`` of the rank and normal
    ``G1, G2``, as PEFT's ``init_lora_weights="orthogonal"``. Every rank must be even.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=4, init="orthogonal")
      >>> bool(abs(lora["kernel"].a).max() > 0.01), bool(abs(lx.delta(lora)["kernel"]).max() < 1e-5)
      (True, True)
    """

    name = "orthogonal"

    def refuses(self, n, m, plan):
        ranks = plan.rank if isinstance(plan.rank, tuple) else (plan.rank,)
        if any(r % 2 for r in ranks):
            return f"an even rank for init='orthogonal', not {plan.rank}: each factor uses half of it"
        return None

    def __call__(self, key, w, layout: Layout, rank, scale, dtype):
        del scale
        stack, n, m = layout.shapes(w.shape)
        used = jnp.asarray(used_ranks(rank, math.prod(stack)))
        r = used.shape[1]

        def one(key, used):
            k1, k2, k3 = jax.random.split(key, 3)
            # Q is the identity on the padding, so each entry is rotated only within its own rank.
            both = used[:, None] * used[None, :]
            rotation = both * jax.random.normal(k1, (r, r), jnp.float32)
            q = jnp.linalg.qr(rotation + (1.0 - both) * jnp.eye(r, dtype=jnp.float32))[0]
            g1 = jax.random.normal(k2, (math.prod(n), r // 2), jnp.float32)
            g2 = jax.random.normal(k3, (r // 2, math.prod(m)), jnp.float32)
            a = jnp.matmul(g1, q[1::2], precision=EXACT) / 10.0 * used[None, :]
            return a, jnp.matmul(q[0::2].T, g2, precision=EXACT) / 10.0 * used[:, None]

        a, b = jax.vmap(one)(jax.random.split(key, math.prod(stack)), used)
        return a.reshape(*stack, *n, r).astype(dtype), b.reshape(*stack, r, *m).astype(dtype), w


kaiming, gaussian, zero_a, orthogonal = Kaiming(), Gaussian(), ZeroA(), Orthogonal()


def factor_shapes(shape, layout: Layout, rank) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A, ``[*s, *n, r]``, and B, ``[*s, r, *m]``, of a weight of ``shape``."""
    stack, n, m = layout.shapes(shape)
    r = max(rank) if isinstance(rank, tuple) else rank
    return (*stack, *n, r), (*stack, r, *m)


def _rank_of_each_entry(rank, layout: Layout, shape, ndim: int) -> np.ndarray:
    """The rank of each entry as a float32 divisor that broadcasts against a factor; 1 for rank 0."""
    if not isinstance(rank, tuple):
        return np.full((1,) * ndim, rank, np.float32)
    stack = layout.shapes(shape)[0]
    return np.maximum(np.asarray(rank, np.float32), 1.0).reshape(stack + (1,) * (ndim - len(stack)))


def drawn(draw: Callable[..., jax.Array], key: Any, shape: Sequence[int]) -> jax.Array:
    """``draw(key, shape, float32)``, without compiling a draw for each shape.

    Threefry computes a number from the key and its position alone. So the numbers of a shape are the first of
    a longer row, and shapes of up to `ROW` numbers share the program that draws such a row. Devices that are
    not CPUs compile the slice of it for each shape.
    """
    size = math.prod(shape)
    # Inside a traced program, which compiles its own draw, a key may be concrete, but no new array is.
    traced = is_tracer(key) or is_tracer(jax.device_put(np.float32(0)))
    if traced or size > LARGE or not _by_position(key):
        return draw(key, shape, jnp.float32)
    row = draw(key, (max(ROW, 1 << (size - 1).bit_length()),), jnp.float32)
    if all(device.platform == "cpu" for device in row.devices()):
        own = np.array(np.asarray(row)[:size]).reshape(shape)  # a copy: a view would keep the whole row alive
        return jax.device_put(own, row.sharding if row.committed else None)
    return _first(row, tuple(shape))


@partial(jax.jit, static_argnums=1)
def _first(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return row[: math.prod(shape)].reshape(shape)


def _by_position(key: Any) -> bool:
    by_position = getattr(jax.config, "jax_threefry_partitionable", True)
    return by_position and str(jax.random.key_impl(key)) == "threefry2x32"


def zeros(shape: Sequence[int], dtype: Any, other: Any) -> jax.Array:
    """Zeros beside the factor ``other``: traced if it is, and otherwise without a program for each shape."""
    return jnp.zeros(shape, dtype) if is_tracer(other) else jax.device_put(np.zeros(shape, dtype))
