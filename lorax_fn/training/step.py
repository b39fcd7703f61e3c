"""One training step, and its two halves: gradients of the trainable leaves, and the adapters' update."""

import dataclasses
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_alive, check_lora
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_array, is_float, named_leaves
from lorax_fn.training import averaging
from lorax_fn.training.masks import check_trained, mask, of_trained, train_only, trainable, with_trainable
from lorax_fn.training.state import TrainState

ARRAYS_ONLY = "arrays, static = eqx.partition(model, eqx.is_array), or graphdef, arrays = nnx.split(model)"


def value_and_grad(loss_fn: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Adapter]]]:
    """Builds ``f(params, lora, ...) -> (value, grads)`` with gradients for the trainable leaves of ``lora``.

    This is the first half of `make_train_step`, for custom loops: several losses, preferences, rollouts,
    accumulation. `apply_gradients` is the second half.

    Args:
      loss_fn: ``loss_fn(params, lora, ...)`` returns the loss, a float scalar, or a tuple that begins with
        it.

    Returns:
      A function with the arguments of ``loss_fn``. ``value`` is everything that ``loss_fn`` returned;
      ``grads`` has the structure of ``trainable(lora)``, with None for leaves that are not trainable.

    Raises:
      LoraError: when the function runs: ``lora`` is not a dict of adapters, or the loss is not a float
        scalar.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> def loss_fn(params, lora, x):
      ...     return jnp.sum(lora["b"].weight(params["b"]) * x), {"batch": x.size}
      >>> lora = {"b": lx.Full(jnp.ones(2))}
      >>> (loss, aux), grads = lx.value_and_grad(loss_fn)({"b": jnp.zeros(2)}, lora, jnp.array([1.0, 2.0]))
      >>> loss, aux, grads["b"].value
      (Array(3., dtype=float32), {'batch': 2}, Array([1., 2.], dtype=float32))
    """

    def graded(params: PyTree, lora: dict[str, Adapter], *args: Any, **kwargs: Any):
        check_lora(lora)

        def objective(trained):
            value = loss_fn(params, with_trainable(lora, trained), *args, **kwargs)
            return _checked_loss(value[0] if isinstance(value, tuple) and value else value), value

        (_, value), grads = jax.value_and_grad(objective, has_aux=True)(trainable(lora))
        return value, grads

    return graded


def apply_gradients(
    state: TrainState,
    grads: dict[str, Adapter],
    tx: optax.GradientTransformation,
    *,
    value: jax.Array | None = None,
) -> TrainState:
    """Takes one step of the optimizer: the second half of `make_train_step`.

    Args:
      state: a state from `TrainState.create` with the same ``tx``.
      grads: gradients from `value_and_grad`, or from ``jax.grad`` with respect to the whole ``lora``, of
        which those for leaves that are not trainable are ignored.
      tx: the optimizer; it is wrapped in `train_only`.
      value: the loss, for optimizers that need it (``optax.contrib.reduce_on_plateau``), or None.

    Returns:
      The state after the step, with new ``lora``, ``opt_state`` and ``step``, and the same ``key`` and
      ``extra``.

    Raises:
      LoraError: ``grads`` have a different structure, or ``tx`` is not an optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> tx, lora = optax.sgd(0.5), {"b": lx.Full(jnp.ones(2))}
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> state = lx.apply_gradients(state, {"b": lx.Full(jnp.ones(2))}, tx)
      >>> state.lora["b"].value, int(state.step)
      (Array([0.5, 0.5], dtype=float32), 1)
    """
    check_alive(state, "state")
    flags, trained = mask(state.lora), trainable(state.lora)
    if jax.tree.structure(grads) == jax.tree.structure(state.lora):
        grads = of_trained(grads, flags)
    check_trained(grads, trained, "grads")
    given = {} if value is None else {"value": value}
    update: Any = train_only(tx).update
    updates, opt_state = update(grads, state.opt_state, trained, **given)
    trained = jax.tree.map(lambda w, u: w + u.astype(w.dtype), trained, updates)
    return dataclasses.replace(
        state, lora=with_trainable(state.lora, trained), opt_state=opt_state, step=state.step + 1
    )


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: Hashable | None = None,
    weight: Callable[[Any], Any] | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Any]]]:
    """Builds ``step(state, params, batch) -> (state, metrics)``, which trains only the adapters.

    The step is an ordinary function, for ``jax.jit(step, donate_argnums=0)``. It combines `value_and_grad`, a
    mean over micro-batches and devices, and `apply_gradients`. Frozen weights have neither gradients nor
    optimizer state. ``params`` must contain only arrays: under ``jax.jit``, JAX raises a TypeError that names
    any other leaf; separate such leaves by ``eqx.partition`` or ``nnx.split``.

    Args:
      loss_fn: ``loss_fn(params, lora, batch, key) -> loss | (loss, aux)``; or, if the state has ``extra``,
        ``loss_fn(params, lora, batch, key, extra) -> (loss, (extra, aux))``. ``loss`` is a float scalar, a
        mean over the batch.
      tx: the optimizer that was passed to `TrainState.create`; its update gets ``value=loss``.
      accumulate: how many micro-batches to split each batch into, along axis 0 of every leaf, ``[B, ...]``.
        Micro-batch ``i`` has examples ``i, i + accumulate, ...``, so that a batch sharded along axis 0 stays
        in place. Gradients, loss and float leaves of ``aux`` are means over micro-batches; other leaves of
        ``aux`` are those of the last one; ``extra`` is passed from one to the next.
      axis_name: the mapped axis (of ``pmap``, ``vmap`` or ``shard_map``) over which gradients, loss and the
        float leaves of ``aux`` and ``extra`` are averaged. Each index along it has its own key.
      weight: ``weight(batch) -> number``, how many of the elements that the loss averages over are in a
        batch, such as ``lambda batch: batch["mask"].sum()`` for the tokens of a mask. Micro-batches and
        devices are then averaged by weight, which gives the mean over the whole batch: gradients, loss, and
        the float leaves of ``aux`` and ``extra``, where all micro-batches start from the same ``extra``. A
        part of weight 0 is ignored, even if its loss is NaN; if the total is 0, loss and gradients are 0.
        None weighs all parts equally.

    Returns:
      The step. ``metrics`` is a dict of ``loss``; ``grad_norm``, float32, over the trainable leaves; and
      ``aux`` if ``loss_fn`` returns one. The key of a step is ``fold_in(state.key, state.step)``, which is
      also folded with the index along ``axis_name`` and the index of the micro-batch, if there are any.

    Raises:
      LoraError: ``accumulate`` is not a positive int, or ``tx`` is not an optimizer. When the step runs:
        ``loss_fn`` does not take ``extra`` as the state requires, or returns anything but the above; the loss
        is not a float scalar; ``extra`` changes its structure; a batch can't be split; ``weight`` does not
        return a number; or ``params`` contain anything but arrays.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> def loss_fn(params, lora, batch, key):
      ...     return jnp.sum((batch - lora["b"].weight(params["b"])) ** 2)
      >>> tx, lora = optax.sgd(0.25), {"b": lx.Full(jnp.zeros(2))}
      >>> step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> state, metrics = step(state, {"b": jnp.zeros(2)}, jnp.array([3.0, 4.0]))
      >>> state.lora["b"].value, metrics["loss"], metrics["grad_norm"]
      (Array([1.5, 2. ], dtype=float32), Array(25., dtype=float32), Array(10., dtype=float32))
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise error(
            "accumulate is not a count.", got=repr(accumulate), want="an int of 1 or more", do="accumulate=1."
        )
    train_only(tx)  # This raises now what `apply_gradients` would raise in the first step.

    def step(state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        check_alive(state, "state")
        check_arrays_only(params)
        given = () if state.extra is None else (state.extra,)
        _check_takes(loss_fn, (params, state.lora, batch, state.key, *given))

        def gradient(batch, key, extra):
            def objective(*args):
                return _read_loss(loss_fn(*args), extra)

            args = (params, lora, batch, key, *(() if extra is None else (extra,)))
            (loss, (new_extra, aux)), grads = value_and_grad(objective)(*args)
            return grads, new_extra, {"loss": loss, **aux}

        trained, extra = _per_device((trainable(state.lora), state.extra), axis_name)
        lora = with_trainable(state.lora, trained)
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            part, weighs = gradient(batch, key, extra), averaging.weight_of(weight, batch)
        else:
            zeros = _per_device(averaging.zeros_to_sum(trained, extra, weight), axis_name)
            part, weighs = averaging.over_micro_batches(
                gradient, batch, key, extra, zeros, count=accumulate, weight=weight
            )
        grads, extra, metrics = averaging.over_devices(part, extra, weighs, axis_name)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, trained)

        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        new = apply_gradients(state, grads, tx, value=metrics["loss"])
        new = dataclasses.replace(new, extra=extra)
        return new, {"loss": metrics.pop("loss"), "grad_norm": norm, **metrics}

    return step


def _read_loss(out: Any, extra: PyTree) -> tuple[jax.Array, tuple[PyTree, dict]]:
    """Sorts what ``loss_fn`` returned into ``(loss, (extra, {} or {"aux": aux}))``."""
    loss: Any = None
    aux: Any = {}
    if extra is None:
        pair = isinstance(out, tuple)
        good, form = not pair or len(out) == 2, "loss or (loss, aux)"
        loss, aux = (out[0], {"aux": out[1]}) if pair and good else (out, {})
    else:
        good = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple) and len(out[1]) == 2
        form = "(loss, (extra, aux)), as the state holds extra"
    if not good:
        raise error(
            "loss_fn did not return a loss in the expected form.",
            got=_describe(out),
            want=form,
            do="return the loss first; put everything else into aux (any tree).",
        )
    if extra is not None:
        loss, (new_extra, aux) = out
        _check_extra(extra, new_extra)
        extra, aux = new_extra, {"aux": aux}
    return loss, (extra, aux)


def _checked_loss(loss: Any) -> jax.Array:
    if not is_float(loss) or np.shape(loss) != ():
        raise error(
            "the loss is not a float scalar.",
            got=_describe(loss),
            want="a scalar: shape (), float",
            do="return jnp.mean(...) of it.",
        )
    return loss


def _check_takes(loss_fn: Callable, args: tuple) -> None:
    """Raises a `LoraError` if ``loss_fn`` does not accept the arguments of a step."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # Some callables have no signature; calling them then raises.
        return
    try:
        signature.bind(*args)
    except TypeError as failure:
        holds = len(args) == 5
        raise error(
            "loss_fn does not take the arguments of a step.",
            got=f"loss_fn{signature}: {failure}",
            want="loss_fn(params, lora, batch, key, extra), as the state holds extra"
            if holds
            else "loss_fn(params, lora, batch, key), as the state holds no extra",
            do="take extra and return (loss, (extra, aux)), or create the state without extra=."
            if holds
            else "if the model has statistics or other state, TrainState.create(..., extra=...).",
        ) from None


def _per_device(tree: PyTree, axis_name: Hashable | None) -> PyTree:
    """The same values, typed as varying along ``axis_name``.

    Under `jax.shard_map`, the gradient with respect to a value that does not vary is summed over the devices,
    and a later mean over them would be too large by their number.
    """
    if axis_name is None:
        return tree
    always = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda x: jnp.where(always, x, x), tree)


def _describe(x: Any) -> str:
    if is_array(x):
        return f"shape {np.shape(x)}, dtype {x.dtype}"
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}: ({', '.join(_describe(part) for part in x)})"
    return f"a {type(x).__name__}"


def check_arrays_only(params: PyTree) -> None:
    """Raises a `LoraError` if a leaf of ``params`` is not an array."""
    wrong = [(path, leaf) for path, leaf in flatten_with_paths(params)[0] if not is_array(leaf)]
    if wrong:
        raise error(
            "params of a train step must contain arrays only.",
            path=[path for path, _ in wrong],
            got=[f"a {type(leaf).__name__}" for _, leaf in wrong],
            want="arrays",
            do=f"{ARRAYS_ONLY}; join the two again inside loss_fn.",
        )


def _check_extra(old: PyTree, new: PyTree) -> None:
    def facts(tree):
        return {
            path: f"{np.shape(x)} {x.dtype if is_array(x) else type(x).__name__}"
            for path, x in named_leaves(tree)
        }

    was, now = facts(old), facts(new)
    paths = [path for path in sorted(was.keys() | now.keys()) if was.get(path) != now.get(path)]
    if paths or jax.tree.structure(old) != jax.tree.structure(new):
        raise error(
            "loss_fn changed the structure of extra.",
            path=paths or "(the containers differ)",
            got=[now.get(path, "nothing") for path in paths] or jax.tree.structure(new),
            want=[was.get(path, "nothing") for path in paths] or jax.tree.structure(old),
            do="return extra with the same keys, shapes and dtypes that it had.",
        )
