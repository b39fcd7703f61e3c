"""`merge` folds adapters back into plain weights; `delta` says what each of them adds."""

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
    """Folds adapters into the base weights: ``W' = W + scale * A @ B``, plain params for the untouched model.

    Sums are taken in float32, or in the dtype of the weight where that is wider, and are rounded once. A
    number that the adapter does not change keeps its bits. Rounding may take more than an adapter adds:
    `surviving` says how much of each change is left; it is logged (logger ``lorax_fn``), and a
    `LoraMergeWarning` names the weights that keep less than half, and what helps. Merges in
    float32 or wider need no report, and under a transformation, such as `jax.jit`, there is none.

    Args:
      params: the frozen tree that `split` returned.
      lora: its adapters, or some of them.
      dtype: dtype of the merged leaves; None keeps each leaf's own. A sum beyond its range becomes the
        largest number of it, with a warning.
      requantize: False makes an array of every quantized leaf, of those without an adapter too. True rounds
        merged leaves to the nearest codes of their format, which takes most of a small change. ``"unbiased"``
        rounds each number up or down so that the mean over many is right, on the scales that are there: a
        small change survives, with some noise; see `lorax_fn.quantization.merge_aware`, which trains for it.

    Returns:
      A tree like ``params``. Float leaves without an adapter are the same objects.

    Raises:
      LoraError: an adapter has no leaf, another shape, or dropout; all are listed, and nothing is merged. Or
        ``requantize`` is none of these values.

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
    """What each adapter adds to its weight: ``dW = scale * A @ B``.

    Adapters whose change depends on the weight itself (`Full`, `Rows`, `DoRA`) have none; they are left out.

    Args:
      lora: adapters by path.

    Returns:
      ``{path: dW}`` in float32, each on its weight's own axes.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or adapters are under dropout.

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
            "adapters under dropout have no one dW.", path=dropped, do="use the lora from before dropout."
        )
    able = {path: adapter for path, adapter in lora.items() if adapter.adds}
    return {path: run(lambda adapter: adapter.delta(), adapter) for path, adapter in able.items()}


@functools.partial(
    jax.jit, static_argnames="dtype"
)  # one program per structure, and no unpacked copy beside it
def _merged(adapter: Adapter, w: Any, dtype: Any) -> jax.Array:
    w = jnp.asarray(dense(w))
    wide = w.astype(accumulation_dtype(w.dtype, dtype))
    changed = adapter.weight(wide)
    return _kept(changed == wide, w.astype(dtype), narrowed(changed, dtype))


@jax.custom_jvp
def _kept(same: jax.Array, w: jax.Array, changed: jax.Array) -> jax.Array:
    """The bits of ``w`` where nothing changes, also those of -0.0 and of a nan."""
    return jnp.where(same, w, changed)


@_kept.defjvp
def _as_if_changed(primals: Any, tangents: Any) -> Any:
    # A change that is zero now, as B is at first, has a gradient all the same.
    return _kept(*primals), tangents[2]
