"""What a sweep found: its records, the best lane, each lane's adapters, and means over seeds."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter, is_real
from lorax_fn.core.errors import error
from lorax_fn.sweeps.files import read as read_file
from lorax_fn.sweeps.grid import label


@dataclasses.dataclass
class SweepResult:
    """What `sweep` returns, even if it was interrupted.

    Args:
      lanes: the configurations, as they were given.
      records: one dict per lane and evaluation: the entries of the lane (as numbers and strings), ``lane``,
        ``step``, ``train_loss`` (its mean since the previous record), ``diverged`` (the first step whose loss
        or gradient was not finite, or None), and the scores. ``loss`` is the single score of ``eval_fn``, or
        ``train_loss`` if no score has that name.
      curves: ``{"loss": [lanes, steps], "grad_norm": [lanes, steps]}`` of every training step; NaN where a
        lane was not trained.
      config: what ran, and on what: steps, versions, device.
      finished: False if it was interrupted.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> result = lx.sweep(
      ...     lambda params, lora, batch, key: jnp.mean(apply(params, lora, batch) ** 2),
      ...     params, lx.grid(rank=[1, 2], lr=[1e-5, 1e-4]), [x], steps=5,
      ...     tx=lambda lane: optax.sgd(lane["lr"]), key=jax.random.key(0), progress=False)
      >>> result.best("loss")["lr"], result.curves["loss"].shape
      (0.0001, (4, 5))
      >>> result.lora(0)["kernel"].rank, result.lora(3)["kernel"].rank
      (1, 2)
    """

    lanes: list[dict[str, Any]]
    records: list[dict[str, Any]]
    curves: dict[str, np.ndarray]
    config: dict[str, Any]
    finished: bool = True
    _loras: dict[int, Callable[[], dict[str, Adapter]]] = dataclasses.field(default_factory=dict, repr=False)

    def best(self, metric: str = "loss") -> dict[str, Any]:
        """The last record of the best lane.

        Args:
          metric: the name of a score, where lower is better; with a leading ``-``, as in ``"-accuracy"``,
            higher is better.

        Returns:
          The record. Lanes that diverged rank last.

        Raises:
          LoraError: there are no records, or no record has such a score.

        Example:
          >>> import lorax_fn as lx
          >>> rows = [{"lane": 0, "step": 5, "loss": 2.0}, {"lane": 1, "step": 5, "loss": 1.0}]
          >>> lx.sweeps.SweepResult([{}, {}], rows, {}, {}).best("loss")["lane"]
          1
        """
        name, sign = (metric[1:], -1.0) if metric.startswith("-") else (metric, 1.0)
        last = self.final()
        check_metric(last, name)

        def score(record):
            value = record.get(name)
            good = is_real(value) and math.isfinite(value) and record.get("diverged") is None
            return (0, sign * value) if good else (1, 0.0)

        return min(last, key=score)

    def final(self) -> list[dict[str, Any]]:
        """The last record of each lane, in the order of the lanes.

        Returns:
          One dict per lane that has a record.

        Example:
          >>> import lorax_fn as lx
          >>> rows = [{"lane": 0, "step": 5, "loss": 2.0}, {"lane": 0, "step": 9, "loss": 1.0}]
          >>> lx.sweeps.SweepResult([{}], rows, {}, {}).final()
          [{'lane': 0, 'step': 9, 'loss': 1.0}]
        """
        last: dict[int, dict] = {}
        for record in self.records:
            if record["lane"] not in last or record["step"] >= last[record["lane"]]["step"]:
                last[record["lane"]] = record
        return [last[lane] for lane in sorted(last)]

    def lora(self, lane: int) -> dict[str, Adapter]:
        """The final adapters of one lane, at its own rank and without padding.

        Args:
          lane: its index in ``lanes``.

        Returns:
          An ordinary ``lora``, to `merge` or to save. If the lane's init moved a part of the weights (PiSSA),
          its adapters fit only the params that `split` returns for its configuration.

        Raises:
          LoraError: there is no such lane, or it was not trained, or the result was read from a file.

        Example:
          >>> import lorax_fn as lx
          >>> lx.sweeps.SweepResult([{}], [], {}, {}).lora(0)
          Traceback (most recent call last):
          ...
          lorax_fn.core.errors.LoraError: this result has no adapters of that lane.
            got:     lane 0
            want:    one of []
            do:      run the sweep again with the same file=: it loads what is done and trains the rest.
        """
        if lane not in self._loras:
            raise error(
                "this result has no adapters of that lane.",
                got=f"lane {lane!r}",
                want=f"one of {sorted(self._loras)}",
                do="run the sweep again with the same file=: it loads what is done and trains the rest.",
            )
        return self._loras[lane]()

    def means(self, metric: str = "loss", by: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The mean of each configuration's final score over seeds, with its standard error.

        Args:
          metric: the name of a score.
          by: the entries of a lane that identify a configuration; None is all but ``seed`` and ``name``.

        Returns:
          One dict per configuration: its entries, ``mean``, ``stderr`` (the sample standard deviation divided
          by ``sqrt(n)``; NaN for one lane) and ``n``. A diverged lane makes the mean NaN.

        Raises:
          LoraError: no record has such a score.

        Example:
          >>> import lorax_fn as lx
          >>> rows = [{"lane": i, "step": 5, "seed": i, "rank": 4, "loss": 1.0 + i} for i in range(3)]
          >>> lx.sweeps.SweepResult([{"seed": 0, "rank": 4}] * 3, rows, {}, {}).means("loss")
          [{'rank': 4, 'mean': 2.0, 'stderr': 0.577..., 'n': 3}]
        """
        names = (
            self.entries(skip=("seed", "name")) if by is None else [by] if isinstance(by, str) else list(by)
        )
        last = self.final()
        check_metric(last, metric)
        found: dict[tuple, list[float]] = {}
        for record in last:
            found.setdefault(tuple(record.get(name) for name in names), []).append(value_of(record, metric))
        return [
            {**dict(zip(names, at, strict=True)), **mean_and_error(values)} for at, values in found.items()
        ]

    def differences(
        self, metric: str = "loss", *, between: str, other: Any, by: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Paired differences from one value of an entry, seed by seed, so that effects of the seed cancel.

        Args:
          metric: the name of a score.
          between: the entry that differs, such as ``"method"``.
          other: the value of ``between`` with which all other values are compared.
          by: further entries that identify a configuration; None is all but ``seed`` and ``name``.

        Returns:
          One dict per configuration and value of ``between`` except ``other``: ``mean`` of the score minus
          that of ``other`` with the same seed and configuration, ``stderr`` and ``n``.

        Raises:
          LoraError: no record has such a score, or none has ``between == other``.

        Example:
          >>> import lorax_fn as lx
          >>> rows = [{"lane": 2 * s + i, "step": 1, "seed": s, "rank": r, "loss": s + 1.0 / r}
          ...         for s in range(2) for i, r in enumerate((1, 2))]
          >>> result = lx.sweeps.SweepResult([{"seed": 0, "rank": 1}] * 4, rows, {}, {})
          >>> result.differences("loss", between="rank", other=1)
          [{'rank': 2, 'mean': -0.5, 'stderr': 0.0, 'n': 2}]
        """
        names = self.entries(skip=("seed", "name", between)) if by is None else list(by)
        last, other = self.final(), label(other)
        check_metric(last, metric)
        base = {self._place(r, names): value_of(r, metric) for r in last if r.get(between) == other}
        if not base:
            raise error(
                "no lane has the value to compare with.",
                got=f"{between}={other!r}",
                want=f"one of {sorted({str(r.get(between)) for r in last})}",
                do="set other= to one of these.",
            )
        found: dict[tuple, list[float]] = {}
        for record in last:
            place = self._place(record, names)
            if record.get(between) != other and place in base:
                at = (record.get(between), *(record.get(name) for name in names))
                found.setdefault(at, []).append(value_of(record, metric) - base[place])
        return [
            {**dict(zip((between, *names), at, strict=True)), **mean_and_error(values)}
            for at, values in found.items()
        ]

    def to_pandas(self) -> Any:
        """The records as a `pandas.DataFrame`, one row each.

        Returns:
          The frame.

        Raises:
          LoraError: pandas is not installed.

        Example:
          >>> import lorax_fn as lx
          >>> frame = lx.sweeps.SweepResult([{}], [{"lane": 0, "step": 1, "loss": 2.0}], {}, {}).to_pandas()
          >>> float(frame["loss"].iloc[0])
          2.0
        """
        try:
            import pandas
        except ImportError:
            raise error(
                "a data frame needs pandas.",
                got="no module pandas",
                do='pip install "lorax_fn[pandas]", or use .records, a list of dicts.',
            ) from None
        return pandas.DataFrame(self.records)

    def entries(self, skip: Iterable[str] = ()) -> list[str]:
        """The names of all entries of the lanes, in order of appearance.

        Args:
          skip: names to leave out.

        Returns:
          The names.

        Example:
          >>> import lorax_fn as lx
          >>> lx.sweeps.SweepResult([{"rank": 1}, {"rank": 1, "lr": 0.1}], [], {}, {}).entries()
          ['rank', 'lr']
        """
        names = dict.fromkeys(name for lane in self.lanes for name in lane)
        return [name for name in names if name not in skip]

    def _place(self, record: dict, names: Sequence[str]) -> tuple:
        return (record.get("seed"), *(record.get(name) for name in names))


def check_metric(records: Sequence[dict], name: str) -> None:
    """Raises a `LoraError` if no record has a number of this name."""
    known = sorted({key for r in records for key, value in r.items() if is_real(value)})
    if not any(is_real(record.get(name)) for record in records):
        raise error(
            "no record has this score.",
            got=repr(name),
            want=f"one of {known}" if records else "records: the sweep has made none yet",
            do="'loss', or a name that eval_fn returns.",
        )


def value_of(record: dict, metric: str) -> float:
    """A score; NaN if the lane diverged or does not have it."""
    value: Any = record.get(metric)
    return float(value) if is_real(value) and record.get("diverged") is None else math.nan


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    numbers = np.asarray(values, np.float64)
    n = len(numbers)
    stderr = float(numbers.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"mean": float(numbers.mean()), "stderr": stderr, "n": n}


def read(path: str | os.PathLike[str]) -> SweepResult:
    """Reads the file of a sweep, with its records and settings, for tables and plots.

    Args:
      path: the path that was passed to `lorax_fn.sweep` as ``file``.

    Returns:
      A `SweepResult` without adapters and curves. Its lanes have the form in which the file stores them.

    Raises:
      LoraError: it is not the file of a sweep.

    Example:
      >>> import lorax_fn as lx
      >>> lx.sweeps.read("ranks.jsonl").best("loss")  # doctest: +SKIP
    """
    head, rows = read_file(path)
    if head is None:
        raise error(
            "there is no sweep in this file.",
            path=str(path),
            got="nothing" if os.path.exists(path) else "no file",
            do="pass the path that was passed to lx.sweep as file=.",
        )
    ends = {row["lane"]: row["step"] for row in rows}
    finished = len(ends) == len(head["lanes"]) and (
        bool(head["halving"]) or set(ends.values()) == {head["steps"]}
    )
    return SweepResult(head["lanes"], rows, {}, head, finished)
