"""CorDA: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation" (https://arxiv.org/abs/2406.05223)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.calibration.inputs import covariances, problem_of
from lorax_fn.calibration.passes import checked_at_once, name_of
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, entries, entry_scales, taken_out, used_ranks
from lorax_fn.core.trees import PyTree, arrays
from lorax_fn.inits.base import Init, check_one_of, raise_unusable

MODES = ("ipm", "kpm")


def corda(
    fn: Callable[..., Any], batches: Iterable[Any], *, mode: str = "ipm", at_once: int | None = None
) -> "Corda":
    """Moves the principal directions of each weight, weighted by its inputs, into A and B.

    Yang et al., "CorDA" (https://arxiv.org/abs/2406.05223), section 3: ``C W = U S V^T`` with ``C`` the
    covariance of the inputs; ``A = C^-1 U sqrt(S / s)`` and ``B = sqrt(S / s) V^T``, and ``s A @ B`` is
    subtracted from ``W``. ``C`` is normalized to a mean diagonal of 1 and damped by 0.01 on its diagonal,
    which is doubled until the computed inverse is accurate.

    Args:
      fn: as for `eva`.
      batches: as for `eva`.
      mode: ``"ipm"`` trains the r largest directions, to adapt to the task of the batches. ``"kpm"`` trains
        the r smallest, so that the knowledge used on the batches stays frozen.
      at_once: as for `eva`.

    Returns:
      A value for ``split(params, init=...)``.

    Raises:
      LoraError: the mode is unknown, or ``at_once`` is not valid. From `split`: as for `eva`, except that
        inputs may span less than the rank.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> x = jax.random.normal(jax.random.key(1), (16, 8))
      >>> init = lx.inits.corda(lambda params, x: x @ params["kernel"], [x])
      >>> params, lora = lx.split({"kernel": w}, rank=2, init=init)
      >>> bool(jnp.allclose(lx.merge(params, lora)["kernel"], w, atol=1e-5))
      True
    """
    check_one_of("mode", mode, MODES)
    return Corda(fn, batches, mode, checked_at_once(at_once))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corda(Init):
    """The init that `corda` returns."""

    name = "corda"
    moves_weight = True
    needs_data = True
    divides_by_scale = True

    fn: Callable
    batches: Iterable
    mode: str
    at_once: int | None

    def __repr__(self) -> str:
        return f"lx.inits.corda({name_of(self.fn)}, batches)"

    def starts(self, params: PyTree, plans: Mapping[str, Any]) -> dict[str, Callable]:
        leaves, starts, wrong = arrays(params), {}, {}
        layouts = {path: plan.layout for path, plan in plans.items()}
        for path, c in covariances(self.fn, params, layouts, self.batches, self.at_once):
            plan = plans[path]
            used = used_ranks(plan.rank, c.shape[0])
            power = jnp.trace(c, axis1=1, axis2=2)[:, None]
            if (problem := problem_of(power, 0 * used.sum(1), used.any(1))) is not None:
                wrong[path] = problem
                continue
            c, inverse = _damped(c)
            # C W is [s, n, m], so u is [s, n, k], sizes [s, k] and vt [s, k, m] with k = min(n, m).
            weighed = jnp.matmul(c, entries(leaves[path], plan.layout).astype(jnp.float32), precision=EXACT)
            u, sizes, vt = jnp.linalg.svd(weighed, full_matrices=False)
            ranks = used.sum(1, keepdims=True).astype(int)
            start = 0 * ranks if self.mode == "ipm" else sizes.shape[1] - ranks
            # [s, r]: the indices of the directions that train; 0 in the padding, which `used` zeroes below.
            which = np.where(used > 0, np.arange(used.shape[1])[None, :] + start, 0)
            a = jnp.matmul(inverse, jnp.take_along_axis(u, which[:, None, :], 2), precision=EXACT)
            root = jnp.sqrt(jnp.take_along_axis(sizes, which, 1)) * used
            b = jnp.take_along_axis(vt, which[:, :, None], 1)
            starts[path] = functools.partial(_weighed, a=a * root[:, None, :], b=b * root[:, :, None])
        raise_unusable("inputs", self, wrong)
        return starts


def _weighed(key, w, layout: Layout, rank, scale, dtype, *, a, b):
    del key, rank
    by = 1.0 / jnp.sqrt(jnp.asarray(entry_scales(scale, a.shape[0])))[:, None, None]
    return taken_out(a * by, b * by, w, layout, scale, dtype)


def _damped(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``C [s, n, n]`` with mean diagonal 1 and damped, and its inverse; damping is doubled where needed."""
    n = c.shape[1]
    eye = jnp.eye(n, dtype=c.dtype)[None]
    power = jnp.trace(c, axis1=1, axis2=2)[:, None, None] / n
    c = c / jnp.where(power == 0, 1.0, power)  # An entry of rank 0 may have no inputs.
    damping = np.full((c.shape[0], 1, 1), 0.01, np.float32)
    while True:
        damped = c + damping * eye
        inverse = jnp.linalg.inv(damped)
        distance = jnp.linalg.norm(jnp.matmul(damped, inverse, precision=EXACT) - eye, axis=(1, 2))
        good = np.asarray(distance < 0.05)
        if good.all():
            return damped, inverse
        damping = np.where(good[:, None, None], damping, 2 * damping)
