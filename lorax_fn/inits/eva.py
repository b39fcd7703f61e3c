"""Inits from what each weight contracts: EVA and CorDA, by the covariance of its inputs.

Each function here gives a value for ``split(..., init=...)``. `split` hands it the params and the weights
that it is to start; it passes through the batches, keeps one statistic a stack entry of each weight, and
gives back inits of the form of inits.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.calibration.inputs import SPAN, covariances, input_products, probed, problem_of
from lorax_fn.calibration.passes import check_again, checked_at_once, groups, name_of
from lorax_fn.core.errors import error
from lorax_fn.core.keys import leaf_key
from lorax_fn.core.layouts import Layout
from lorax_fn.core.matrices import EXACT, OVERSAMPLING, used_ranks
from lorax_fn.core.trees import PyTree, arrays
from lorax_fn.inits.base import Init, raise_unusable, widest
from lorax_fn.inits.plain import factor_shapes
from lorax_fn.targets.roles import choose, classify


def eva(
    fn: Callable, batches: Iterable, *, iterations: int | None = None, at_once: int | None = None
) -> "Eva":
    """``A`` = the directions in which a weight's inputs are largest, ``B = 0``: a value for ``init=``.

    Paischer et al., "One Initialization to Rule them All" (https://arxiv.org/abs/2410.07170): the top ``r``
    right singular vectors of all inputs, here by the covariance ``X^T X``, which adds up exactly over batches
    and uses of the weight. Its ranks by explained variance are `ranks` of the result.

    Args:
      fn: ``fn(params, batch)`` with a float output, such as ``model.apply``.
      batches: an iterable of what ``fn`` takes second. ``fn`` is differentiated, at the cost of a training
        step a batch.
      iterations: None for the whole covariance, ``[n, n]`` a stack entry; else passes through the batches
        that keep ``[n, r + 8]``: a Nyström approximation (https://arxiv.org/abs/1706.05736) after so many
        subspace iterations, for weights of many inputs.
      at_once: how many weights' statistics to hold at a time; each group is a pass through the batches. None
        is all.

    Returns:
      A value for ``split(params, init=...)``. Only uses that contract the layout's inputs count: those of
      ``w.T`` say nothing of them.

    Raises:
      LoraError: by `split`: params are abstract; a weight is not contracted with any input, or with ones that
        are not finite or span less than its rank; a use of it has no rule.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
      >>> init = lx.inits.eva(lambda params, x: x @ params["kernel"], [x])
      >>> _, lora = lx.split({"kernel": jnp.ones((3, 2))}, rank=1, init=init)
      >>> abs(lora["kernel"].a[:, 0])
      Array([0., 0., 1.], dtype=float32)
    """
    if iterations is not None and iterations < 1:
        raise error("iterations= is not valid.", got=iterations, want="an int above 0, or None", do="2.")
    return Eva(fn, batches, iterations, checked_at_once(at_once))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Eva(Init):
    """What `eva` returns."""

    name = "eva"
    needs_data = True
    splits_ranks = True

    fn: Callable
    batches: Iterable
    iterations: int | None
    at_once: int | None

    def __repr__(self) -> str:
        return f"lx.inits.eva({name_of(self.fn)}, batches)"

    def starts(self, params: PyTree, plans: Mapping[str, Any]) -> dict[str, Callable]:
        layouts = {path: plan.layout for path, plan in plans.items()}
        widths = {path: widest(plan.rank) for path, plan in plans.items()}
        starts, wrong = {}, {}
        for path, (values, vectors) in self._spectra(params, layouts, widths):
            used = used_ranks(plans[path].rank, values.shape[0])
            if (problem := problem_of(values, used.sum(1), used.any(1))) is not None:
                wrong[path] = problem
            starts[path] = functools.partial(
                _along, directions=vectors[:, :, : used.shape[1]] * used[:, None]
            )
        raise_unusable("inputs", self, wrong)
        return starts

    def ranks(
        self, params: PyTree, rank: int = 16, *, rho: float = 2.0, targets=None, exclude=None, layout=None
    ) -> dict[str, int | tuple[int, ...]]:
        """Ranks where inputs need them: the directions of all weights with the largest explained variance.

        Each stack entry of each weight brings the shares ``lambda_i / sum(lambda)`` of its first
        ``rho * rank`` directions; the largest of all are chosen, ``rank`` times the number of entries.

        Args:
          params: as for `split`.
          rank: the mean rank of a stack entry.
          rho: no entry gets more than ``round(rho * rank)``.
          targets: as for `split`.
          exclude: as for `split`.
          layout: as for `split`.

        Returns:
          ``{path: rank}``, a tuple for a stacked weight; weights that get none are left out. For
          ``split(params, rank=ranks, targets=list(ranks), init=eva)``; with ``alpha=lambda r: 2 * r`` scales
          do not depend on the ranks, as PEFT has it. Batches are passed through here, and again by `split`.

        Raises:
          LoraError: as for `split`; or ``iterations`` was given, which keeps no total variance.

        Example:
          >>> import jax.numpy as jnp, lorax_fn as lx
          >>> params = {"narrow": {"kernel": jnp.eye(4)}, "wide": {"kernel": jnp.eye(4)}}
          >>> def fn(params, x):
          ...     return x @ params["wide"]["kernel"] + x[:, :1] * x[:1] @ params["narrow"]["kernel"]
          >>> lx.inits.eva(fn, [jnp.eye(4)]).ranks(params, rank=2)
          {'narrow/kernel': 1, 'wide/kernel': 3}
        """
        if self.iterations is not None:
            raise error(
                "ranks by explained variance need the whole covariance.",
                got=f"iterations={self.iterations}",
                do="lx.inits.eva(fn, batches, at_once=4).ranks(params), without iterations.",
            )
        leaves = arrays(params)
        layouts, _ = choose(leaves, classify(params, layout), targets, exclude, None)
        limits = {p: min(round(rho * rank), *_sizes(leaves[p], layouts[p])) for p in layouts}
        shares, wrong = {}, {}
        for path, (values, _) in self._spectra(params, layouts, limits):
            if (problem := problem_of(values, np.zeros(values.shape[0]))) is not None:
                wrong[path] = problem
            values = np.asarray(values, np.float64)
            shares[path] = values[:, : limits[path]] / values.sum(1, keepdims=True)
        raise_unusable("inputs", self, wrong)
        every = np.concatenate([share.reshape(-1) for share in shares.values()])
        entry = np.concatenate([np.repeat(np.arange(x.shape[0]), x.shape[1]) for x in shares.values()])
        owner = np.repeat(np.arange(len(shares)), [x.size for x in shares.values()])
        chosen = np.argsort(-every, kind="stable")[: rank * sum(x.shape[0] for x in shares.values())]
        found = {}
        for i, (path, share) in enumerate(shares.items()):
            counts = np.bincount(entry[chosen][owner[chosen] == i], minlength=share.shape[0]).tolist()
            if any(counts):
                found[path] = tuple(counts) if layouts[path].stack else counts[0]
        # as patterns, the longer path is asked first: a shorter one may be a run of its components
        return {path: found[path] for path in sorted(found, key=lambda path: -path.count("/"))}

    def _spectra(self, params: PyTree, layouts: Mapping, widths: Mapping) -> Iterator[tuple[str, tuple]]:
        """For each path the eigenvalues ``[s, k]``, falling, and eigenvectors ``[s, n, k]`` of its inputs."""
        if self.iterations is None:
            for path, c in covariances(self.fn, params, layouts, self.batches, self.at_once):
                yield path, _eigen(c)
            return
        if self.iterations > 1:
            check_again(self.batches, f"iterations={self.iterations}")
        leaves = arrays(params)
        sums = input_products(self.fn, params, layouts)
        for group in groups(layouts, self.batches, self.at_once):
            bases = {p: _random_basis(p, leaves[p], layouts[p], widths[p]) for p in group}
            products = bases
            for i in range(self.iterations):
                bases = {p: jnp.linalg.qr(x)[0] for p, x in products.items()} if i else bases
                products = probed(sums, self.batches, bases, layouts, leaves)
            for path in group:
                yield path, _nystrom(bases[path], products[path])


def _along(key, w, layout: Layout, rank, scale, dtype, *, directions: jax.Array):
    """A along given directions ``[s, n, r]``, B zero."""
    del key, scale
    shape_a, shape_b = factor_shapes(w.shape, layout, rank)
    return directions.reshape(shape_a).astype(dtype), jnp.zeros(shape_b, dtype), w


@jax.jit
def _eigen(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues ``[s, n]``, falling, and eigenvectors ``[s, n, n]`` of sums ``X^T X``."""
    values, vectors = jnp.linalg.eigh((c + jnp.swapaxes(c, 1, 2)) / 2.0)
    return values[:, ::-1], vectors[:, :, ::-1]


def _random_basis(path: str, w: Any, layout: Layout, width: int) -> jax.Array:
    stack, n, _ = layout.shapes(w.shape)
    shape = (math.prod(stack), math.prod(n), min(width + OVERSAMPLING, math.prod(n)))
    return jnp.linalg.qr(jax.random.normal(leaf_key(jax.random.key(0), path), shape, jnp.float32))[0]


@jax.jit
def _nystrom(basis: jax.Array, product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and vectors of ``Y (Q^T Y)^-1 Y^T``, the part of C that ``Y = C Q`` tells of."""
    core = jnp.matmul(jnp.swapaxes(basis, -1, -2), product, precision=EXACT)
    sizes, turn = jnp.linalg.eigh((core + jnp.swapaxes(core, -1, -2)) / 2.0)
    kept = sizes > SPAN * sizes[:, -1:]
    root = jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, sizes, 1.0)), 0.0)
    vectors, values, _ = jnp.linalg.svd(
        jnp.matmul(product, turn * root[:, None, :], precision=EXACT), full_matrices=False
    )
    return jnp.square(values), vectors


def _sizes(w: Any, layout: Layout) -> tuple[int, int]:
    _, n, m = layout.shapes(w.shape)
    return math.prod(n), math.prod(m)
