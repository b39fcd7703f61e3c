"""The gradient of a loss with respect to each weight, averaged over batches."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from lorax_fn.calibration.passes import over_arrays, summed
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, arrays, is_float
from lorax_fn.methods.whole import Full
from lorax_fn.transform.adapt import adapt


def mean_gradients(
    loss: Callable, params: PyTree, batches: Iterable, paths: Iterable[str]
) -> dict[str, jax.Array]:
    """The gradient of a loss with respect to each weight, averaged over batches.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: its parameters, concrete.
      batches: the batches, each passed to ``loss`` in turn.
      paths: the paths of the weights.

    Returns:
      ``{path: gradient}`` float32, on the weights' own axes.

    Raises:
      LoraError: there is no batch, or the loss is not one number.
    """
    leaves, adapted = arrays(params), adapt(loss, fallback="error")

    def value(weights, params, batch):
        found = adapted(params, {path: Full(w) for path, w in weights.items()}, batch)
        if not is_float(found) or found.shape != ():
            raise error(
                "LoRA-GA needs a loss.",
                got=f"{jax.tree.map(lambda x: getattr(x, 'shape', type(x)), found)} from fn(params, batch)",
                want="one float",
                do="lx.inits.lora_ga(lambda params, batch: loss(fn(params, batch.x), batch.y), batches).",
            )
        return found

    weights = {path: leaves[path].astype(jnp.float32) for path in paths}
    total, count = summed(over_arrays(jax.grad(value)), weights, params, batches)
    return {path: gradient / count for path, gradient in total.items()}
