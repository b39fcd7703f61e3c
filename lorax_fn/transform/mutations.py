"""What a function changes in place: Variables of Flax NNX modules among its arguments.

A traced function works on copies of its arguments. What it writes into a copy's Variables (running means,
RNG counters) is a result of the trace like any other, and is written into the caller's own afterwards.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lorax_fn.core.errors import error
from lorax_fn.transform import jaxpr as jx


def variables(tree: Any) -> list[Any]:
    """The NNX Variables of a tree, in order; there can be none if NNX is not loaded."""
    # Flax is not imported for those who don't use it.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []

    def is_variable(x: object) -> bool:
        return isinstance(x, nnx.Variable)

    return [leaf for leaf in jax.tree_util.tree_leaves(tree, is_leaf=is_variable) if is_variable(leaf)]


class Watched:
    """Remembers the Variables of a tree and tells later which of them have changed."""

    def __init__(self, tree: Any):
        self.tree, self.before = tree, [(v, v.get_raw_value()) for v in variables(tree)]

    def changes(self) -> dict[int, Any]:
        """New values of the Variables that were written to, by their place among all of them.

        Raises:
          LoraError: Variables were added, removed or replaced, so the caller could not find their values.
        """
        if not self.before:
            return {}
        now = variables(self.tree)
        if [id(v) for v in now] != [id(v) for v, _ in self.before]:
            raise error(
                "the function adds, removes or replaces Variables of an nnx.Module: a traced call cannot "
                "hand them to its caller.",
                got=f"{len(now)} Variables after the call",
                want=f"the {len(self.before)} from before it",
                do="graphdef, params, rest = nnx.split(model, nnx.Param, ...), and adapt "
                "fn(params, rest, x):\n"
                "    model = nnx.merge(graphdef, params, rest, copy=True)\n"
                "    return model(x), nnx.split(model, nnx.Param, ...)[2]",
            )
        # Identity and not equality: arrays under a trace can't be compared, and a write makes a new one.
        values = ((v.get_raw_value(), old) for v, old in self.before)
        return {i: new for i, (new, old) in enumerate(values) if new is not old}


def unchanged(trace: Any, given: Sequence[Any], tree: Any) -> list[int]:
    """Places, among a trace's results, of changes that give a Variable the value which it already had.

    A layer loop of NNX writes the weights that it was given back into their Variables.
    """
    places = jax.tree_util.tree_unflatten(trace.out_tree, range(trace.out_tree.num_leaves))[1]
    if not places:
        return []
    own, handed = variables(tree), jx.handed_on(trace.jaxpr)
    return [
        place
        for i, place in places.items()
        if isinstance(place, int)
        and (source := handed[place]) is not None
        and given[source] is own[i].get_raw_value()
    ]


def write_back(changes: Mapping[int, Any], tree: Any, adapted: Sequence[Any] = ()) -> None:
    """Writes new values into the Variables of the caller's own tree.

    Args:
      changes: values by place, from `Watched`.
      tree: a tree of the same structure as the watched one.
      adapted: arrays that have an adapter: a value written over one of them would lose the adapter's part.

    Raises:
      LoraError: a value for one of ``adapted``.
    """
    changes = {i: value for i, value in changes.items() if value is not None}
    own = variables(tree) if changes else []
    for i in changes:
        # The Variable holds W. A new value for it could only be W + a b, and a b would then be added twice.
        if any(own[i].get_raw_value() is array for array in adapted):
            raise error(
                "the function writes to a Variable that has an adapter.",
                got=f"a {type(own[i]).__name__} of shape {own[i].get_raw_value().shape}",
                want="adapted weights that are only read",
                do="leave that weight out: lx.split(..., exclude=[its path]).",
            )
    for i, value in changes.items():
        own[i].set_raw_value(value)
