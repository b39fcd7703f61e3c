"""Lanes: the configurations of a sweep, one dict each, and what can be asked of them."""

import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error

# What `split` is called with, for each lane of its own.
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
# What the sweep reads besides; every other entry of a lane is for `tx` alone.
OWN = ("seed", "dropout", "name")
# Names that a record has besides the entries of its lane.
TAKEN = ("lane", "step", "train_loss", "diverged")


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Builds all combinations of the values of some axes: the lanes of a `sweep`.

    Args:
      axes: for each name the values that it takes, a list or any other iterable; a string, a mapping or what
        is not iterable is one value for all lanes. A value may itself be a list, as the first of
        ``targets=[["q", "v"], None]`` is.

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
    """The lanes as a list of dicts of their own, or a `LoraError`."""
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
            "lanes use names that records need for themselves.",
            got=clash,
            do="call these entries something else, and read them so in tx(lane).",
        )
    wrong = sorted(set(split) - set(SPLIT))
    if wrong:
        raise error(
            "split= takes arguments of lx.split.",
            got=wrong,
            want=f"some of {', '.join(SPLIT)}",
            do="key= of the sweep is where the keys of all lanes come from."
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
            "a seed is not a count.",
            got=[f"lane {i}: seed={seed!r}" for i, seed in bad.items()],
            want="an int of 0 or more",
            do="seed=range(3).",
        )
    rates = {
        i: rate
        for i, lane in enumerate(lanes)
        if not (is_number(rate := lane.get("dropout", 0.0)) and 0.0 <= rate < 1.0)
    }
    if rates:
        raise error(
            "a dropout rate is a share below one.",
            got=[f"lane {i}: dropout={rate!r}" for i, rate in rates.items()],
            want="0 <= dropout < 1",
            do="dropout=[0.0, 0.1].",
        )
    return lanes


def is_number(x: object) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _plain(value: Any) -> Any:
    """Scalars and arrays of one number as Python numbers."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0):
        return value.item()
    return value


def label(value: Any) -> Any:
    """An entry of a lane as JSON and tables show it: a number, a string or None."""
    if value is None or isinstance(value, str | bool) or is_number(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(label(x)) for x in value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return repr(value)


class Reader(dict):
    """A lane as `tx` gets it, which remembers the entries that were read."""

    def __init__(self, lane: Mapping[str, Any]):
        super().__init__(lane)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise error(
                "tx asks a lane for an entry that it does not have.",
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
