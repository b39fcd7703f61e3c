"""Whether a `lora` fits a tree of parameters."""

from collections.abc import Mapping
from typing import Any

from lorax_fn.core.adapters import is_adapter
from lorax_fn.core.errors import SHOWN, error, nearest
from lorax_fn.core.trees import is_array, is_float


def check_fits(leaves: Mapping[str, Any], lora: Any, *, allow_dropped: bool = True) -> None:
    """Checks every adapter against the leaf it is named after.

    Args:
      leaves: leaves by path.
      lora: what should be a flat dict of adapters.
      allow_dropped: whether adapters of `lorax_fn.dropout` are welcome.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, or an adapter has no leaf, another shape, or an unwanted
        dropout; the first of them are listed, with how many more there are.

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
            do="use the params that this lora was split from; for dropout, the lora from before it.",
        )


def misfits(
    leaves: Mapping[str, Any], lora: Any, *, allow_dropped: bool = True
) -> list[tuple[str, str, str]]:
    """``(path, what is there, what should be)`` of every adapter that does not fit its leaf.

    Where params have no leaf of that path, the last is empty: to look for near names takes time, and only a
    message needs them.
    """
    check_lora(lora)
    return [
        (path, *found)
        for path, adapter in lora.items()
        if (found := _misfit(leaves, path, adapter, allow_dropped))
    ]


def _wanted(leaves: Mapping[str, Any], wrong: list[tuple[str, str, str]]) -> list[str]:
    """What should be there, with the nearest names of the paths that a message has room for."""
    paths = list(leaves)
    return [
        want or (f"one of {nearest(path, paths)}" if i <= SHOWN else "a path of params")
        for i, (path, _, want) in enumerate(wrong)
    ]


def check_lora(lora: Any) -> None:
    """Raises a `LoraError` where ``lora`` is anything but a dict of adapters."""
    if not isinstance(lora, Mapping):
        strange: Any = type(lora).__name__
    else:
        strange = [f"{path}: {type(x).__name__}" for path, x in lora.items() if not is_adapter(x)]
    if lora is None:
        raise error(
            "lora is not a dict of adapters.",
            got="None",
            want="{path: Adapter}, as lx.split returns it second",
            do="pass {} for the model without adapters.",
        )
    if strange:
        raise error(
            "lora is not a dict of adapters.",
            got=strange,
            want="{path: Adapter}, as lx.split returns it second",
            do="params, lora = lx.split(params); params come before lora in every call.",
        )


def _misfit(
    leaves: Mapping[str, Any], path: str, adapter: Any, allow_dropped: bool
) -> tuple[str, str] | None:
    """What is there and what should be, or None where the adapter fits."""
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
    """Raises a `LoraError` where ``lora`` is not a dict of adapters, or any has an axis for `jax.vmap`."""
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
    """Refuses what can be neither trained nor saved: anything but a dict of adapters without dropout."""
    check_lora(lora)
    dropped = [path for path, node in lora.items() if node.under_dropout]
    if dropped:
        raise error(
            "lora came out of dropout.",
            path=dropped,
            got="adapters that hold a dropout key",
            want="adapters without dropout",
            do="pass the lora that dropout was given; call lx.dropout(lora, rate, key) inside loss_fn only.",
        )
