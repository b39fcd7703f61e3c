"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685).

W' = W + scale * A @ B,   scale = alpha / rank         "lora", equation (3)
                          scale = alpha / sqrt(rank)   "rslora" (https://arxiv.org/abs/2312.03732)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.types import Adapter, Factors, Layout

SCALINGS = {"lora": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / math.sqrt(rank)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
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

    @property
    def scale(self) -> float | np.ndarray:
        """The number before ``A @ B``; ``[*s]`` float32 where ranks differ along the stack, 0 for rank 0."""
        rule = SCALINGS[self.scaling]
        if not isinstance(self.rank, tuple):
            return rule(self.alpha, self.rank)
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(self.rank)
        scales = [rule(alpha, rank) if rank else 0.0 for alpha, rank in zip(alphas, self.rank, strict=True)]
        return np.asarray(scales, np.float32).reshape(np.shape(self.a)[: len(self.layout.stack)])

    def delta(self) -> jax.Array:
        """``dW`` in float32 on the weight's own axes."""
        layout, shape = self.layout, self.shape
        stack, n, m = layout.shapes(shape)
        s, i, o = math.prod(stack), math.prod(n), math.prod(m)
        a = self.a.astype(jnp.float32).reshape(s, i, -1)
        b = self.b.astype(jnp.float32).reshape(s, -1, o)
        scale = jnp.asarray(self.scale, jnp.float32)
        b = b * (scale.reshape(s, 1, 1) if scale.ndim else scale)
        dw = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(*stack, *n, *m)
        order = (*layout.stack, *layout.inputs, *layout.outputs)
        return jnp.transpose(dw, [order.index(i) for i in range(layout.ndim)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, as the factors and the layout tell it."""
        layout, a, b = self.layout, np.shape(self.a), np.shape(self.b)
        sizes = dict(zip((*layout.stack, *layout.inputs), a[:-1], strict=True))
        sizes.update(zip(layout.outputs, b[len(layout.stack) + 1 :], strict=True))
        return tuple(sizes[i] for i in range(layout.ndim))

    def weight(self, w: jax.Array) -> jax.Array:
        return (w.astype(jnp.float32) + self.delta()).astype(w.dtype)

    def factors(self, w: jax.Array) -> Factors:
        del w
        return Factors(self.a, self.b, self.layout, self.scale, key=self.key, rate=self.rate)

    def problem(self, w: Any) -> str | None:
        if len(w.shape) != self.layout.ndim or tuple(w.shape) != self.shape:
            return f"factors {np.shape(self.a)} @ {np.shape(self.b)} for a weight of shape {self.shape}"
        return None
