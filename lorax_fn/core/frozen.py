"""Stops gradients at frozen factors, and says so once where a program differentiates them."""

import functools
import logging
from typing import Any

import jax

from lorax_fn.core.errors import error

LOG = logging.getLogger("lorax_fn")


def frozen(x: Any, owner: str) -> Any:
    """``x`` with a gradient of zero.

    In a loop of the user's own, optax still decays what has a gradient of zero. This cannot be prevented
    here, as an optimizer sees only arrays. But only such a loop, which differentiates the whole ``lora``, has
    a tangent for ``x``: `value_and_grad` and the train steps have none. So the log then says what to do.

    Args:
      x: a tree of float arrays of any shape.
      owner: whose arrays they are, for the message.
    """
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(_watched(leaf, owner)), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _watched(x: Any, owner: str) -> Any:
    del owner
    return x


def _watched_jvp(owner: str, primals: tuple, tangents: tuple) -> tuple:
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        tell(owner)
    return primals[0], tangents[0]


_watched.defjvp(_watched_jvp, symbolic_zeros=True)


@functools.cache
def tell(owner: str) -> None:
    """Logs, once per process and kind of adapter, that frozen factors are differentiated."""
    text = error(
        "frozen factors are differentiated. Their gradient is zero, but weight decay still shrinks them.",
        got=f"gradients by the whole lora, with a {owner}",
        want="gradients of the leaves that train, or an optimizer that leaves the others alone",
        do="lx.value_and_grad(loss_fn), and optax on lx.trainable(lora); or tx = lx.train_only(tx).",
    )
    LOG.warning("%s", text)
