"""Whole values: `Full` trains a leaf as it is (a bias, a norm, a new head), `Rows` some rows of one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, Factors, fact, register
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import dense


@register
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

    def with_dropout(self, rate: Any, key: jax.Array) -> "Full":
        """Itself: a leaf trained whole has no low-rank branch whose inputs could be dropped."""
        del rate, key
        return self

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"value": tuple(range(len(self.value.shape)))}

    def problem(self, w: Any) -> str | None:
        if tuple(w.shape) != np.shape(self.value):
            return f"a whole leaf of shape {np.shape(self.value)}"
        return None


@register
class Rows(Adapter):
    """Chosen rows of a table, such as new tokens of an embedding: ``W' = W`` but ``W'[ids] = values``.

    The transform contracts it as the low-rank ``W + S (values - W[ids])``, ``S`` the columns ``ids`` of the
    identity, so that neither a lookup nor tied logits build the table.

    Args:
      values: ``[k, *m]``, the rows as they train.
      ids: which rows of axis 0 they are, each once.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> lx.Rows(jnp.ones((1, 2)), ids=(2,)).weight(jnp.zeros((3, 2)))[2]
      Array([1., 1.], dtype=float32)
    """

    values: Any
    ids: tuple[int, ...] = fact()

    @property
    def rank(self) -> int:
        """How many rows train."""
        return len(self.ids)

    def numbers(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def with_dropout(self, rate: Any, key: jax.Array) -> "Rows":
        """Itself: rows that are looked up have no low-rank branch whose inputs could be dropped."""
        del rate, key
        return self

    def weight(self, w: jax.Array) -> jax.Array:
        return dense(w).at[np.asarray(self.ids, np.int32)].set(self.values.astype(w.dtype))

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"values": (None, *range(1, len(self.values.shape)))}

    def factors(self, w: jax.Array) -> Factors:
        ids = np.asarray(self.ids, np.int32)
        table = np.arange(w.shape[0], dtype=np.int32)
        a = (jnp.asarray(table)[:, None] == ids[None, :]).astype(self.values.dtype)
        b = self.values - dense(w)[ids].astype(self.values.dtype)
        return Factors(a, b, Layout((), (0,), tuple(range(1, w.ndim))), 1.0)

    def problem(self, w: Any) -> str | None:
        shape = np.shape(self.values)
        if len(w.shape) < 2 or shape != (len(self.ids), *w.shape[1:]) or max(self.ids) >= w.shape[0]:
            return f"rows {self.ids[:8]} of shape {shape[1:]}"
        return None
