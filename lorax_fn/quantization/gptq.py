"""GPTQ: Frantar et al., "GPTQ" (https://arxiv.org/abs/2210.17323).

With X the inputs of W and H = X^T X, input i is rounded, and the later ones compensate for its error:
W[i:] -= outer(U[i, i:], error / U[i, i]),   H^-1 = U^T U,   algorithm 1
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.calibration.inputs import covariances, problem_of
from lorax_fn.calibration.passes import checked_at_once
from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, entries, from_entries
from lorax_fn.core.trees import PyTree, is_concrete, replace_leaves
from lorax_fn.quantization.blocks import Quantized, read_scales, with_codes
from lorax_fn.quantization.formats import READ
from lorax_fn.quantization.trees import chosen, rounded
from lorax_fn.targets.patterns import Patterns

LOG = logging.getLogger("lorax_fn")
LAZY = 64  # how many inputs pass on their errors to all later inputs in one product


def gptq(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    format: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    targets: Patterns = None,
    layout: Mapping[Any, Any] | None = None,
    damping: float = 0.01,
    at_once: int | None = None,
) -> PyTree:
    """Quantizes weights so that ``X W`` changes little: later inputs compensate for earlier errors.

    Frantar et al., "GPTQ" (https://arxiv.org/abs/2210.17323), algorithm 1: with ``X`` all inputs of a weight,
    ``H = X^T X`` damped and ``H^-1 = U^T U``, input ``i`` is rounded, and ``outer(U[i], error / U[i, i])`` is
    subtracted from the weight. Inputs are ordered from the strongest to the weakest, and the scales are those
    of `quantize` (``act_order`` and ``static_groups`` in the authors' code). ``X`` is computed with the given
    ``params``.

    Args:
      fn: ``fn(params, batch)`` with a float output, such as ``model.apply``.
      params: any pytree of concrete arrays. Weights that are already quantized stay and affect ``X``.
      batches: an iterable of batches for ``fn``. ``fn`` is differentiated, which costs a training step per
        batch, and ``[n, n]`` float32 is kept per stack entry of a weight of ``n`` inputs.
      format: as in `lorax_fn.quantize`.
      block: as in `lorax_fn.quantize`.
      double: as in `lorax_fn.quantize`.
      targets: as in `lorax_fn.quantize`.
      layout: as in `lorax_fn.quantize`.
      damping: added to the diagonal of ``H``, relative to its mean; with more of it, the result is closer to
        that of `quantize`.
      at_once: how many weights' ``H`` to hold at a time, in one pass through the batches per group; None is
        all.

    Returns:
      The same tree as from `lorax_fn.quantize`, with other codes. Only uses that contract the layout's inputs
      count. Stack entries that no input reached, such as experts without tokens, are rounded to the nearest
      codes, and are listed in a message of the logger ``lorax_fn``.

    Raises:
      LoraError: as for `lorax_fn.quantize`; or params are not concrete; ``damping`` is not above 0, or too
        small for float32; a weight contracts no inputs that reach an output, or inputs that are not finite;
        or it has a use without a low-rank rule.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 8)) @ jax.random.normal(jax.random.key(2), (8, 64))
      >>> def fn(params, x):
      ...     return x @ params["kernel"]
      >>> def lost(stored):
      ...     return float(jnp.linalg.norm(fn(lx.dequantize(stored), x) - fn(params, x)))
      >>> lost(lx.quantization.gptq(fn, params, [x])) < 0.5 * lost(lx.quantize(params))
      True
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < np.inf:
        want = "a finite number above 0"
        raise error("damping= is not valid.", got=repr(damping), want=want, do="damping=0.01.")
    at_once = checked_at_once(at_once)
    leaves, layouts = chosen(params, format, block, targets, layout)
    unseen = [p for p, w in leaves.items() if not is_concrete(w)]
    if unseen:
        raise error(
            "GPTQ needs concrete weights.",
            path=unseen,
            got="abstract or traced",
            want="concrete arrays",
            do="call it outside jax.jit; for abstract params, lx.quantize gives the same shapes.",
        )
    made = rounded(leaves, layouts, format, block, double)
    wrong, unfed = {}, {}
    for path, c in covariances(fn, params, layouts, batches, at_once):
        power = np.asarray(jnp.trace(c, axis1=1, axis2=2))
        empty = power == 0
        if empty.any() and not empty.all():
            unfed[path] = np.flatnonzero(empty).tolist()
            c = _as_if_even(c, empty)
        problem = problem_of(power[:, None], np.zeros(c.shape[0]), needed=empty.all())
        if problem is None:
            made[path], good = _fed_back(leaves[path], made[path], c, np.float32(damping), layouts[path])
            problem = None if bool(good) else f"not positive definite in float32 with damping={damping}"
        if problem is not None:
            wrong[path] = problem
    if wrong:
        raise error(
            "the inputs of these weights cannot guide rounding.",
            path=list(wrong),
            got=list(wrong.values()),
            want="finite inputs, some of them not zero",
            do="pass more batches, or damping=0.1, or name the others in targets= and lx.quantize these.",
        )
    if unfed:
        lines = [f"  {path}: stack entries {entries}" for path, entries in unfed.items()]
        head = "gptq: no input reached these stack entries; they are rounded to the nearest code"
        LOG.warning("%s", "\n".join([head, *lines]))
    return replace_leaves(params, made)


@jax.jit
def _as_if_even(c: jax.Array, empty: jax.Array) -> jax.Array:
    """``C [s, n, n]`` with the identity for empty entries: uncorrelated inputs compensate for nothing."""
    return jnp.where(empty[:, None, None], jnp.eye(c.shape[-1], dtype=c.dtype)[None], c)


@functools.partial(jax.jit, static_argnums=4)
def _fed_back(
    w: jax.Array, q: Quantized, c: jax.Array, damping: float, layout: Layout
) -> tuple[Quantized, jax.Array]:
    """``q`` with the codes of GPTQ for ``C = X^T X [s, n, n]``, and whether every ``U`` is finite."""

    def one(entry):
        w, scales, c = entry
        order = jnp.argsort(-jnp.diagonal(c), stable=True)
        root = _root_of_inverse(c[order][:, order], damping)
        codes = _codes(w[order], scales[order], root, q.format)
        return jnp.zeros_like(codes).at[order].set(codes), jnp.isfinite(root).all()

    wide = (entries(x, layout).astype(jnp.float32) for x in (w, read_scales(q)))
    codes, good = jax.lax.map(one, (*wide, c))
    return with_codes(q, from_entries(codes, layout, w.shape)), good.all()


def _root_of_inverse(c: jax.Array, damping: float) -> jax.Array:
    """The upper triangular ``U`` with ``U^T U = H^-1``, where ``H`` is ``C`` normalized and damped.

    An input that is always 0 gets a 1 on the diagonal, so that it compensates for nothing.
    """
    diagonal = jnp.diagonal(c)
    mean = jnp.mean(diagonal)
    h = (c + c.T) / (2.0 * mean) + jnp.diag(damping + (diagonal == 0).astype(c.dtype))
    # Cholesky from the last input to the first gives H = R R^T with an upper R, so that U = R^-1. H^-1 itself
    # would lose precision and is never computed.
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    eye = jnp.eye(c.shape[0], dtype=c.dtype)
    return jnp.triu(jax.scipy.linalg.solve_triangular(r, eye, lower=False))


def _codes(w: jax.Array, scales: jax.Array, root: jax.Array, format: str) -> jax.Array:
    """Codes ``[n, m]``, input by input. Errors reach a run of `LAZY` inputs at once, and others after it."""
    form, n = READ[format], w.shape[0]
    extra = -n % LAZY
    w, scales = (jnp.pad(x, ((0, extra), (0, 0))) for x in (w, scales))
    root = jnp.pad(root, ((0, extra), (0, extra))) + jnp.diag((jnp.arange(n + extra) >= n).astype(w.dtype))
    inverse = jnp.where(scales == 0, 0.0, 1.0 / jnp.where(scales == 0, 1.0, scales))

    def one_input(i, state, scales, inverse, square):
        near, errors, codes = state  # [LAZY, m]: the inputs of this run, after compensation
        code = form.encode(jnp.clip(near[i] * inverse[i], -form.top, form.top))
        wrong = (near[i] - form.decode(code) * scales[i]) / square[i, i]
        near = near - square[i][:, None] * wrong[None, :]  # U is upper triangular, so rounded inputs stay
        put = jax.lax.dynamic_update_index_in_dim
        return near, put(errors, wrong, i, 0), put(codes, code, i, 0)

    def one_run(w, k):
        def cut(x, axis=0):
            return jax.lax.dynamic_slice_in_dim(x, k * LAZY, LAZY, axis)

        near, rows = cut(w), cut(root)
        step = functools.partial(
            one_input, scales=cut(scales), inverse=cut(inverse), square=cut(rows, axis=1)
        )
        codes = jnp.zeros(near.shape, jax.eval_shape(form.encode, near).dtype)
        _, errors, codes = jax.lax.fori_loop(0, LAZY, step, (near, jnp.zeros_like(near), codes))
        return w - jnp.matmul(rows.T, errors, precision=EXACT), codes

    codes = jax.lax.scan(one_run, w, jnp.arange((n + extra) // LAZY))[1]
    return codes.reshape(w.shape)[:n]
