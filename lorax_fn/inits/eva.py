"""EVA: Paischer et al., "One Initialization to Rule them All" (https://arxiv.org/abs/2410.07170).

A = V_r^T of the inputs X = U S V^T of each weight, by the covariance X^T X;   B = 0
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
    fn: Callable[..., Any],
    batches: Iterable[Any],
    *,
    iterations: int | None = None,
    at_once: int | None = None,
) -> "Eva":
    """Starts ``A`` at the principal directions of each weight's inputs, and ``B`` at 0.

    Paischer et al., "One Initialization to Rule them All" (https://arxiv.org/abs/2410.07170): the top ``r``
    right singular vectors of all inputs, here from the covariance ``X^T X``, which is a sum over batches and
    uses of the weight. `ranks` of the result divides ranks among weights by explained variance.

    Args:
      fn: ``fn(params, batch)`` with a float output, such as ``model.apply``.
      batches: an iterable of batches for ``fn``. ``fn`` is differentiated, which costs a training step per
        batch.
      iterations: None for the whole covariance, ``[n, n]`` per stack entry. For weights of many inputs, the
        number of subspace iterations of a Nyström approximation (https://arxiv.org/abs/1706.05736), each of
        which passes through the batches and keeps ``[n, r + 8]``.
      at_once: how many weights' statistics to hold at a time, in one pass through the batches per group; None
        is all.

    Returns:
      A value for ``split(params, init=...)``. Only uses that contract the layout's inputs count; uses of
      ``w.T`` do not.

    Raises:
      LoraError: ``iterations`` or ``at_once`` is not valid. From `split`: params are abstract; a weight
        contracts no inputs, or inputs that are not finite or span less than its rank; or it has a use without
        a low-rank rule.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
      >>> init = lx.inits.eva(lambda params, x: x @ params["kernel"], [x])
      >>> _, lora = lx.split({"kernel": jnp.ones((3, 2))}, rank=1, init=init)
      >>> abs(lora["kernel"].a[:, 0])
      Array([0., 0., 1.], dtype=float32)
    """
    if iterations is not None and iterations < 1:
        want = "an int above 0, or None"
        raise error("iterations= is not valid.", got=iterations, want=want, do="iterations=2.")
    return Eva(fn, batches, iterations, checked_at_once(at_once))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Eva(Init):
    """The init that `eva` returns."""

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
        """Divides ranks among weights by explained variance.

        The first ``rho * rank`` directions of each stack entry of each weight compete by their shares of the
        variance, ``lambda_i / sum(lambda)``; the largest are kept, ``rank`` times the number of entries.

        Args:
          params: as for `split`.
          rank: the mean rank of a stack entry.
          rho: limits the rank of any entry to ``round(rho * rank)``.
          targets: as for `split`.
          exclude: as for `split`.
          layout: as for `split`.

        Returns:
          ``{path: rank}``, with a tuple for a stacked weight, for
          ``split(params, rank=ranks, targets=list(ranks), init=eva)``. Weights of rank 0 are left out. With
          ``alpha=lambda r: 2 * r`` scales do not depend on the ranks, as in PEFT. `split` passes through the
          batches again.

        Raises:
          LoraError: as for `split`; or ``iterations`` was given, which does not keep the total variance.

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
        # One number per direction of any weight: its share, its stack entry, and the index of its weight.
        every = np.concatenate([share.reshape(-1) for share in shares.values()])
        entry = np.concatenate([np.repeat(np.arange(x.shape[0]), x.shape[1]) for x in shares.values()])
        owner = np.repeat(np.arange(len(shares)), [x.size for x in shares.values()])
        chosen = np.argsort(-every, kind="stable")[: rank * sum(x.shape[0] for x in shares.values())]
        found = {}
        for i, (path, share) in enumerate(shares.items()):
            counts = np.bincount(entry[chosen][owner[chosen] == i], minlength=share.shape[0]).tolist()
            if any(counts):
                found[path] = tuple(counts) if layouts[path].stack else counts[0]
        # As patterns, longer paths must come first, since a shorter one may be a run of their components.
        return {path: found[path] for path in sorted(found, key=lambda path: -path.count("/"))}

    def _spectra(self, params: PyTree, layouts: Mapping, widths: Mapping) -> Iterator[tuple[str, tuple]]:
        """Yields each path with eigenvalues ``[s, k]``, descending, and eigenvectors ``[s, n, k]``."""
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
    """A along given directions ``[s, n, r]``, and B zero."""
    del key, scale
    shape_a, shape_b = factor_shapes(w.shape, layout, rank)
    return directions.reshape(shape_a).astype(dtype), jnp.zeros(shape_b, dtype), w


@jax.jit
def _eigen(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues ``[s, n]``, descending, and eigenvectors ``[s, n, n]`` of sums ``X^T X``."""
    values, vectors = jnp.linalg.eigh((c + jnp.swapaxes(c, 1, 2)) / 2.0)
    return values[:, ::-1], vectors[:, :, ::-1]


def _random_basis(path: str, w: Any, layout: Layout, width: int) -> jax.Array:
    stack, n, _ = layout.shapes(w.shape)
    shape = (math.prod(stack), math.prod(n), min(width + OVERSAMPLING, math.prod(n)))
    return jnp.linalg.qr(jax.random.normal(leaf_key(jax.random.key(0), path), shape, jnp.float32))[0]


@jax.jit
def _nystrom(basis: jax.Array, product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of ``Y (Q^T Y)^-1 Y^T``, which approximates C from ``Y = C Q``."""
    # Q and Y are [s, n, k]; the core Q^T Y is [s, k, k].
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
