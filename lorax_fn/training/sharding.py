"""Shardings on a mesh: weights by rules, and adapters like the weights that they change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.core.adapters import Adapter, is_adapter
from lorax_fn.core.errors import error, nearest
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, arrays, flatten_with_paths, is_array
from lorax_fn.targets.patterns import find, label_of


def shardings(lora: PyTree, params_shardings: PyTree) -> PyTree:
    """Shards adapters like the weights that they change: A along W's inputs, and B along its outputs.

    Stack axes keep their sharding and the rank is replicated, so products with A or B need no communication
    beyond that of products with W. `DoRA`'s magnitude follows the outputs, `VeRA` and `LoHa` the axes of
    their weights, `Full` its leaf, and `Rows` all axes but that of the rows. `LoKr`, whose factors cut axes
    in two, is sharded only along stack axes.

    Args:
      lora: ``dict[str, Adapter]``, or any tree that contains one, such as a `TrainState`. Optimizer state in
        the shape of an adapter's array is sharded like the array; all other leaves are replicated. Leaves may
        be abstract.
      params_shardings: a tree like ``params`` with a ``NamedSharding`` for each leaf, or ``params``
        themselves (arrays, or ``jax.ShapeDtypeStruct`` with a sharding), all on one mesh. The sharding of a
        quantized weight is that of its codes.

    Returns:
      The same tree with a ``NamedSharding`` for each leaf, for ``jax.device_put`` and ``jax.jit``.

    Raises:
      LoraError: a sharded axis is not divisible by its mesh axes; an adapter has no weight; or a leaf of
        ``params_shardings`` has no ``NamedSharding``, or has one on another mesh.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
      >>> params, lora = lx.split({"up": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> rules = {"up": {"kernel": jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))}}
      >>> adapter = lx.shardings(lora, rules)["up/kernel"]
      >>> adapter.a.spec, adapter.b.spec
      (P('fsdp', None), P(None, 'tensor'))
    """
    given, mesh = _weight_shardings(params_shardings)
    nodes, treedef = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)
    named = [(str(getattr(path[-1], "key", "")) if path else "", node) for path, node in nodes]
    adapters: dict[str, Adapter] = {}
    for path, node in named:
        # The optimizer state in a TrainState has adapters at the same paths; those of lora come first.
        if is_adapter(node):
            adapters.setdefault(path, node)
    _check_known(adapters, given, bool(named))

    misfits: list = []
    placed = {path: _adapter_shardings(path, x, given[path], misfits) for path, x in adapters.items()}
    raise_misfits(misfits)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(path, node):
        if not is_adapter(node):
            return everywhere
        leaves, inner = jax.tree_util.tree_flatten_with_path(node)
        known = placed[path]
        return inner.unflatten(known.get((at, np.shape(x)), everywhere) for at, x in leaves)

    return treedef.unflatten([one(path, node) for path, node in named])


def _weight_shardings(tree: PyTree) -> tuple[dict[str, NamedSharding], Any]:
    """The sharding of each weight by path, and the mesh that all of them share."""
    found: dict[str, Any] = {path: _sharding_of(x) for path, x in flatten_with_paths(tree)[0]}
    strange = {path: x for path, x in found.items() if not isinstance(x, NamedSharding)}
    mesh = next((x.mesh for x in found.values() if isinstance(x, NamedSharding)), None)
    others = {path: x for path, x in found.items() if isinstance(x, NamedSharding) and x.mesh != mesh}
    if strange or others or mesh is None:
        raise error(
            "params_shardings do not place every leaf on one mesh.",
            path=[*strange, *others] or "(no leaf)",
            got=[f"a {type(x).__name__}" for x in strange.values()]
            + [f"another mesh, {x.mesh}" for x in others.values()]
            or "nothing",
            want="a NamedSharding, or an array that has one" + (f", of {mesh}" if others else ""),
            do="jax.device_put(params, jax.NamedSharding(mesh, jax.P(...))), or a tree of NamedSharding.",
        )
    return found, mesh


def _sharding_of(leaf: Any) -> Any:
    """The sharding of a leaf, or of the codes of a stored weight, which are its first array."""
    leaf = jax.tree.leaves(leaf)[0] if is_stored(leaf) else leaf
    return getattr(leaf, "sharding", leaf)


def _check_known(adapters: Mapping[str, Adapter], given: Mapping[str, Any], filled: bool) -> None:
    if filled and not adapters:
        raise error(
            "there is no adapter to shard.",
            got="a tree without any",
            want="lora, or a tree that contains it, first; params_shardings second",
            do="lx.shardings(lora, params_shardings).",
        )
    lost = [path for path in adapters if path not in given]
    if lost:
        raise error(
            "an adapter has no leaf in params_shardings.",
            path=lost,
            want=[f"one of {nearest(path, list(given))}" for path in lost],
            do="pass the shardings of the params that this lora was split from.",
        )


def _adapter_shardings(path: str, adapter: Adapter, weight: NamedSharding, misfits: list) -> dict:
    """``{(key path, shape): sharding}`` of one adapter's arrays."""
    axes = adapter.axes()
    spec = tuple(weight.spec)
    layout = getattr(adapter, "layout", None)
    last = max((i for run in axes.values() for i in run if i is not None), default=len(spec) - 1)
    known = last + 1 if layout is None else layout.ndim
    if any(entry is not None for entry in spec[known:]):
        misfits.append((path, f"{weight.spec} for {known} axes", "at most one entry per axis"))
    spec += (None,) * (known - len(spec))
    placed = {}
    for at, leaf in jax.tree_util.tree_flatten_with_path(adapter)[0]:
        name, shape = at[0].name, tuple(leaf.shape)
        run = axes.get(name, (None,) * len(shape))
        if len(run) != len(shape):
            misfits.append((path, f"{name} of shape {shape}", f"{len(run)} axes"))
            continue
        own = PartitionSpec(*(None if i is None else spec[i] for i in run))
        misfits.extend(misfits_of(path, shape, own, weight.mesh, f"{name}: "))
        placed[at, shape] = NamedSharding(weight.mesh, own)
    return placed


def misfits_of(
    path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Any, label: str = "", times: int = 1
) -> list:
    """Why ``spec`` can't be applied to an array of ``shape``: ``[(path, got, want)]``, empty if it can.

    ``times`` is how many micro-batches each shard of axis 0 is cut into.
    """
    if len(spec) > len(shape):
        return [(path, f"{label}{spec} for shape {tuple(shape)}", "at most one entry per axis")]
    wrong = []
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        names = mesh_axes(entry)
        cut = times if names and axis == 0 else 1
        count = math.prod(mesh.shape[name] for name in names) * cut
        if size % count:
            sizes = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
            sizes += f", each cut into {cut}" if cut > 1 else ""
            got = f"{label}axis {axis} of shape {tuple(shape)}, size {size}, over {sizes}"
            wrong.append((path, got, f"a multiple of {count}"))
    return wrong


REPLICATE = "give these leaves a rule of their own, before the others: {'path': jax.P()} replicates."


def raise_misfits(misfits: list, do: str = REPLICATE) -> None:
    """Raises one error for everything that `misfits_of` found, if anything."""
    if misfits:
        raise error(
            "a sharding can't be applied.",
            path=[path for path, _, _ in misfits],
            got=[got for _, got, _ in misfits],
            want=[want for _, _, want in misfits],
            do=do,
        )


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def check_specs(specs: Mapping[Any, Any], mesh: Any, argument: str) -> None:
    """Raises a `LoraError` if a spec is not a PartitionSpec of this mesh's axes."""
    wrong = {
        label: spec
        for label, spec in specs.items()
        if not isinstance(spec, PartitionSpec)
        or any(name not in mesh.shape for entry in spec for name in mesh_axes(entry))
    }
    if wrong:
        raise error(
            f"{argument}= has values that are not specs of this mesh.",
            path=[str(label) for label in wrong],
            got=[repr(spec) for spec in wrong.values()],
            want=f"jax.P(...) of the mesh axes {tuple(mesh.shape)}",
            do=f"{argument}: jax.P({', '.join(repr(name) for name in tuple(mesh.shape)[:2])}).",
        )


def rule_shardings(mesh: Any, rules: Mapping[Any, PartitionSpec], params: PyTree) -> PyTree:
    """A ``NamedSharding`` for each leaf of ``params``, by the first rule that matches it, else replicated."""
    leaves = arrays(params)
    specs: dict[str, PartitionSpec] = {}
    idle: dict[str, str] = {}  # rules whose leaves are all decided by earlier ones
    for number, (pattern, spec) in enumerate(rules.items(), 1):
        for label, hits in find([pattern], leaves, "rules"):
            left = [path for path in hits if path not in specs]
            if not left and not (pattern == "*" and number == len(rules)):
                idle[label] = f"{hits[0]}, and {len(hits) - 1} more" if len(hits) > 1 else hits[0]
            specs.update((path, spec) for path in left)
    if idle:
        raise error(
            "rules without effect: earlier rules decide all leaves that they name, and the first match wins.",
            path=[f"{label}: {named}" for label, named in idle.items()],
            got=f"rules={{{', '.join(label_of(pattern) for pattern in rules)}}}, in this order",
            do="put the narrow patterns first, '*' last.",
        )
    misfits = []
    for path, spec in specs.items():
        misfits += misfits_of(path, leaves[path].shape, spec, mesh)
        if is_stored(leaves[path]) and not misfits:
            codes = jax.tree.leaves(leaves[path])[0]
            misfits += misfits_of(path, codes.shape, spec, mesh, "codes: ")
    raise_misfits(misfits)
    named, treedef = flatten_with_paths(params)
    return treedef.unflatten(
        _placed(leaf, mesh, specs.get(path, PartitionSpec())) for path, leaf in named if is_array(leaf)
    )


def _placed(leaf: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """A leaf's sharding; for a stored weight, one per array, since its scales may be too few to divide."""
    if not is_stored(leaf):
        return NamedSharding(mesh, spec)

    def one(array):
        entries = [
            entry if size % math.prod(mesh.shape[name] for name in mesh_axes(entry)) == 0 else None
            for entry, size in zip(spec, array.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(one, leaf)
