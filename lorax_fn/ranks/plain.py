"""`to_plain` converts adapters of residual weights (PiSSA, ...) to ordinary ones of the original weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits
from lorax_fn.core.matrices import entries, factor_entries, used_ranks
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_tracer
from lorax_fn.methods.lora import LoRA


def to_plain(params0: PyTree, params: PyTree, lora: dict[str, Adapter]) -> dict[str, Adapter]:
    """Converts adapters whose init moved a part of W (`pissa`, `olora`, ...) to ones of the original weights.

    With ``W0 = W + s A0 B0``, training changed the weight by ``W + s A B - W0 = s [A, A0] [B; -B0]``, a
    product of rank 2r with the same scale; PEFT converts in the same way on saving. ``A0`` and ``B0`` are
    computed from ``W0 - W`` by an SVD in float32.

    Args:
      params0: the original tree, which was given to `split`.
      params: the frozen tree that `split` returned.
      lora: the adapters of ``params``, trained or not. Adapters whose weight is the same in both trees are
        returned as they are; under a trace, values are unknown, so both must be the same object.

    Returns:
      Adapters of ``params0`` with the same methods and scales, and of rank 2r where the weights differ.

    Raises:
      LoraError: ``lora`` does not fit one of the trees; a weight differs by more than a rank-r part, so that
        ``params0`` is not the original tree; the weight was quantized after its init; or it differs although
        its method takes no init.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> original = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
      >>> params, lora = lx.split(original, rank=2, init="pissa")
      >>> plain = lx.ranks.to_plain(original, params, lora)
      >>> plain["kernel"].rank, bool(abs(lx.delta(plain)["kernel"]).max() < 1e-5)
      (4, True)
    """
    first, frozen = dict(flatten_with_paths(params0)[0]), dict(flatten_with_paths(params)[0])
    check_fits(first, lora)
    check_fits(frozen, lora)
    moved = [path for path in lora if _differ(first[path], frozen[path])]
    strange = [path for path in moved if lora[path].pair() is not None and not lora[path].owns_factors]
    if strange:
        raise error(
            "these weights differ, but their method takes no part of W.",
            path=strange,
            got=[type(lora[path]).__name__ for path in strange],
            want="the same weight in params0 and params",
            do="pass the params that this lora was split from, before and after split.",
        )
    rounded = [path for path in moved if is_stored(frozen[path])]
    if rounded:
        raise error(
            "the weights of params were quantized after their adapters took a part of them.",
            path=rounded,
            got="a difference of full rank, because it includes the rounding",
            want="the same weight in params0 and params, or the float residual that split returned",
            do="use params and lora together, or lx.merge(params, lora).",
        )
    plain, wrong = dict(lora), {}
    for path in moved:
        if lora[path].owns_factors:
            plain[path], left = _relative_to(lora[path], first[path], frozen[path])
            # Allow what rounding of the residual adds beyond rank r, with a margin. Tracers can't be checked.
            most = max(8.0 * float(jnp.finfo(frozen[path].dtype).eps), 1e-4)
            if not is_tracer(left) and float(left) > most:
                wrong[path] = float(left)
    if wrong:
        raise error(
            "params0 and params differ by more than these adapters took out.",
            path=list(wrong),
            got=[f"{share:.2%} of the weight beyond its adapter's rank" for share in wrong.values()],
            want="params0 as given to split, and params as it returned them",
            do="keep the original tree: params, lora = lx.split(params0, init='pissa').",
        )
    return plain


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
    """The adapter of ``w0``, and the norm of ``w0 - w`` beyond the adapter's rank, relative to ``w0``."""
    a, b, scale = factor_entries(adapter)
    first, last = (entries(x, adapter.layout).astype(jnp.float32) for x in (w0, w))
    used = jnp.asarray(used_ranks(adapter.rank, a.shape[0]))
    s = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    u, size, vt = jnp.linalg.svd(first - last, full_matrices=False)
    # u: [s, n, k], size: [s, k], vt: [s, k, m] with k = min(n, m). The first r directions are what init took.
    r = used.shape[1]
    taken = size[:, :r] * used
    left = jnp.concatenate([size[:, :r] - taken, size[:, r:]], axis=-1)
    share = jnp.sqrt(jnp.square(left).sum() / jnp.square(first).sum())
    root = jnp.sqrt(taken / jnp.abs(s))
    a0, b0 = u[:, :, :r] * root[:, None, :], (root * jnp.sign(s))[:, :, None] * vt[:, :r]
    a, b = jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=1)
    if not isinstance(adapter.rank, tuple):
        return _plain(adapter.with_factors(a, b, 2 * adapter.rank)), share
    # Both parts may end in padding, so move all padding to the end, behind the used ranks of both.
    order = np.argsort(1 - np.concatenate([used_ranks(adapter.rank, a.shape[0])] * 2, -1), kind="stable")
    a, b = jnp.take_along_axis(a, order[:, None, :], -1), jnp.take_along_axis(b, order[:, :, None], 1)
    return _plain(adapter.with_factors(a, b, tuple(2 * r for r in adapter.rank))), share


def _plain(adapter: LoRA) -> LoRA:
    return dataclasses.replace(adapter, residual=False)
