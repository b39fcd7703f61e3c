"""Which leaves train, and an optimizer that touches no other."""

import operator
from typing import Any

import jax
import optax

from lorax_fn.core.adapters import Adapter, is_adapter
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_float


def mask(tree: PyTree) -> PyTree:
    """True on the leaves that train, False on every other.

    A leaf trains if it is a float array of an `Adapter` and its field is not in the class's ``frozen`` tuple.
    PRNG keys and integers never train, nor does any leaf outside an adapter.

    Beware: ``optax.masked(tx, lx.mask)`` alone passes the *raw gradients* of the False leaves through, so
    that `optax.apply_updates` adds them to the frozen weights. Use `train_only`, which sets them to zero.

    Args:
      tree: any tree that holds adapters, params or both, of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      A tree of bool with ``tree``'s structure, as `optax.masked` and `optax.partition` take it.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> layout = lx.Layout(inputs=(0,), outputs=(1,))
      >>> lora = {"w": lx.LoRA(jnp.ones((3, 1)), jnp.ones((1, 2)), 1.0, 1, "lora", layout)}
      >>> jax.tree.leaves(lx.mask({"lora": lora, "params": {"w": jnp.ones((3, 2))}}))
      [True, True, False]
    """
    return jax.tree.map(_mask_node, tree, is_leaf=is_adapter)


def _mask_node(node: object) -> PyTree:
    if not isinstance(node, Adapter):
        return False
    names = node.trained()

    def trains(path, leaf):
        return getattr(path[0], "name", None) in names and is_float(leaf)

    return jax.tree_util.tree_map_with_path(trains, node)


def _unmask(tree: PyTree) -> PyTree:
    return jax.tree.map(operator.not_, mask(tree))


def train_only(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that every leaf that `mask` calls False gets exactly zero update and no state.

    The trap that this avoids: ``optax.masked(tx, mask)`` by itself hands the raw gradients of the other
    leaves through, and `optax.apply_updates` then adds them to the weights. A global-norm clip inside ``tx``
    sees only the leaves that train.

    Args:
      tx: any optax transformation (chains, ``inject_hyperparams``, ``MultiSteps``, ...); extra arguments such
        as ``update(..., value=loss)`` reach it. It runs under JAX's standard dtype promotion.

    Returns:
      The wrapped transformation, for trees that hold adapters, params or both.

    Raises:
      LoraError: ``tx`` is not an optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> tree = {"w": jnp.ones(2), "lora": {"b": lx.Full(jnp.ones(2))}}
      >>> tx = lx.train_only(optax.sgd(0.5))
      >>> updates, _ = tx.update(tree, tx.init(tree), tree)
      >>> updates["w"], updates["lora"]["b"].value
      (Array([0., 0.], dtype=float32), Array([-0.5, -0.5], dtype=float32))
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not is_optimizer(tx):
        raise error(
            "tx is not an optimizer.",
            got=f"{type(tx).__name__} {getattr(tx, '__name__', '')}".strip(),
            want="an optax.GradientTransformation",
            do="call it first, e.g. optax.adamw(1e-4).",
        )
    # extra arguments of the tree's own structure (gradients, for instance) are masked as the updates are
    trained = optax.masked(own_promotion(tx), mask, mask_compatible_extra_args=True)
    return optax.chain(trained, optax.masked(optax.set_to_zero(), _unmask))


def own_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer under JAX's standard promotion: ``0.9**count`` in optax's Adam fails under strict."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def is_optimizer(tx: Any) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
