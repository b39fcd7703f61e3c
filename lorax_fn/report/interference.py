"""How much adapters interfere with each other: cosines of their changes, and overlap of their subspaces."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters, check_unstacked
from lorax_fn.core.matrices import EXACT, factor_entries
from lorax_fn.ranks.spectra import product_svd


@dataclasses.dataclass(frozen=True)
class Interference:
    """Similarity of each pair of adapters over all weights that both adapt; it prints as a table.

    Args:
      names: the names of the ``k`` adapters.
      cosine: ``[k, k]``, ``<dW_i, dW_j> / (|dW_i| |dW_j|)`` over all weights together.
      overlap: ``[k, k]``, mean over weights of ``|U_i^T U_j|_F^2 / min(r_i, r_j)``, 0 to 1, for orthonormal
        bases U of what each adds to outputs; the subspace similarity of section 7.2 of Hu et al.
        (https://arxiv.org/abs/2106.09685). For random subspaces of ``m`` outputs it is about
        ``max(r_i, r_j) / m``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.eye(6)}, rank=2, init="pissa")
      >>> print(lx.report.interference({"a": lora, "b": lx.scale(lora, -1.0)}))
      cosine       a      b
      a        1.000 -1.000
      b       -1.000  1.000
      <BLANKLINE>
      overlap      a      b
      a        1.000  1.000
      b        1.000  1.000
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    overlap: np.ndarray

    def __str__(self) -> str:
        wide = max(7, *map(len, self.names))

        def table(title, values):
            lines = [f"{title:{wide}}" + "".join(f" {name[:6]:>6}" for name in self.names)]
            for name, row in zip(self.names, values, strict=True):
                lines.append(f"{name:{wide}}" + "".join(f" {value:6.3f}" for value in row))
            return "\n".join(lines)

        return table("cosine", self.cosine) + "\n\n" + table("overlap", self.overlap)

    def plot(self) -> Any:
        """Draws both tables as heat maps in one matplotlib figure.

        Raises:
          LoraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise error(
                "heat maps need matplotlib.", got="no matplotlib", do="pip install 'lorax_fn[plot]'."
            ) from None
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, title, low in zip(figure.subplots(1, 2), ("cosine", "overlap"), (-1, 0), strict=True):
            image = axes.imshow(getattr(self, title), vmin=low, vmax=1, cmap="RdBu" if low else "Blues")
            axes.set_title(title)
            axes.set_xticks(range(len(self.names)), self.names, rotation=45)
            axes.set_yticks(range(len(self.names)), self.names)
            figure.colorbar(image, ax=axes)
        return figure


def interference(loras: Mapping[str, dict[str, Adapter]]) -> Interference:
    """Computes cosines and subspace overlaps of adapters, to be looked at before combining them.

    They come from products of the factors, ``<dW_i, dW_j> = <A_i^T A_j, B_i B_j^T>``; no dW is built.

    Args:
      loras: the adapters of each name, all of one base. For a `DoRA`, dW is the change of the direction,
        before the norm.

    Returns:
      The two tables; adapters without a weight in common have cosine and overlap 0.

    Raises:
      LoraError: there are fewer than two adapters, or one of them has a weight without a low-rank dW.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.eye(6)}, rank=2, init="pissa")
      >>> float(lx.report.interference({"a": lora, "b": lora}).cosine[0, 1].round(3))
      1.0
    """
    if len(loras) < 2:
        do = 'lx.report.interference({"one": lora, "other": lora2}).'
        raise error("interference needs two adapters or more.", got=list(loras), do=do)
    for name, lora in loras.items():
        check_unstacked(lora)
        check_adapters(lora)
        whole = [path for path, x in lora.items() if x.pair() is None]
        if whole:
            raise error(
                f"adapter {name!r} has weights without a low-rank dW.",
                path=whole,
                got=[type(lora[path]).__name__ for path in whole],
                want="methods with two factors",
                do="leave them out: {path: a for path, a in lora.items() if a.pair() is not None}.",
            )
    names = tuple(loras)
    dots, overlaps = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            both = [path for path in loras[one] if path in loras[other]]
            pairs = [_pair(loras[one][path], loras[other][path]) for path in both]
            dots[i, j] = dots[j, i] = sum(float(dot) for dot, _ in pairs)
            mean = sum(float(share) for _, share in pairs) / max(len(pairs), 1)
            overlaps[i, j] = overlaps[j, i] = mean
    sizes = np.sqrt(np.maximum(np.diag(dots), np.finfo(np.float64).tiny))
    return Interference(names, dots / sizes[:, None] / sizes[None, :], overlaps)


@jax.jit
def _pair(one: Adapter, other: Adapter) -> tuple[jax.Array, jax.Array]:
    """``<dW_i, dW_j>`` and the overlap of what both add to outputs, the mean over stack entries."""
    # a: [s, n, r], b: [s, r, m]; c: [s, n, q], d: [s, q, m]. Both products below are [s, r, q].
    (a, b, s), (c, d, t) = factor_entries(one), factor_entries(other)
    b, d = b * s[:, :, None], d * t[:, :, None]
    inner = jnp.matmul(jnp.swapaxes(a, 1, 2), c, precision=EXACT)
    dot = (inner * jnp.matmul(b, jnp.swapaxes(d, 1, 2), precision=EXACT)).sum()
    (u, mine), (v, theirs) = _outputs(a, b), _outputs(c, d)
    shared = jnp.square(jnp.matmul(u, jnp.swapaxes(v, 1, 2), precision=EXACT)).sum((1, 2))
    return dot, (shared / jnp.maximum(jnp.minimum(mine, theirs), 1.0)).mean()


def _outputs(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis ``[s, r, m]`` of the rows of ``a @ b``, zero beyond their rank, and that rank."""
    _, size, vt = product_svd(a, b)
    used = (size > size[:, :1] * 1e-5 * math.sqrt(b.shape[-1])).astype(jnp.float32)
    return vt[:, : size.shape[1]] * used[:, :, None], used.sum(1)
