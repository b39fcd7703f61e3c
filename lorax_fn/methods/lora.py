"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685).

W' = W + scale * A @ B,   scale = alpha / rank         "lora", equation (3)
                          scale = alpha / sqrt(rank)   "rslora" (https://arxiv.org/abs/2312.03732)
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.low_rank import STACKED, LowRank, Start, scale_of


@register
class LoRA(LowRank):
    """A low-rank update of one weight, ``dW = scale * A @ B``.

    Equation (3) of Hu et al. (https://arxiv.org/abs/2106.09685).

    Args:
      a: ``[*s, *n, r]`` down-projection.
      b: ``[*s, r, *m]`` up-projection.
      alpha: numerator of the scale; one number, or one per stack entry. An array, ``[]`` or ``[*s]``, is a
        leaf that does not train: new values do not recompile, and `jax.vmap` maps over it.
      rank: ``r``; or one int per stack entry, where entries below the largest are padded with exact zeros.
        It is an array in the result of `lorax_fn.stack`.
      scaling: ``"lora"`` for alpha / rank, ``"rslora"`` for alpha / sqrt(rank).
      layout: which axes of the weight are stack, inputs and outputs.
      key: PRNG keys ``[*s]``; set by `lorax_fn.dropout` only.
      rate: fraction of A's inputs to drop; set by `lorax_fn.dropout` only.
      residual: True if the init moved a part of W into the factors (PiSSA, OLoRA, ...), so that they fit only
        the params that `lorax_fn.split` returned, not the original ones.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> a, b = jnp.ones((3, 1)), jnp.ones((1, 2))
      >>> adapter = lx.LoRA(a, b, alpha=2.0, rank=1, scaling="lora", layout=layout)
      >>> adapter.weight(jnp.zeros((3, 2)))[0, 0]
      Array(2., dtype=float32)
    """

    up: ClassVar[tuple[str, ...]] = ("b",)
    owns_factors: ClassVar[bool] = True
    a: Any
    b: Any
    alpha: Any = number()
    rank: Any = number()
    scaling: str = fact()
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)
    residual: bool = fact(default=False, kw_only=True)

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["LoRA", Any]:
        stack = start.layout.shapes(w.shape)[0]
        scale = scale_of(start.alpha, start.rank, start.scaling, stack)
        a, b, frozen = start.init(start.key, w, start.layout, start.rank, scale, start.dtype)
        if isinstance(start.rank, tuple):
            a, b = _zero_pads(a, b, start.rank, len(stack))
        facts = (start.alpha, start.rank, start.scaling, start.layout)
        return cls(a, b, *facts, residual=frozen is not w), frozen

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        return None

    @property
    def scale(self) -> Any:
        """The factor before ``A @ B``; ``[*s]`` float32 if it differs along the stack, and 0 for rank 0."""
        stack = np.shape(self.a)[: len(self.layout.stack)]
        return scale_of(self.alpha, self.rank, self.scaling, stack)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, from the factors and the layout."""
        return self.shape_of(self.a, self.b)

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        a, b = self.factor_axes()
        return {"a": a, "b": b, "key": self.layout.stack}

    def pair(self) -> Factors:
        return Factors(self.a, self.b, self.layout, self.scale)

    def with_factors(self, a: jax.Array, b: jax.Array, rank: int | tuple[int, ...]) -> "LoRA":
        """This adapter with factors ``[s, n, r]`` and ``[s, r, m]`` of another rank, and the same scale."""
        stack, n, m = self.layout.shapes(self.shape)

        def kept(alpha, old, new):
            return alpha * scale_of(1.0, old, self.scaling, ()) / scale_of(1.0, new, self.scaling, ())

        alpha: Any
        if isinstance(rank, tuple):
            alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(rank)
            ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * len(rank)
            pairs = zip(alphas, ranks, rank, strict=True)
            alpha = tuple(kept(alpha, old, new) if old and new else alpha for alpha, old, new in pairs)
        else:
            alpha = kept(self.alpha, self.rank, rank)
        a = a.reshape(*stack, *n, a.shape[-1]).astype(self.a.dtype)
        b = b.reshape(*stack, b.shape[1], *m).astype(self.b.dtype)
        return dataclasses.replace(self, a=a, b=b, rank=rank, alpha=alpha)

    def problem(self, w: Any) -> str | None:
        if self.is_stacked:
            return STACKED
        if len(w.shape) != self.layout.ndim or tuple(w.shape) != self.shape:
            return f"factors {np.shape(self.a)} @ {np.shape(self.b)} for a weight of shape {self.shape}"
        return None


def _zero_pads(a: Any, b: Any, ranks: tuple[int, ...], s: int) -> tuple[Any, Any]:
    """A and B with exact zeros beyond each entry's rank, which stay zero under elementwise optimizers."""
    used = np.arange(a.shape[-1])[None, :] < np.asarray(ranks)[:, None]
    stack, r = a.shape[:s], a.shape[-1]
    used_a = used.reshape(*stack, *(1,) * (a.ndim - s - 1), r)
    used_b = used.reshape(*stack, r, *(1,) * (b.ndim - s - 1))
    return jnp.where(used_a, a, jnp.zeros_like(a)), jnp.where(used_b, b, jnp.zeros_like(b))
