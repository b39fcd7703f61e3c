"""DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (https://arxiv.org/abs/2402.09353).

W' = m * V / ||V||,   V = W + scale * A @ B,   ||.|| over the inputs of each output, equation (5)

The norm is treated as a constant in the backward pass (section 4.3). It is computed without building V:

||V||^2 = ||W||^2 + 2 scale <W^T A, B> + scale^2 <(A^T A) B, B>, each term summed over inputs or the rank.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Factors, register
from lorax_fn.core.matrices import accumulation_dtype, product
from lorax_fn.core.stored import by_entry, dense
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import Start


@register
class DoRA(LoRA):
    """LoRA on the direction of each output, and a trained magnitude: ``W' = m * V / ||V||``.

    Equation (5) of Liu et al. (https://arxiv.org/abs/2402.09353), with the norm constant in the backward
    pass. An output whose norm is zero is left unscaled.

    Args:
      a: ``[*s, *n, r]`` down-projection.
      b: ``[*s, r, *m]`` up-projection.
      alpha: as in `LoRA`.
      rank: as in `LoRA`.
      scaling: as in `LoRA`.
      layout: as in `LoRA`.
      key: as in `LoRA`.
      rate: as in `LoRA`.
      residual: as in `LoRA`.
      magnitude: ``[*s, *m]``, starts as the norm of ``W``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=1, method="dora")
      >>> lora["kernel"].magnitude
      Array([2., 2.], dtype=float32)
    """

    adds: ClassVar[bool] = False
    magnitude: Any = None

    @classmethod
    def create(cls, w: Any, start: Start) -> tuple["DoRA", Any]:
        plain, frozen = super().create(w, start)
        norm = by_entry(_norm, w, start.layout)
        facts = (plain.a, plain.b, plain.alpha, plain.rank, plain.scaling, plain.layout)
        return cls(*facts, magnitude=norm.astype(start.dtype), residual=plain.residual), frozen

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        return super().axes() | {"magnitude": (*self.layout.stack, *self.layout.outputs)}

    def weight(self, w: jax.Array) -> jax.Array:
        wide = accumulation_dtype(w.dtype)
        direction = dense(w).astype(wide) + product(self.pair(), self.shape, wide)
        norm = jnp.sqrt(_sum_over_inputs(jnp.square(direction), self.layout))
        gain = self._gain(jax.lax.stop_gradient(norm))
        return (direction * _on_weight_axes(gain, self.layout)).astype(w.dtype)

    def factors(self, w: jax.Array) -> Factors:
        return dataclasses.replace(super().factors(w), column=self._gain(self.norm(w)))

    def norm(self, w: jax.Array) -> jax.Array:
        """``||W + scale * A @ B||`` over inputs, ``[*s, *m]`` float32 or wider, without a gradient."""
        w, a, b, scale = jax.lax.stop_gradient(
            (w, self.a, self.b, jnp.asarray(self.scale, accumulation_dtype(w.dtype)))
        )
        scale = jnp.broadcast_to(scale, self.layout.shapes(self.shape)[0])
        return by_entry(_norm_of_sum, w, self.layout, a, b, scale)

    def _gain(self, norm: jax.Array) -> jax.Array:
        zero = norm == 0
        magnitude = self.magnitude.astype(norm.dtype)
        ones = jnp.ones_like(norm)
        return jnp.where(zero, ones, magnitude / jnp.where(zero, ones, norm))

    def problem(self, w: Any) -> str | None:
        wrong = super().problem(w)
        if wrong is not None:
            return wrong
        stack, _, m = self.layout.shapes(self.shape)
        if tuple(self.magnitude.shape) != (*stack, *m):
            return f"a magnitude of shape {tuple(self.magnitude.shape)}, not {(*stack, *m)}"
        return None


def _sum_over_inputs(x: jax.Array, layout: Any) -> jax.Array:
    """The sum over the input axes of an array on the weight's axes, as ``[*s, *m]``."""
    kept = [i for i in range(layout.ndim) if i not in layout.inputs]
    return jnp.transpose(x.sum(layout.inputs), [kept.index(i) for i in (*layout.stack, *layout.outputs)])


def _on_weight_axes(x: jax.Array, layout: Any) -> jax.Array:
    """An array ``[*s, *m]`` on the weight's axes, with size 1 along the inputs."""
    order = (*layout.stack, *layout.outputs)
    x = jnp.transpose(x, [order.index(i) for i in sorted(order)])
    return jnp.expand_dims(x, [i for i in range(layout.ndim) if i in layout.inputs])


def _norm(w: jax.Array, layout: Any) -> jax.Array:
    return jnp.sqrt(_sum_over_inputs(jnp.square(w.astype(accumulation_dtype(w.dtype))), layout))


def _norm_of_sum(w: jax.Array, layout: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """``||W + scale * A @ B||`` over inputs, ``[*s, *m]``, without the sum itself; ``scale`` is ``[*s]``."""
    letters = "abcdefghijklmnopq"[: layout.ndim]
    s, n, m = ("".join(letters[i] for i in axes) for axes in (layout.stack, layout.inputs, layout.outputs))
    exact, wide = jax.lax.Precision.HIGHEST, accumulation_dtype(w.dtype)
    # W^T A, [*s, r, *m]. W keeps its dtype: a float32 copy of a bfloat16 base would take twice its memory.
    wa = jnp.einsum(
        f"{letters},{s}{n}y->{s}y{m}",
        w,
        a.astype(w.dtype),
        precision=exact,
        preferred_element_type=wide,
    )
    a, b = a.astype(wide), b.astype(wide)
    aab = jnp.einsum(f"{s}{n}y,{s}{n}z->{s}yz", a, a, precision=exact)  # A^T A, [*s, r, r]
    aab = jnp.einsum(f"{s}yz,{s}z{m}->{s}y{m}", aab, b, precision=exact)  # (A^T A) B, [*s, r, *m]
    # The terms with B, [*s, r, *m], are summed over the rank, and W^2 over the inputs: both are [*s, *m].
    scale = scale.reshape(scale.shape + (1,) * (wa.ndim - scale.ndim))
    change = ((2.0 * scale * wa + scale * scale * aab) * b).sum(len(layout.stack))
    square = _sum_over_inputs(jnp.square(w.astype(wide)), layout)
    return jnp.sqrt(jnp.maximum(square + change, jnp.zeros_like(square)))
