"""Rank as an object of research: spectra of dW, adapters of another rank, plain ones from residual ones.

Nothing here builds a dW: singular values come from the QR of both factors, ``A = Qa Ra``, ``B^T = Qb Rb``,
so that ``svd(A B) = svd(Ra Rb^T)``, an ``[r, r]`` matrix.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.trees import Adapter, PyTree, error, flatten_with_paths, is_stored, is_tracer
from lorax_fn.inits.pissa import EXACT, entries, used_ranks
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import SCALINGS, LowRank
from lorax_fn.targets.roles import check_fits, check_lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of one dW and the ranks they speak of; one row a stack entry.

    Args:
      values: ``[*s, r]`` float32, largest first.
      stable: ``[*s]``, ``||dW||_F^2 / ||dW||_2^2``; 0 where dW is 0.
      entropy: ``[*s]``, ``exp(-sum p log p)`` with ``p = values / sum(values)`` (Roy and Vetterli, "The
        effective rank", 2007); 0 where dW is 0.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> eye = lx.LoRA(jnp.eye(3, 2), jnp.eye(2, 3), 2.0, 2, "lora", layout)
      >>> float(lx.effective_rank({"w": eye})["w"].stable)
      2.0
    """

    values: Any
    stable: Any
    entropy: Any


def effective_rank(lora: dict[str, Adapter]) -> dict[str, Spectrum]:
    """Singular values of every ``dW = scale * A @ B``, and its stable and entropy rank.

    By QR of the factors, so that the cost is that of ``r``, not of ``n m``.

    Args:
      lora: adapters by path. Those without a low-rank dW (`Full`) are left out; of a `DoRA` it is the change
        of direction, before the norm.

    Returns:
      ``{path: Spectrum}`` in float32.

    Raises:
      LoraError: ``lora`` is not a dict of adapters.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> b = jnp.diag(jnp.array([4.0, 3.0]))
      >>> lora = {"w": lx.LoRA(jnp.eye(2), b, 2.0, 2, "lora", layout)}
      >>> spectrum = lx.effective_rank(lora)["w"]
      >>> [round(float(x), 3) for x in spectrum.values], round(float(spectrum.stable), 3)
      ([4.0, 3.0], 1.562)
    """
    check_lora(lora)
    return {path: _spectrum(adapter) for path, adapter in lora.items() if isinstance(adapter, LowRank)}


def truncate(
    lora: dict[str, Adapter], rank: int | Mapping[str, int] | None = None, *, energy: float | None = None
) -> dict[str, Adapter]:
    """The best adapters of a lower rank: the largest singular directions of each dW, the rest cut off.

    The error is ``sqrt(sum of the squares of the singular values cut off)`` in the Frobenius norm, which no
    adapter of that rank undercuts (Eckart and Young). The scale stays what it is; dW is not built.

    Args:
      lora: adapters by path; those that are no `LoRA` (or `DoRA`, `LoRAFA`) are returned as they are.
      rank: the largest rank to keep, or ``{path: rank}``; adapters of that rank or less stay as they are.
      energy: instead of ``rank``, the share of ``sum(values^2)`` to keep, above 0, at most 1: each adapter
        gets the smallest rank that keeps it in every stack entry (at least 1). Needs concrete arrays.

    Returns:
      New adapters of the same methods, ``A`` and ``B`` balanced as the roots of the singular values.

    Raises:
      LoraError: not exactly one of ``rank`` and ``energy``, or one out of range, or of no adapter.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> b = jnp.diag(jnp.array([4.0, 3.0]))
      >>> lora = {"w": lx.LoRA(jnp.eye(2), b, 2.0, 2, "lora", layout)}
      >>> lx.delta(lx.truncate(lora, rank=1))["w"].round(3)
      Array([[4., 0.],
             [0., 0.]], dtype=float32)
    """
    check_lora(lora)
    if (rank is None) == (energy is None):
        raise error(
            "truncate takes one measure.",
            got=f"rank={rank!r}, energy={energy!r}",
            want="either rank= or energy=",
            do="rank=8, or energy=0.99.",
        )
    if energy is not None:
        if not 0.0 < energy <= 1.0:
            raise error(
                "energy is a share.", got=f"energy={energy!r}", want="0 < energy <= 1", do="energy=0.99."
            )
        ranks = {path: _rank_of_energy(x, energy) for path, x in lora.items() if isinstance(x, LoRA)}
    else:
        ranks = _asked_ranks(lora, rank)
    return {
        path: _cut(adapter, ranks[path]) if path in ranks and _width(adapter) > ranks[path] else adapter
        for path, adapter in lora.items()
    }


def resize(lora: dict[str, Adapter], rank: int | Mapping[str, int]) -> dict[str, Adapter]:
    """Adapters of another rank and the same scale: cut by `truncate`, or padded with ranks that are zero.

    Padding changes neither dW nor the gradient of what was there. New columns of A are normal numbers of A's
    own size where B's rows are the zeros, so that they train.

    Args:
      lora: adapters by path; those that are no `LoRA` are returned as they are.
      rank: the new rank, or ``{path: rank}``; paths that it does not name stay as they are.

    Returns:
      New adapters of the same methods.

    Raises:
      LoraError: a rank is not an int of 1 or more, or is of no adapter; or an adapter to enlarge has ranks
        that differ along its stack.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2)
      >>> larger = lx.resize(lora, 4)["kernel"]
      >>> larger.a.shape, larger.scale == lora["kernel"].scale
      ((8, 4), True)
    """
    check_lora(lora)
    ranks = _asked_ranks(lora, rank)
    had = {path: adapter.rank for path, adapter in lora.items() if isinstance(adapter, LoRA)}
    uneven = [p for p, r in ranks.items() if isinstance(had[p], tuple) and r > _width(lora[p])]
    if uneven:
        raise error(
            "ranks that differ along a stack cannot be enlarged.",
            path=uneven,
            got=[f"rank={had[p]}" for p in uneven],
            want="one rank for the whole stack",
            do="split again with the ranks you want.",
        )
    new = dict(lora)
    for path, r in ranks.items():
        width = _width(lora[path])
        new[path] = _cut(lora[path], r) if r < width else _padded(lora[path], r) if r > width else lora[path]
    return new


def to_plain(params0: PyTree, params: PyTree, lora: dict[str, Adapter]) -> dict[str, Adapter]:
    """Adapters for the original weights from those of an init that took a part of W (`pissa`, `olora`).

    With ``W0 = W + s A0 B0``, what training changed is ``dW' = W + s A B - W0 = s [A, A0] [B; -B0]``, of rank
    2r and the same scale, as PEFT converts on saving. ``A0, B0`` are read off ``W0 - W`` by SVD in float32.

    Args:
      params0: the original tree, which `split` was given.
      params: the frozen tree that `split` returned.
      lora: the adapters of ``params``, trained or not. Those whose weight is the same in both trees are
        returned as they are (under a trace, where that can't be seen, only if both are one object).

    Returns:
      Adapters of ``params0``; of the same methods, of rank 2r, alpha such that the scale stays.

    Raises:
      LoraError: ``lora`` does not fit either tree; a weight differs by more than a rank-r part, so that
        ``params0`` are not the original ones; or it differs under a method that takes no init.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> original = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
      >>> params, lora = lx.split(original, rank=2, init="pissa")
      >>> plain = lx.to_plain(original, params, lora)
      >>> plain["kernel"].rank, bool(abs(lx.delta(plain)["kernel"]).max() < 1e-5)
      (4, True)
    """
    first, frozen = dict(flatten_with_paths(params0)[0]), dict(flatten_with_paths(params)[0])
    check_fits(first, lora)
    check_fits(frozen, lora)
    moved = [path for path in lora if _differ(first[path], frozen[path])]
    strange = [path for path in moved if isinstance(lora[path], LowRank) and not isinstance(lora[path], LoRA)]
    if strange:
        raise error(
            "these weights differ, but their method takes no part of W.",
            path=strange,
            got=[type(lora[path]).__name__ for path in strange],
            want="one weight in params0 and params",
            do="pass the params that this lora was split from, before and after split.",
        )
    rounded = [path for path in moved if is_stored(frozen[path])]
    if rounded:
        raise error(
            "the weights of params were quantised after their adapters took a part of them.",
            path=rounded,
            got="a difference of full rank: that part, and the rounding",
            want="one weight in params0 and params, or the float residual that split returned",
            do="keep the two together: serve params with lora, or lx.merge(params, lora).",
        )
    plain, wrong = dict(lora), {}
    for path in moved:
        if isinstance(lora[path], LoRA):
            plain[path], left = _relative_to(lora[path], first[path], frozen[path])
            # what rounding of the residual leaves beyond rank r, with room; a tracer tells nothing
            most = max(8.0 * float(jnp.finfo(frozen[path].dtype).eps), 1e-4)
            if not is_tracer(left) and float(left) > most:
                wrong[path] = float(left)
    if wrong:
        raise error(
            "params0 and params differ by more than these adapters took out.",
            path=list(wrong),
            got=[f"{share:.2%} of the weight beyond its adapter's rank" for share in wrong.values()],
            want="params0 as split was given them, params as it returned them",
            do="keep the original tree: params, lora = lx.split(params0, init='pissa').",
        )
    return plain


# One adapter --------------------------------------------------------------------------------------------


def factor_entries(adapter: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A ``[s, n, r]`` and B ``[s, r, m]`` in float32, and the scale as ``[s, r]``."""
    pair, stack = adapter.pair(), len(adapter.layout.stack)
    a, b = jnp.asarray(pair.a, jnp.float32), jnp.asarray(pair.b, jnp.float32)
    r = a.shape[-1]
    count = math.prod(b.shape[:stack])
    b = b.reshape(count, r, -1)
    shared = a.ndim == 1 + len(adapter.layout.inputs) and stack > 0
    a = jnp.broadcast_to(a.reshape(1, -1, r), (count, a.size // r, r)) if shared else a.reshape(count, -1, r)
    scale = jnp.asarray(pair.scale, jnp.float32)
    per_rank = scale.ndim > stack
    scale = scale.reshape(-1, r) if per_rank else scale.reshape(-1, 1)
    return a, b, jnp.broadcast_to(scale, (count, r))


def _svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular triplets ``u [s, n, r], size [s, r], vt [s, r, m]`` of ``a @ b``, by QR of both."""
    if a.shape[-1] > min(a.shape[-2], b.shape[-1]):  # wider than the weight: nothing is skinny here
        u, size, vt = jnp.linalg.svd(jnp.matmul(a, b, precision=EXACT), full_matrices=False)
        return u, size, vt
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, size, vt = jnp.linalg.svd(jnp.matmul(ra, jnp.swapaxes(rb, -1, -2), precision=EXACT))
    left = jnp.matmul(qa, u, precision=EXACT)
    return left, size, jnp.matmul(vt, jnp.swapaxes(qb, -1, -2), precision=EXACT)


def _spectrum(adapter: LowRank) -> Spectrum:
    a, b, scale = factor_entries(adapter)
    values = _svd(a, b * scale[:, :, None])[1]
    total, largest = values.sum(-1), values[:, 0]
    none = largest == 0
    square = jnp.square(values / jnp.where(none, jnp.ones_like(largest), largest)[:, None]).sum(-1)
    share = values / jnp.where(none, jnp.ones_like(total), total)[:, None]
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0).sum(-1)
    stack = jax.eval_shape(lambda adapter: adapter.pair().b, adapter).shape[: len(adapter.layout.stack)]
    return Spectrum(
        values.reshape(*stack, values.shape[-1]),
        square.reshape(stack),
        jnp.where(none, jnp.zeros_like(total), jnp.exp(entropy)).reshape(stack),
    )


def _width(adapter: Any) -> int:
    return np.shape(adapter.a)[-1]


def _rank_of_energy(adapter: Any, energy: float) -> int:
    values = np.asarray(_spectrum(adapter).values, np.float64).reshape(-1, _width(adapter))
    squares = np.cumsum(np.square(values), axis=-1)
    enough = squares >= energy * squares[:, -1:] * (1.0 - 1e-12)
    return int(enough.argmax(-1).max()) + 1


def _asked_ranks(lora: Mapping[str, Adapter], rank: Any) -> dict[str, int]:
    """The rank asked of each `LoRA`, checked."""
    able = {path for path, adapter in lora.items() if isinstance(adapter, LoRA)}
    asked: Any = rank if isinstance(rank, Mapping) else {path: rank for path in lora if path in able}
    unknown = [path for path in asked if path not in able]
    if unknown:
        raise error(
            "rank= names no LoRA.", path=unknown, want=sorted(able), do="name paths of lora: {path: rank}."
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


def with_rank(adapter: LoRA, a: jax.Array, b: jax.Array, rank: Any) -> LoRA:
    """The adapter with factors ``[s, n, r], [s, r, m]`` of ``rank``, alpha such that the scale stays."""
    stack, n, m = adapter.layout.shapes(adapter.shape)
    rule = SCALINGS[adapter.scaling]

    def kept(alpha, old, new):
        return alpha * rule(1.0, old) / rule(1.0, new) if old and new else alpha

    alpha: Any
    if isinstance(rank, tuple):
        alphas = adapter.alpha if isinstance(adapter.alpha, tuple) else (adapter.alpha,) * len(rank)
        ranks = adapter.rank if isinstance(adapter.rank, tuple) else (adapter.rank,) * len(rank)
        alpha = tuple(map(kept, alphas, ranks, rank))
    else:
        alpha = kept(adapter.alpha, adapter.rank, rank)
    r = a.shape[-1]
    a = a.reshape(*stack, *n, r).astype(adapter.a.dtype)
    b = b.reshape(*stack, r, *m).astype(adapter.b.dtype)
    return dataclasses.replace(adapter, a=a, b=b, rank=rank, alpha=alpha)


def _cut(adapter: Any, rank: int) -> LoRA:
    a, b, _ = factor_entries(adapter)
    u, size, vt = _svd(a, b)
    new = tuple(min(r, rank) for r in adapter.rank) if isinstance(adapter.rank, tuple) else rank
    root = jnp.sqrt(size[:, :rank]) * used_ranks(new, a.shape[0])  # pads stay exactly zero
    return with_rank(adapter, u[:, :, :rank] * root[:, None, :], root[:, :, None] * vt[:, :rank], new)


def _padded(adapter: Any, rank: int) -> LoRA:
    a, b, _ = factor_entries(adapter)
    count, extra = a.shape[0], rank - a.shape[-1]
    # a fixed key: any numbers of A's size will do, and B's zeros keep dW
    draw = jax.random.normal(jax.random.key(rank), (count, a.shape[1], extra), jnp.float32)
    a = jnp.concatenate([a, draw * jnp.sqrt(jnp.mean(jnp.square(a)))], axis=-1)
    b = jnp.concatenate([b, jnp.zeros((count, extra, b.shape[-1]), jnp.float32)], axis=1)
    return with_rank(adapter, a, b, rank)


def _differ(w0: Any, w: Any) -> bool:
    if w0 is w:
        return False
    if jax.tree.structure(w0) != jax.tree.structure(w):
        return True
    pairs = zip(jax.tree.leaves(w0), jax.tree.leaves(w), strict=True)
    return any(
        is_tracer(a) or is_tracer(b) or not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs
    )


def _relative_to(adapter: Any, w0: Any, w: Any) -> tuple[LoRA, jax.Array]:
    """The adapter of ``w0``, and the share of ``w0`` that lies in neither ``w`` nor its rank."""
    a, b, scale = factor_entries(adapter)
    first, last = (entries(x, adapter.layout).astype(jnp.float32) for x in (w0, w))
    used = jnp.asarray(used_ranks(adapter.rank, a.shape[0]))
    s = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    u, size, vt = jnp.linalg.svd(first - last, full_matrices=False)
    r = used.shape[1]
    taken = size[:, :r] * used
    left = jnp.concatenate([size[:, :r] - taken, size[:, r:]], axis=-1)
    share = jnp.sqrt(jnp.square(left).sum() / jnp.square(first).sum())
    root = jnp.sqrt(taken / jnp.abs(s))
    a0, b0 = u[:, :, :r] * root[:, None, :], (root * jnp.sign(s))[:, :, None] * vt[:, :r]
    a, b = jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=1)
    if not isinstance(adapter.rank, tuple):
        return with_rank(adapter, a, b, 2 * adapter.rank), share
    # pads go behind both parts, as everywhere
    order = np.argsort(1 - np.concatenate([used_ranks(adapter.rank, a.shape[0])] * 2, -1), kind="stable")
    a, b = jnp.take_along_axis(a, order[:, None, :], -1), jnp.take_along_axis(b, order[:, :, None], 1)
    return with_rank(adapter, a, b, tuple(2 * r for r in adapter.rank)), share
