"""Sharded operands: when their axes must not be merged, and how the result of their product is sharded."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax


def explicit_mesh(*arrays: Any) -> bool:
    """Whether any operand's type carries explicit mesh axes; if so, a reshape must not merge them blindly."""
    return any(not mesh.are_all_axes_auto for mesh in _meshes(arrays))


def may_be_sharded(*arrays: Any) -> bool:
    """Whether merging two axes of an operand might move it between devices.

    Along which automatic axes it is sharded is not known while it is traced, but its type has their mesh.
    """
    context = jax.sharding.get_abstract_mesh()
    around = [] if context is None or context.empty else [context]
    return any(mesh.size > 1 or not mesh.are_all_axes_auto for mesh in (*around, *_meshes(arrays)))


def _meshes(arrays: Sequence[Any]) -> Iterator[Any]:
    for array in arrays:
        # Not every type has a sharding, and outside of a mesh the sharding's own mesh is empty.
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty:
            yield mesh


def axis_specs(x: Any, names: Sequence) -> dict:
    # A spec may have fewer entries than the array has axes: the remaining axes are not sharded.
    spec = tuple(jax.typeof(x).sharding.spec)
    return dict(zip(names, spec + (None,) * (len(names) - len(spec)), strict=True))


def result_sharding(spec: list, *arrays: Any):
    mesh = next(jax.typeof(a).sharding.mesh for a in arrays if explicit_mesh(a))
    used: set = set()
    kept = []
    for entry in spec:  # one mesh axis may shard one axis of the result only
        axes = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        kept.append(None if axes & used else entry)
        used |= axes
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))


def sharding_without(x: Any, axis: int) -> dict[str, Any]:
    """``out_sharding=`` for a product sharded like ``x`` except along ``axis``; {} without explicit axes."""
    if not explicit_mesh(x):
        return {}
    spec = [entry for i, entry in axis_specs(x, range(x.ndim)).items() if i != axis]
    return {"out_sharding": result_sharding([*spec[:axis], None, *spec[axis:]], x)}
