"""A sweep on disk: records as JSON lines, and beside them the states from which it resumes after a kill.

The records of a step are written before its state, so a kill may leave records of later steps than the saved
state. These are cut off when the sweep resumes, and are then written again with the same values.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree

FORMAT = 1


def as_json(value: Any) -> Any:
    """Turns NaN and infinity into strings, because strict JSON has no numbers for them."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(row: dict) -> dict:
    words = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    return {name: words.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def read(path: str | os.PathLike) -> tuple[dict | None, list[dict]]:
    """Returns the first line, which describes the sweep, and the records. An incomplete line is left out."""
    file = pathlib.Path(path)
    lines = file.read_text("utf-8").split("\n")[:-1] if file.is_file() else []
    if not lines:
        return None, []
    first, *rest = [json.loads(line) for line in lines]
    if not isinstance(first, dict) or first.get("sweep") != FORMAT:
        raise error(
            "this is not the file of a sweep.",
            path=str(file),
            got=lines[0][:80],
            want=f'a first line {{"sweep": {FORMAT}, ...}}, as lx.sweep writes it',
            do="give another file=.",
        )
    return first, [from_json(row) for row in rest]


class Folder:
    """The file of a sweep, and the folder of its saved states, ``<file>.state``.

    Of several processes the first one writes, and all read.
    """

    def __init__(self, file: str | os.PathLike, head: dict[str, Any]):
        self.file = pathlib.Path(file)
        self.states = self.file.with_name(self.file.name + ".state")
        self.head, self.records = head, []
        self.writes = jax.process_index() == 0
        if not self.writes:
            multihost_utils.sync_global_devices("the folder of the sweep")
        try:
            self._open()
        finally:
            if self.writes and jax.process_count() > 1:
                multihost_utils.sync_global_devices("the folder of the sweep")

    def _open(self) -> None:
        found, rows = read(self.file)
        if found is not None:
            self._check(found)
            self.records = rows
        if self.writes:
            self.states.mkdir(parents=True, exist_ok=True)
            if found is None:
                for old in self.states.glob("*"):
                    old.unlink()
                self._rewrite([])

    def _check(self, found: dict) -> None:
        names = [n for n in ("lanes", "steps", "every", "data", "key", "base", "halving", "best", "split")
                 if found.get(n) != self.head.get(n)]  # fmt: skip
        if names:
            raise error(
                "this file holds another sweep.",
                path=str(self.file),
                got=[f"{name}: {_short(self.head.get(name))}" for name in names],
                want=[f"{name}: {_short(found.get(name))}" for name in names],
                do=f"give another file=, or delete {self.file} and {self.states}.",
            )

    def begin(self, reached: dict[int, int]) -> list[dict]:
        """Keeps the records of each lane up to the step that its state has reached, and returns them."""
        self.records = [row for row in self.records if row["step"] <= reached.get(row["lane"], 0)]
        if self.writes:
            self._rewrite(self.records)
        return self.records

    def _rewrite(self, rows: Sequence[dict]) -> None:
        stage = self.file.with_name(f".{self.file.name}.new")
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.write_text("".join(json.dumps(as_json(row)) + "\n" for row in [self.head, *rows]), "utf-8")
        os.replace(stage, self.file)

    def add(self, rows: Sequence[dict]) -> None:
        if not self.writes:
            return
        with open(self.file, "a", encoding="utf-8") as out:
            out.write("".join(json.dumps(as_json(row)) + "\n" for row in rows))

    def plan(self, plan: Any) -> Any:
        """The plan of the first run, which all later runs keep; ``plan`` itself if this is the first run."""
        path = self.states / "plan.json"
        if path.is_file():
            return json.loads(path.read_text("utf-8"))
        if plan is not None and self.writes:
            stage = path.with_suffix(".new")
            stage.write_text(json.dumps(plan), "utf-8")
            os.replace(stage, path)
        return plan

    def reached(self) -> dict[int, int]:
        """How many steps each lane has completed, according to the saved states."""
        steps: dict[int, int] = {}
        for path in self.states.glob("[!.]*.npz"):
            with np.load(path) as held:
                facts = json.loads(held["facts"].tobytes())
            for lane in facts["lanes"]:
                steps[lane] = max(steps.get(lane, 0), facts["step"])
        return steps

    def save(self, name: str, tree: PyTree, lanes: Sequence[int], step: int) -> None:
        """Writes the leaves of a tree as bytes, whole or not at all."""
        if not self.writes:
            return
        leaves: dict[str, Any] = {
            f"{i}": np.frombuffer(_numpy(x).tobytes(), np.uint8) for i, x in enumerate(jax.tree.leaves(tree))
        }
        leaves["facts"] = np.frombuffer(json.dumps({"lanes": list(lanes), "step": step}).encode(), np.uint8)
        stage = self.states / f".{name}.new.npz"
        with open(stage, "wb") as out:
            np.savez(out, **leaves)
        os.replace(stage, self.states / f"{name}.npz")

    def load(self, name: str, like: PyTree) -> PyTree | None:
        """The tree that was saved, with the shapes and dtypes of ``like``; None if there is none."""
        path = self.states / f"{name}.npz"
        if not path.is_file():
            return None
        leaves, treedef = jax.tree.flatten(like)
        with np.load(path) as held:
            saved = [held[str(i)] for i in range(len(held.files) - 1)]
        sizes = [_numpy(x).nbytes for x in leaves]
        if [x.nbytes for x in saved] != sizes:
            raise error(
                "a saved state of this sweep has other shapes.",
                path=str(path),
                got=f"{len(saved)} arrays, {sum(x.nbytes for x in saved)} bytes",
                want=f"{len(leaves)} arrays, {sum(sizes)} bytes",
                do=f"give another file=, or delete {self.file} and {self.states}.",
            )
        return jax.tree.unflatten(treedef, [_like(x, raw) for x, raw in zip(leaves, saved, strict=True)])


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _like(x: Any, raw: np.ndarray) -> Any:
    data = _numpy(x)
    made = np.frombuffer(raw.tobytes(), data.dtype).reshape(data.shape)
    if not isinstance(x, jax.Array):
        return made.copy()
    if _is_key(x):
        return jax.random.wrap_key_data(jax.numpy.asarray(made), impl=jax.random.key_impl(x))
    return jax.numpy.asarray(made)


def _short(value: Any) -> str:
    text = json.dumps(as_json(value))
    return text if len(text) <= 120 else text[:117] + "..."
