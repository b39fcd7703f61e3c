"""Sums of ``x^T x`` over all inputs ``x`` that each weight contracts, batch by batch.

They are computed as gradients of the adapted function. So they work wherever `adapt` does (scans, slices,
several uses of one weight, jit, checkpoint), and need what training needs: outputs that depend on the weight
through differentiable operations. Only the sums are kept, not the batches.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.calibration.passes import groups, over_arrays, summed
from lorax_fn.core.adapters import Adapter, Factors
from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.trees import PyTree, arrays, is_float
from lorax_fn.transform.adapt import adapt
from lorax_fn.transform.usage import usage

SPAN = 1e-6  # eigenvalues of a float32 covariance below this fraction of the largest are rounding errors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe(Adapter):
    """Changes nothing, but its gradient with respect to ``a`` is ``sum x^T x a`` over the weight's inputs."""

    a: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    def weight(self, w: jax.Array) -> jax.Array:
        return w

    def factors(self, w: Any) -> Factors:
        stack, _, m = self.layout.shapes(w.shape)
        b = jnp.zeros((*stack, self.a.shape[-1], *m), jnp.float32)
        return Factors(self.a, b, self.layout, 1.0, tap=True)


def input_products(fn: Callable, params: PyTree, layouts: Mapping[str, Layout]) -> Callable:
    """Builds a function that sums ``x^T x A`` over all inputs ``x`` that each weight contracts.

    Args:
      fn: ``fn(params, batch)`` with a float output.
      params: its parameters, concrete.
      layouts: ``{path: Layout}`` of the weights.

    Returns:
      ``products(batches, probes)``, which takes ``{path: A}``, each ``[*s, *n, k]`` float32, and returns sums
      of the same shapes, zero for weights that no input reached. Identity matrices give the covariance
      itself. Probes of the same shapes compile once.

    Raises:
      LoraError: from ``products``: there is no batch or no float output; or a weight is not used, is looked
        up by row, or has a use without a low-rank rule.
    """
    adapted = adapt(fn, fallback="error")

    def outputs(probes, params, batch):
        found = adapted(params, {p: _Probe(a, layouts[p]) for p, a in probes.items()}, batch)
        floats = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
        if not floats:
            raise error(
                "no output to differentiate.",
                got=jax.tree.map(lambda x: getattr(x, "dtype", type(x)), found),
                want="fn(params, batch) with a float output that depends on the weights",
                do="return logits, or the loss.",
            )
        return sum(leaf.astype(jnp.float32).sum() for leaf in floats)

    run, checked = over_arrays(jax.grad(outputs)), set()

    def products(batches: Iterable, probes: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        def seen() -> Iterator[Any]:
            for batch in batches:
                if not checked.issuperset(probes):
                    _check_contracted(fn, params, batch, list(probes))
                    checked.update(probes)
                yield batch

        return summed(run, dict(probes), params, seen())[0]

    return products


def covariances(
    fn: Callable, params: PyTree, layouts: Mapping[str, Layout], batches: Iterable, at_once: int | None
) -> Iterator[tuple[str, jax.Array]]:
    """Yields ``(path, X^T X)`` for each weight, ``[s, n, n]`` float32, ``at_once`` weights per pass."""
    leaves = arrays(params)
    sums = input_products(fn, params, layouts)
    for group in groups(layouts, batches, at_once):
        sizes = {path: layouts[path].shapes(leaves[path].shape)[:2] for path in group}
        eyes = {
            path: jnp.broadcast_to(
                jnp.eye(math.prod(n), dtype=jnp.float32), (math.prod(stack), math.prod(n), math.prod(n))
            )
            for path, (stack, n) in sizes.items()
        }
        yield from probed(sums, batches, eyes, layouts, leaves).items()


def probed(sums: Callable, batches: Iterable, bases: Mapping, layouts: Mapping, leaves: Mapping) -> dict:
    """``X^T X Q`` for each weight by `input_products`, ``[s, n, k]``, where ``Q [s, n, k]`` are its bases."""
    probes = {}
    for path, basis in bases.items():
        stack, n, _ = layouts[path].shapes(leaves[path].shape)
        probes[path] = basis.reshape(*stack, *n, basis.shape[-1])
    found = sums(batches, probes)
    return {path: found[path].reshape(basis.shape) for path, basis in bases.items()}


def _check_contracted(fn: Callable, params: PyTree, batch: Any, paths: list[str]) -> None:
    """Raises a `LoraError` unless every weight is contracted with inputs, rather than looked up by row."""
    uses = usage(fn, params, batch)
    wrong = {}
    for path in paths:
        if not uses[path].ops:
            wrong[path] = "not used by fn(params, batch)"
        elif uses[path].ops[0] == "gather":
            wrong[path] = "rows looked up by index, which have no inputs"
    if wrong:
        raise error(
            "these weights contract no inputs.",
            path=list(wrong),
            got=list(wrong.values()),
            want="a product with activations",
            do="give them another init: init={pattern: 'kaiming', '*': lx.inits.eva(fn, batches)}.",
        )


def problem_of(sizes: Any, ranks: np.ndarray, needed: Any = True) -> str | None:
    """Why spectra ``[s, k]`` cannot start stack entries of these ranks, or None if they can."""
    sizes = np.asarray(sizes, np.float64)
    if not np.isfinite(sizes).all():
        return "not finite"
    if ((sizes[:, 0] <= 0) & needed).any():
        return (
            f"zero{_in_entries((sizes[:, 0] <= 0) & needed)}: no batch uses it in a way that affects outputs"
        )
    span = (sizes > SPAN * sizes[:, :1]).sum(1)
    if (span < ranks).any():
        return f"of rank {span[span < ranks].min()}{_in_entries(span < ranks)}, below {int(ranks.max())}"
    return None


def _in_entries(which: np.ndarray) -> str:
    return "" if which.size == 1 else f" in stack entries {np.flatnonzero(which).tolist()}"
