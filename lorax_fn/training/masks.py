"""Masks of trainable leaves, trees of only these leaves, and optimizers that change only these."""

import inspect
import operator
from typing import Any

import jax
import optax

from lorax_fn.core.adapters import Adapter, is_adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_lora
from lorax_fn.core.trees import PyTree, is_float, named_leaves


def mask(tree: PyTree) -> PyTree:
    """A mask that is True on trainable leaves and False on all others.

    A leaf is trainable if it is a float array of an `Adapter` and its field is not in the class's ``frozen``
    tuple. PRNG keys and integers are never trainable, and neither is any leaf outside an adapter.

    Beware: ``optax.masked(tx, lx.mask)`` by itself passes the *raw gradients* of the False leaves through,
    and `optax.apply_updates` then adds them to the frozen weights. Use `train_only`, which zeroes them.

    Args:
      tree: any tree of adapters, params or both, of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      A tree of bools with ``tree``'s structure, for `optax.masked` and `optax.partition`.

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


def trainable(lora: dict[str, Adapter]) -> dict[str, Adapter]:
    """The trainable leaves of ``lora``, with None in place of all others.

    In a custom loop, give this to the optimizer. With the whole ``lora``, `optax.adamw` would also decay the
    frozen factors of LoRA-FA, VeRA and LoRA-XS, although their gradient is zero. Gradients from
    `value_and_grad` have this structure, so applying them to the whole ``lora`` by mistake raises.

    Args:
      lora: ``dict[str, Adapter]``, of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      The same dict of adapters, with None where `mask` is False. It is an ordinary pytree, but cannot be
      passed to `adapt`; `with_trainable` restores the whole ``lora``.

    Raises:
      LoraError: ``lora`` is not a dict of adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2, method="lora_fa")
      >>> trained, tx = lx.trainable(lora), optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
      >>> opt_state = tx.init(trained)
      >>> grads = jax.tree.map(jnp.ones_like, trained)
      >>> updates, opt_state = tx.update(grads, opt_state, trained)
      >>> lora = lx.with_trainable(lora, optax.apply_updates(trained, updates))
      >>> trained["kernel"].a, lora["kernel"].a.shape
      (None, (8, 2))
    """
    check_lora(lora)
    return of_trained(lora, mask(lora))


def with_trainable(lora: dict[str, Adapter], trained: dict[str, Adapter]) -> dict[str, Adapter]:
    """``lora`` with its trainable leaves replaced by those of ``trained``: the inverse of `trainable`.

    Args:
      lora: ``dict[str, Adapter]``, from which the leaves that are not trainable are taken.
      trained: a tree with the structure of ``trainable(lora)``.

    Returns:
      The whole ``dict[str, Adapter]``, for `adapt`, `merge` and `checkpoint.save`.

    Raises:
      LoraError: ``trained`` does not have the structure of ``trainable(lora)``.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2, method="lora_fa")
      >>> half = jax.tree.map(lambda x: x / 2, lx.trainable(lora))
      >>> lx.with_trainable(lora, half)["kernel"].a is lora["kernel"].a
      True
    """
    check_trained(trained, trainable(lora), "trained")
    return jax.tree.map(lambda new, old: old if new is None else new, trained, lora, is_leaf=_is_none)


def of_trained(tree: PyTree, flags: PyTree) -> PyTree:
    """``tree`` with None where ``flags`` is False."""
    return jax.tree.map(lambda train, leaf: leaf if train else None, flags, tree)


def check_trained(tree: PyTree, want: PyTree, name: str) -> None:
    """Raises a `LoraError` if ``tree`` does not have the structure of ``want``, a result of `trainable`."""
    if jax.tree.structure(tree) == jax.tree.structure(want):
        return
    got, wanted = ({path for path, _ in named_leaves(x)} for x in (tree, want))
    more, less = sorted(got - wanted), sorted(wanted - got)
    raise error(
        f"{name} are not the trainable leaves of lora.",
        path=[*more, *less] or "(the containers differ)",
        got=[*("a leaf that is not trainable" for _ in more), *("nothing" for _ in less)]
        or type(tree).__name__,
        want="the structure of lx.trainable(lora)",
        do="start from lx.trainable(lora), or take the gradients from lx.value_and_grad.",
    )


def _is_none(x: object) -> bool:
    return x is None


def _unmask(tree: PyTree) -> PyTree:
    return jax.tree.map(operator.not_, mask(tree))


def train_only(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that leaves where `mask` is False get an update of exactly zero, and no state.

    ``optax.masked(tx, mask)`` by itself would pass the raw gradients of those leaves through, and
    `optax.apply_updates` would add them to the weights. A global-norm clip inside ``tx`` sees only the
    trainable leaves.

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
    # Extra arguments with the structure of the tree, such as gradients, are masked like the updates.
    trained = optax.masked(own_promotion(tx), mask, mask_compatible_extra_args=True)
    return optax.chain(trained, optax.masked(optax.set_to_zero(), _unmask))


def own_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer under JAX's standard dtype promotion, since optax's Adam fails under a strict one.

    Only the extra arguments that its update accepts are passed on: `optax.contrib.sam`, for one, does not
    accept ``value``.
    """
    tx = optax.with_extra_args_support(tx)
    known = inspect.signature(tx.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

    def init(params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return tx.init(params)

    def update(updates, state, params=None, **extra_args):
        taken = {name: value for name, value in extra_args.items() if takes_all or name in known}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return tx.update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(init, update)


def is_optimizer(tx: Any) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
