"""The train step on many devices: one program a device (pmap), or one program over a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.trees import PyTree, error, is_array, named_leaves
from lorax_fn.training import sharding
from lorax_fn.training.step import TrainState, check_arrays_only, make_train_step

BATCH_AXES = ("data", "fsdp")


def pmap_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: Hashable = "devices",
    devices: Sequence[Any] | None = None,
) -> Callable:
    """Builds the step of `make_train_step` under ``jax.pmap``: every device holds the whole base.

    ``step(state, params, batch)`` takes ``replicate(state)``, ``replicate(params)`` and ``shard(batch)``.
    Gradients, loss and the float leaves of ``aux`` and ``extra`` are means over the devices; each device has
    a key of its own. The state is donated: the step consumes the one that it was given.

    Args:
      loss_fn: as in `make_train_step`; it sees the examples of one device.
      tx: the optimizer that `TrainState.create` got.
      accumulate: how many micro-batches each device splits its examples into.
      axis_name: the name of the mapped axis, for collectives inside ``loss_fn``.
      devices: the devices, those that `replicate` and `shard` got; None is all.

    Returns:
      The step, ``step(state, params, batch) -> (state, metrics)``, compiled at its first call. Every leaf
      that it returns has the leading axis of devices, along which all copies are equal: `unreplicate` takes
      one. (Leaves of ``aux`` and ``extra`` that are not float are each device's own.)

    Raises:
      LoraError: as `make_train_step`; when the step runs, a leaf lacks the leading axis of devices.

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
    inner = make_train_step(loss_fn, tx, accumulate=accumulate, axis_name=axis_name)
    mapped = jax.pmap(inner, axis_name=axis_name, donate_argnums=0, devices=devices)
    count = jax.local_device_count() if devices is None else len(devices)

    @functools.wraps(inner)
    def step(state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
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


def mesh_train_step(
    mesh: jax.sharding.Mesh,
    rules: Mapping[Any, PartitionSpec],
    loss_fn: Callable | None = None,
    tx: optax.GradientTransformation | None = None,
    *,
    accumulate: int = 1,
    batch: Any = None,
) -> Any:
    """Builds the step of `make_train_step` on a mesh: weights by rules, adapters after them, batch over data.

    Weights are laid out by the first rule that matches them and replicated where none does; adapters and what
    the optimizer keeps of them follow by `shardings`; step, key and ``extra`` are replicated. Loss and
    statistics are those of the whole batch. Mesh axes may be Auto or Explicit: the step runs under
    ``jax.set_mesh(mesh)``, and a model on Explicit axes reshards where JAX asks it to, as without adapters.

    Beware: on Auto axes, constrain activations (``jax.lax.with_sharding_constraint``), in scans above all.
    XLA, as of JAX 0.10 and 0.12, computes some scans wrongly, with or without adapters, where their carry is
    left to it and the batch is sharded over an axis (``"fsdp"``) that shards weights, too.

    Args:
      mesh: for instance ``jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))``.
      rules: ``{pattern: jax.P(...)}``, patterns as the targets of `split`, an entry for each axis of the
        weight. ``{"bias": jax.P(), "attn/*": jax.P("fsdp", "tensor")}``: the first match wins.
      loss_fn: as in `make_train_step`. Without ``loss_fn`` and ``tx`` the result is a function that takes
        them, for several steps on one mesh: ``on_mesh = mesh_train_step(mesh, rules); on_mesh(loss_fn, tx)``.
      tx: the optimizer that `TrainState.create` got.
      accumulate: how many micro-batches each batch is split into.
      batch: ``jax.P`` of every leaf of the batch, or a tree of them with the structure of the batch or of its
        upper part. None puts axis 0 over the mesh's axes named ``"data"`` and ``"fsdp"``.

    Returns:
      A `MeshStep`, called as ``step(state, params, batch)`` and compiled once; it donates the state.

    Raises:
      LoraError: a spec names no axis of the mesh; ``batch=None`` on a mesh without a data axis. When the step
        runs: a pattern of ``rules`` matches nothing, an axis does not divide by its mesh axes (all of them
        are listed), and what `make_train_step` refuses.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2)
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> def loss_fn(params, lora, x, key):
      ...     return jnp.mean(apply(params, lora, x) ** 2)
      >>> tx = optax.adam(1e-2)
      >>> mesh = jax.make_mesh((2, 2), ("data", "tensor"))
      >>> step = lx.mesh_train_step(mesh, {"kernel": jax.P(None, "tensor")}, loss_fn, tx)
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> state, params = step.place(state, params)
      >>> state, metrics = step(state, params, jnp.ones((6, 8)))
      >>> state.lora["kernel"].b.sharding.spec, int(state.step)
      (P(None, 'tensor'), 1)
    """
    if not isinstance(rules, Mapping):
        raise error(
            "rules= is no mapping.",
            got=repr(rules),
            want="{pattern: jax.P(...)}",
            do="rules={'kernel': jax.P('fsdp', 'tensor')}, or {} to replicate all weights.",
        )
    sharding.check_specs(rules, mesh, "rules")
    if batch is None:
        axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
        if not axes:
            raise error(
                "no axis of the mesh is known to be one of data.",
                got=tuple(mesh.shape),
                want=f"an axis named in {BATCH_AXES}, or batch=",
                do=f"batch=jax.P({mesh.axis_names[0]!r}), which shards axis 0 of every leaf of the batch.",
            )
        batch = PartitionSpec(axes)
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    sharding.check_specs({jax.tree_util.keystr(path) or "batch": x for path, x in leaves}, mesh, "batch")
    if loss_fn is None and tx is None:
        return functools.partial(mesh_train_step, mesh, rules, accumulate=accumulate, batch=batch)
    if loss_fn is None or tx is None:
        raise error(
            "a step needs a loss and an optimizer.",
            got=f"loss_fn={loss_fn!r}, tx={tx!r}",
            do="lx.mesh_train_step(mesh, rules, loss_fn, tx).",
        )
    return MeshStep(mesh, dict(rules), batch, accumulate, make_train_step(loss_fn, tx, accumulate=accumulate))


@dataclasses.dataclass(frozen=True)
class MeshStep:
    """A train step on a mesh, as `mesh_train_step` makes it: ``step(state, params, batch)``.

    What is not yet where it belongs is put there at every call, so `place` the params once, before the loop.
    With several processes, each gives the whole state and params, but its own part of the batch.

    Args:
      mesh: the mesh.
      rules: ``{pattern: jax.P(...)}`` of the weights.
      batch: the specs of the batch.
      accumulate: how many micro-batches.
      step: the step, not yet compiled.
      programs: what was compiled, by the structure and shapes of the arguments.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2)
      >>> apply, tx = lx.adapt(lambda params, x: x @ params["kernel"]), optax.sgd(0.1)
      >>> mesh = jax.make_mesh((4,), ("data",))
      >>> step = lx.mesh_train_step(mesh, {}, lambda p, lora, x, key: jnp.mean(apply(p, lora, x)), tx)
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> step.lower(state, params, jnp.ones((8, 8))).compile().memory_analysis().argument_size_in_bytes > 0
      True
    """

    mesh: Any
    rules: Mapping[Any, PartitionSpec]
    batch: Any
    accumulate: int
    step: Callable
    programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        batch = self._put_batch(batch)
        run, (at_state, at_params, _) = self._program(state, params, batch)
        state, params = _put(state, at_state), _put(params, at_params)
        with jax.set_mesh(self.mesh):
            return run(state, params, batch)

    def shardings(self, state: TrainState, params: PyTree) -> tuple[PyTree, PyTree]:
        """``(state, params)`` of ``NamedSharding``; arguments may be abstract."""
        check_arrays_only(params)
        at_params = sharding.rule_shardings(self.mesh, self.rules, params)
        return sharding.shardings(state, at_params), at_params

    def place(self, state: TrainState, params: PyTree) -> tuple[TrainState, PyTree]:
        """``(state, params)`` on the mesh; the state may share buffers with the given one, and is donated."""
        at_state, at_params = self.shardings(state, params)
        return _put(state, at_state), _put(params, at_params)

    def lower(self, state: TrainState, params: PyTree, batch: PyTree) -> Any:
        """The lowered program, as ``jax.jit(...).lower`` gives it; arguments may be abstract."""
        with jax.set_mesh(self.mesh):
            return self._program(state, params, batch)[0].lower(state, params, batch)

    def _program(self, state, params, batch) -> tuple[Any, tuple]:
        leaves, treedef = jax.tree.flatten((state, params, batch))
        known = treedef, tuple(x.shape if is_array(x) else () for x in leaves)
        if known not in self.programs:
            at = *self.shardings(state, params), self._batch_shardings(batch)
            # the state comes out as it went in, so that the next call finds the same program
            run = jax.jit(self.step, donate_argnums=0, in_shardings=at, out_shardings=(at[0], None))
            self.programs[known] = run, at
        return self.programs[known]

    def _batch_shardings(self, batch: PyTree) -> PyTree:
        specs = jax.tree.broadcast(self.batch, batch)
        misfits = []
        for (name, leaf), spec in zip(named_leaves(batch, "batch"), jax.tree.leaves(specs), strict=True):
            shape = tuple(getattr(leaf, "shape", ()))
            misfits += sharding.misfits_of(name, shape, spec, self.mesh, times=self.accumulate)
        sharding.raise_misfits(misfits, "change the batch size, accumulate=, the mesh, or batch=.")
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def _put_batch(self, batch: PyTree) -> PyTree:
        if jax.process_count() == 1:
            return jax.device_put(batch, self._batch_shardings(batch))

        def whole(x, spec):
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return x
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), np.asarray(x))

        return jax.tree.map(whole, batch, jax.tree.broadcast(self.batch, batch))


def _put(tree: PyTree, where: PyTree) -> PyTree:
    """``jax.device_put``, also of keys to a mesh of several processes, which JAX does not do."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def one(x, at):
        if getattr(x, "sharding", None) == at:
            return x
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.device_put(jax.random.key_data(x), at)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(x, at)

    return jax.tree.map(one, tree, where)
