"""Singular values of each dW, and how many of them matter.

They are computed from the QR of both factors, ``A = Qa Ra`` and ``B^T = Qb Rb``: the singular values of
``A B`` are those of the ``[r, r]`` matrix ``Ra Rb^T``. No dW is built unless r exceeds a side of the weight.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.fitting import check_unstacked
from lorax_fn.core.matrices import EXACT, factor_entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of one dW and its effective ranks, for each stack entry.

    Args:
      values: ``[*s, r]`` float32, largest first.
      stable: ``[*s]``, the stable rank ``||dW||_F^2 / ||dW||_2^2``; 0 where dW is 0.
      entropy: ``[*s]``, the entropy rank ``exp(-sum p log p)`` with ``p = values / sum(values)`` (Roy and
        Vetterli, "The effective rank", 2007); 0 where dW is 0.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> eye = lx.LoRA(jnp.eye(3, 2), jnp.eye(2, 3), 2.0, 2, "lora", layout)
      >>> float(lx.ranks.effective_rank({"w": eye})["w"].stable)
      2.0
    """

    values: Any
    stable: Any
    entropy: Any


def effective_rank(lora: dict[str, Adapter]) -> dict[str, Spectrum]:
    """The singular values of every ``dW = scale * A @ B``, and its stable and entropy rank.

    They are computed by a QR of the factors, without building dW.

    Args:
      lora: adapters by path. Those without a low-rank dW (`Full`, `Rows`) are left out. For a `DoRA`, dW is
        the change of the direction, before the norm.

    Returns:
      ``{path: Spectrum}`` in float32.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or is stacked for `jax.vmap`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> b = jnp.diag(jnp.array([4.0, 3.0]))
      >>> lora = {"w": lx.LoRA(jnp.eye(2), b, 2.0, 2, "lora", layout)}
      >>> spectrum = lx.ranks.effective_rank(lora)["w"]
      >>> [round(float(x), 3) for x in spectrum.values], round(float(spectrum.stable), 3)
      ([4.0, 3.0], 1.562)
    """
    check_unstacked(lora)
    return {path: spectrum(adapter) for path, adapter in lora.items() if adapter.pair() is not None}


def product_svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular triplets ``u [s, n, r], size [s, r], vt [s, r, m]`` of ``a @ b``, by QR of both."""
    if a.shape[-1] > min(a.shape[-2], b.shape[-1]):  # r exceeds a side of the weight, so QR would not help
        u, size, vt = jnp.linalg.svd(jnp.matmul(a, b, precision=EXACT), full_matrices=False)
        return u, size, vt
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, size, vt = jnp.linalg.svd(jnp.matmul(ra, jnp.swapaxes(rb, -1, -2), precision=EXACT))
    left = jnp.matmul(qa, u, precision=EXACT)
    return left, size, jnp.matmul(vt, jnp.swapaxes(qb, -1, -2), precision=EXACT)


def spectrum(adapter: Any) -> Spectrum:
    """The `Spectrum` of one adapter, of any method with two factors."""
    a, b, scale = factor_entries(adapter)
    values = product_svd(a, b * scale[:, :, None])[1]
    total, largest = values.sum(-1), values[:, 0]  # [s], from values [s, r]
    none = largest == 0
    square = jnp.square(values / jnp.where(none, jnp.ones_like(largest), largest)[:, None]).sum(-1)
    share = values / jnp.where(none, jnp.ones_like(total), total)[:, None]
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0).sum(-1)
    stack = jax.eval_shape(lambda adapter: adapter.pair().b, adapter).shape[: len(adapter.layout.stack)]
    return Spectrum(
        values.reshape(*stack, values.shape[-1]),
        square.reshape(stack),
        jnp.where(none, jnp.zeros_like(total), jnp.exp(entropy)).reshape(stack),
    )
