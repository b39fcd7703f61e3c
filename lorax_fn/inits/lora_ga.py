"""LoRA-GA: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation".

https://arxiv.org/abs/2407.05000, theorem 3.1:

dL/dW = U S V^T;   A = c U[:, :r],   B = c V[:, r:2r]^T,   W_res = W - s * A @ B
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_fn.calibration.gradients import mean_gradients
from lorax_fn.calibration.inputs import problem_of
from lorax_fn.calibration.passes import checked_at_once, groups, name_of
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import entries, entry_scales, taken_out, used_ranks
from lorax_fn.core.trees import PyTree
from lorax_fn.inits.base import Init, check_one_of, no_scale, raise_unusable, widest

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
SCALES = ("stable", "unit", "gd_scale", "weight_svd")


def lora_ga(
    loss: Callable[..., Any],
    batches: Iterable[Any],
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    at_once: int | None = None,
) -> "LoraGA":
    """Starts the factors along the gradient of ``W``, so that the first step approximates full training.

    Wang et al., "LoRA-GA" (https://arxiv.org/abs/2407.05000), theorem 3.1: with ``dL/dW = U S V^T``,
    ``A = c U[:, :r]`` and ``B = c V[:, r:2r]^T``, a gradient step changes ``s A B`` by ``s^2 c^2`` times the
    best rank-2r approximation of the gradient. ``s A @ B`` is subtracted from ``W``.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      batches: an iterable of batches for ``loss``, over which gradients are averaged.
      direction: which singular vectors A and B take: ``"ArB2r"`` the first r and the next r, ``"A2rBr"`` the
        reverse, ``"ArBr"`` every other one each.
      scale: ``c``: ``"stable"`` is ``m^(1/4) / sqrt(gamma)``, ``"unit"`` 1, ``"gd_scale"`` ``1 / s``, and
        ``"weight_svd"`` the mean of ``sqrt(sigma_i(W) / s)`` over the first r.
      gamma: the constant of ``"stable"``.
      at_once: how many weights' gradients to hold at a time, in one pass through the batches per group; None
        is all, which takes the memory of a full training step.

    Returns:
      A value for ``split(params, init=...)``, for ranks of at most ``min(n, m) / 2``. As in the authors'
      code, both factors are scaled by ``c``, and the singular values do not enter.

    Raises:
      LoraError: the direction or scale is unknown, or ``at_once`` is not valid. From `split`: params are
        abstract, a rank is too large, or a gradient is zero or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> loss = lambda params, x: jnp.mean(jnp.square(x @ params["kernel"]))
      >>> init = lx.inits.lora_ga(loss, [jax.random.normal(jax.random.key(1), (16, 8))])
      >>> params, lora = lx.split({"kernel": w}, rank=2, init=init)
      >>> bool(jnp.allclose(lx.merge(params, lora)["kernel"], w, atol=1e-6))
      True
    """
    check_one_of("direction", direction, DIRECTIONS)
    check_one_of("scale", scale, SCALES)
    return LoraGA(loss, batches, direction, scale, gamma, checked_at_once(at_once))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoraGA(Init):
    """The init that `lora_ga` returns."""

    name = "lora_ga"
    moves_weight = True
    needs_data = True

    loss: Callable
    batches: Iterable
    direction: str
    scale: str
    gamma: float
    at_once: int | None

    def __repr__(self) -> str:
        return f"lx.inits.lora_ga({name_of(self.loss)}, batches)"

    def refuses(self, n: int, m: int, plan: Any) -> str | None:
        if 2 * widest(plan.rank) > min(n, m):
            return f"a rank of at most {min(n, m) // 2} for {self!r}: A and B take r singular vectors each"
        return no_scale(plan) if self.scale in ("gd_scale", "weight_svd") else None

    def starts(self, params: PyTree, plans: Mapping[str, Any]) -> dict[str, Callable]:
        starts, wrong = {}, {}
        for group in groups(plans, self.batches, self.at_once):
            for path, gradient in mean_gradients(self.loss, params, self.batches, group).items():
                plan = plans[path]
                u, sizes, vt = jnp.linalg.svd(entries(gradient, plan.layout), full_matrices=False)
                used = used_ranks(plan.rank, u.shape[0])
                if (problem := problem_of(sizes, 0 * used.sum(1), used.any(1))) is not None:
                    wrong[path] = problem
                of_a, of_b = self._vectors(used)
                a = jnp.take_along_axis(u, of_a[:, None, :], 2) * used[:, None, :]
                b = jnp.take_along_axis(vt, of_b[:, :, None], 1) * used[:, :, None]
                starts[path] = functools.partial(self._start, a=a, b=b, used=used)
        raise_unusable("gradient", self, wrong)
        return starts

    def _vectors(self, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the singular vectors for A and for B, each ``[s, r]``; 0 in the padding."""
        first, ranks = np.arange(used.shape[1])[None, :], used.sum(1, keepdims=True).astype(int)
        of_a, of_b = {
            "ArB2r": (first + 0 * ranks, first + ranks),
            "A2rBr": (first + ranks, first + 0 * ranks),
            "ArBr": (2 * first + 1 + 0 * ranks, 2 * first + 0 * ranks),
        }[self.direction]
        return np.where(used > 0, of_a, 0), np.where(used > 0, of_b, 0)

    def _start(self, key, w, layout: Layout, rank, scale, dtype, *, a, b, used):
        del key, rank
        s = entry_scales(scale, a.shape[0])
        if self.scale == "weight_svd":
            sizes = jnp.linalg.svd(entries(w, layout), compute_uv=False)[:, : used.shape[1]]
            roots = jnp.sqrt(sizes / s[:, None]) * used
            gain = roots.sum(1) / np.maximum(used.sum(1), 1.0)
        else:
            m = b.shape[-1]
            stable = np.full_like(s, m**0.25 / math.sqrt(self.gamma))
            gain = {"stable": stable, "unit": np.ones_like(s), "gd_scale": 1.0 / s}[self.scale]
        gain = jnp.asarray(gain)[:, None, None]
        return taken_out(a * gain, b * gain, w, layout, scale, dtype)
