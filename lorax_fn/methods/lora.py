"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685).

W' = W + scale * A @ B,   scale = alpha / rank         "lora", equation (3)
                          scale = alpha / sqrt(rank)   "rslora" (https://arxiv.org/abs/2312.03732)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Factors
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.low_rank import LowRank, Start, scale_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
    """A low-rank update of one weight, ``dW = scale * A @ B``.

    Equation (3) of Hu et al. (https://arxiv.org/abs/2106.09685).

    Args:
      a: ``[*s, *n, r]`` down-projection.
      b: ``[*s, r, *m]`` up-projection.
      alpha: numerator of the scale; one number, or one a stack entry.
      rank: ``r``; or one int a stack entry, where entries below the largest are padded with exact zeros.
      scaling: ``"lora"`` for alpha / rank, ``"rslora"`` for alpha / sqrt(rank).
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: share of A's inputs dropped; set by `lorax_fn.dropout` only.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> a, b = jnp.ones((3, 1)), jnp.ones((1, 2))
      >>> adapter = lx.LoRA(a, b, alpha=2.0, rank=1, scaling="lora", layout=layout)
      >>> adapter.weight(jnp.zeros((3, 2)))[0, 0]
      Array(2., dtype=float32)
    """

    a: Any
    b: Any
    alpha: Any = dataclasses.field(metadata={"static": True})
    rank: Any = dataclasses.field(metadata={"static": True})
    scaling: str = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    key: Any = None
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["LoRA", Any]:
        stack = start.layout.shapes(w.shape)[0]
        scale = scale_of(start.alpha, start.rank, start.scaling, stack)
        a, b, frozen = start.init(start.key, w, start.layout, start.rank, scale, start.dtype)
        if isinstance(start.rank, tuple):
            a, b = _zero_pads(a, b, start.rank, len(stack))
        return cls(a, b, start.alpha, start.rank, start.scaling, start.layout), frozen

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        return None

    @property
    def scale(self) -> float | np.ndarray:
        """The number before ``A @ B``; ``[*s]`` float32 where ranks differ along the stack, 0 for rank 0."""
        stack = np.shape(self.a)[: len(self.layout.stack)]
        return scale_of(self.alpha, self.rank, self.scaling, stack)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, as the factors and the layout tell it."""
        return self.shape_of(self.a, self.b)

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        a, b = self.factor_axes()
        return {"a": a, "b": b, "key": self.layout.stack}

    def pair(self) -> Factors:
        return Factors(self.a, self.b, self.layout, self.scale, key=self.key, rate=self.rate)

    def problem(self, w: Any) -> str | None:
        if len(w.shape) != self.layout.ndim or tuple(w.shape) != self.shape:
            return f"factors {np.shape(self.a)} @ {np.shape(self.b)} for a weight of shape {self.shape}"
        return None


def _zero_pads(a: Any, b: Any, ranks: tuple[int, ...], s: int) -> tuple[Any, Any]:
    """Exact zeros in A and B beyond each entry's rank: both then stay zero under elementwise optimizers."""
    used = np.arange(a.shape[-1])[None, :] < np.asarray(ranks)[:, None]
    stack, r = a.shape[:s], a.shape[-1]
    used_a = used.reshape(*stack, *(1,) * (a.ndim - s - 1), r)
    used_b = used.reshape(*stack, r, *(1,) * (b.ndim - s - 1))
    return jnp.where(used_a, a, jnp.zeros_like(a)), jnp.where(used_b, b, jnp.zeros_like(b))
