"""The train step as one program on a mesh of devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_alive
from lorax_fn.core.trees import PyTree, is_array, is_tracer, named_leaves
from lorax_fn.training import sharding
from lorax_fn.training.state import TrainState
from lorax_fn.training.step import check_arrays_only, make_train_step

BATCH_AXES = ("data", "fsdp")
Arguments = ParamSpec("Arguments")
Step = TypeVar("Step")


def _loss_first(make: Callable[Arguments, Step]) -> Callable[Arguments, Step]:
    """Raises a `LoraError` with the correct call for the argument order of version 0.1, mesh first."""

    @functools.wraps(make)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Step:
        meshes = jax.sharding.Mesh | jax.sharding.AbstractMesh
        if len(args) > 2 or any(isinstance(arg, meshes) for arg in args) or {"mesh", "rules"} - kwargs.keys():
            raise error(
                "mesh_train_step takes the loss and the optimizer first.",
                got=[f"{type(arg).__name__} as argument {i}" for i, arg in enumerate(args, 1)]
                + [f"{name}=" for name in kwargs],
                want="the order of make_train_step, mesh= and rules= by name",
                do="lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules=rules).",
            )
        return make(*args, **kwargs)

    return checked


@_loss_first
def mesh_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh,
    rules: Mapping[Any, PartitionSpec],
    accumulate: int = 1,
    weight: Callable[[Any], Any] | None = None,
    batch: PyTree = None,
) -> "MeshStep":
    """Builds the step of `make_train_step` on a mesh, with weights sharded by rules and adapters alongside.

    Weights are sharded by the first rule that matches them, or replicated if none does. Adapters and their
    optimizer state follow their weights, as in `shardings`; step, key and ``extra`` are replicated. Loss and
    statistics are those of the whole batch. Mesh axes may be Auto or Explicit: the step runs under
    ``jax.set_mesh(mesh)``, and on Explicit axes the model must reshard where JAX requires it, as without
    adapters.

    Beware: on Auto axes, constrain activations (``jax.lax.with_sharding_constraint``), above all in scans.
    With JAX 0.10 and 0.12, XLA computes some scans incorrectly, with or without adapters, if the sharding of
    their carry is left to it and the batch is sharded over an axis that also shards weights (``"fsdp"``).

    Args:
      loss_fn: as in `make_train_step`; it sees the whole batch.
      tx: the optimizer that was passed to `TrainState.create`.
      mesh: for instance ``jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))``.
      rules: ``{pattern: jax.P(...)}``, such as ``{"bias": jax.P(), "attn/*": jax.P("fsdp", "tensor")}``, with
        patterns like the targets of `split`, and one entry per axis of the weight. The first match wins. A
        rule that is left with nothing by earlier ones is an error, except for ``"*"`` at the end.
      accumulate: how many micro-batches to split each batch into.
      weight: ``weight(batch) -> number``, as in `make_train_step`, but for micro-batches only, since the
        devices of a mesh compute one mean over the whole batch.
      batch: ``jax.P`` for all leaves of the batch, or a tree of them that is a prefix of the batch. None
        shards axis 0 over the mesh axes named ``"data"`` and ``"fsdp"``.

    Returns:
      A `MeshStep`, called as ``step(state, params, batch)``, which is compiled once and donates the state.

    Raises:
      LoraError: the arguments are in the order of version 0.1; a spec names an axis that the mesh does not
        have; or ``batch=None`` on a mesh without a data axis. When the step runs: a pattern of ``rules``
        matches nothing, or only leaves that earlier ones decide; an axis is not divisible by its mesh axes;
        the state was consumed by a step; the call is inside ``jax.jit``; or as for `make_train_step`.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2)
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> def loss_fn(params, lora, x, key):
      ...     return jnp.mean(apply(params, lora, x) ** 2)
      >>> tx = optax.adam(1e-2)
      >>> mesh = jax.make_mesh((2, 2), ("data", "tensor"))
      >>> step = lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules={"kernel": jax.P(None, "tensor")})
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> state, params = step.place(state, params)
      >>> state, metrics = step(state, params, jnp.ones((6, 8)))
      >>> state.lora["kernel"].b.sharding.spec, int(state.step)
      (P(None, 'tensor'), 1)
    """
    if not isinstance(rules, Mapping):
        raise error(
            "rules= is not a mapping.",
            got=repr(rules),
            want="{pattern: jax.P(...)}",
            do="rules={'kernel': jax.P('fsdp', 'tensor')}, or {} to replicate all weights.",
        )
    sharding.check_specs(rules, mesh, "rules")
    if batch is None:
        axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
        if not axes:
            raise error(
                "the mesh has no axis with a known name for data.",
                got=tuple(mesh.shape),
                want=f"an axis named one of {BATCH_AXES}, or batch=",
                do=f"batch=jax.P({mesh.axis_names[0]!r}), which shards axis 0 of every leaf of the batch.",
            )
        batch = PartitionSpec(axes)
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    sharding.check_specs({jax.tree_util.keystr(path) or "batch": x for path, x in leaves}, mesh, "batch")
    step = make_train_step(loss_fn, tx, accumulate=accumulate, weight=weight)
    return MeshStep(mesh, dict(rules), batch, accumulate, step)


# With eq=False, a step is compared by identity and is hashable although it contains dicts.
@dataclasses.dataclass(frozen=True, eq=False)
class MeshStep:
    """A train step on a mesh, the result of `mesh_train_step`: ``step(state, params, batch)``.

    Every call moves arrays that are not where they belong, so `place` the params once, before the loop. With
    several processes, each passes the whole state and params, but only its own part of the batch.

    Args:
      mesh: the mesh.
      rules: ``{pattern: jax.P(...)}`` for the weights.
      batch: the specs of the batch.
      accumulate: how many micro-batches.
      step: the step before compilation.
      programs: compiled programs, by the structure and shapes of the arguments.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, lora = lx.split({"kernel": jnp.ones((8, 4))}, rank=2)
      >>> apply, tx = lx.adapt(lambda params, x: x @ params["kernel"]), optax.sgd(0.1)
      >>> mesh = jax.make_mesh((4,), ("data",))
      >>> def loss_fn(params, lora, x, key):
      ...     return jnp.mean(apply(params, lora, x))
      >>> step = lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules={})
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

    def __call__(self, state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        if any(is_tracer(x) for x in jax.tree.leaves((state, params, batch))):
            raise error(
                "a mesh step was called inside jax.jit or another JAX transformation.",
                got="traced arguments",
                want="arrays, because the step is already compiled, and donates its state",
                do="call it directly: state, metrics = step(state, params, batch); "
                "step.lower(state, params, batch) returns the program.",
            )
        check_alive(state, "state")
        batch = self._put_batch(batch)
        run, (at_state, at_params, _) = self._program(state, params, batch)
        state, params = put(state, at_state), put(params, at_params)
        with jax.set_mesh(self.mesh):
            return run(state, params, batch)

    def shardings(self, state: TrainState, params: PyTree) -> tuple[PyTree, PyTree]:
        """``(state, params)`` with a ``NamedSharding`` for each array; arguments may be abstract."""
        check_arrays_only(params)
        at_params = sharding.rule_shardings(self.mesh, self.rules, params)
        return sharding.shardings(state, at_params), at_params

    def place(self, state: TrainState, params: PyTree) -> tuple[TrainState, PyTree]:
        """``(state, params)`` on the mesh. The new state may share buffers with the old."""
        at_state, at_params = self.shardings(state, params)
        return put(state, at_state), put(params, at_params)

    def lower(self, state: TrainState, params: PyTree, batch: PyTree) -> Any:
        """The lowered program, like ``jax.jit(...).lower``; arguments may be abstract."""
        with jax.set_mesh(self.mesh):
            return self._program(state, params, batch)[0].lower(state, params, batch)

    def _program(self, state, params, batch) -> tuple[Any, tuple]:
        leaves, treedef = jax.tree.flatten((state, params, batch))
        known = treedef, tuple(x.shape if is_array(x) else () for x in leaves)
        if known not in self.programs:
            at = *self.shardings(state, params), self._batch_shardings(batch)
            # The state keeps its shardings, so that the next call runs the same program.
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


def put(tree: PyTree, where: PyTree) -> PyTree:
    """``jax.device_put`` that, unlike JAX's, can also put keys on a mesh of several processes."""
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
