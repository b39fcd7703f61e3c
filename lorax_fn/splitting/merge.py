"""`merge` folds adapters into plain weights, and `delta` gives what each of them adds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits, check_unstacked
from lorax_fn.core.matrices import accumulation_dtype
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, flatten_with_paths, replace_leaves, run
from lorax_fn.quantization.straight_through import requantized, requantized_unbiased
from lorax_fn.splitting.rounding import narrowed, report

ROUNDINGS = (False, True, "unbiased")


def merge(
    params: PyTree, lora: dict[str, Adapter], *, dtype: Any = None, requantize: bool | str = False
) -> PyTree:
    """Folds adapters into the base weights, ``W' = W + scale * A @ B``, for the unchanged model to use.

    Sums are computed in float32, or in the dtype of the weight if that is wider, and rounded once. A number
    that the adapter does not change keeps its bits. Rounding may remove much of what an adapter adds. How
    much survives is computed by `surviving` and logged (logger ``lorax_fn``), and a `LoraMergeWarning` names
    the weights that keep less than half of their change, with a remedy. Merges in float32 or wider, and
    merges under a transformation such as `jax.jit`, are not checked.

    Args:
      params: the frozen tree that `split` returned.
      lora: its adapters, or some of them.
      dtype: dtype of the merged leaves; None keeps each leaf's own. A sum beyond its range becomes its
        largest number, with a warning.
      requantize: False turns every quantized leaf into an array, even those without an adapter. True rounds
        merged leaves to the nearest codes of their format, which removes most of a small change.
        ``"unbiased"`` rounds each number up or down at the existing scales so that the mean is right: a small
        change survives, with some noise. `lorax_fn.quantization.merge_aware` trains for it.

    Returns:
      A tree like ``params``. Float leaves without an adapter are the same objects.

    Raises:
      LoraError: there is no leaf at an adapter's path, or it has another shape; an adapter is under dropout;
        or ``requantize`` is not one of these values.

    Warns:
      LoraMergeWarning: a merged weight keeps less than half of its change, or numbers exceed its range.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> bool((lx.merge(params, lora)["q"]["kernel"] == params["q"]["kernel"]).all())
      True
    """
    if requantize not in ROUNDINGS:
        raise error(
            "requantize= is not valid.", got=repr(requantize), want=ROUNDINGS, do='requantize="unbiased".'
        )
    named = dict(flatten_with_paths(params)[0])
    check_fits(named, lora, allow_dropped=False)
    again = requantized_unbiased if requantize == "unbiased" else requantized
    merged = {}
    for path, leaf in named.items():
        if path in lora and requantize and is_stored(leaf):
            codes = run(again, lora[path], leaf)
            merged[path] = dataclasses.replace(codes, dtype=np.dtype(dtype or leaf.dtype))
        elif path in lora:
            merged[path] = run(
                functools.partial(_merged, dtype=np.dtype(dtype or leaf.dtype)), lora[path], leaf
            )
        elif is_stored(leaf) and not requantize:
            merged[path] = run(lambda leaf: dense(leaf).astype(dtype or leaf.dtype), leaf)
    report(named, lora, merged)
    return replace_leaves(params, merged)


def delta(lora: dict[str, Adapter]) -> dict[str, jax.Array]:
    """The change that each adapter adds to its weight: ``dW = scale * A @ B``.

    Adapters whose change depends on the weight itself (`Full`, `Rows`, `DoRA`) are left out.

    Args:
      lora: adapters by path.

    Returns:
      ``{path: dW}`` in float32, each on its weight's own axes.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, is stacked for `jax.vmap`, or is under dropout.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> lx.delta(lora)["q/kernel"].shape
      (8, 6)
    """
    check_unstacked(lora)
    dropped = [path for path, adapter in lora.items() if adapter.under_dropout]
    if dropped:
        raise error(
            "adapters under dropout have no single dW.", path=dropped, do="use the lora from before dropout."
        )
    able = {path: adapter for path, adapter in lora.items() if adapter.adds}
    return {path: run(lambda adapter: adapter.delta(), adapter) for path, adapter in able.items()}


# This is one fused program, so no unpacked copy of a quantized weight is kept.
@functools.partial(jax.jit, static_argnames="dtype")
def _merged(adapter: Adapter, w: Any, dtype: Any) -> jax.Array:
    w = jnp.asarray(dense(w))
    wide = w.astype(accumulation_dtype(w.dtype, dtype))
    changed = adapter.weight(wide)
    return _kept(changed == wide, w.astype(dtype), narrowed(changed, dtype))


@jax.custom_jvp
def _kept(same: jax.Array, w: jax.Array, changed: jax.Array) -> jax.Array:
    """``changed``, but the bits of ``w`` where nothing changes, including those of -0.0 and NaN."""
    return jnp.where(same, w, changed)


@_kept.defjvp
def _as_if_changed(primals: Any, tangents: Any) -> Any:
    # A change that is zero now, as it is while B is zero, still has a gradient.
    return _kept(*primals), tangents[2]
