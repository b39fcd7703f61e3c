"""The compiled programs of a sweep (step and evaluation), with or without a mesh, and their memory."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree
from lorax_fn.sweeps.groups import hashable
from lorax_fn.sweeps.lanes import AXIS, Chunk, Widths, make_step, own_lora, own_widths, start, whole
from lorax_fn.training.mesh import put
from lorax_fn.training.step import make_train_step
from lorax_fn.transform.walk import LoraFallbackWarning

SHARE = 0.8  # the fraction of the free memory that a program may take
MANY = 50  # the fewest steps for which leaving padding out of products is worth the longer compilation
UNTRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Programs:
    """The step and the evaluation, compiled once for all chunks of the same form."""

    def __init__(
        self,
        loss_fn: Callable,
        tx: Callable,
        eval_fn: Callable | None,
        extra: PyTree,
        seeded: bool,
        mesh: Any,
    ):
        self.loss_fn, self.tx, self.eval_fn, self.extra = loss_fn, tx, eval_fn, extra
        self.seeded, self.mesh = seeded, mesh
        self.steps: dict[Any, Any] = {}
        self.evals: dict[Any, Any] = {}
        if mesh is not None and AXIS not in mesh.axis_names:
            raise error(
                "the mesh has no axis for the lanes.",
                got=f"axes {tuple(mesh.axis_names)}",
                want=f"an axis {AXIS!r}",
                do=f'jax.make_mesh((8,), ("{AXIS}",)).',
            )

    @property
    def multiple(self) -> int:
        """The number of lanes of a program is a multiple of this."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    def place(self, tree: PyTree, lanes: bool) -> PyTree:
        """Puts a tree on the mesh: with axis 0 spread over the lanes' axis, or else copied to each device."""
        if self.mesh is None:
            return tree
        where = NamedSharding(self.mesh, PartitionSpec(AXIS) if lanes else PartitionSpec())

        def placed(x):
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            mine = getattr(getattr(x, "sharding", None), "mesh", None)
            return x if not lanes and mine == self.mesh else put(x, where)

        return jax.tree.map(placed, tree)

    def step(self, chunk: Chunk, states: PyTree, params: PyTree, batch: PyTree, which: Any) -> Any:
        """The compiled step for chunks of this form."""
        facts = [(hashable(fixed), size) for fixed, size in chunk.parts]
        widths = own_widths(chunk) if chunk.own else {}
        given = jax.tree.leaves((states, batch, params))
        shapes = tuple((np.shape(x), str(x.dtype), getattr(x, "weak_type", False)) for x in given)
        places = tuple(getattr(x, "sharding", None) for x in jax.tree.leaves(params))
        form = jax.tree.structure((states, batch, params))
        told = (hashable(facts), hashable(widths), form, shapes, places)
        if told not in self.steps:
            args = (states, params, batch, chunk.values(), chunk.rates(), which)
            args = tuple(self.place(x, i in (0, 3, 4, 5)) for i, x in enumerate(args))
            self.steps[told] = self._lowered(chunk, args, widths).compile()
        return self.steps[told]

    def _lowered(self, chunk: Chunk, args: tuple, widths: Widths) -> Any:
        if self.mesh is not None:
            lanes, one = PartitionSpec(AXIS), PartitionSpec()
            step = jax.shard_map(
                self._local(chunk),
                mesh=self.mesh,
                in_specs=(lanes, one, one, lanes, lanes, lanes),
                out_specs=(lanes, lanes),
                axis_names={AXIS},
                check_vma=False,  # lanes are independent: no value is summed over them
            )
        else:
            step = make_step(self.loss_fn, self.tx, chunk.parts, seeded=self.seeded, widths=widths)
        # Results are placed as the next step expects them, also where the base is sharded over another axis.
        lanes_first = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(AXIS))
        try:
            return jax.jit(step, donate_argnums=0, out_shardings=lanes_first).lower(*args)
        except Exception as problem:
            if widths:  # loss_fn may take a gradient, for example, which products of lanes do not support
                padded = self._lowered(chunk, args, {})
                _warn_of_padding(widths, problem)
                return padded
            self._explain(chunk, args[1], args[2])
            raise

    def _local(self, chunk: Chunk) -> Callable:
        """The step of the lanes on one device."""
        if len(chunk.parts) > 1:
            raise error(
                "lanes with different optimizers cannot share a mesh.",
                got=[str(fixed) for fixed, _ in chunk.parts],
                want="one optimizer whose entries are numbers that can be traced",
                do="run one sweep for each of these, or leave mesh= out.",
            )
        ((fixed, size),) = chunk.parts
        return make_step(self.loss_fn, self.tx, [(fixed, size // self.multiple)], seeded=self.seeded)

    def _explain(self, chunk: Chunk, params: PyTree, batch: PyTree) -> None:
        """Raises the error that `make_train_step` raises for one lane, if any."""
        member = chunk.slots[0]
        state = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], start(chunk, self.tx, self.extra)[0]))
        one = jax.tree.map(lambda x: x[0], batch) if self.seeded else batch
        jax.eval_shape(make_train_step(self.loss_fn, self.tx(member.lane)), state, params, one)

    def scores(self, chunk: Chunk, states: Sequence[Any], params: PyTree) -> list[dict[str, float]]:
        """The scores of each lane; empty if there is no ``eval_fn``."""
        if self.eval_fn is None:
            return [{} for _ in chunk.lanes]
        state = whole(states)
        told = (jax.tree.structure((state, params)), tuple(np.shape(x) for x in jax.tree.leaves(state)))
        if told not in self.evals:
            self.evals[told] = self._evaluation(state, params)
        run = self.evals[told]
        if run is None:
            made = []
            for i, member in enumerate(chunk.slots[: chunk.real]):
                own = jax.tree.map(lambda x, i=i: x[i], (state.step, state.key, state.extra))
                lora = own_lora(member, state.lora, i)
                one = type(state)(lora=lora, opt_state=(), step=own[0], key=own[1], extra=own[2])
                made.append(_named(self.eval_fn(one, params)))
            return made
        scores = {name: host(x) for name, x in run(state, params).items()}
        return [{name: float(x[i]) for name, x in scores.items()} for i in range(chunk.real)]

    def _evaluation(self, state: Any, params: PyTree) -> Any:
        """The compiled evaluation of all lanes; None if ``eval_fn`` can't be traced.

        All lanes are evaluated at once if that program fits into memory, otherwise one after the other.
        """
        eval_fn: Any = self.eval_fn

        def one(state, params):
            return _named(eval_fn(state, params))

        def in_turn(state, params):
            return jax.lax.map(lambda state: one(state, params), state)

        together = jax.vmap(one, (0, None))
        try:
            jax.eval_shape(together, state, params)
        except UNTRACED:
            return None
        compiled = self._compiled(together, state, params)
        fits = memory_of(compiled) <= free_memory()
        return compiled if fits else self._compiled(in_turn, state, params)

    def _compiled(self, evaluate: Callable, state: Any, params: PyTree) -> Any:
        if self.mesh is not None:
            evaluate = jax.shard_map(
                evaluate,
                mesh=self.mesh,
                in_specs=(PartitionSpec(AXIS), PartitionSpec()),
                out_specs=PartitionSpec(AXIS),
                axis_names={AXIS},
                check_vma=False,  # lanes are independent: no value is summed over them
            )
        return jax.jit(evaluate).lower(state, params).compile()


def _warn_of_padding(widths: Widths, problem: Exception) -> None:
    widest = {path: max(rank for _, rank in lanes.runs) for path, lanes in widths.items()}
    text = error(
        "products of this sweep are as wide as the widest rank: results are equal, steps take longer.",
        got=f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}",
        want=f"products at each lane's own rank, instead of {max(widest.values())} for all",
        do="sweep over one rank at a time if steps are too slow; a gradient inside of loss_fn is what "
        "products at several ranks cannot be part of.",
    )
    warnings.warn(str(text), LoraFallbackWarning, stacklevel=2)


def _named(scores: Any) -> dict[str, Any]:
    """Scores by name; a single score without a name is the loss."""
    named = scores if isinstance(scores, dict) else {"loss": scores}
    strange = [f"{name}: shape {np.shape(x)}" for name, x in named.items() if np.shape(x) != ()]
    if strange or not named:
        raise error(
            "eval_fn returned something else.",
            got=strange or "an empty dict",
            want="a scalar, or a dict of scalars",
            do="return jnp.mean(...) of it.",
        )
    traced = any(isinstance(x, jax.Array) for x in named.values())
    return {str(name): x if traced else float(x) for name, x in named.items()}


def host(x: Any) -> Any:
    """The whole array in this process, even if other processes hold parts of it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(host(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def cuts_padding(steps: int, mesh: Any, halving: Sequence[int]) -> bool:
    """Whether products leave the padding out. A mesh or halving rules it out: any slot may hold any rank."""
    measured = jax.default_backend() in ("cpu", "tpu")
    return measured and steps >= MANY and mesh is None and not halving


def memory_of(compiled: Any) -> int:
    """Bytes that a program holds while it runs: arguments, results and temporaries."""
    told = compiled.memory_analysis()
    return (
        told.argument_size_in_bytes
        + told.output_size_in_bytes
        - told.alias_size_in_bytes
        + told.temp_size_in_bytes
    )


def free_memory() -> int:
    """Bytes that a program may take on the first device of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    return int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
