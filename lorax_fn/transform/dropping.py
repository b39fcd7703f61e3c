"""Dropout of the inputs of A, and its refusal where a use of a weight has no such inputs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import LoraError, error
from lorax_fn.transform.factored import Factored, Part, align


class Refused(LoraError):
    """Dropout was asked for on a weight that is used where nothing can be dropped."""

    def __init__(self, what: str, paths: Sequence[str]):
        self.what, self.paths = what, tuple(paths)
        do = (
            f"leave {', '.join(map(repr, paths))} out: "
            "lx.dropout({p: a for p, a in lora.items() if p not in left_out}, rate, key) | "
            "{p: lora[p] for p in left_out}."
        )
        super().__init__(str(error(what, path=list(paths), do=do)))

    def of(self, paths: dict[str, tuple[str, ...]]) -> "Refused":
        """The same error about the caller's weight: inside a jit, weights are named by operand position."""
        return Refused(self.what, [outer for inner in self.paths for outer in paths[inner]])

    def __reduce__(self):
        return Refused, (self.what, self.paths)


def dropped(w: Factored, x: Any, xs: Sequence[Any], keys: Part) -> tuple[Any, list]:
    """Drops entries of ``x``: one mask per stack entry, drawn from the entry's key."""
    stack = [n for n in keys.axes if n in w.parts["a"].axes]
    xs = list(xs)
    # For a stack W [s, n, m] and x [B, n] without s, each entry draws its own mask, so x becomes [s, B, n].
    missing = [n for n in stack if n not in xs]
    x = jnp.broadcast_to(x, (*[w.shape[n] for n in missing], *x.shape))
    xs = missing + xs
    rate = w.parts["rate"].array if "rate" in w.parts else w.rate
    return _dropped(x, keys.array, rate, tuple(xs), keys.axes, tuple(stack)), xs


@partial(jax.jit, static_argnames=("xs", "names", "stack"))
def _dropped(x, keys, rate, xs, names, stack):
    """``x * keep / (1 - rate)``, jitted so that equal uses share one trace and lowered function."""
    # The rate may be traced. The share is float32 whatever the dtype of x: bfloat16 would round 0.9 to
    # 0.8984.
    keep_share = jnp.float32(1.0) - jnp.asarray(rate, jnp.float32)
    rest = [n for n in xs if n not in stack]
    shape = tuple(x.shape[xs.index(n)] for n in rest)

    def draw(key):
        return jax.random.bernoulli(key, keep_share, shape)

    # A batch of keys, even a batch of one, compiles to a larger program than a single key.
    keep = draw(keys) if keys.ndim == 0 else jax.vmap(draw)(keys.reshape(-1))
    # The mask [*stack, *rest] is put into the order of x's axes; stack axes without keys share one mask.
    keep = align(keep.reshape(*keys.shape, *shape), [*names, *rest], xs)
    return jnp.where(keep, x * (1.0 / keep_share).astype(x.dtype), jnp.zeros((), x.dtype))
