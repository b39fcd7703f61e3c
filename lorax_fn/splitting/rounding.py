"""How much of a merge survives rounding to narrow dtypes and 4-bit codes, which may lose a small change."""

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.matrices import accumulation_dtype
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_concrete

LOG = logging.getLogger("lorax_fn")
HALF = 0.5  # a smaller surviving share causes a warning
LISTED = 5  # how many weights a warning names
# Remedies, by the form of the merged weight.
CODES = (
    'lx.merge(params, lora, requantize="unbiased"), best after training by lx.quantization.merge_aware; '
    "or lx.merge(params, lora), which gives floats."
)
FLOAT8 = "lx.merge(params, lora, dtype=jnp.bfloat16); or keep the adapters beside the float8 weights."
NARROW = "lx.merge(params, lora, dtype=jnp.float32); or keep the adapters beside the weights."


class LoraMergeWarning(UserWarning):
    """Rounding removed more than half of what an adapter adds to a merged weight, or numbers overflowed.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraMergeWarning, UserWarning)
      True
    """


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in ``dtype``; finite numbers beyond its range become its largest number, not infinity or NaN."""
    largest = float(jnp.finfo(dtype).max)
    if largest >= float(jnp.finfo(x.dtype).max):
        return x.astype(dtype)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(dtype)


@jax.jit
def survival(adapter: Adapter, w: Any, merged: Any) -> jax.Array:
    """``[4]``: surviving share of the change; norms of rounding and change relative to W; numbers cut off.

    This is a separate program after the merge, because inside one program the compiler may skip the rounding.
    """
    wide = accumulation_dtype(w.dtype, merged.dtype)
    before, after = (dense(x).astype(wide) for x in (w, merged))
    meant = adapter.weight(before)
    largest = float(jnp.finfo(merged.dtype).max)
    cut = jnp.sum(jnp.isfinite(meant) & (jnp.abs(meant) > largest), dtype=jnp.int32).astype(wide)
    # A row that was infinite has no finite change to lose.
    known = jnp.isfinite(before) & jnp.isfinite(meant)
    change, done = (jnp.where(known, x - before, jnp.zeros_like(x)) for x in (meant, after))
    peak = jnp.max(jnp.abs(change))  # the squares of small changes would underflow
    unit = jnp.where(peak > 0, peak, jnp.ones_like(peak))
    square = jnp.sum(jnp.square(change / unit))
    share = jnp.where(peak > 0, jnp.sum(done / unit * (change / unit)) / jnp.maximum(square, 1.0), 1.0)
    whole = jnp.where(known, meant, jnp.zeros_like(meant))
    rounded, changed, whole = (jnp.sqrt(jnp.sum(jnp.square(x))) for x in (done - change, change, whole))
    whole = jnp.maximum(whole, jnp.finfo(wide).tiny)
    return jnp.stack([share, rounded / whole, changed / whole, cut])


# Between these sums of squares, no square that matters underflows or overflows in float32.
SAFE = 1e-20, 1e30


@jax.jit
def _square(adapter: Adapter, w: Any, merged: jax.Array) -> jax.Array:
    """``<dW, dW>``, unscaled."""
    before = w.astype(accumulation_dtype(w.dtype, merged.dtype))
    return jnp.sum(jnp.square(adapter.weight(before) - before))


@jax.jit
def _along(adapter: Adapter, w: Any, merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``<W' - W, dW>``, unscaled; and whether a number is at the end of the range or beyond."""
    before = w.astype(accumulation_dtype(w.dtype, merged.dtype))
    done = merged.astype(before.dtype) - before
    at_the_end = jnp.any(jnp.abs(merged) >= jnp.finfo(merged.dtype).max)
    return jnp.sum(done * (adapter.weight(before) - before)), at_the_end


def _survivals(
    before: Mapping[str, Any], lora: Mapping[str, Adapter], merged: Mapping[str, Any], paths: list[str]
) -> dict[str, Any]:
    """The numbers of `survival`; of arrays of ordinary size only the first and the last, the others are NaN.

    Each sum is a program of its own, whose only array of the weight's size is the product of the factors. In
    `survival`, several sums share four such arrays.
    """
    quick, whole = {}, {}
    for path in paths:
        given = lora[path], before[path], merged[path]
        if is_stored(before[path]) or is_stored(merged[path]):
            whole[path] = survival(*given)
        else:
            quick[path] = _square(*given), *_along(*given)
    for path, (square, along, at_the_end) in jax.device_get(quick).items():
        usual = SAFE[0] < square < SAFE[1] and math.isfinite(along) and not at_the_end
        whole[path] = (
            (along / square, math.nan, math.nan, 0)
            if usual
            else survival(lora[path], before[path], merged[path])
        )
    return jax.device_get(whole)


def surviving(params: PyTree, lora: Mapping[str, Adapter], merged: PyTree) -> dict[str, float]:
    """The share of each adapter's change that is in the merged weights: ``<W' - W, dW> / <dW, dW>``.

    ``dW`` is the adapter's change of ``W`` without rounding. A share of 1 means that the whole change
    survived (besides rounding noise, which is not along ``dW``), and 0 that rounding removed all of it. It is
    1 if ``dW`` is 0.

    `merge` computes it, and warns below one half. Use this function to see the numbers, even for a merge that
    went through a file or another program.

    Args:
      params: the tree before the merge.
      lora: adapters by path.
      merged: the tree after the merge, with the same paths, of arrays or `Quantized`.

    Returns:
      ``{path: share}``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 6), jnp.bfloat16)}, full="kernel", targets=())
      >>> lora = {"kernel": lx.Full(jnp.full((8, 6), 1.001))}
      >>> lx.surviving(params, lora, lx.merge(params, lora, dtype=jnp.float32))
      {'kernel': 1.0}
    """
    before, after = (dict(flatten_with_paths(tree)[0]) for tree in (params, merged))
    found = _survivals(before, lora, after, list(lora))
    return {path: float(numbers[0]) for path, numbers in found.items()}


def report(before: Mapping[str, Any], lora: Mapping[str, Adapter], merged: Mapping[str, Any]) -> None:
    """Logs what survived and warns of what did not; does nothing under a transformation.

    Weights that are merged in float32 or wider are skipped, as sums are not computed in any wider dtype.
    """
    paths = [p for p in lora if is_stored(merged[p]) or merged[p].dtype.itemsize < 4]
    if not is_concrete([(lora[path], before[path], merged[path]) for path in paths]):
        return
    found = _survivals(before, lora, merged, paths)
    packed = {path: numbers for path, numbers in found.items() if is_stored(merged[path])}
    plain = {path: numbers for path, numbers in found.items() if path not in packed}
    if packed:
        # Always log, since rounding always removes something, but do not warn, since that may stop a program.
        lines = [
            f"  {p}: {rounded:.3%}, {changed:.3%}; {share:.1%} of the change survives"
            for p, (share, rounded, changed, _) in packed.items()
        ]
        head = "merged and requantized: rounding, and the adapter's change, as shares of the weight's norm"
        LOG.warning("%s", "\n".join([head, *lines]))
    if plain:
        lines = [f"  {path}: {numbers[0]:.1%}" for path, numbers in plain.items()]
        LOG.info(
            "%s", "\n".join(["merged: the share of each adapter's change that survives rounding", *lines])
        )
    _warn(found, merged)


def _warn(found: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """Gives one warning for all weights that keep less than half of their change or have numbers cut off."""
    told, cures = [], {}
    for path, (share, _, _, cut) in found.items():
        if share >= HALF and not cut:
            continue
        kind = merged[path].format if is_stored(merged[path]) else str(merged[path].dtype)
        beyond = f"; {int(cut)} numbers are cut off at the largest {kind}" if cut else ""
        told.append(f"  {path} ({kind}): {share:.1%} of the change survives{beyond}")
        codes, float8 = is_stored(merged[path]), kind.startswith("float8")
        cures[CODES if codes else FLOAT8 if float8 else NARROW] = None
    if told:
        more = [f"  and {len(told) - LISTED} more"] if len(told) > LISTED else []
        head = "this merge loses what adapters add, because rounding is coarser than their change."
        text = "\n".join([head, *told[:LISTED], *more, *(f"  do: {x}" for x in cures)])
        warnings.warn(text, LoraMergeWarning, stacklevel=4)
