"""The train step as one program over a mesh of devices."""

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
from lorax_fn.core.trees import PyTree, is_array, is_tracer, named_leaves
from lorax_fn.training import sharding
from lorax_fn.training.state import TrainState, check_alive
from lorax_fn.training.step import check_arrays_only, make_train_step

BATCH_AXES = ("data", "fsdp")
Arguments = ParamSpec("Arguments")
Step = TypeVar("Step")


def _loss_first(make: Callable[Arguments, Step]) -> Callable[Arguments, Step]:
    """Refuses the order of arguments of 0.1, in which the mesh came first, with the call to write instead."""

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
    """Builds the step of `make_train_step` on a mesh: weights by rules, adapters after them, batch over data.

    Weights are laid out by the first rule that matches them and replicated where none does; adapters and what
    the optimizer keeps of them follow by `shardings`; step, key and ``extra`` are replicated. Loss and
    statistics are those of the whole batch. Mesh axes may be Auto or Explicit: the step runs under
    ``jax.set_mesh(mesh)``, and a model on Explicit axes reshards where JAX asks it to, as without adapters.

    Beware: on Auto axes, constrain activations (``jax.lax.with_sharding_constraint``), in scans above all.
    XLA, as of JAX 0.10 and 0.12, computes some scans wrongly, with or without adapters, where their carry is
    left to it and the batch is sharded over an axis (``"fsdp"``) that shards weights, too.

    Args:
      loss_fn: as in `make_train_step`; it sees the whole batch.
      tx: the optimizer that `TrainState.create` got.
      mesh: for instance ``jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))``.
      rules: ``{pattern: jax.P(...)}``, patterns as the targets of `split`, an entry for each axis of the
        weight. ``{"bias": jax.P(), "attn/*": jax.P("fsdp", "tensor")}``: the first match wins. A rule that
        earlier ones leave nothing to is refused, but for ``"*"`` at the end.
      accumulate: how many micro-batches each batch is split into.
      weight: ``weight(batch) -> number``, as in `make_train_step`. The devices of a mesh compute one mean
        over the whole batch anyway; this is for micro-batches.
      batch: ``jax.P`` of every leaf of the batch, or a tree of them with the structure of the batch or of its
        upper part. None puts axis 0 over the mesh's axes named ``"data"`` and ``"fsdp"``.

    Returns:
      A `MeshStep`, called as ``step(state, params, batch)`` and compiled once; it donates the state.

    Raises:
      LoraError: the mesh comes first, as it did in 0.1; a spec names no axis of the mesh; ``batch=None`` on a
        mesh without a data axis. When the step runs: a pattern of ``rules`` matches nothing, or only what an
        earlier one took; an axis does not divide by its mesh axes (all of them are listed); the state was
        consumed by a step; the call is inside ``jax.jit``; and what `make_train_step` refuses.

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
                "no axis of the mesh is known to be one of data.",
                got=tuple(mesh.shape),
                want=f"an axis named in {BATCH_AXES}, or batch=",
                do=f"batch=jax.P({mesh.axis_names[0]!r}), which shards axis 0 of every leaf of the batch.",
            )
        batch = PartitionSpec(axes)
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    sharding.check_specs({jax.tree_util.keystr(path) or "batch": x for path, x in leaves}, mesh, "batch")
    step = make_train_step(loss_fn, tx, accumulate=accumulate, weight=weight)
    return MeshStep(mesh, dict(rules), batch, accumulate, step)


# eq=False: a step is itself alone, so that it has a hash although it holds dicts
@dataclasses.dataclass(frozen=True, eq=False)
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

    def __call__(self, state: TrainState, params: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        if any(is_tracer(x) for x in jax.tree.leaves((state, params, batch))):
            raise error(
                "a mesh step is inside jax.jit, or another transformation of JAX.",
                got="traced arguments",
                want="arrays: the step is compiled already, and donates its state",
                do="call it as it is: state, metrics = step(state, params, batch); "
                "step.lower(state, params, batch) gives the program.",
            )
        check_alive(state, "state")
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
