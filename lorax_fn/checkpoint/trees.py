"""Trees of arrays on disk: the facts of the leaves, the arrays, and the structure if JSON can express it."""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.checkpoint.storage import array_facts, raw, to_device
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_array, named_leaves


def leaves_of(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf as ``(path, array)``; Python numbers become arrays, anything else raises a `LoraError`."""
    named = named_leaves(tree)
    wrong = [path for path, x in named if not is_array(x) and not isinstance(x, bool | int | float | complex)]
    if wrong:
        raise error(
            "these leaves can't be stored.",
            path=wrong,
            got="values that are not arrays or numbers",
            do="leave them out, for example by nnx.split(module) or eqx.partition(model, eqx.is_array).",
        )
    return [(path, x if is_array(x) else jnp.asarray(x)) for path, x in named]


def leaf_facts(named: list[tuple[str, Any]]) -> list[dict]:
    """The path, shape and dtype of each leaf."""
    return [{"path": path, **array_facts(x)} for path, x in named]


def weak_paths(named: list[tuple[str, Any]]) -> list[str]:
    """The paths of weakly typed leaves: a strong type would recompile the step and might widen results."""
    return [path for path, x in named if getattr(x, "weak_type", False)]


def restored(
    facts: list[dict], weak: list[str], arrays: Mapping[str, np.ndarray], prefix: str
) -> list[jax.Array]:
    """The leaves of ``facts`` on the default device, from arrays named ``<prefix>.<number>``."""
    found = [to_device(arrays[f"{prefix}.{i}"], fact) for i, fact in enumerate(facts)]
    return [_weak(x) if fact["path"] in weak else x for x, fact in zip(found, facts, strict=True)]


def by_name(named: list[tuple[str, Any]], prefix: str) -> dict[str, Any]:
    """The arrays by the names under which they are stored, keys as raw words."""
    return {f"{prefix}.{i}": raw(x) for i, (_, x) in enumerate(named)}


def _weak(x: jax.Array) -> jax.Array:
    return jnp.full(x.shape, np.zeros((), x.dtype).item()).at[...].set(x)


def skeleton(tree: PyTree) -> Any:
    """A tree of dicts, lists, tuples and None as JSON, ``"*"`` for a leaf; None if it has other nodes.

    ``{"dict": [[key, part], ...]}``, ``{"list": [part, ...]}``, ``{"tuple": [part, ...]}``, ``"none"``.
    """
    try:
        return _skeleton(tree)
    except TypeError:
        return None


def _skeleton(tree: PyTree) -> Any:
    if type(tree) is dict and all(type(key) in (str, int) for key in tree):
        return {"dict": [[key, _skeleton(tree[key])] for key in sorted(tree)]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_skeleton(part) for part in tree]}
    if tree is None:
        return "none"
    if jax.tree_util.all_leaves([tree]):
        return "*"
    raise TypeError(type(tree).__name__)


def grown(node: Any, leaves: Iterator[Any]) -> PyTree:
    """The tree of a skeleton, with ``leaves`` in order."""
    if isinstance(node, str):
        return next(leaves) if node == "*" else None
    kind, parts = next(iter(node.items()))
    if kind == "dict":
        return {key: grown(part, leaves) for key, part in parts}
    found = [grown(part, leaves) for part in parts]
    return tuple(found) if kind == "tuple" else found


def leaf_count(node: Any) -> int:
    """How many leaves a skeleton has."""
    if isinstance(node, str):
        return int(node == "*")
    kind, parts = next(iter(node.items()))
    return sum(leaf_count(part[1] if kind == "dict" else part) for part in parts)


def fitted(path: pathlib.Path, tree: Any, facts: list[dict], leaves: list[jax.Array], like: PyTree) -> PyTree:
    """Stored leaves in the structure of ``like``, or in the stored structure if that is None."""
    if like is not None:
        want, have = leaf_facts(leaves_of(like)), facts
        wrong = [
            f"{(old or new)['path']}: {_told(old)} saved, {_told(new)} in like"
            for old, new in itertools.zip_longest(have, want)
            if old != new
        ]
        if wrong:
            raise error(
                "like does not have the structure that was saved.",
                path=wrong[:20],
                do="pass the extra that training began with, or leave like out.",
            )
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    if tree is None or leaf_count(tree) != len(leaves):
        raise error(
            "the structure of this extra is not stored, as it has nodes other than dicts, lists and tuples.",
            path=path,
            got=[fact["path"] for fact in facts][:20],
            do="load_extra(path, like=extra), with the extra that training began with.",
        )
    return grown(tree, iter(leaves))


def _told(fact: dict | None) -> str:
    return "nothing" if fact is None else f"{fact['path'] or 'a leaf'} {fact['dtype']}{fact['shape']}"


# --- several processes


def gathered(x: Any) -> np.ndarray:
    """A whole array on the host. If each process holds a part of it, all processes must call this."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that all processes leave together, with an error if the first process had one."""
    if jax.process_count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as met:
        failure = met
    failed = multihost_utils.broadcast_one_to_all(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise error(
            f"the first process could not {what} the checkpoint.",
            got=f"this is process {jax.process_index()}",
            do="see the error of process 0.",
        )
