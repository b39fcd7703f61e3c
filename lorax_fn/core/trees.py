"""Trees of parameters: their leaves by path, and what kind of leaf each one is.

Shape legend, used in every docstring of the package: ``*s`` stack axes (scan layers, experts),
``n`` input (contracted) axes, ``m`` output axes, ``r`` rank, ``k`` adapters, ``B`` batch, ``T`` tokens.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.stored import Stored, is_stored

PyTree = Any


def is_array(x: object) -> bool:
    """Whether ``x`` is an array, including abstract and stored ones. Python scalars do not count."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Stored)


def is_tracer(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)  # noqa: TID251  # pyright: ignore[reportAttributeAccessIssue]


def is_float(x: Any) -> bool:
    return is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)


def _is_box(x: object) -> bool:
    """Whether ``x`` is a Flax Variable or metadata box, which wraps one array.

    Flax is consulted only if it is imported already; otherwise no tree can contain its boxes.
    """
    if "flax" not in sys.modules:
        return False
    from flax.core import meta

    nnx = sys.modules.get("flax.nnx")
    return isinstance(x, meta.AxisMetadata) or (nnx is not None and isinstance(x, nnx.Variable))


def flatten_with_paths(tree: PyTree, is_leaf=None) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens ``tree`` to ``[(path, leaf)]`` and its treedef.

    The trailing key of a Flax Variable or box is dropped, so that a leaf has the same path in a module, a
    State and a plain dict, boxed or not. A `Stored` weight is one leaf.

    Raises:
      LoraError: two leaves have the same path.
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
            "two leaves have the same path.",
            path=twice,
            want="a different path for each leaf, since adapters are keyed by path",
            do="rename a key; keys that contain '/' can collide with nested ones.",
        )
    return named, jax.tree_util.tree_structure(tree, is_leaf=stop)


def named_leaves(tree: PyTree, alone: str = "") -> list[tuple[str, Any]]:
    """``[(path, leaf)]`` of any tree, such as a batch; a single leaf has the path ``alone``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/") or alone, leaf) for path, leaf in leaves]


def replace_leaves(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
    """``tree`` with the leaves at some paths replaced, or ``tree`` itself if there are none."""
    if not new:
        return tree
    named, treedef = flatten_with_paths(tree)
    return jax.tree.unflatten(treedef, [new.get(path, leaf) for path, leaf in named])


def is_abstract(x: PyTree) -> bool:
    """Whether any array of a leaf or tree is abstract: a shape and dtype without values."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def is_concrete(x: PyTree) -> bool:
    """Whether the values of a leaf or tree are known: nothing in it is abstract or traced."""
    return not is_abstract(x) and not any(map(is_tracer, jax.tree.leaves(x)))


def run(f: Callable, *args: Any) -> Any:
    """Calls ``f``, or evaluates its shapes if an argument is abstract."""
    return jax.eval_shape(f, *args) if is_abstract(args) else f(*args)


def arrays(params: PyTree) -> dict[str, Any]:
    """The array leaves of a tree by path."""
    return {path: leaf for path, leaf in flatten_with_paths(params)[0] if is_array(leaf)}
