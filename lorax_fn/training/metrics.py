"""The output of `fit`: a progress bar, lines of JSON, and callbacks, on the first process only."""

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, is_array, named_leaves

WINDOW = 20  # how many steps the speed is averaged over
FLUSH = 0.5  # seconds between writes to the file of metrics, since a write per row would be slow


def scalars(metrics: PyTree) -> dict:
    """The scalar leaves of a step's metrics as Python numbers; under pmap, those of the first device.

    Other leaves, such as logits in ``aux``, are left out.
    """
    if not isinstance(metrics, dict) or "loss" not in metrics:
        raise error(
            "the step's metrics have no loss.",
            got=sorted(metrics) if isinstance(metrics, dict) else f"a {type(metrics).__name__}",
            want='(state, {"loss": loss, ...}), as the steps of make_train_step return',
            do='return state, {"loss": loss}.',
        )
    mapped = np.ndim(metrics["loss"]) > 0

    def read(x):
        if isinstance(x, jax.Array):
            if not isinstance(x.dtype, np.dtype):  # a PRNG key
                return None
            if x.ndim == 0:  # replicated on all devices
                return x.item()
            x = x.addressable_shards[0].data if mapped else None
        if x is not None and np.size(x) == 1 and np.ndim(x) <= mapped:
            return np.asarray(x).reshape(()).item()
        return None

    return _without_none(jax.tree.map(read, metrics))


def scores(found: Any) -> dict[str, float]:
    """The result of ``eval_fn`` as numbers by name; a single score is called ``loss``."""
    named = found if isinstance(found, dict) else {"loss": found}
    strange = [f"{name}: {_kind(x)}" for name, x in named.items() if not _is_number(x)]
    if strange or not named:
        raise error(
            "eval_fn did not return scores.",
            got=strange or "an empty dict",
            want="a scalar, or a dict of scalars",
            do="return jnp.mean(...) of it.",
        )
    return {str(name): float(x) for name, x in named.items()}


def _is_number(x: Any) -> bool:
    if is_array(x):
        return np.shape(x) == () and (x.dtype == bool or jax.numpy.issubdtype(x.dtype, np.number))
    return isinstance(x, bool | int | float)


def _kind(x: Any) -> str:
    return f"shape {np.shape(x)}" if is_array(x) else f"a {type(x).__name__}"


def _without_none(tree: Any) -> Any:
    """Nested dicts without None leaves; other containers become dicts of leaves by path."""
    if isinstance(tree, dict):
        kept = {str(name): _without_none(part) for name, part in tree.items()}
        return {name: part for name, part in kept.items() if part is not None and part != {}}
    if tree is None or isinstance(tree, bool | int | float | complex):
        return tree
    return dict(named_leaves(tree))


def _copied(row: dict) -> dict:
    """A copy of a row, since a callback may modify it."""
    return {name: _copied(part) if isinstance(part, dict) else part for name, part in row.items()}


def _json(value: Any) -> Any:
    """NaN, infinity and complex numbers as strings, because strict JSON cannot represent them."""
    if isinstance(value, dict):
        return {name: _json(part) for name, part in value.items()}
    odd = isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if odd else value


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics file, without a last line that a crash cut short."""
    if not os.path.lexists(path):
        return []
    rows = []
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        *lines, last = path.read_text("utf-8").split("\n")
        for line in lines:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("not a row with a step")
            rows.append(row)
        if not last.startswith('{"step"'[: len(last)]):
            raise ValueError("not a row, nor a part of one")
    except (OSError, ValueError, RecursionError) as failure:
        raise error(
            "metrics_file contains something other than the metrics of fit.",
            path=path,
            got=f"line {len(rows) + 1}: {type(failure).__name__}: {str(failure)[:200]}",
            want="a JSON object with a step on each line, or no file",
            do="move it away, repair that line, or pass another metrics_file; nothing was overwritten.",
        ) from failure
    return rows


class Log:
    """Passes each row of metrics to the bar, the file and the callbacks."""

    def __init__(
        self,
        done: int,
        steps: int,
        file: str | os.PathLike | None,
        callbacks: Iterable[Callable[[dict], None]],
        progress: bool | None,
        unit: str,
    ):
        first = jax.process_index() == 0
        self.unit = unit
        self.callbacks = tuple(callbacks) if first else ()
        self.file = self.bar = None
        self.begin, self.clock = time.perf_counter(), collections.deque(maxlen=WINDOW + 1)
        self.plain, self.flushed = False, 0.0
        if not first:
            return
        self.bar = None if progress is False else _bar(done, steps, needed=progress is True)
        self.plain = progress is None and self.bar is None
        if file is not None:
            path = pathlib.Path(os.path.realpath(file))  # so that a link stays a link
            kept = [row for row in read_rows(path) if row["step"] <= done]
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                stage = path.with_name(f".{zlib.crc32(path.name.encode()):08x}.new")
                stage.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
                os.replace(stage, path)
                self.file = open(path, "a", encoding="utf-8")

    def tick(self, amount: int) -> None:
        """Records the time at the end of a step, and the size of its batch."""
        self.clock.append((time.perf_counter(), amount))

    def speed(self) -> float | None:
        """Units per second over the last steps; None before the second step, since the first compiles."""
        if len(self.clock) < 2:
            return None
        seconds = self.clock[-1][0] - self.clock[0][0]
        return sum(amount for _, amount in list(self.clock)[1:]) / max(seconds, 1e-9)

    def step(self, number: int, metrics: dict, amount: int) -> None:
        """Writes the row of one step: its metrics, the speed, and the seconds since the start."""
        self.tick(amount)
        speed = self.speed()
        row = {"step": number, **metrics, "seconds": round(time.perf_counter() - self.begin, 3)}
        if speed is not None:
            row[f"{self.unit}_per_second"] = round(speed, 1)
        self.row(row)
        if self.bar is not None:
            shown = f"loss {metrics['loss']:.4g}"
            self.bar.set_postfix_str(
                shown if speed is None else f"{shown}, {speed:,.0f} {self.unit}/s", False
            )
            self.bar.update(1)

    def row(self, row: dict) -> None:
        """Writes one row to the file, and passes a copy to each callback."""
        if self.file is not None:
            with _writing(self.file.name):
                self.file.write(json.dumps(_json(row)) + "\n")
            if time.perf_counter() - self.flushed > FLUSH:
                self.flush()
        for callback in self.callbacks:
            callback(_copied(row))

    def flush(self) -> None:
        """Flushes the file."""
        self.flushed = time.perf_counter()
        if self.file is not None:
            with _writing(self.file.name):
                self.file.flush()

    def note(self, text: str) -> None:
        """Prints a line above the bar, or to stderr if there is no tqdm."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.plain:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk, which was reported already
                self.file.close()


@contextlib.contextmanager
def _writing(path: Any) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise error(
            "metrics_file can't be written.",
            path=path,
            got=f"{type(failure).__name__}: {failure}",
            do="make room on its disk or pass another metrics_file; a run with a checkpoint_dir goes on from "
            "its last checkpoint.",
        ) from failure


def _bar(done: int, steps: int, *, needed: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        if needed:
            raise error(
                "a progress bar needs tqdm.",
                got="no module tqdm",
                do='pip install "lorax_fn[progress]", or progress=False.',
            ) from None
        return None
    return tqdm(total=steps, initial=done, desc="fit", unit="step", dynamic_ncols=True)
