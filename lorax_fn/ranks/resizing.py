"""Changes the rank of adapters: truncates them to the best lower rank, or adds ranks that start at zero."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_unstacked
from lorax_fn.core.keys import checked_key, leaf_key
from lorax_fn.core.matrices import factor_entries, used_ranks
from lorax_fn.methods.lora import LoRA
from lorax_fn.ranks.spectra import product_svd, spectrum


def truncate(
    lora: dict[str, Adapter], rank: int | Mapping[str, int] | None = None, *, energy: float | None = None
) -> dict[str, Adapter]:
    """Truncates adapters to a lower rank, which keeps the largest singular directions of each dW.

    The error in the Frobenius norm is the root of the sum of the squared singular values that are cut off,
    the smallest possible for that rank (Eckart and Young). The scale stays, and dW is not built.

    Args:
      lora: adapters by path: `LoRA`, `DoRA` and `LoRAFA`. Leaves trained whole stay as they are.
      rank: the largest rank to keep, or ``{path: rank}``; adapters of that rank or less stay as they are.
      energy: instead of ``rank``, the fraction of ``sum(values^2)`` to keep, above 0 and at most 1. Each
        adapter gets the smallest rank, at least 1, that keeps it in every stack entry. Needs concrete arrays.

    Returns:
      New adapters of the same methods, in which ``A`` and ``B`` each have the roots of the singular values.

    Raises:
      LoraError: not exactly one of ``rank`` and ``energy`` is given; it is out of range, or names a path
        without an adapter; or it would truncate a method without factors of its own (`VeRA`, `LoHa`, `LoKr`,
        `LoRAXS`).

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> b = jnp.diag(jnp.array([4.0, 3.0]))
      >>> lora = {"w": lx.LoRA(jnp.eye(2), b, 2.0, 2, "lora", layout)}
      >>> lx.delta(lx.ranks.truncate(lora, rank=1))["w"].round(3)
      Array([[4., 0.],
             [0., 0.]], dtype=float32)
    """
    check_unstacked(lora)
    if (rank is None) == (energy is None):
        raise error(
            "truncate takes either rank= or energy=.",
            got=f"rank={rank!r}, energy={energy!r}",
            want="one of the two",
            do="rank=8, or energy=0.99.",
        )
    if energy is not None:
        if not 0.0 < energy <= 1.0:
            raise error(
                "energy is not a fraction.",
                got=f"energy={energy!r}",
                want="0 < energy <= 1",
                do="energy=0.99.",
            )
        _check_served(lora, list(lora))
        ranks = {path: _rank_of_energy(x, energy) for path, x in lora.items() if x.owns_factors}
    else:
        ranks = _asked_ranks(lora, rank)
    return {
        path: _cut(adapter, ranks[path]) if path in ranks and _width(adapter) > ranks[path] else adapter
        for path, adapter in lora.items()
    }


def resize(
    lora: dict[str, Adapter], rank: int | Mapping[str, int], *, key: jax.Array | None = None
) -> dict[str, Adapter]:
    """Changes the rank of adapters at the same scale: truncates them, or adds ranks that start at zero.

    Added ranks change neither dW nor the gradients of the old ranks. Their columns of A are normal numbers of
    the same size as A (or as a new A, if A is zero) and their rows of B are zero, so that they train.

    Args:
      lora: adapters by path: `LoRA`, `DoRA` and `LoRAFA`. Leaves trained whole stay as they are.
      rank: the new rank, or ``{path: rank}``; adapters at other paths stay as they are.
      key: PRNG key for the new columns, from which each path derives its own; None is ``jax.random.key(0)``.

    Returns:
      New adapters of the same methods.

    Raises:
      LoraError: a rank is not an int of 1 or more, or names a path without an adapter; an adapter to enlarge
        has ranks that differ along its stack; or a method cannot be resized, as in `truncate`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2)
      >>> larger = lx.ranks.resize(lora, 4)["kernel"]
      >>> larger.a.shape, larger.scale == lora["kernel"].scale
      ((8, 4), True)
    """
    check_unstacked(lora)
    ranks = _asked_ranks(lora, rank)
    had = {path: adapter.numbers()["rank"] for path, adapter in lora.items() if adapter.owns_factors}
    uneven = [p for p, r in ranks.items() if isinstance(had[p], tuple) and r > _width(lora[p])]
    if uneven:
        raise error(
            "ranks that differ along a stack cannot be enlarged.",
            path=uneven,
            got=[f"rank={had[p]}" for p in uneven],
            want="one rank for the whole stack",
            do="split again with the ranks you want.",
        )
    key = checked_key(jax.random.key(0) if key is None else key)
    new = dict(lora)
    for path, r in ranks.items():
        width = _width(lora[path])
        if r < width:
            new[path] = _cut(lora[path], r)
        elif r > width:
            new[path] = _padded(lora[path], r, leaf_key(key, path))
    return new


def _check_served(lora: Mapping[str, Adapter], paths: list[str]) -> None:
    """Raises a `LoraError` if one of ``paths`` has a low-rank method whose rank cannot be changed."""
    wrong = [p for p in paths if p in lora and lora[p].pair() is not None and not lora[p].owns_factors]
    if wrong:
        raise error(
            "the rank of these methods cannot be changed.",
            path=wrong,
            got=[type(lora[path]).__name__ for path in wrong],
            want="LoRA, DoRA or LoRAFA, whose change is scale * a @ b",
            do="name only the other paths: rank={path: rank}; or split again.",
        )


def _width(adapter: Any) -> int:
    return np.shape(adapter.a)[-1]


def _rank_of_energy(adapter: Any, energy: float) -> int:
    values = np.asarray(spectrum(adapter).values, np.float64).reshape(-1, _width(adapter))
    squares = np.cumsum(np.square(values), axis=-1)
    enough = squares >= energy * squares[:, -1:] * (1.0 - 1e-12)
    return int(enough.argmax(-1).max()) + 1


def _asked_ranks(lora: Mapping[str, Adapter], rank: Any) -> dict[str, int]:
    """The requested rank of each adapter by path, after checks."""
    able = {path for path, adapter in lora.items() if adapter.owns_factors}
    _check_served(lora, list(rank if isinstance(rank, Mapping) else lora))
    asked: Any = rank if isinstance(rank, Mapping) else {path: rank for path in lora if path in able}
    unknown = [path for path in asked if path not in able]
    if unknown:
        raise error(
            "rank= names paths without a LoRA.",
            path=unknown,
            want=sorted(able),
            do="name paths of lora: {path: rank}.",
        )
    wrong = [p for p, r in asked.items() if isinstance(r, bool) or not isinstance(r, int) or r < 1]
    if wrong:
        raise error(
            "a rank is not valid.",
            path=wrong,
            got=[f"rank={asked[p]!r}" for p in wrong],
            want="an int of 1 or more",
            do="rank=8, or {path: rank}.",
        )
    return dict(asked)


def _cut(adapter: Any, rank: int) -> LoRA:
    """The best approximation of rank ``rank``, with the roots of the singular values in each factor."""
    a, b, _ = factor_entries(adapter)
    u, size, vt = product_svd(a, b)
    new = tuple(min(r, rank) for r in adapter.rank) if isinstance(adapter.rank, tuple) else rank
    root = jnp.sqrt(size[:, :rank]) * used_ranks(new, a.shape[0])  # padding stays exactly zero
    return adapter.with_factors(u[:, :, :rank] * root[:, None, :], root[:, :, None] * vt[:, :rank], new)


def _padded(adapter: Any, rank: int, key: jax.Array) -> LoRA:
    """The adapter with added ranks: random columns of A ``[s, n, r]`` and zero rows of B ``[s, r, m]``."""
    a, b, _ = factor_entries(adapter)
    count, n, extra = a.shape[0], a.shape[1], rank - a.shape[-1]
    # Any numbers of A's size will do, since the zeros in B keep dW. If A is zero, as after init="zero_a", use
    # the size of a new A: the new ranks would never train if both factors were zero.
    size = jnp.sqrt(jnp.mean(jnp.square(a)))
    size = jnp.where(size > 0, size, jnp.full_like(size, 1.0 / math.sqrt(3.0 * n)))
    a = jnp.concatenate([a, size * jax.random.normal(key, (count, n, extra), jnp.float32)], axis=-1)
    b = jnp.concatenate([b, jnp.zeros((count, extra, b.shape[-1]), jnp.float32)], axis=1)
    return adapter.with_factors(a, b, rank)
