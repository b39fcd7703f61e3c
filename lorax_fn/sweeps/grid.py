"""Lanes: the configurations of a sweep, one dict each, and the checks of their entries."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax_fn.core.adapters import is_real
from lorax_fn.core.errors import error

# Entries of a lane that are passed to `split`.
SPLIT = (
    "rank",
    "alpha",
    "scaling",
    "method",
    "init",
    "targets",
    "exclude",
    "full",
    "rows",
    "layout",
    "dtype",
)
# Entries that the sweep itself reads. Every other entry of a lane is for `tx` alone.
OWN = ("seed", "dropout", "name")
# Names that a record uses in addition to the entries of its lane.
TAKEN = ("lane", "step", "train_loss", "diverged")


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Builds all combinations of the values of some axes: the lanes of a `sweep`.

    Args:
      axes: the values of each name, a list or any other iterable. A string, a mapping or anything that is not
        iterable is a single value for all lanes. A value may itself be a list, such as the first one of
        ``targets=[["q", "v"], None]``.

    Returns:
      One dict per lane; the last axis changes fastest.

    Raises:
      LoraError: an axis has no values.

    Example:
      >>> import lorax_fn as lx
      >>> lx.grid(rank=[1, 8], lr=[1e-3, 1e-2], scaling="rslora")[1]
      {'rank': 1, 'lr': 0.01, 'scaling': 'rslora'}
      >>> len(lx.grid(rank=[1, 8], lr=[1e-3, 1e-2], seed=range(3)))
      12
    """
    values = {name: _values(axis) for name, axis in axes.items()}
    empty = [name for name, axis in values.items() if not axis]
    if empty:
        raise error(
            "axes of the grid have no values.",
            got=[f"{name}={axes[name]!r}" for name in empty],
            do="give each axis one value or more, or leave it out.",
        )
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _values(axis: Any) -> list:
    single = isinstance(axis, str | Mapping) or not isinstance(axis, Iterable)
    if isinstance(axis, np.ndarray | jax.Array):
        return [axis.item()] if not axis.ndim else axis.tolist()
    return [axis] if single else list(axis)


def check_lanes(lanes: Any, split: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the lanes as a list of new dicts, or raises a `LoraError`."""
    listed = list(lanes) if isinstance(lanes, Iterable) and not isinstance(lanes, str | Mapping) else []
    if not listed or not all(isinstance(lane, Mapping) for lane in listed):
        raise error(
            "lanes are not configurations.",
            got=f"a {type(lanes).__name__} of {len(listed)}",
            want="a list of dicts, at least one",
            do="lanes = lx.grid(rank=[4, 16], lr=[1e-3, 1e-2]).",
        )
    lanes = [{str(name): _plain(value) for name, value in lane.items()} for lane in listed]
    clash = sorted({name for lane in lanes for name in lane if name in TAKEN})
    if clash:
        raise error(
            "lanes have entries with names that are reserved for records.",
            got=clash,
            do="rename these entries, in the lanes and in tx(lane).",
        )
    wrong = sorted(set(split) - set(SPLIT))
    if wrong:
        raise error(
            "split= has entries that are not arguments of lx.split.",
            got=wrong,
            want=f"some of {', '.join(SPLIT)}",
            do="pass key= to lx.sweep itself: the keys of all lanes come from it."
            if "key" in wrong
            else "split={}",
        )
    bad = {
        i: lane["seed"]
        for i, lane in enumerate(lanes)
        if isinstance(lane.get("seed", 0), bool) or not isinstance(lane.get("seed", 0), int)
    }
    bad = bad or {i: lane["seed"] for i, lane in enumerate(lanes) if lane.get("seed", 0) < 0}
    if bad:
        raise error(
            "a seed is not a nonnegative int.",
            got=[f"lane {i}: seed={seed!r}" for i, seed in bad.items()],
            want="an int of 0 or more",
            do="seed=range(3).",
        )
    rates = {
        i: rate
        for i, lane in enumerate(lanes)
        if not (is_real(rate := lane.get("dropout", 0.0)) and 0.0 <= rate < 1.0)
    }
    if rates:
        raise error(
            "a dropout rate is not a fraction below one.",
            got=[f"lane {i}: dropout={rate!r}" for i, rate in rates.items()],
            want="0 <= dropout < 1",
            do="dropout=[0.0, 0.1].",
        )
    return lanes


def _plain(value: Any) -> Any:
    """Converts NumPy scalars and 0-d arrays to Python numbers."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0):
        return value.item()
    return value


def label(value: Any) -> Any:
    """The form in which JSON and tables show an entry of a lane: a number, a string or None."""
    if value is None or isinstance(value, str | bool) or is_real(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(label(x)) for x in value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return repr(value)


class Reader(dict):
    """A lane as it is passed to `tx`. It remembers which entries were read."""

    def __init__(self, lane: Mapping[str, Any]):
        super().__init__(lane)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise error(
                "tx reads an entry that this lane does not have.",
                got=f"lane[{name!r}]; the lane has {sorted(super().keys())}",
                do=f"add it to the grid: lx.grid({name}=[...]), or lane.get({name!r}, default).",
            )
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __iter__(self):
        self.read.update(super().keys())
        return super().__iter__()

    def items(self):
        self.read.update(super().keys())
        return super().items()

    def keys(self):
        self.read.update(super().keys())
        return super().keys()

    def values(self):
        self.read.update(super().keys())
        return super().values()
