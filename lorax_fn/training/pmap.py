"""Training under `jax.pmap`: every device holds the base."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, named_leaves
from lorax_fn.training.state import TrainState, check_alive
from lorax_fn.training.step import check_arrays_only, make_train_step


def replicate(tree: PyTree, devices: Sequence[Any] | None = None) -> PyTree:
    """Copies a tree to each device, side by side on a new leading axis, as `pmap_train_step` takes it.

    Args:
      tree: a `TrainState`, params, or any tree of arrays ``[...]`` and numbers; PRNG keys are welcome.
      devices: the devices; None is ``jax.local_devices()``, the order of ``jax.pmap``.

    Returns:
      The same tree of arrays ``[devices, ...]``, one copy on each device.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> lx.replicate({"w": jnp.ones((2, 3))}, jax.devices()[:4])["w"].shape
      (4, 2, 3)
    """
    devices = list(jax.local_devices() if devices is None else devices)
    whole = _along_devices(devices)

    def copies(x):
        x = jnp.asarray(x)[None]
        parts = [jax.device_put(x, device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *x.shape[1:]), whole, parts)

    return jax.tree.map(copies, tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy of a replicated tree: what `replicate` was given, after training.

    Args:
      tree: a tree of arrays ``[devices, ...]``, as `replicate` and ``jax.pmap`` give them.

    Returns:
      The same tree of arrays ``[...]`` on the first device.

    Raises:
      LoraError: a leaf has no leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> lx.unreplicate(lx.replicate({"w": jnp.ones((2, 3))}))["w"].shape
      (2, 3)
    """
    wrong = [path for path, leaf in named_leaves(tree, "batch") if not np.ndim(leaf)]
    if wrong:
        raise error(
            "a leaf has no axis of devices.",
            path=wrong,
            got="shape ()",
            want="shape (devices, ...)",
            do="pass what lx.replicate or a pmapped step gave; nothing else needs lx.unreplicate.",
        )

    def first(x):
        # not x[0], which is a program over all devices
        return x.addressable_shards[0].data.reshape(x.shape[1:]) if isinstance(x, jax.Array) else x[0]

    return jax.tree.map(first, tree)


def shard(batch: PyTree, devices: Sequence[Any] | None = None) -> PyTree:
    """Deals a batch out to devices: axis 0 of every leaf becomes ``[devices, B / devices]``.

    Args:
      batch: a tree of arrays ``[B, ...]``.
      devices: the devices; None is ``jax.local_devices()``, the order of ``jax.pmap``.

    Returns:
      The same tree of arrays ``[devices, B / devices, ...]``, each device with its own examples.

    Raises:
      LoraError: axis 0 of a leaf does not divide by the number of devices, or there is none.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> lx.shard({"x": jnp.ones((16, 3))}, jax.devices()[:4])["x"].shape
      (4, 4, 3)
    """
    devices = list(jax.local_devices() if devices is None else devices)
    count = len(devices)
    wrong = [
        (path, np.shape(x))
        for path, x in named_leaves(batch, "batch")
        if not np.ndim(x) or np.shape(x)[0] % count
    ]
    if wrong:
        raise error(
            "the batch can't be dealt out to the devices.",
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=f"axis 0 a multiple of {count}, the number of devices",
            do="change the batch size; keep what is not a batch out of it.",
        )

    def deal(x):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return jax.device_put(x.reshape(count, x.shape[0] // count, *x.shape[1:]), _along_devices(devices))

    return jax.tree.map(deal, batch)


def _along_devices(devices: list) -> NamedSharding:
    return NamedSharding(jax.sharding.Mesh(np.array(devices), ("devices",)), PartitionSpec("devices"))


def pmap_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: Hashable = "devices",
    weight: Callable[[Any], Any] | None = None,
    devices: Sequence[Any] | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict]]:
    """Builds the step of `make_train_step` under ``jax.pmap``: every device holds the whole base.

    ``step(state, params, batch)`` takes ``replicate(state)``, ``replicate(params)`` and ``shard(batch)``.
    Gradients, loss and the float leaves of ``aux`` and ``extra`` are means over the devices; each device has
    a key of its own. The state is donated: the step consumes the one that it was given.

    Args:
      loss_fn: as in `make_train_step`; it sees the examples of one device.
      tx: the optimizer that `TrainState.create` got.
      accumulate: how many micro-batches each device splits its examples into.
      axis_name: the name of the mapped axis, for collectives inside ``loss_fn``.
      weight: ``weight(batch) -> number``, as in `make_train_step`: what the part of one device, or a
        micro-batch of it, weighs in the means.
      devices: the devices, those that `replicate` and `shard` got; None is all.

    Returns:
      The step, ``step(state, params, batch) -> (state, metrics)``, compiled at its first call. Every leaf
      that it returns has the leading axis of devices, along which all copies are equal: `unreplicate` takes
      one. (Leaves of ``aux`` and ``extra`` that are not float are each device's own.)

    Raises:
      LoraError: as `make_train_step`; when the step runs, a leaf lacks the leading axis of devices, or the
        state was consumed by a step.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> def loss_fn(params, lora, batch, key):
      ...     return jnp.mean((batch - lora["b"].weight(params["b"])) ** 2)
      >>> tx, params = optax.sgd(0.5), {"b": jnp.zeros(())}
      >>> state = lx.TrainState.create(lora={"b": lx.Full(jnp.zeros(()))}, tx=tx, key=jax.random.key(0))
      >>> step = lx.pmap_train_step(loss_fn, tx)
      >>> count = jax.local_device_count()
      >>> batch = lx.shard(jnp.arange(2.0 * count))
      >>> state, metrics = step(lx.replicate(state), lx.replicate(params), batch)
      >>> float(lx.unreplicate(state).lora["b"].value) == count - 0.5
      True
    """
    inner = make_train_step(loss_fn, tx, accumulate=accumulate, axis_name=axis_name, weight=weight)
    mapped = jax.pmap(inner, axis_name=axis_name, donate_argnums=0, devices=devices)
    count = jax.local_device_count() if devices is None else len(devices)

    @functools.wraps(inner)
    def step(state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        check_alive(state, "state")  # pmap itself crashes on deleted arrays, as of JAX 0.10
        try:
            return mapped(state, params, batch)
        except (TypeError, ValueError, IndexError):
            _check_replicated({"state": state, "params": params, "batch": batch}, count)
            raise

    return step


def _check_replicated(arguments: dict, count: int) -> None:
    """What pmap's own error says less clearly; called only after one."""
    check_arrays_only(arguments["params"])
    named = [(path, np.shape(x)) for path, x in named_leaves(arguments)]
    wrong = [(path, shape) for path, shape in named if shape[:1] != (count,)]
    if wrong:
        raise error(
            "the arguments of a pmapped step have no axis of devices.",
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=f"shape ({count}, ...)",
            do="step(lx.replicate(state), lx.replicate(params), lx.shard(batch)).",
        )
