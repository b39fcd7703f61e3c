"""One training step: gradients of the adapters alone, and the state that carries them."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters
from lorax_fn.core.keys import checked_key
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_array, is_float, named_leaves
from lorax_fn.training.masks import mask, train_only

ARRAYS_ONLY = "arrays, static = eqx.partition(model, eqx.is_array), or graphdef, arrays = nnx.split(model)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step carries: adapters, optimizer state, step count, key and anything mutable.

    It is an ordinary pytree. A step that donates it (``jax.jit(step, donate_argnums=0)``) consumes the
    ``lora`` that `create` was given: keep a copy of that one if it is needed later.

    Args:
      lora: ``dict[str, Adapter]`` that trains.
      opt_state: state of ``train_only(tx)``; it holds nothing for leaves that don't train.
      step: int32 scalar, how many steps were taken.
      key: PRNG key; step ``i`` uses ``fold_in(key, i)`` and the key itself never changes.
      extra: any tree that the model rewrites (batch statistics, Haiku state, NNX rngs), or None.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> lora = {"b": lx.Full(jnp.ones(2))}
      >>> lx.TrainState.create(lora=lora, tx=optax.adam(1e-3), key=jax.random.key(0)).step
      Array(0, dtype=int32)
    """

    lora: Any
    opt_state: Any
    step: Any
    key: Any
    extra: Any = None

    @classmethod
    def create(
        cls, *, lora: dict, tx: optax.GradientTransformation, key: jax.Array, extra: PyTree = None
    ) -> "TrainState":
        """A state at step 0, with the optimizer state of ``train_only(tx)``.

        ``key`` and ``extra`` are copied, so that a donating step leaves the caller's arrays alive; ``lora``
        is not.

        Args:
          lora: ``dict[str, Adapter]`` as `split` makes it.
          tx: the optimizer that `make_train_step` gets too.
          key: a PRNG key.
          extra: what the model rewrites, or None.

        Returns:
          The state.

        Raises:
          LoraError: ``lora`` is not a dict of adapters, came out of `dropout`, or has no leaf that trains;
            ``key`` is not a PRNG key.

        Example:
          >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
          >>> lora = {"b": lx.Full(jnp.ones(2))}
          >>> lx.TrainState.create(lora=lora, tx=optax.sgd(0.1), key=jax.random.key(0), extra={"n": 1}).extra
          {'n': 1}
        """
        check_adapters(lora)
        _check_trains(lora)
        checked_key(key)
        return cls(
            lora=lora,
            opt_state=_unaliased(train_only(tx).init(lora), lora),
            step=jnp.zeros((), jnp.int32),
            key=_copy(key),
            extra=jax.tree.map(_copy, extra),
        )


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: Hashable | None = None,
) -> Callable:
    """Builds ``step(state, params, batch) -> (state, metrics)``, which trains the adapters and nothing else.

    The step is an ordinary function: ``jax.jit(step, donate_argnums=0)`` it. Only leaves that `mask` calls
    True are differentiated, and ``tx`` is wrapped in `train_only` (wrapping twice does no harm), so frozen
    weights cost neither gradient nor optimizer state.

    Args:
      loss_fn: ``loss_fn(params, lora, batch, key) -> loss | (loss, aux)``; if the state holds ``extra``,
        ``loss_fn(params, lora, batch, key, extra) -> (loss, (extra, aux))``. ``loss`` is a float scalar, the
        mean over the batch.
      tx: the optimizer that `TrainState.create` got; it is passed ``value=loss``.
      accumulate: how many micro-batches each batch is split into along axis 0 of every leaf, ``[B, ...]``.
        Micro-batch ``i`` holds examples ``i, i + accumulate, ...`` (so a batch sharded on axis 0 stays where
        it is). Gradients, loss and the float leaves of ``aux`` are means; other leaves of ``aux`` are the
        last micro-batch's; ``extra`` goes from one to the next.
      axis_name: the mapped axis (of ``pmap``, ``vmap`` or ``shard_map``) over which gradients, loss and the
        float leaves of ``aux`` and ``extra`` are averaged. Each index along it then has a key of its own.

    Returns:
      The step. ``metrics`` is a dict: ``loss``; ``grad_norm``, float32, of the leaves that train; and ``aux``
      where ``loss_fn`` gives one. The key of a step is ``fold_in(state.key, state.step)``, then folded with
      the index along ``axis_name`` and the index of the micro-batch, where there are any.

    Raises:
      LoraError: ``accumulate`` is not a positive int. When the step runs: the loss is not a float scalar or
        comes with anything but the above, ``extra`` changes its structure, a batch can't be split, or
        ``params`` hold anything but arrays. (Under ``jax.jit`` JAX refuses such params with its own TypeError
        before the step runs; that message carries the remedy too.)

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
    tx = train_only(tx)

    def step(state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        check_arrays_only(params)
        lora, flags = state.lora, mask(state.lora)
        trained = jax.tree.map(lambda train, leaf: leaf if train else None, flags, lora)

        def gradient(trained, batch, key, extra):
            def objective(trained):
                given = () if extra is None else (extra,)
                return _read_loss(loss_fn(params, _fill(trained, lora), batch, key, *given), extra)

            (loss, (new_extra, aux)), grads = jax.value_and_grad(objective, has_aux=True)(trained)
            return grads, new_extra, {"loss": loss, **aux}

        trained, extra = _per_device((trained, state.extra), axis_name)
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            result = gradient(trained, batch, key, extra)
        else:
            result = _accumulated(gradient, trained, batch, key, extra, accumulate, axis_name)
        grads, extra, metrics = _averaged(result, axis_name)

        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        updates, opt_state = tx.update(_fill(grads, lora), state.opt_state, lora, value=metrics["loss"])
        lora = jax.tree.map(lambda train, w, u: w + u.astype(w.dtype) if train else w, flags, lora, updates)
        new = TrainState(lora=lora, opt_state=opt_state, step=state.step + 1, key=state.key, extra=extra)
        return new, {"loss": metrics.pop("loss"), "grad_norm": norm, **metrics}

    # jit looks at its arguments before any code of ours runs, and its TypeError quotes this name
    step.__qualname__ = f"step(state, params, batch), whose params hold arrays only: {ARRAYS_ONLY},"
    return step


def _fill(partial: PyTree, whole: PyTree) -> PyTree:
    """``partial``, its None leaves taken from ``whole``."""
    return jax.tree.map(lambda p, w: w if p is None else p, partial, whole, is_leaf=lambda x: x is None)


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
            "loss_fn returned something else.",
            got=_describe(out),
            want=form,
            do="return the loss first; put everything else into aux (any tree).",
        )
    if extra is not None:
        loss, (new_extra, aux) = out
        _check_extra(extra, new_extra)
        extra, aux = new_extra, {"aux": aux}
    if not is_float(loss) or np.shape(loss) != ():
        raise error(
            "the loss is not a float scalar.",
            got=_describe(loss),
            want="a scalar: shape (), float",
            do="return jnp.mean(...) of it.",
        )
    return loss, (extra, aux)


def _accumulated(gradient, trained, batch, key, extra, count, axis_name):
    """Means of ``gradient`` over ``count`` micro-batches, one after the other."""
    batch = _micro_batches(batch, count)

    def wide(x):  # sums of many 16-bit gradients lose the small ones
        return jnp.zeros_like(x, jnp.float32 if x.dtype.itemsize < 4 else x.dtype)

    def body(carry, inputs):
        total, extra = carry
        micro, index = inputs
        grads, extra, metrics = gradient(trained, micro, jax.random.fold_in(key, index), extra)
        return (jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), extra), metrics

    zeros = _per_device(jax.tree.map(wide, trained), axis_name)
    inputs = (batch, jnp.arange(count, dtype=jnp.int32))
    (total, extra), metrics = jax.lax.scan(body, (zeros, extra), inputs)
    grads = jax.tree.map(lambda t, x: (t / count).astype(x.dtype), total, trained)
    return grads, extra, jax.tree.map(lambda m: jnp.mean(m, axis=0) if is_float(m) else m[-1], metrics)


def _micro_batches(batch: PyTree, count: int) -> PyTree:
    """``[B, ...]`` leaves as ``[count, B / count, ...]``."""
    named = [(path, np.shape(leaf)) for path, leaf in named_leaves(batch, "batch")]
    wrong = [(path, shape) for path, shape in named if not shape or shape[0] % count]
    if wrong:
        raise error(
            "the batch can't be split.",
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=f"axis 0 a multiple of accumulate={count}",
            do="change the batch size or accumulate; keep what is not a batch out of it.",
        )

    def split(x):
        # examples i, i + count, ...: axis 0 keeps its sharding (explicit mesh axes allow no other split), and
        # the devices of one mesh together take the same examples as a single device does
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _per_device(tree: PyTree, axis_name: Hashable | None) -> PyTree:
    """The same values, but of a type that varies along ``axis_name``.

    Under `jax.shard_map` the gradient by a value that does not vary is summed over the devices, which a mean
    over them would then leave too large by their number.
    """
    if axis_name is None:
        return tree
    always = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda x: jnp.where(always, x, x), tree)


def _averaged(tree: PyTree, axis_name: Hashable | None) -> PyTree:
    """The mean over ``axis_name`` of every float leaf."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name) if is_float(x) else x, tree)


def _copy(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array | np.ndarray) else x


def _unaliased(tree: PyTree, other: PyTree) -> PyTree:
    """``tree`` without an array twice or one of ``other``'s: one buffer can't be donated twice."""
    taken = {id(x) for x in jax.tree.leaves(other)}

    def own(x):
        twice = id(x) in taken
        taken.add(id(x))
        return _copy(x) if twice else x

    return jax.tree.map(own, tree)


def _describe(x: Any) -> str:
    if is_array(x):
        return f"shape {np.shape(x)}, dtype {x.dtype}"
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}: ({', '.join(_describe(part) for part in x)})"
    return f"a {type(x).__name__}"


def _check_trains(lora: dict) -> None:
    if not any(jax.tree.leaves(mask(lora))):
        raise error(
            "no leaf of lora trains.",
            got=f"{len(lora)} adapters",
            want="at least one float leaf that is not frozen",
            do="look at lx.mask(lora); a filter may have dropped every adapter.",
        )


def check_arrays_only(params: PyTree) -> None:
    wrong = [(path, leaf) for path, leaf in flatten_with_paths(params)[0] if not is_array(leaf)]
    if wrong:
        raise error(
            "params of a train step hold arrays only.",
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
            do="return extra with the keys, shapes and dtypes that it came with.",
        )
