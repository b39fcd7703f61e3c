"""What an adapter is: it changes or replaces one weight, and answers what other code asks of it."""

import dataclasses
from typing import Any, ClassVar

import jax

from lorax_fn.core.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank form ``W' = column * (W + scale * A @ B)`` that the transform contracts.

    Args:
      a: ``[*s, *n, r]``; without ``*s`` where all stack entries share it.
      b: ``[*s, r, *m]``.
      layout: which axes of the weight are stack, inputs and outputs.
      scale: a number, an array ``[*s]``, or ``[*s, r]``.
      column: ``[*s, *m]`` factor of the whole weight (DoRA), or None for 1.
      key: PRNG keys ``[*s]`` that drop inputs of A, or None.
      rate: the share of inputs dropped.
      tap: whether the factors only read what the weight contracts; see `transform/taps.py`.
    """

    a: jax.Array
    b: jax.Array
    layout: Layout
    scale: Any
    column: jax.Array | None = None
    key: jax.Array | None = None
    rate: float = 0.0
    tap: bool = False


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What changes or replaces one weight: a frozen dataclass registered as a pytree.

    A method is a subclass with `weight` (the changed weight, always) and, where a fast path exists,
    `factors` (its low-rank form, which the transform contracts without building the weight).

    ``frozen`` names the array fields that never train: they get a zero gradient and ``mask`` False.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoRA, lx.Adapter), lx.LoRA.frozen
      (True, ())
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    def weight(self, w: jax.Array) -> jax.Array:
        """The changed weight, accumulated in float32 and returned in ``w``'s dtype, ``w``'s shape."""
        raise TypeError(f"{type(self).__name__} must define weight(w)")

    def factors(self, w: jax.Array) -> Factors | None:
        """The low-rank form of the change, or None where `weight` is the form to compute with."""
        del w
        return None

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """Which axis of the weight each axis of each array field runs along, None for a rank.

        Shardings of the weight are handed down along it; a field left out is replicated.
        """
        return {}

    def problem(self, w: Any) -> str | None:
        """Why this adapter does not fit a weight of ``w``'s shape, or None where it fits."""
        del w
        return None


def is_adapter(x: object) -> bool:
    return isinstance(x, Adapter)


def is_dropped(x: object) -> bool:
    """Whether an adapter came out of `lorax_fn.dropout`: it then carries the keys that drop inputs of A."""
    return getattr(x, "key", None) is not None
