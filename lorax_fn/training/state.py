"""`TrainState`: what a train step carries from one call to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters
from lorax_fn.core.keys import checked_key
from lorax_fn.core.trees import PyTree
from lorax_fn.training.masks import mask, train_only, trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step carries: adapters, optimizer state, step count, key and mutable state of the model.

    It is an ordinary pytree. A step that donates it (``jax.jit(step, donate_argnums=0)``) consumes the
    ``lora`` that was passed to `create`; keep a copy if you need it later.

    Args:
      lora: the ``dict[str, Adapter]`` to train.
      opt_state: state of ``train_only(tx)`` for ``trainable(lora)``; other leaves have none.
      step: int32 scalar, how many steps have been taken.
      key: PRNG key; step ``i`` uses ``fold_in(key, i)``, and the key itself never changes.
      extra: any tree that the model updates (batch statistics, Haiku state, NNX rngs), or None.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> lora = {"b": lx.Full(jnp.ones(2))}
      >>> lx.TrainState.create(lora=lora, tx=optax.adam(1e-3), key=jax.random.key(0)).step
      Array(0, dtype=int32)
    """

    lora: Any
    opt_state: Any
    step: Any
    key: Any
    extra: Any = None

    @classmethod
    def create(
        cls, *, lora: dict[str, Any], tx: optax.GradientTransformation, key: jax.Array, extra: PyTree = None
    ) -> "TrainState":
        """A state at step 0, with the optimizer state of ``train_only(tx)``.

        ``key`` and ``extra`` are copied, so that a donating step does not delete the caller's arrays.
        ``lora`` is not copied.

        Args:
          lora: ``dict[str, Adapter]``, as from `split`.
          tx: the optimizer that is also passed to `make_train_step`.
          key: a PRNG key.
          extra: the tree that the model updates, or None.

        Returns:
          The state.

        Raises:
          LoraError: ``lora`` is not a dict of adapters, came out of `dropout`, was consumed by a step, or has
            no trainable leaf; ``key`` is not a PRNG key.

        Example:
          >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
          >>> lora = {"b": lx.Full(jnp.ones(2))}
          >>> lx.TrainState.create(lora=lora, tx=optax.sgd(0.1), key=jax.random.key(0), extra={"n": 1}).extra
          {'n': 1}
        """
        check_adapters(lora)
        _check_trains(lora)
        checked_key(key)
        trained: Any = trainable(lora)
        return cls(
            lora=lora,
            opt_state=_unaliased(train_only(tx).init(trained), lora),
            step=jnp.zeros((), jnp.int32),
            key=_copy(key),
            extra=jax.tree.map(_copy, extra),
        )


def _check_trains(lora: dict) -> None:
    if not any(jax.tree.leaves(mask(lora))):
        raise error(
            "lora has no trainable leaf.",
            got=f"{len(lora)} adapters",
            want="at least one float leaf that is not frozen",
            do="look at lx.mask(lora); a filter may have dropped every adapter.",
        )


def _copy(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array | np.ndarray) else x


def _unaliased(tree: PyTree, other: PyTree) -> PyTree:
    """``tree`` with copies of arrays that repeat or occur in ``other``: a buffer can be donated only once."""
    taken = {id(x) for x in jax.tree.leaves(other)}

    def own(x):
        twice = id(x) in taken
        taken.add(id(x))
        return _copy(x) if twice else x

    return jax.tree.map(own, tree)
