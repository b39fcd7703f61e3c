"""Which axes of a weight are stacked, contracted and produced."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of one weight are stacked, contracted and produced.

    Args:
      stack: ``*s``, the axes along which independent weights are stacked.
      inputs: ``n``, the contracted axes.
      outputs: ``m``, the axes of the result.

    Example:
      >>> import lorax_fn as lx
      >>> lx.Layout(stack=(0,), inputs=(1,), outputs=(2, 3)).ndim
      4
    """

    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("stack", "inputs", "outputs"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))

    @property
    def ndim(self) -> int:
        return len(self.stack) + len(self.inputs) + len(self.outputs)

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Splits a weight's shape into its ``(stack, inputs, outputs)`` sizes."""
        return tuple(tuple(shape[i] for i in axes) for axes in (self.stack, self.inputs, self.outputs))

    def without(self, axis: int) -> "Layout":
        """The layout of one entry along stack axis ``axis``."""

        def left(axes):
            return tuple(i - (i > axis) for i in axes if i != axis)

        return Layout(left(self.stack), left(self.inputs), left(self.outputs))

    def __str__(self) -> str:
        return f"Layout(stack={self.stack}, inputs={self.inputs}, outputs={self.outputs})"


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """What a traced function does with one parameter.

    Args:
      path: the parameter's path.
      shape: its shape.
      dtype: its dtype.
      ops: names of the primitives that consume it (after casts, reshapes and slices), in order, each once.
      layout: its stack, input and output axes, or None if no low-rank layout suits all uses.
      times: how often one pass uses it; a use inside a scan counts once per iteration.
      flops: floating-point operations of those uses.
      served: whether every use has a low-rank rule.
      source: for each use without a rule, its primitive and source line.
      moves: False if no gradient reaches it: no output depends on it, except through ``stop_gradient``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> use = lx.usage(lambda params: jnp.sin(params["w"]), {"w": jnp.ones((3, 2))})["w"]
      >>> use.ops, use.layout, use.served
      (('sin', 'return'), None, False)
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    ops: tuple[str, ...]
    layout: Layout | None
    times: int
    flops: int
    served: bool
    source: tuple[str, ...]
    moves: bool = True
