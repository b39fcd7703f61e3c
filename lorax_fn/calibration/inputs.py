"""What data does to the weights of a function: sums of ``x^T x``, and mean gradients, batch by batch.

Both are gradients of the adapted function, so whatever `adapt` runs (scans, slices, several uses of one
weight, jit, checkpoint) they run too, and they need what training needs: that outputs depend on the weight by
operations that can be differentiated. Of the batches nothing is kept but the sums.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.trees import Adapter, Factors, Layout, PyTree, error, is_array, is_float
from lorax_fn.methods.whole import Full
from lorax_fn.targets.roles import arrays
from lorax_fn.transform.usage import usage
from lorax_fn.transform.walk import adapt

SPAN = 1e-6  # below this share of the largest eigenvalue a float32 covariance holds rounding only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe(Adapter):
    """Changes nothing; the gradient by ``a`` is ``sum x^T x a`` over all that its weight contracts."""

    a: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    def weight(self, w: jax.Array) -> jax.Array:
        return w

    def factors(self, w: Any) -> Factors:
        stack, _, m = self.layout.shapes(w.shape)
        b = jnp.zeros((*stack, self.a.shape[-1], *m), jnp.float32)
        return Factors(self.a, b, self.layout, 1.0, tap=True)


def input_products(fn: Callable, params: PyTree, layouts: Mapping[str, Layout]) -> Callable:
    """How to sum ``x^T x A`` over every input ``x`` that each weight contracts, in every batch.

    Args:
      fn: ``fn(params, batch)`` with a float output.
      params: its parameters, concrete.
      layouts: ``{path: Layout}`` of the weights.

    Returns:
      ``products(batches, probes)``: from ``{path: A}``, ``[*s, *n, k]`` float32 each, sums of the same
      shapes; zeros where no input reached the weight. The identity gives the covariance itself. Probes of
      the same shapes compile once.

    Raises:
      LoraError: by ``products``: there is no batch or no float output, a weight is not used, is looked up by
        row, or is used in a way that has no rule.
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

    run, checked = _over_arrays(jax.grad(outputs)), set()

    def products(batches: Iterable, probes: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        def seen() -> Iterator[Any]:
            for batch in batches:
                if not checked.issuperset(probes):
                    _check_contracted(fn, params, batch, list(probes))
                    checked.update(probes)
                yield batch

        return _summed(run, dict(probes), params, seen())[0]

    return products


def covariances(
    fn: Callable, params: PyTree, layouts: Mapping[str, Layout], batches: Iterable, at_once: int | None
) -> Iterator[tuple[str, jax.Array]]:
    """``(path, X^T X)`` of each weight, ``[s, n, n]`` float32; so many weights a pass through the batches."""
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
    """``X^T X Q`` of each weight, ``[s, n, k]`` from bases ``Q [s, n, k]``, by `input_products`."""
    probes = {}
    for path, basis in bases.items():
        stack, n, _ = layouts[path].shapes(leaves[path].shape)
        probes[path] = basis.reshape(*stack, *n, basis.shape[-1])
    found = sums(batches, probes)
    return {path: found[path].reshape(basis.shape) for path, basis in bases.items()}


def mean_gradients(
    loss: Callable, params: PyTree, batches: Iterable, paths: Iterable[str]
) -> dict[str, jax.Array]:
    """The gradient of a loss by each weight, the mean over batches.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: its parameters, concrete.
      batches: what ``loss`` is called with, one after the other.
      paths: which weights.

    Returns:
      ``{path: gradient}`` float32, on the weights' own axes.

    Raises:
      LoraError: there is no batch, or the loss is not one number.
    """
    leaves, adapted = arrays(params), adapt(loss, fallback="error")

    def value(weights, params, batch):
        found = adapted(params, {path: Full(w) for path, w in weights.items()}, batch)
        if not is_float(found) or found.shape != ():
            raise error(
                "LoRA-GA needs a loss.",
                got=f"{jax.tree.map(lambda x: getattr(x, 'shape', type(x)), found)} from fn(params, batch)",
                want="one float",
                do="lx.lora_ga(lambda params, batch: loss(fn(params, batch.x), batch.y), batches).",
            )
        return found

    weights = {path: leaves[path].astype(jnp.float32) for path in paths}
    total, count = _summed(_over_arrays(jax.grad(value)), weights, params, batches)
    return {path: gradient / count for path, gradient in total.items()}


def groups(paths: Iterable[str], batches: Iterable, at_once: int | None) -> Iterator[list[str]]:
    """The paths, so many at once, where the batches can be passed through again for the next ones."""
    paths = list(paths)
    size = len(paths) if at_once is None else at_once
    if size < len(paths):
        check_again(batches, f"at_once={at_once} of {len(paths)} weights")
    for i in range(0, len(paths), max(size, 1)):
        yield paths[i : i + size]


def check_again(batches: Iterable, why: str) -> None:
    """Raises a `LoraError` where the batches can be passed through only once."""
    if iter(batches) is batches:
        raise error(
            "batches have to be passed through more than once.",
            got=f"a {type(batches).__name__}, and {why}",
            want="a list, or anything that gives a new iterator each time",
            do="batches=list(batches).",
        )


def _summed(run: Callable, at: dict, params: PyTree, batches: Iterable) -> tuple[dict, int]:
    """The sum over batches of ``run(at, params, batch)``, and their number."""
    total, count = None, 0
    for batch in batches:
        new = run(at, params, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += 1
    if total is None:
        raise error(
            "there are no batches to look at.",
            path=list(at),
            got="an empty iterable, or an iterator that was used up before",
            do="batches=[x0, x1, ...], each called as fn(params, batch).",
        )
    return total, count


def _over_arrays(fn: Callable) -> Callable:
    """`jax.jit` over the arrays among the leaves of the arguments; all else is static, as in `adapt`."""
    known: dict[Any, Callable] = {}

    def call(*args):
        leaves, treedef = jax.tree.flatten(args)
        dynamic = tuple(map(is_array, leaves))
        static = tuple(None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True))

        def flat(values):
            rest = iter(values)
            return fn(
                *treedef.unflatten([next(rest) if d else x for x, d in zip(static, dynamic, strict=True)])
            )

        jitted = known.setdefault((treedef, dynamic, static), jax.jit(flat))
        return jitted([leaf for leaf, d in zip(leaves, dynamic, strict=True) if d])

    return call


def _check_contracted(fn: Callable, params: PyTree, batch: Any, paths: list[str]) -> None:
    """Every weight has to be contracted with inputs; rows that are looked up have none."""
    uses = usage(fn, params, batch)
    wrong = {}
    for path in paths:
        if not uses[path].ops:
            wrong[path] = "not used by fn(params, batch)"
        elif uses[path].ops[0] == "gather":
            wrong[path] = "rows looked up by index: no inputs to take directions of"
    if wrong:
        raise error(
            "these weights contract no inputs.",
            path=list(wrong),
            got=list(wrong.values()),
            want="a product with activations",
            do="give them another init: init={pattern: 'kaiming', '*': lx.eva(fn, batches)}.",
        )


# What inits from data share.


def problem_of(sizes: Any, ranks: np.ndarray, needed: Any = True) -> str | None:
    """What keeps spectra ``[s, k]`` from starting entries of these ranks, or None."""
    sizes = np.asarray(sizes, np.float64)
    if not np.isfinite(sizes).all():
        return "not finite"
    if ((sizes[:, 0] <= 0) & needed).any():
        return f"zero{_in_entries((sizes[:, 0] <= 0) & needed)}: no batch has a use of it that outputs show"
    span = (sizes > SPAN * sizes[:, :1]).sum(1)
    if (span < ranks).any():
        return f"of rank {span[span < ranks].min()}{_in_entries(span < ranks)}, below {int(ranks.max())}"
    return None


def _in_entries(which: np.ndarray) -> str:
    return "" if which.size == 1 else f" in stack entries {np.flatnonzero(which).tolist()}"


def raise_unusable(what: str, init: Any, wrong: Mapping[str, str]) -> None:
    if wrong:
        raise error(
            f"the {what} of these weights cannot start them.",
            path=list(wrong),
            got=list(wrong.values()),
            want="finite numbers, and as many directions as the rank",
            do=f"more batches, a lower rank, or another init: init={{pattern: 'kaiming', '*': {init!r}}}.",
        )


def checked_at_once(at_once: Any) -> int | None:
    if at_once is not None and (isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1):
        raise error("at_once= is not valid.", got=repr(at_once), want="an int above 0, or None", do="4.")
    return at_once


def check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise error(f"unknown {name}.", got=repr(value), want=list(known), do=f"{name}={known[0]!r}.")


def widest(rank: Any) -> int:
    """The rank of the factors: of ranks along a stack, the largest."""
    return max(rank) if isinstance(rank, tuple) else rank


def name_of(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
