"""The nouns that every other module shares: paths, layouts, adapters and the one error.

Shape legend, used in every docstring of the package: ``*s`` stack axes (scan layers, experts),
``n`` input (contracted) axes, ``m`` output axes, ``r`` rank, ``k`` adapters, ``B`` batch, ``T`` tokens.
"""

import dataclasses
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

PyTree = Any


class LoraError(ValueError):
    """Any mistake that a user of this library can make and mend.

    The message has one form: what happened; then ``where``, ``got``, ``want`` and ``do`` lines.

    Args:
      message: the whole text.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraError, ValueError)
      True
    """


def error(what: str, *, do: str, **facts: object) -> LoraError:
    """Builds a `LoraError` with aligned fact lines: ``error("no match.", path=..., got=..., do=...)``."""
    lines = [what]
    for name, fact in {**facts, "do": do}.items():
        text = "\n".join(str(f) for f in fact) if isinstance(fact, list) else str(fact)
        first, *rest = text.split("\n")
        lines.append(f"  {name + ':':<9}{first}")
        lines.extend(f"  {'':<9}{line}" for line in rest)
    return LoraError("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of one weight are stacked, contracted and produced.

    Args:
      stack: axes along which independent weights lie side by side, ``*s``.
      inputs: contracted axes, ``n``.
      outputs: axes of the result, ``m``.

    Example:
      >>> import lorax_fn as lx
      >>> lx.Layout(stack=(0,), inputs=(1,), outputs=(2, 3)).ndim
      4
    """

    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("stack", "inputs", "outputs"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))

    @property
    def ndim(self) -> int:
        return len(self.stack) + len(self.inputs) + len(self.outputs)

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Splits a weight's shape into its ``(stack, inputs, outputs)`` sizes."""
        return tuple(tuple(shape[i] for i in axes) for axes in (self.stack, self.inputs, self.outputs))

    def without(self, axis: int) -> "Layout":
        """The layout of one entry along stack axis ``axis``."""

        def left(axes):
            return tuple(i - (i > axis) for i in axes if i != axis)

        return Layout(left(self.stack), left(self.inputs), left(self.outputs))

    def __str__(self) -> str:
        return f"Layout(stack={self.stack}, inputs={self.inputs}, outputs={self.outputs})"


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank form ``W' = column * (W + scale * A @ B)`` that the transform contracts.

    Args:
      a: ``[*s, *n, r]``; without ``*s`` where all stack entries share it.
      b: ``[*s, r, *m]``.
      layout: which axes of the weight are stack, inputs and outputs.
      scale: a number, an array ``[*s]``, or ``[*s, r]``.
      column: ``[*s, *m]`` factor of the whole weight (DoRA), or None for 1.
      key: PRNG keys ``[*s]`` that drop inputs of A, or None.
      rate: the share of inputs dropped.
      tap: whether the factors only read what the weight contracts; see `transform/taps.py`.
    """

    a: jax.Array
    b: jax.Array
    layout: Layout
    scale: Any
    column: jax.Array | None = None
    key: jax.Array | None = None
    rate: float = 0.0
    tap: bool = False


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What changes or replaces one weight: a frozen dataclass registered as a pytree.

    A method is a subclass with `weight` (the changed weight, always) and, where a fast path exists,
    `factors` (its low-rank form, which the transform contracts without building the weight).

    ``frozen`` names the array fields that never train: they get a zero gradient and ``mask`` False.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoRA, lx.Adapter), lx.LoRA.frozen
      (True, ())
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    def weight(self, w: jax.Array) -> jax.Array:
        """The changed weight, accumulated in float32 and returned in ``w``'s dtype, ``w``'s shape."""
        raise TypeError(f"{type(self).__name__} must define weight(w)")

    def factors(self, w: jax.Array) -> Factors | None:
        """The low-rank form of the change, or None where `weight` is the form to compute with."""
        del w
        return None

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """Which axis of the weight each axis of each array field runs along, None for a rank.

        Shardings of the weight are handed down along it; a field left out is replicated.
        """
        return {}

    def problem(self, w: Any) -> str | None:
        """Why this adapter does not fit a weight of ``w``'s shape, or None where it fits."""
        del w
        return None


class Stored:
    """A weight kept in another form than its own array, such as 4-bit codes.

    A subclass is a registered pytree of arrays, each of which has the weight's axes in the weight's order. It
    has the ``shape`` and ``dtype`` of the weight, and names its ``format``. To everything in this library it
    is one leaf.
    """

    shape: tuple[int, ...]
    dtype: Any
    format: str
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dense(self) -> jax.Array:
        """The weight itself: an array of ``shape`` and ``dtype``."""
        raise TypeError(f"{type(self).__name__} must define dense()")

    def store(self, w: jax.Array) -> "Stored":
        """Another weight of this shape, stored as this one is."""
        raise TypeError(f"{type(self).__name__} must define store(w)")

    def entry(self, axis: int) -> "Stored | None":
        """This object for arrays that lost ``axis``, as those of a loop over it; None for a packed axis."""
        raise TypeError(f"{type(self).__name__} must define entry(axis)")

    def stacked(self, axis: int, size: int) -> "Stored":
        """This object for arrays that got a stack axis ``axis`` of ``size``: undoes `entry`."""
        raise TypeError(f"{type(self).__name__} must define stacked(axis, size)")


def is_stored(x: object) -> bool:
    return isinstance(x, Stored)


def dense(x: Any) -> Any:
    """``x`` itself, or the weight that it stores."""
    return x.dense() if isinstance(x, Stored) else x


def by_entry(f: Callable, w: Any, layout: Layout, *factors: Any) -> Any:
    """``f(w, layout, *factors)`` of a dense ``w``; where it is stored, one stack entry after the other.

    So no more than one entry is dense at a time. ``factors`` and the result have the stack ``*s`` in front.
    """
    axis = layout.stack[0] if layout.stack else None
    if not isinstance(w, Stored) or axis is None or w.entry(axis) is None:
        return f(dense(w), layout, *factors)

    def one(parts):
        w, *factors = parts
        return by_entry(f, w.entry(axis), layout.without(axis), *factors)

    first = jax.tree.map(lambda x: jax.numpy.moveaxis(x, axis, 0), w)
    return jax.lax.map(one, (first, *factors))


def is_adapter(x: object) -> bool:
    return isinstance(x, Adapter)


def is_dropped(x: object) -> bool:
    """Whether an adapter came out of `lorax_fn.dropout`: it then carries the keys that drop inputs of A."""
    return getattr(x, "key", None) is not None


def is_array(x: object) -> bool:
    """Arrays of any kind, abstract and stored ones included; Python scalars are not arrays here."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Stored)


def is_tracer(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)  # noqa: TID251  # pyright: ignore[reportAttributeAccessIssue]


def is_float(x: Any) -> bool:
    return is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)


def _is_box(x: object) -> bool:
    """A Flax Variable or metadata box: one array with facts about it.

    Asked of flax only where flax is loaded: a tree cannot hold its boxes otherwise.
    """
    if "flax" not in sys.modules:
        return False
    from flax.core import meta

    nnx = sys.modules.get("flax.nnx")
    return isinstance(x, meta.AxisMetadata) or (nnx is not None and isinstance(x, nnx.Variable))


def flatten_with_paths(tree: PyTree, is_leaf=None) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens ``tree`` to ``[(path, leaf)]`` and its treedef.

    The trailing key of a Flax Variable or box is dropped, so that boxed, unboxed, State and pure dict
    give one path. A `Stored` weight is one leaf.

    Raises:
      LoraError: two leaves have one path.
    """

    def stop(x):
        return is_stored(x) or (is_leaf is not None and is_leaf(x))

    named = []
    for key_path, node in jax.tree_util.tree_flatten_with_path(tree, lambda x: _is_box(x) or stop(x))[0]:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        inner = jax.tree_util.tree_leaves(node, is_leaf=stop) if _is_box(node) else [node]
        named.extend((path, leaf) for leaf in inner)
    seen: dict[str, int] = {}
    for path, _ in named:
        seen[path] = seen.get(path, 0) + 1
    twice = [path for path, count in seen.items() if count > 1]
    if twice:
        raise error(
            "two leaves have one path.",
            path=twice,
            want="one path a leaf: adapters are keyed by path",
            do="rename a key; keys that hold '/' can collide with nested ones.",
        )
    return named, jax.tree_util.tree_structure(tree, is_leaf=stop)


def named_leaves(tree: PyTree, alone: str = "") -> list[tuple[str, Any]]:
    """``[(path, leaf)]`` of any tree, such as a batch; a tree that is one leaf goes by ``alone``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/") or alone, leaf) for path, leaf in leaves]


def replace_leaves(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
    """``tree`` with the leaves of some paths replaced; the very same tree where none is."""
    if not new:
        return tree
    named, treedef = flatten_with_paths(tree)
    return jax.tree.unflatten(treedef, [new.get(path, leaf) for path, leaf in named])


def is_abstract(x: PyTree) -> bool:
    """Whether any array of a leaf or tree is a shape without numbers."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def is_concrete(x: PyTree) -> bool:
    """Whether a leaf or tree has its numbers: nothing in it is abstract or traced."""
    return not is_abstract(x) and not any(map(is_tracer, jax.tree.leaves(x)))


def run(f: Callable, *args: Any) -> Any:
    """Calls ``f``, or asks for its shapes where an argument is abstract."""
    return jax.eval_shape(f, *args) if is_abstract(args) else f(*args)


def checked_key(key: Any) -> jax.Array:
    """``key`` itself, if it is one PRNG key of the new or the old style."""
    dtype = key.dtype if is_array(key) else None
    new = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    if new or (dtype == np.uint32 and key.ndim == 1):
        return key
    raise error("key= is not one PRNG key.", got=repr(key), want="a single key", do="key=jax.random.key(0).")


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """A key of one leaf: crc32 of its path, never ``hash()``, so it is the same in every process."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def nearest(path: str, others: Sequence[str], n: int = 4) -> list[str]:
    """The paths most like ``path``, for error messages."""
    import difflib

    return difflib.get_close_matches(path, list(others), n=n, cutoff=0.0)


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """What a traced function does with one parameter.

    Args:
      path: the parameter's path.
      shape: its shape.
      dtype: its dtype.
      ops: names of the primitives that consume it (after casts, reshapes and slices), in order, each once.
      layout: stack, inputs and outputs axes, or None where no low-rank layout serves.
      times: how often a pass uses it; a use inside a scan counts once a step.
      flops: floating point operations of those uses.
      served: whether every use has a low-rank rule.
      source: for each use without a rule, its primitive and source line.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> use = lx.usage(lambda params: jnp.sin(params["w"]), {"w": jnp.ones((3, 2))})["w"]
      >>> use.ops, use.layout, use.served
      (('sin',), None, False)
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    ops: tuple[str, ...]
    layout: Layout | None
    times: int
    flops: int
    served: bool
    source: tuple[str, ...]
