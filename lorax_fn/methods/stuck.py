"""Adapters that can never move, because to first order nothing that trains in them changes the weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.trees import is_concrete, is_float


class LoraStuckWarning(UserWarning):
    """Adapters were created that no training can move, such as PiSSA's for a weight of zeros.

    Example:
      >>> import warnings, jax.numpy as jnp, lorax_fn as lx
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     _ = lx.split({"kernel": jnp.zeros((3, 2))}, rank=1, init="pissa")
      >>> caught[0].category.__name__
      'LoraStuckWarning'
    """


def stuck(adapter: Adapter) -> str | None:
    """Why an adapter cannot move, or None if it can or if its values are not known.

    To first order, ``d(A B) = dA B + A dB``. If this is zero for random changes of all that trains, then one
    factor of each product is zero, and so is the gradient at every step.

    Args:
      adapter: an adapter of any method; one without factors can always move.

    Returns:
      A clause that gives the reason, and names the stack entries if not all of them are stuck.
    """
    if not is_concrete(adapter) or adapter.is_stacked or adapter.pair() is None:
        return None
    moves = np.asarray(_moves(adapter))
    rank = adapter.numbers().get("rank")
    used = np.reshape(rank, moves.shape) > 0 if isinstance(rank, tuple) else True
    entries = np.flatnonzero(~moves & used)
    if not entries.size:
        return None
    where = f" in stack entries {', '.join(map(str, entries[:8]))}" if entries.size < moves.size else ""
    return f"all that trains is multiplied by zeros{where}"


def _moves(adapter: Any) -> Any:
    """``[*s]`` bool: whether a change of the trained arrays changes ``A @ B`` to first order."""
    rng = np.random.default_rng(0)
    trained = {name: x for name in adapter.trained() if is_float(x := getattr(adapter, name))}
    step = {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in trained.items()}

    def factors(trained):
        pair: Any = dataclasses.replace(adapter, **trained).pair()
        return pair.a, pair.b

    (a, b), (da, db) = jax.jvp(factors, (trained,), (step,))

    def any_of(x, axes):
        return jnp.any(x != 0, axis=tuple(range(x.ndim - axes, x.ndim)))

    # A ends in (*n, r) and B in (r, *m). Reducing these axes leaves [*s], or [] for a factor that is shared.
    layout = adapter.layout
    n, m = len(layout.inputs) + 1, len(layout.outputs) + 1
    moves = (any_of(da, n) & any_of(b, m)) | (any_of(a, n) & any_of(db, m))
    return jnp.broadcast_to(moves, any_of(b, m).shape)
