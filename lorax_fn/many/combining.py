"""Adapters put together: exact sums, their best low-rank form, and the trimming methods that PEFT offers.

With ``dW_i = s_i A_i B_i`` and ``f_i = sqrt(|w_i s_i|)``, each entry of a stack by itself:

cat              A = [w_1 s_1 A_1, ...], B = [B_1; ...]: exactly sum_i w_i dW_i, of rank sum r_i
linear           the same sum with orthogonal factors: exact, of rank min(sum r_i, n, m)
svd              its best approximation of rank k (Eckart and Young), by QR of the factors and SVD of r x r
peft_linear      A = sum sign(w_i s_i) f_i A_i, B = sum f_i B_i: has cross terms, so is not sum_i w_i dW_i
ties             on A and on B: trim, elect signs, mean of those that agree (https://arxiv.org/abs/2306.01708)
dare_linear      on A and on B: drop at random, rescale, sum (https://arxiv.org/abs/2311.03099)
dare_ties        dropped and rescaled like that, then elected as in ties
magnitude_prune  trim, then sum
*_svd            the same on the dW_i; the result is not low-rank, and its SVD is cut off at rank k
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error, nearest
from lorax_fn.core.fitting import check_adapters, check_unstacked
from lorax_fn.core.keys import checked_key, leaf_key
from lorax_fn.core.matrices import EXACT, factor_entries
from lorax_fn.core.trees import run
from lorax_fn.inits.pissa import randomized_svd
from lorax_fn.methods.lora import LoRA
from lorax_fn.ranks.spectra import product_svd

TRIMMED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "linear", "svd", "peft_linear", *TRIMMED, *(f"{name}_svd" for name in TRIMMED))
SIGNS = ("total", "frequency")
EXACT_UP_TO = 256  # trimmed dW with a smaller side up to this get an exact SVD, larger ones a randomized one


def combine(
    loras: Sequence[tuple[Any, dict[str, Adapter]]],
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    key: jax.Array | None = None,
) -> dict[str, Adapter]:
    """Puts weighted adapters together into one: ``sum_i w_i dW_i``, exactly or by a method of the literature.

    ``"cat"``, the default, is exact and has rank ``sum r_i``; ``"svd"`` is the best approximation of a lower
    rank, and builds no dW. The others are approximations to compare: TIES (https://arxiv.org/abs/2306.01708)
    and DARE (https://arxiv.org/abs/2311.03099) trim each adapter first. Without ``_svd`` they work on A and B
    separately, as in PEFT, so that even at density 1 they are not the sum of the dW. With ``_svd`` they work
    on the dW, which are built one weight at a time. The trimmed sum is not low-rank: with a smaller side of
    up to 256 its SVD is exact, and otherwise a randomized one with eight power iterations (Halko et al.,
    https://arxiv.org/abs/0909.4061), whose error is at most about 1 % above the smallest possible.

    Args:
      loras: ``(weight, lora)`` pairs; a weight is any number, negative ones too. A weight of the model that
        only some of them adapt gets what those add.
      method: one of ``cat``, ``linear``, ``svd``, ``peft_linear``, ``ties``, ``dare_linear``, ``dare_ties``,
        ``magnitude_prune``, ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``, ``magnitude_prune_svd``.
      rank: the rank of ``svd`` and the ``_svd`` forms; None is the largest of the adapters.
      density: the share of entries that trimming keeps, above 0 and at most 1; the methods that trim need it.
      sign: how ``ties`` elects the sign of an entry: ``"total"`` by the sum, ``"frequency"`` by count.
      key: PRNG key that decides what ``dare`` drops; None is ``jax.random.key(0)``.

    Returns:
      One adapter per path: a `LoRA` of scale 1, whatever the methods of ``loras``.

    Raises:
      LoraError: there are no adapters; an option is unknown, missing or without effect; layouts or shapes of
        a path differ; ranks differ where factors are added up; or what an adapter adds depends on the weight
        (`DoRA`, `Full`, `Rows`).

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> one, two = (lx.split(params, rank=r)[1] for r in (1, 2))
      >>> lx.combine([(0.5, one), (-1.0, two)])["kernel"]
      LoRA(a=f32[8,3], b=f32[3,6], rank=3, alpha=3.0, scale=1)
    """
    pairs = [(weight, lora) for weight, lora in loras]
    _check_options(pairs, method, rank, density, sign, key)
    for _, lora in pairs:
        check_unstacked(lora)
        check_adapters(lora)
    without = {
        path: type(x).__name__
        for _, lora in pairs
        for path, x in lora.items()
        if not x.adds or x.pair() is None
    }
    if without:
        raise error(
            "what these adapters change depends on the weight itself, so they cannot be added up.",
            path=list(without),
            got=list(without.values()),
            want="methods with a dW: LoRA, LoRA-FA, VeRA, LoHa, LoKr, LoRA-XS",
            do="combine the rest: {path: a for path, a in lora.items() if a.adds}.",
        )
    key = jax.random.key(0) if key is None else checked_key(key)
    made = {}
    for path in dict.fromkeys(path for _, lora in pairs for path in lora):
        here = [(weight, lora[path]) for weight, lora in pairs if path in lora]
        _check_alike(path, [x for _, x in here], method)
        keys = jax.random.split(leaf_key(key, path), len(here))
        weights, adapters = [w for w, _ in here], [x for _, x in here]
        options = {"method": method, "rank": rank, "density": density, "sign": sign}
        made[path] = run(partial(_combined, **options), weights, adapters, keys)
    return made


def subtract(lora: dict[str, Adapter], other: dict[str, Adapter]) -> dict[str, Adapter]:
    """An adapter that adds what one adds minus what another adds: ``dW - dW_other``, exactly.

    Task negation (Ilharco et al., https://arxiv.org/abs/2212.04089) is ``lx.subtract({}, other)``, or
    ``lx.scale(other, -1.0)`` at its own rank.

    Args:
      lora: the adapter to take from; ``{}`` is the base.
      other: the adapter to take away.

    Returns:
      An adapter whose rank is the sum of both, as from `combine`.

    Raises:
      LoraError: as `combine`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2)
      >>> bool(abs(lx.delta(lx.subtract(lora, lora))["kernel"]).max() < 1e-6)
      True
    """
    return combine([(1.0, lora), (-1.0, other)])


def scale(lora: dict[str, Adapter], factor: Any) -> dict[str, Adapter]:
    """An adapter that adds ``factor`` times as much: ``factor * dW``, at the same rank.

    With ``factor=-1.0`` it undoes a merge: ``merge(merge(params, lora), scale(lora, -1.0))`` is ``params`` up
    to the rounding of two sums, half a unit in the last place of the weight's dtype each. In bfloat16 that
    can be more than the adapter adds, so keep the base instead.

    Args:
      lora: adapters whose change is a dW.
      factor: a number; an array stays an array, so that other values of it compile nothing.

    Returns:
      The same factors under another alpha; methods without alpha (`VeRA`) become a `LoRA`.

    Raises:
      LoraError: as `combine`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2, alpha=4.0)
      >>> lx.scale(lora, -0.5)["kernel"].alpha
      -2.0
    """
    check_unstacked(lora)
    direct = {path for path, x in lora.items() if x.adds and "alpha" in x.numbers()}
    rest = (
        combine([(factor, {p: x for p, x in lora.items() if p not in direct})])
        if lora.keys() - direct
        else {}
    )
    return {path: _scaled(x, factor) if path in direct else rest[path] for path, x in lora.items()}


def interpolate(lora: dict[str, Adapter], other: dict[str, Adapter], t: Any) -> dict[str, Adapter]:
    """A point on the line between two adapters: ``(1 - t) dW + t dW_other``, exactly.

    Args:
      lora: the adapter at ``t = 0``.
      other: the adapter at ``t = 1``.
      t: a number; beyond 0 and 1 it extrapolates.

    Returns:
      An adapter whose rank is the sum of both, as from `combine`.

    Raises:
      LoraError: as `combine`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2)
      >>> lx.interpolate(lora, lora, 0.25)["kernel"].rank
      4
    """
    return combine([(1.0 - t, lora), (t, other)])


def _scaled(adapter: Any, factor: Any) -> Any:
    alpha = adapter.alpha
    new = tuple(a * factor for a in alpha) if isinstance(alpha, tuple) else alpha * factor
    if isinstance(new, tuple) and not all(isinstance(a, float | int) for a in new):
        new = jnp.stack(new).reshape(np.shape(adapter.a)[: len(adapter.layout.stack)])
    return dataclasses.replace(adapter, alpha=new)


def _check_options(pairs: list, method: str, rank: Any, density: Any, sign: str, key: Any) -> None:
    trims = method.removesuffix("_svd") in TRIMMED
    if method not in METHODS:
        raise error(
            "unknown method.", got=repr(method), want=nearest(str(method), METHODS), do='method="cat".'
        )
    if not pairs:
        raise error("there are no adapters to combine.", got="[]", do="lx.combine([(1.0, lora)]).")
    if density is None and trims:
        raise error(f"{method} trims, and density= is missing.", want="0 < density <= 1", do="density=0.5.")
    if density is not None and (not trims or not 0.0 < density <= 1.0):
        want = "0 < density <= 1" if trims else f"no density: {method} does not trim"
        raise error("density= does not fit.", got=density, want=want, do="leave it out, or density=0.5.")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        want = "an int of 1 or more" if method.endswith("svd") else f"no rank: that of {method} is given"
        raise error("rank= does not fit.", got=f"rank={rank}", want=want, do='method="svd" takes a rank.')
    if sign not in SIGNS or (sign != "total" and "ties" not in method):
        want = SIGNS if "ties" in method else f"no sign: {method} elects none"
        raise error("sign= does not fit.", got=repr(sign), want=want, do='sign="total".')
    if key is not None and "dare" not in method:
        raise error(
            f"{method} draws nothing.", got="key=...", want="no key", do='leave key= out, or "dare_ties".'
        )


def _check_alike(path: str, adapters: list[Any], method: str) -> None:
    facts = {f"{x.shape}, {x.layout}" for x in adapters}
    if len(facts) > 1:
        raise error(
            "adapters of different weights cannot be added up.",
            path=path,
            got=sorted(facts),
            want="one shape and one layout",
            do="split both from one base with the same layout=.",
        )
    ranks = sorted({_width(x) for x in adapters})
    if len(ranks) > 1 and method in ("peft_linear", *TRIMMED):
        raise error(
            f"{method} adds up the factors themselves, and their ranks differ.",
            path=path,
            got=f"ranks {ranks}",
            want="one rank",
            do=f'method="svd", or lx.ranks.resize(lora, {ranks[-1]}) first.',
        )


def _width(adapter: Any) -> int:
    return jax.eval_shape(lambda x: x.pair().a, adapter).shape[-1]


@partial(jax.jit, static_argnames=("method", "rank", "density", "sign"))  # once for all weights alike
def _combined(weights, adapters, keys, method, rank, density, sign) -> LoRA:
    entries = [factor_entries(x) for x in adapters]
    by_weight = [(w * s, a, b) for w, (a, b, s) in zip(map(_float32, weights), entries, strict=True)]
    largest = max(map(_width, adapters)) if rank is None else rank
    if method in ("cat", "linear", "svd"):
        a = jnp.concatenate([a * s[:, None, :] for s, a, _ in by_weight], -1)
        b = jnp.concatenate([b for _, _, b in by_weight], 1)
        if method != "cat":
            most = min(a.shape[-1], a.shape[1], b.shape[-1])
            a, b = _rebalanced(*product_svd(a, b), most if method == "linear" else min(largest, most))
    elif method.endswith("_svd"):
        # w multiplies what is trimmed, so the dW come without it.
        changes = [jnp.matmul(a * s[:, None, :], b, precision=EXACT) for a, b, s in entries]
        trimmed = _merged(changes, list(map(_float32, weights)), keys, method[:-4], density, sign)
        a, b = _rebalanced(*_svd(trimmed, min(largest, *trimmed.shape[1:]), keys[0]))
    else:
        # The scale may differ per rank or stack entry; A and B get its root each.
        roots = [jnp.sqrt(jnp.abs(s)) for s, _, _ in by_weight]
        for_a = [(jnp.sign(s) * root)[:, None, :] for (s, _, _), root in zip(by_weight, roots, strict=True)]
        for_b = [root[:, :, None] for root in roots]
        name = "linear" if method == "peft_linear" else method
        keys_a, keys_b = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in (0, 1))
        a = _merged([a for _, a, _ in by_weight], for_a, keys_a, name, density, sign)
        b = _merged([b for _, _, b in by_weight], for_b, keys_b, name, density, sign)
    return _as_lora(adapters, a, b)


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _merged(arrays: list, weights: list, keys: Any, method: str, density: Any, sign: str) -> jax.Array:
    """Arrays ``[s, ., .]`` of several adapters as one: trimmed, elected and added up, entry by entry."""
    if method in ("ties", "magnitude_prune"):
        arrays = [_largest(x, density) for x in arrays]
    if method.startswith("dare"):
        arrays = [_dropped(x, density, k) for x, k in zip(arrays, keys, strict=True)]
    weighted = [x * w for x, w in zip(arrays, weights, strict=True)]
    total = sum(weighted[1:], weighted[0])
    if not method.endswith("ties"):
        return total
    votes = [x if sign == "total" else jnp.sign(x) for x in arrays]
    elected = jnp.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
    agree = [(jnp.sign(x) == elected).astype(jnp.float32) for x in arrays]
    kept = [x * y for x, y in zip(weighted, agree, strict=True)]
    return sum(kept[1:], kept[0]) / jnp.maximum(sum(agree[1:], agree[0]), jnp.float32(1.0))


def _largest(x: jax.Array, density: float) -> jax.Array:
    """``x`` ``[s, ., .]`` with the largest ``density`` of each entry's values, the others zero."""
    count = int(density * x.shape[1] * x.shape[2])
    # Floats without a sign are ordered like their bits, so 32 counts find the smallest value that is kept. A
    # sort would take many times as long.
    size = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32).reshape(x.shape[0], -1)

    def with_bit(i, least):
        higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where((size >= higher).sum(1, keepdims=True) >= count, higher, least)

    least = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((x.shape[0], 1), jnp.uint32))
    above, equal = size > least, size == least
    left = count - above.sum(1, keepdims=True)  # of equals the first are kept
    kept = above | (equal & (jnp.cumsum(equal, axis=1) <= left))
    return jnp.where(kept.reshape(x.shape), x, jnp.zeros_like(x))


def _dropped(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """``x`` with a share of ``density`` kept at random and divided by it, so that its mean stays."""
    return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, jnp.zeros_like(x))


def _svd(x: jax.Array, rank: int, key: jax.Array) -> tuple[Any, Any, Any, int]:
    if min(x.shape[1:]) <= EXACT_UP_TO:
        u, size, vt = jnp.linalg.svd(x, full_matrices=False)
        return u, size, vt, rank
    u, size, vt = jax.lax.map(lambda matrix: randomized_svd(key, matrix, rank, 8), x)
    return u, size, vt, rank


def _rebalanced(u: jax.Array, size: jax.Array, vt: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The first ``rank`` singular triplets as ``a`` and ``b``, each with the root of the values."""
    root = jnp.sqrt(size[:, :rank])
    return u[:, :, :rank] * root[:, None, :], root[:, :, None] * vt[:, :rank]


def _as_lora(adapters: list[Any], a: jax.Array, b: jax.Array) -> LoRA:
    first = adapters[0]
    stack, n, m = first.layout.shapes(first.shape)
    dtype = jnp.result_type(*(jax.eval_shape(lambda x: x.pair().b, x).dtype for x in adapters))
    rank = a.shape[-1]
    a, b = a.reshape(*stack, *n, rank).astype(dtype), b.reshape(*stack, rank, *m).astype(dtype)
    residual = any(getattr(x, "residual", False) for x in adapters)
    return LoRA(a, b, float(rank), rank, "lora", first.layout, residual=residual)
