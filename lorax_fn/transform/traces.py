"""Traced programs of one function, kept by the structure and types of its arguments."""

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_array
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.factored import is_factored
from lorax_fn.transform.mutations import Watched
from lorax_fn.transform.stored import abstract


def check_argnum(argnum: Any, most: float = math.inf) -> None:
    """Raises a `LoraError` if ``argnum`` is not a position of params, counted from the front."""
    if isinstance(argnum, bool) or not isinstance(argnum, int) or not 0 <= argnum <= most:
        raise error(
            "argnum is not a position of fn's arguments, counted from 0.",
            got=repr(argnum),
            want="0 for fn(params, ...), 1 for fn(x, params), and so on",
            do="count from the front: lora follows params, so positions counted from the end would shift."
            if most == math.inf
            else f"pass the position of params in fn, at most {most} after the arguments given.",
        )


class Leaves:
    """The flattened parameters of a call; not a pytree, so that factored weights pass as they are."""

    def __init__(self, leaves: list, treedef: Any):
        self.leaves, self.treedef = leaves, treedef


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced call: run ``jaxpr`` on ``values``; ``slots`` says which of them are parameters."""

    jaxpr: Any
    consts: Sequence[Any]
    values: list[Any]
    slots: list[int | None]
    out_tree: Any


class Traces:
    """The jaxprs of one function, one for each set of static values and argument types."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.lock = threading.Lock()
        self.jitted: dict[Hashable, Callable] = {}
        self.by_value: set[Hashable] = set()  # structures of calls whose floats the function needs as numbers

    def of(self, args: tuple, kwargs: dict) -> Trace:
        """Traces a call in which the parameters are given as `Leaves`.

        The results are ``(fn(...), changes)``, see `lorax_fn.transform.mutations`.
        """
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Leaves))
        where = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Leaves))
        params = leaves[where]
        slots = [None] * where + list(range(len(params.leaves))) + [None] * (len(leaves) - where - 1)
        # The leaves of the parameters stand in the middle of those of the arguments; `slots` says which value
        # is which parameter.
        leaves[where : where + 1] = params.leaves
        # Floats among the parameters are facts about the model, such as the rate of an Equinox dropout layer.
        floats = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, float | complex) and slots[i] is None
        ]
        arrays = [is_array(leaf) or is_factored(leaf) for leaf in leaves]
        shape = (treedef, params.treedef, where, len(params.leaves))
        call = (shape, tuple(arrays), tuple(floats))
        if floats and call not in self.by_value:
            try:
                return self._traced(shape, leaves, slots, [d or i in floats for i, d in enumerate(arrays)])
            except jax.errors.JAXTypeError:  # a number decides what is traced
                trace = self._traced(shape, leaves, slots, arrays)  # raises again if it was not a float
                self.by_value.add(call)
                return trace
        return self._traced(shape, leaves, slots, arrays)

    def _traced(self, shape: tuple, leaves: list, slots: list, dynamic: list[bool]) -> Trace:
        static = [None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        # jit keeps its own traces by type; here one jitted function is kept for each set of static values.
        jitted = self._jitted((*shape, tuple(dynamic)), static)
        values: list[Any] = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
        values = [jnp.asarray(v) if isinstance(v, float | complex) else v for v in values]
        types = [abstract(v.base if is_factored(v) else v) for v in values]
        traced = jitted.trace(*types)
        jaxpr, consts = jx.opened(traced.jaxpr)
        if len(jaxpr.invars) != len(values):  # fn closes over tracers: only make_jaxpr hands them out
            jaxpr, consts = jx.opened(jax.make_jaxpr(jitted.__wrapped__)(*types))
        slots = [slot for slot, d in zip(slots, dynamic, strict=True) if d]
        return Trace(jaxpr, consts, values, slots, traced.out_tree)

    def _jitted(self, structure: tuple, static: list) -> Callable:
        # Types distinguish 1, 1.0 and True. Text distinguishes 0.0 and -0.0, and makes nan equal to itself.
        key = (structure, tuple((type(x), repr(x) if isinstance(x, float | complex) else x) for x in static))
        try:
            with self.lock:
                known = self.jitted.get(key)
        except TypeError:  # an unhashable static value can't be looked up, so it is traced anew
            return self._flat(structure, static)
        if known is None:
            with self.lock:
                known = self.jitted.setdefault(key, self._flat(structure, static))
                if len(self.jitted) > 256:
                    del self.jitted[next(iter(self.jitted))]
        return known

    def _flat(self, structure: tuple, static: list) -> Callable:
        treedef, params_treedef, where, count, dynamic = structure

        def flat(*values):
            rest = iter(values)
            # Traced values and static ones go back to their places, in the order in which they were
            # flattened.
            leaves = [next(rest) if d else leaf for leaf, d in zip(static, dynamic, strict=True)]
            params = jax.tree_util.tree_unflatten(params_treedef, leaves[where : where + count])
            leaves[where : where + count] = [params]
            args, kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
            watched = Watched((args, kwargs))
            results = self.fn(*args, **kwargs)
            return results, watched.changes()

        flat.__name__ = flat.__qualname__ = getattr(self.fn, "__name__", "fn")
        return jax.jit(flat)
