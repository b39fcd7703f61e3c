"""Optimizer transformations for A and B: LoRA+, LoRA-FA's gradient and Riemannian preconditioning."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_fn.core.adapters import Adapter, is_adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_lora
from lorax_fn.core.trees import is_float
from lorax_fn.training.masks import is_optimizer, own_promotion


def loraplus(tx_or_lr: Any, ratio: Any = 16.0) -> optax.GradientTransformationExtraArgs:
    """LoRA+: B learns ``ratio`` times as fast as A.

    Hayou et al., "LoRA+" (https://arxiv.org/abs/2402.12354): ``lr_B = ratio * lr_A``. The updates of all
    output-side fields (``b``, LoHa's ``b1`` and ``b2``) are multiplied by ``ratio``, including decoupled
    weight decay inside ``tx_or_lr``, as in a second parameter group. With ratio 1 it is ``tx_or_lr`` itself.

    Args:
      tx_or_lr: an optimizer with its learning rate; or a learning rate or schedule for `optax.adam`.
      ratio: a number, or a scalar array, so that ``optax.inject_hyperparams`` can set it.

    Returns:
      A transformation that composes with `optax.chain`, ``inject_hyperparams`` and ``MultiSteps``.

    Raises:
      LoraError: ``tx_or_lr`` is neither an optimizer nor a learning rate.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx, optax
      >>> _, lora = lx.split({"kernel": jnp.ones((2, 2))}, rank=1)
      >>> tx = lx.optim.loraplus(optax.sgd(0.5), ratio=4)
      >>> updates, _ = tx.update(lora, tx.init(lora), lora)
      >>> bool((updates["kernel"].a == -0.5 * lora["kernel"].a).all())
      True
    """
    if isinstance(tx_or_lr, optax.MultiSteps):
        tx_or_lr = tx_or_lr.gradient_transformation()
    if not is_optimizer(tx_or_lr):
        if not (callable(tx_or_lr) or is_float(tx_or_lr) or isinstance(tx_or_lr, numbers.Real)):
            raise error(
                "loraplus takes an optimizer or a learning rate.",
                got=type(tx_or_lr).__name__,
                want="an optax.GradientTransformation, a number, or a schedule",
                do="lx.optim.loraplus(1e-4), or lx.optim.loraplus(optax.adamw(1e-4)).",
            )
        lr: Any = tx_or_lr
        tx_or_lr = optax.adam(lr)

    def faster(_, adapter, __):
        def scaled(path, update):
            up = getattr(path[0], "name", None) in adapter.up
            return update * jnp.asarray(ratio, update.dtype) if up else update

        return jax.tree_util.tree_map_with_path(scaled, adapter)

    return optax.chain(own_promotion(tx_or_lr), _of_adapters(faster))


def lora_fa_gradient(lora: dict[str, Adapter], eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA's gradient: the gradient of B whose step makes dW best follow the gradient of W, with A frozen.

    Like PEFT's ``create_lorafa_optimizer``, for LoRA-FA (https://arxiv.org/abs/2308.03303):
    ``g_B <- (A^T A + eps I)^-1 g_B / s^2``. Put it before the optimizer: ``chain(this, adamw(lr))``.

    Args:
      lora: the adapters to train. A never changes, so the inverses, ``[*s, r, r]``, are computed only once,
        here.
      eps: added to the diagonal.

    Returns:
      A transformation. The gradients of adapters other than `LoRAFA` stay as they are.

    Raises:
      LoraError: ``lora`` is not a dict of adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> _, lora = lx.split({"kernel": jnp.ones((4, 2))}, rank=1, alpha=2.0, method="lora_fa")
      >>> tx = optax.chain(lx.optim.lora_fa_gradient(lora), optax.sgd(1.0))
      >>> grads = jax.tree.map(jnp.ones_like, lora)
      >>> update = tx.update(grads, tx.init(lora))[0]["kernel"].b
      >>> bool(jnp.allclose(update, -1.0 / (4 * jnp.sum(lora["kernel"].a ** 2)), rtol=1e-5))
      True
    """
    check_lora(lora)
    able = {path: adapter for path, adapter in lora.items() if _is_fa(adapter)}
    inverses = {}
    adapter: Any
    for path, adapter in able.items():
        a = _matrices(adapter.a, len(adapter.layout.stack), last=True)
        scale = jnp.asarray(adapter.scale, jnp.float32).reshape(-1, 1, 1)
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)  # The gradient for rank 0 is 0.
        inverses[path] = _inverse(jnp.swapaxes(a, -1, -2), eps) / jnp.square(scale)

    def corrected(path, adapter, _):
        name = getattr(path[-1], "key", None) if path else None
        if not _is_fa(adapter) or name not in inverses:
            return adapter
        b = _matrices(adapter.b, len(adapter.layout.stack))
        b = jnp.matmul(inverses[name], b, precision=jax.lax.Precision.HIGHEST)
        return dataclasses.replace(adapter, b=b.reshape(adapter.b.shape).astype(adapter.b.dtype))

    return _of_adapters(corrected)


def riemannian(damping: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    """Preconditions each factor's gradient by the other factor, so that training depends only on ``A B``.

    Zhang and Pilanci, "Riemannian Preconditioned LoRA" (https://arxiv.org/abs/2402.02347), equation (4):
    ``g_A <- g_A (B B^T + d I)^-1`` and ``g_B <- (A^T A + d I)^-1 g_B``, in float32. Put it before the
    optimizer: ``chain(riemannian(), sgd(lr))``.

    Args:
      damping: ``d``, added to the diagonals.

    Returns:
      A transformation, whose ``update`` needs the adapters as ``params``. The gradients of adapters other
      than `LoRA` and `DoRA` stay as they are.

    Raises:
      LoraError: from ``update``: there are no ``params``, or one of the adapters is a `LoRAFA`.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> lora = {"w": lx.LoRA(2 * jnp.ones((1, 1)), jnp.ones((1, 1)), 1.0, 1, "lora", layout)}
      >>> tx = lx.optim.riemannian(damping=0.0)
      >>> tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)[0]["w"].b
      Array([[0.25]], dtype=float32)
    """
    exact = jax.lax.Precision.HIGHEST

    def preconditioned(path, grad, adapter):
        if not grad.owns_factors:
            return grad
        if adapter is None or _is_fa(grad):
            raise error(
                "riemannian needs both factors.",
                path=jax.tree_util.keystr(path, simple=True, separator="/"),
                got="no params" if adapter is None else "LoRAFA, whose A is frozen",
                want="tx.update(grads, state, lora) with adapters whose A and B are trained",
                do="pass params, or use lx.optim.lora_fa_gradient(lora) for LoRA-FA.",
            )
        stack = len(grad.layout.stack)
        a, ga = (_matrices(x.a, stack, last=True) for x in (adapter, grad))
        b, gb = (_matrices(x.b, stack) for x in (adapter, grad))
        ga = jnp.matmul(ga, _inverse(b, damping), precision=exact)
        gb = jnp.matmul(_inverse(jnp.swapaxes(a, -1, -2), damping), gb, precision=exact)
        new = [g.reshape(x.shape).astype(x.dtype) for g, x in ((ga, grad.a), (gb, grad.b))]
        return dataclasses.replace(grad, a=new[0], b=new[1])

    return _of_adapters(preconditioned)


def _is_fa(adapter: Any) -> bool:
    """Whether an adapter has factors A and B of which only B is trained."""
    return adapter.owns_factors and "a" in adapter.frozen


def _matrices(factor: jax.Array, stack: int, *, last: bool = False) -> jax.Array:
    """A factor as float32 matrices: B as ``[s, r, m]``, or A as ``[s, n, r]`` with ``last``."""
    shape = factor.shape
    count = math.prod(shape[:stack])
    wide = jnp.asarray(factor, jnp.float32)
    return wide.reshape(count, -1, shape[-1]) if last else wide.reshape(count, shape[stack], -1)


def _inverse(rows: jax.Array, damping: float) -> jax.Array:
    """``(X X^T + damping I)^-1``, ``[s, r, r]``, of matrices ``X [s, r, n]``."""
    gram = jnp.einsum("srn,stn->srt", rows, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.inv(gram + damping * jnp.eye(gram.shape[-1], dtype=jnp.float32)[None])


def _of_adapters(change: Callable) -> optax.GradientTransformationExtraArgs:
    """A stateless transformation that maps ``change(path, update, param)`` over the adapters of a tree."""

    def update(updates, state, params=None, **_):
        def one(path, node, param=None):
            return change(path, node, param) if is_adapter(node) else node

        trees = (updates,) if params is None else (updates, params)
        return jax.tree_util.tree_map_with_path(one, *trees, is_leaf=is_adapter), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
