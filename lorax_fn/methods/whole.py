"""`Full` trains a whole leaf (a bias, a norm, a new head), and `Rows` some rows of a table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, Factors, fact, register
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import dense, is_stored


@register
class Full(Adapter):
    """A leaf trained whole: ``W' = value``, cast to the leaf's dtype where it is used.

    Args:
      value: array of the leaf's shape, in the dtype to train in.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> lx.Full(jnp.ones(2)).weight(jnp.zeros(2, jnp.bfloat16)).dtype
      dtype(bfloat16)
    """

    value: Any

    def weight(self, w: jax.Array) -> jax.Array:
        return self.value.astype(w.dtype)

    def with_dropout(self, rate: Any, key: jax.Array) -> "Full":
        """Returns itself, as a leaf trained whole has no low-rank branch."""
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

    The transform contracts it as ``W0 + S values``, where ``S`` holds the columns ``ids`` of the identity and
    ``W0`` is W with zeros in these rows. The rows are replaced, not added to, so their old values do not
    matter, even if they are large, infinite or NaN.

    For a vocabulary that grew, enlarge the table first and then split:

        table = params["embed"]["embedding"]
        new = jnp.broadcast_to(table.mean(0, keepdims=True), (2, table.shape[1]))
        params["embed"]["embedding"] = jnp.concatenate([table, new])
        params, lora = lx.split(params, rows={"embed": [50, 51]})

    To load these adapters later, enlarge the base table with the same lines again.

    Args:
      values: ``[k, ...]``, the trained rows, with the axes of W other than ``axis``.
      ids: the index of each row, without repeats.
      axis: the axis of W that indexes rows: 0 for an embedding ``[V, d]``, 1 for a head ``[d, V]``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> lx.Rows(jnp.ones((1, 2)), ids=(2,)).weight(jnp.zeros((3, 2)))[2]
      Array([1., 1.], dtype=float32)
      >>> lx.Rows(jnp.ones((1, 3)), ids=(1,), axis=1).weight(jnp.zeros((3, 2)))[0]
      Array([0., 1.], dtype=float32)
    """

    values: Any
    ids: tuple[int, ...] = fact()
    axis: int = fact(default=0)

    @property
    def rank(self) -> int:
        """How many rows train."""
        return len(self.ids)

    def numbers(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def with_dropout(self, rate: Any, key: jax.Array) -> "Rows":
        """Returns itself, as replaced rows have no low-rank branch."""
        del rate, key
        return self

    def weight(self, w: jax.Array) -> jax.Array:
        w = dense(w)
        at = jax.typeof(w).sharding
        keep = {"out_sharding": at} if at.mesh.explicit_axes else {}  # JAX asks where a sharded result goes
        return w.at[self._rows()].set(jnp.moveaxis(self.values, 0, self.axis).astype(w.dtype), **keep)

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        others = (i for i in range(len(self.values.shape)) if i != self.axis)
        return {"values": (None, *others)}

    def base(self, w: Any) -> Any:
        """W with zeros in the trained rows, so that NaN there is gone too. A stored table keeps its rows."""
        if is_stored(w):
            return w
        trained = np.zeros(w.shape[self.axis], bool)
        trained[list(self.ids)] = True
        others = [i for i in range(w.ndim) if i != self.axis]
        return jnp.where(np.expand_dims(trained, others), jnp.zeros((), w.dtype), w)

    def factors(self, w: Any) -> Factors:
        number = np.arange(w.shape[self.axis], dtype=np.int32)
        chosen = jnp.asarray(number)[:, None] == np.asarray(self.ids, np.int32)[None, :]  # [V, k]
        chosen = chosen.astype(self.values.dtype)
        rows = self.values - rows_of(dense(w), self.ids, self.axis).astype(self.values.dtype)
        others = tuple(i for i in range(len(w.shape)) if i != self.axis)
        if self.axis == 0:
            return Factors(chosen, rows, Layout((), (0,), others), 1.0)
        # Along another axis, the rows are the inputs' side, A [*n, k], and S^T [k, V] is B.
        return Factors(jnp.moveaxis(rows, 0, -1), chosen.T, Layout((), others, (self.axis,)), 1.0)

    def problem(self, w: Any) -> str | None:
        shape, ndim = np.shape(self.values), len(w.shape)
        others = tuple(w.shape[i] for i in range(ndim) if i != self.axis)
        if ndim < 2 or self.axis >= ndim or shape != (len(self.ids), *others):
            return f"rows {self.ids[:8]} along axis {self.axis}, each of shape {shape[1:]}"
        if max(self.ids) >= w.shape[self.axis]:
            return (
                f"at least {max(self.ids) + 1} rows along axis {self.axis}: pad the table first, see lx.Rows"
            )
        return None

    def _rows(self) -> tuple[Any, ...]:
        """The index of the rows in W."""
        return (slice(None),) * self.axis + (np.asarray(self.ids, np.int32),)


def rows_of(w: jax.Array, ids: tuple[int, ...], axis: int) -> jax.Array:
    """``[k, ...]``, the rows ``ids`` of W along ``axis``; not sharded, if a mesh has explicit axes."""
    table, index = jnp.moveaxis(w, axis, 0), np.asarray(ids, np.int32)
    mesh = jax.typeof(table).sharding.mesh
    if not mesh.explicit_axes:
        return table[index]
    return table.at[index].get(out_sharding=jax.NamedSharding(mesh, jax.P()))
