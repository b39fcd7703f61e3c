"""Traced programs of one function, kept by the structure and types of its arguments."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lorax_fn.core.trees import is_array
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.factored import is_factored
from lorax_fn.transform.stored import abstract


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
        self.jitted: dict[Hashable, Callable] = {}

    def of(self, args: tuple, kwargs: dict) -> Trace:
        """Traces a call in which the parameters are given as `Leaves`."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Leaves))
        where = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Leaves))
        params = leaves[where]
        slots = [None] * where + list(range(len(params.leaves))) + [None] * (len(leaves) - where - 1)
        leaves[where : where + 1] = params.leaves
        dynamic = [is_array(leaf) or is_factored(leaf) for leaf in leaves]
        static = [None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        structure = (treedef, params.treedef, where, len(params.leaves), tuple(dynamic))
        jitted = self._jitted(structure, static)
        values = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
        types = [abstract(v.base if is_factored(v) else v) for v in values]
        traced = jitted.trace(*types)
        jaxpr, consts = jx.opened(traced.jaxpr)
        if len(jaxpr.invars) != len(values):  # fn closes over tracers: only make_jaxpr hands them out
            jaxpr, consts = jx.opened(jax.make_jaxpr(jitted.__wrapped__)(*types))
        slots = [slot for slot, d in zip(slots, dynamic, strict=True) if d]
        return Trace(jaxpr, consts, values, slots, traced.out_tree)

    def _jitted(self, structure: tuple, static: list) -> Callable:
        key = (structure, tuple((type(leaf), leaf) for leaf in static))
        try:
            known = self.jitted.get(key)
        except TypeError:  # an unhashable static value: trace it anew, as there is nothing to find it by
            return self._flat(structure, static)
        if known is None:
            known = self.jitted[key] = self._flat(structure, static)
            if len(self.jitted) > 256:
                del self.jitted[next(iter(self.jitted))]
        return known

    def _flat(self, structure: tuple, static: list) -> Callable:
        treedef, params_treedef, where, count, dynamic = structure

        def flat(*values):
            rest = iter(values)
            leaves = [next(rest) if d else leaf for leaf, d in zip(static, dynamic, strict=True)]
            params = jax.tree_util.tree_unflatten(params_treedef, leaves[where : where + count])
            leaves[where : where + count] = [params]
            args, kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
            return self.fn(*args, **kwargs)

        flat.__name__ = flat.__qualname__ = getattr(self.fn, "__name__", "fn")
        return jax.jit(flat)
