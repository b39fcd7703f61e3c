"""Training under `jax.pmap`, with a copy of the base on every device."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_alive
from lorax_fn.core.trees import PyTree, named_leaves
from lorax_fn.training.averaging import check_divisible
from lorax_fn.training.state import TrainState
from lorax_fn.training.step import check_arrays_only, make_train_step


def replicate(tree: PyTree, devices: Sequence[Any] | None = None) -> PyTree:
    """Copies a tree to each device, along a new leading axis, for `pmap_train_step`.

    Args:
      tree: a `TrainState`, params, or any tree of arrays ``[...]``, PRNG keys and numbers.
      devices: the devices; None is ``jax.local_devices()``, in the order of ``jax.pmap``.

    Returns:
      The same tree with arrays ``[devices, ...]``, one copy per device.

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
    """The first device's copy of a replicated tree: the inverse of `replicate`.

    Args:
      tree: a tree of arrays ``[devices, ...]``, from `replicate` or ``jax.pmap``.

    Returns:
      The same tree with arrays ``[...]`` on the first device.

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
            "a leaf has no device axis.",
            path=wrong,
            got="shape ()",
            want="shape (devices, ...)",
            do="pass the result of lx.replicate or of a pmapped step; nothing else needs lx.unreplicate.",
        )

    def first(x):
        # x[0] would run a program on all devices.
        return x.addressable_shards[0].data.reshape(x.shape[1:]) if isinstance(x, jax.Array) else x[0]

    return jax.tree.map(first, tree)


def shard(batch: PyTree, devices: Sequence[Any] | None = None) -> PyTree:
    """Distributes a batch over devices: axis 0 of every leaf becomes ``[devices, B / devices]``.

    Args:
      batch: a tree of arrays ``[B, ...]``.
      devices: the devices; None is ``jax.local_devices()``, in the order of ``jax.pmap``.

    Returns:
      The same tree with arrays ``[devices, B / devices, ...]``, each device with its own examples.

    Raises:
      LoraError: axis 0 of a leaf is not divisible by the number of devices, or there is no such axis.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> lx.shard({"x": jnp.ones((16, 3))}, jax.devices()[:4])["x"].shape
      (4, 4, 3)
    """
    devices = list(jax.local_devices() if devices is None else devices)
    count = len(devices)
    check_divisible(
        batch,
        count,
        "the batch can't be distributed over the devices.",
        want=f"axis 0 a multiple of {count}, the number of devices",
        do="change the batch size",
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
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Any]]]:
    """Builds the step of `make_train_step` under ``jax.pmap``, with a copy of the base on every device.

    ``step(state, params, batch)`` takes ``replicate(state)``, ``replicate(params)`` and ``shard(batch)``.
    Gradients, loss and the float leaves of ``aux`` and ``extra`` are means over the devices; each device has
    its own key. The state is donated.

    Args:
      loss_fn: as in `make_train_step`; it sees the examples of one device.
      tx: the optimizer that was passed to `TrainState.create`.
      accumulate: how many micro-batches each device splits its examples into.
      axis_name: the name of the mapped axis, for collectives inside ``loss_fn``.
      weight: ``weight(batch) -> number``, as in `make_train_step`: the weight in the means of one device's
        examples, or of a micro-batch of them.
      devices: the devices, as given to `replicate` and `shard`; None is all local devices.

    Returns:
      The step, ``step(state, params, batch) -> (state, metrics)``, compiled at its first call. Every result
      has a leading device axis, along which all copies are equal; `unreplicate` takes one. Only leaves of
      ``aux`` and ``extra`` that are not float may differ between devices.

    Raises:
      LoraError: as for `make_train_step`. When the step runs: a leaf lacks the leading device axis, or the
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
    def step(state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        check_alive(state, "state")  # In JAX 0.10, pmap crashes on deleted arrays.
        try:
            return mapped(state, params, batch)
        except (TypeError, ValueError, IndexError):
            _check_replicated({"state": state, "params": params, "batch": batch}, count)
            raise

    return step


def _check_replicated(arguments: dict, count: int) -> None:
    """If arguments lack the device axis, explains pmap's error more clearly than pmap itself does."""
    check_arrays_only(arguments["params"])
    named = [(path, np.shape(x)) for path, x in named_leaves(arguments)]
    wrong = [(path, shape) for path, shape in named if shape[:1] != (count,)]
    if wrong:
        raise error(
            "the arguments of a pmapped step have no device axis.",
            path=[path for path, _ in wrong],
            got=[f"shape {shape}" for _, shape in wrong],
            want=f"shape ({count}, ...)",
            do="step(lx.replicate(state), lx.replicate(params), lx.shard(batch)).",
        )
