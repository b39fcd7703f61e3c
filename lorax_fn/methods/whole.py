"""Whole leaves: `Full` trains a leaf as it is (a bias, a norm, a new head)."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lorax_fn.types import Adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full(Adapter):
    """A leaf trained whole: ``W' = value``, cast to the dtype of the leaf at use.

    Args:
      value: array of the leaf's shape, in the dtype that trains.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> lx.Full(jnp.ones(2)).weight(jnp.zeros(2, jnp.bfloat16)).dtype
      dtype(bfloat16)
    """

    value: Any

    def weight(self, w: jax.Array) -> jax.Array:
        return self.value.astype(w.dtype)

    def problem(self, w: Any) -> str | None:
        if tuple(w.shape) != np.shape(self.value):
            return f"a whole leaf of shape {np.shape(self.value)}"
        return None
