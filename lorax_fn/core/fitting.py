"""Checks that a `lora` is a dict of live adapters and fits a tree of parameters."""

from collections.abc import Mapping
from typing import Any

import jax

from lorax_fn.core.adapters import is_adapter
from lorax_fn.core.errors import SHOWN, error, nearest
from lorax_fn.core.trees import PyTree, is_array, is_float, is_tracer, named_leaves


def check_fits(leaves: Mapping[str, Any], lora: Any, *, allow_dropped: bool = True) -> None:
    """Checks every adapter against the leaf of its path.

    Args:
      leaves: leaves by path.
      lora: what should be a flat dict of adapters.
      allow_dropped: whether adapters from `lorax_fn.dropout` are allowed.

    Raises:
      LoraError: ``lora`` is not a dict of adapters; or there is no leaf at an adapter's path, the leaf is not
        a float array of the adapter's shape, or the adapter is under dropout and that is not allowed.

    Example:
      >>> from lorax_fn.core.fitting import check_fits
      >>> check_fits({}, {})
    """
    wrong = misfits(leaves, lora, allow_dropped=allow_dropped)
    if wrong:
        raise error(
            "lora does not fit these params.",
            path=[path for path, _, _ in wrong],
            got=[got for _, got, _ in wrong],
            want=_wanted(leaves, wrong),
            do="use the params that this lora was split from, and the lora from before any dropout.",
        )


def misfits(
    leaves: Mapping[str, Any], lora: Any, *, allow_dropped: bool = True
) -> list[tuple[str, str, str]]:
    """``(path, got, want)`` for every adapter that does not fit its leaf.

    If params have no leaf at that path, ``want`` is empty: finding similar names takes time, and only an
    error message needs them.
    """
    check_lora(lora)
    return [
        (path, *found)
        for path, adapter in lora.items()
        if (found := _misfit(leaves, path, adapter, allow_dropped))
    ]


def _wanted(leaves: Mapping[str, Any], wrong: list[tuple[str, str, str]]) -> list[str]:
    """The ``want`` of each misfit; where it is empty, the nearest paths, for as many as a message shows."""
    paths = list(leaves)
    return [
        want or (f"one of {nearest(path, paths)}" if i <= SHOWN else "a path of params")
        for i, (path, _, want) in enumerate(wrong)
    ]


def check_lora(lora: Any) -> None:
    """Raises a `LoraError` if ``lora`` is not a dict of adapters, or a step has consumed their arrays."""
    if not isinstance(lora, Mapping):
        strange: Any = type(lora).__name__
    else:
        strange = [f"{path}: {type(x).__name__}" for path, x in lora.items() if not is_adapter(x)]
    if lora is None:
        raise error(
            "lora is not a dict of adapters.",
            got="None",
            want="{path: Adapter}, the second result of lx.split",
            do="pass {} for the model without adapters.",
        )
    if strange:
        raise error(
            "lora is not a dict of adapters.",
            got=strange,
            want="{path: Adapter}, the second result of lx.split",
            do="params, lora = lx.split(params); params come before lora in every call.",
        )
    check_alive(lora, "lora")


def check_alive(tree: PyTree, name: str) -> None:
    """Raises a `LoraError` if a step that donates its state has consumed an array of ``tree``."""
    if not any(map(_is_deleted, jax.tree.leaves(tree))):  # This runs at each step, so it builds no paths.
        return
    gone = [path for path, x in named_leaves(tree, name) if _is_deleted(x)]
    raise error(
        f"a step that donates its state has consumed this {name}.",
        path=gone,
        got="deleted arrays",
        want=f"the {name} that the last step returned",
        do="state, metrics = step(state, params, batch); jax.tree.map(jnp.copy, state) keeps an older one.",
    )


def _is_deleted(x: Any) -> bool:
    return isinstance(x, jax.Array) and not is_tracer(x) and x.is_deleted()


def _misfit(
    leaves: Mapping[str, Any], path: str, adapter: Any, allow_dropped: bool
) -> tuple[str, str] | None:
    """``(got, want)``, or None if the adapter fits."""
    if path not in leaves or not is_array(leaves[path]):
        return "no such array in params", ""
    leaf = leaves[path]
    problem = adapter.problem(leaf)
    if problem is not None:
        return f"a leaf of shape {tuple(leaf.shape)}", problem
    if not is_float(leaf):
        return f"a leaf of dtype {leaf.dtype}", "a float leaf"
    if not allow_dropped and adapter.under_dropout:
        return "an adapter under dropout", "one without"
    return None


def check_unstacked(lora: Mapping[str, Any]) -> None:
    """Raises a `LoraError` if ``lora`` is not a dict of adapters, or one is stacked for `jax.vmap`."""
    check_lora(lora)
    stacked = [path for path, adapter in lora.items() if adapter.is_stacked]
    if stacked:
        raise error(
            "these adapters are stacked along axis 0.",
            path=stacked,
            got=[repr(lora[path]) for path in stacked],
            want="one adapter per path",
            do="map over the axis, jax.vmap(f)(lora), or take them apart: for one in lx.unstack(lora).",
        )


def check_adapters(lora: Any) -> None:
    """Raises a `LoraError` unless ``lora`` is a dict of adapters, none of them under dropout."""
    check_lora(lora)
    dropped = [path for path, node in lora.items() if node.under_dropout]
    if dropped:
        raise error(
            "lora came out of dropout.",
            path=dropped,
            got="adapters that hold a dropout key",
            want="adapters without dropout",
            do="pass the lora from before dropout; call lx.dropout(lora, rate, key) only inside loss_fn.",
        )
