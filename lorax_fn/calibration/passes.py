"""Passes through batches: sums of what a function returns, and functions compiled once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_array


def groups(paths: Iterable[str], batches: Iterable, at_once: int | None) -> Iterator[list[str]]:
    """Yields the paths in groups of ``at_once``, each of which takes one pass through the batches."""
    paths = list(paths)
    size = len(paths) if at_once is None else at_once
    if size < len(paths):
        check_again(batches, f"at_once={at_once} of {len(paths)} weights")
    for i in range(0, len(paths), max(size, 1)):
        yield paths[i : i + size]


def check_again(batches: Iterable, why: str) -> None:
    """Raises a `LoraError` if the batches are an iterator, which allows only one pass."""
    if iter(batches) is batches:
        raise error(
            "batches have to be passed through more than once.",
            got=f"a {type(batches).__name__}, and {why}",
            want="a list, or another iterable that starts over each time",
            do="batches=list(batches).",
        )


def summed(run: Callable, at: dict, params: PyTree, batches: Iterable) -> tuple[dict, int]:
    """The sum of ``run(at, params, batch)`` over batches, and the number of batches."""
    total, count = None, 0
    for batch in batches:
        new = run(at, params, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += 1
    if total is None:
        raise error(
            "there are no batches to look at.",
            path=list(at),
            got="an empty iterable, or an iterator that is used up",
            do="batches=[x0, x1, ...], each called as fn(params, batch).",
        )
    return total, count


def over_arrays(fn: Callable) -> Callable:
    """`jax.jit` in which array leaves of the arguments are traced and all other leaves are static."""
    known: dict[Any, Callable] = {}

    def call(*args):
        leaves, treedef = jax.tree.flatten(args)
        dynamic = tuple(map(is_array, leaves))
        static = tuple(None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True))

        def flat(values):
            rest = iter(values)
            return fn(
                *treedef.unflatten([next(rest) if d else x for x, d in zip(static, dynamic, strict=True)])
            )

        jitted = known.setdefault((treedef, dynamic, static), jax.jit(flat))
        return jitted([leaf for leaf, d in zip(leaves, dynamic, strict=True) if d])

    return call


def checked_at_once(at_once: Any) -> int | None:
    if at_once is not None and (isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1):
        want = "an int above 0, or None"
        raise error("at_once= is not valid.", got=repr(at_once), want=want, do="at_once=4.")
    return at_once


def name_of(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
