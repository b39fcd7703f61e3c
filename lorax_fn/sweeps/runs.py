"""One run of a sweep: group after group, program after program, with records and saved states on the way."""

import dataclasses
import datetime
import itertools
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.checkpoint.fingerprint import fingerprint
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree
from lorax_fn.sweeps import lanes as side_by_side
from lorax_fn.sweeps.files import FORMAT, Folder
from lorax_fn.sweeps.grid import label
from lorax_fn.sweeps.groups import Group, Member, group, members
from lorax_fn.sweeps.lanes import Chunk, own_lora, start, whole
from lorax_fn.sweeps.programs import Programs, free_memory, host, memory_of
from lorax_fn.sweeps.progress import Bar
from lorax_fn.sweeps.sources import Source


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `sweep`, after checks."""

    lanes: list[dict[str, Any]]
    steps: int
    every: int
    tx: Callable
    key: jax.Array
    split: Mapping[str, Any]
    data: str
    limit: int | str
    halving: tuple[int, ...]
    best: str
    extra: PyTree
    own: bool  # whether lanes are kept and multiplied at their own ranks

    def stages(self) -> list[tuple[int, int]]:
        """The ranges ``(from, to)`` of steps in which the same lanes are trained."""
        return list(itertools.pairwise([0, *self.halving, self.steps]))

    def score(self, record: Mapping[str, Any]) -> float:
        """The number by which a record is compared, where lower is better; infinite if its lane diverged."""
        name, sign = (self.best[1:], -1.0) if self.best.startswith("-") else (self.best, 1.0)
        if name not in record:
            raise error(
                "records have no score of this name.",
                got=f"best={self.best!r}, scores {sorted(record)}",
                do="best='loss', or a name that eval_fn returns, with a leading '-' if higher is better.",
            )
        good = record["diverged"] is None and math.isfinite(record[name])
        return sign * record[name] if good else math.inf


class Run:
    """One call of `sweep`."""

    bar: Bar
    stopping: Callable[[], bool]

    def __init__(self, params: PyTree, settings: Settings, programs: Programs, source: Source):
        self.params, self.settings, self.programs, self.source = params, settings, programs, source
        self.records: list[dict] = []
        shape = (len(settings.lanes), settings.steps)
        self.curves = {n: np.full(shape, np.nan, np.float32) for n in ("loss", "grad_norm")}
        self.loras: dict[int, Callable] = {}
        self.leader: tuple[float, dict] | None = None
        self.groups: list[Group] = []
        self.sizes: list[int] = []
        self.folder: Folder | None = None
        self.head: dict[str, Any] = {}

    def prepare(self, file: str | os.PathLike | None) -> None:
        """Splits and groups the lanes, and plans how many of them each program has."""
        asked = self.settings
        made = members(self.params, asked.lanes, asked.split, asked.key)
        self.groups = group(self.params, made, asked.tx)
        self.head = head(asked)
        if file is not None:
            base = [[x["path"], x["shape"], x["dtype"], x["crc32"]] for x in fingerprint(self.params)]
            self.folder = Folder(file, {**self.head, "base": base})
        plan = self.folder.plan(None) if self.folder else None
        self.sizes = plan or agreed([self._size(one) for one in self.groups])
        if self.folder:
            self.folder.plan(self.sizes)
            self.records = list(self.folder.begin(self.folder.reached()))
            for record in self.records:
                self._lead(record)

    def total(self) -> int:
        """The number of steps of all programs together."""
        count = 0
        for one, size in zip(self.groups, self.sizes, strict=True):
            left = len(one.members)
            for begin, end in self.settings.stages():
                count += -(-left // size) * (end - begin)
                left = -(-left // 2)
        return count

    def _size(self, one: Group) -> int:
        """How many lanes a program of this group has."""
        multiple, total = self.programs.multiple, len(one.members)
        if isinstance(self.settings.limit, int):
            return len(side_by_side.chunks(one, self.settings.limit, multiple)[0].slots)
        count = total
        while True:
            first = side_by_side.chunks(one, count, multiple, own=self.settings.own)[0]
            size = len(first.slots)
            if total <= multiple:
                return size
            states = jax.eval_shape(lambda first=first: start(first, self.settings.tx, self.settings.extra))
            batch, which = next(self.source.batches_of(first, 0))
            used = memory_of(self.programs.step(first, states, one.params, batch, which))
            # The base is held once, and all else grows with the number of lanes.
            base = sum(x.nbytes for x in jax.tree.leaves(one.params))
            room = free_memory()
            each = max((used - base) / size, 1)
            fits = int(max(room - base, 0) // each)
            if used <= room or size <= multiple:
                return size
            count = max(min(fits, size - 1), 1)

    def group(self, number: int) -> bool:
        """Trains the lanes of one group; returns False if it was interrupted."""
        one, size = self.groups[number], self.sizes[number]
        alive, former = one.members, {}
        for stage, (begin, end) in enumerate(self.settings.stages()):
            if stage:
                alive = self._better_half(alive, begin)
            after: dict[int, Any] = {}
            pieces = [alive[i : i + size] for i in range(0, len(alive), size)]
            for i, some in enumerate(pieces):
                chunk = side_by_side.chunk(one, some, size, own=self.settings.own)
                states = (
                    start(chunk, self.settings.tx, self.settings.extra) if not stage else moved(chunk, former)
                )
                states, done = self.train(chunk, states, f"{number}-{stage}-{i}", begin, end)
                self._keep(chunk, states)
                if done < end:
                    return False
                if end < self.settings.steps:
                    after |= {
                        m.index: (chunk, states, slot) for slot, m in enumerate(chunk.slots[: chunk.real])
                    }
            former = after
        return True

    def _better_half(self, alive: list[Member], step: int) -> list[Member]:
        found = {r["lane"]: r for r in self.records if r["step"] == step}
        ranked = sorted(alive, key=lambda member: self.settings.score(found[member.index]))
        kept = {member.index for member in ranked[: -(-len(alive) // 2)]}
        return [member for member in alive if member.index in kept]

    def train(self, chunk: Chunk, states: Any, name: str, begin: int, end: int) -> tuple[Any, int]:
        """Trains one chunk from step ``begin``, or from its saved state, to step ``end``."""
        params = self.programs.place(chunk.group.params, False)
        log = {n: np.full((chunk.real, end - begin), np.nan, np.float32) for n in self.curves}
        progress = {"step": np.int64(begin), "since": np.int64(begin), **log}
        saved = self.folder.load(name, (states, progress)) if self.folder else None
        if saved is not None:
            states, progress = saved
        log = {n: progress[n] for n in self.curves}
        done, since = int(progress["step"]), int(progress["since"])
        for n, values in log.items():
            self.curves[n][chunk.lanes, begin:end] = values
        self.bar.skip(done - begin)
        if done == end:
            return states, done
        states = self.programs.place(states, True)
        values = self.programs.place(chunk.values(), True)
        rates = self.programs.place(chunk.rates(), True)
        # The metrics of a step are read while the next one runs, so the device does not wait for the host.
        pending: Any = None

        def read():
            if pending is not None:
                for n in log:
                    log[n][:, pending[0] - begin] = host(pending[1][n])[: chunk.real]
                self.curves["loss"][chunk.lanes, pending[0]] = log["loss"][:, pending[0] - begin]
                self.curves["grad_norm"][chunk.lanes, pending[0]] = log["grad_norm"][:, pending[0] - begin]

        for batch, which in self.source.batches_of(chunk, done):
            step = self.programs.step(chunk, states, params, batch, which)
            states, metrics = step(states, params, batch, values, rates, which)
            read()
            pending = done, metrics
            done += 1
            stop = any(agreed([self.stopping()], of_all=True))
            due = done % self.settings.every == 0 or done == end
            if due or stop:
                read()
                pending = None
            if due:
                self._record(chunk, states, params, done, since)
                since = done
            if (due or stop) and self.folder:
                facts = {"step": np.int64(done), "since": np.int64(since), **log}
                local = jax.tree.map(lambda x: x if x.is_fully_addressable else host(x), states)
                self.folder.save(name, (local, facts), chunk.lanes, done)
            self.bar.step(self._best_so_far())
            if stop or done == end:
                break
        return states, done

    def _record(self, chunk: Chunk, states: Any, params: PyTree, step: int, since: int) -> None:
        """Adds one record per lane."""
        rows = []
        for member, scores in zip(chunk.slots, self.programs.scores(chunk, states, params), strict=False):
            lane = member.index
            curves = {n: self.curves[n][lane, :step] for n in self.curves}
            bad = ~(np.isfinite(curves["loss"]) & np.isfinite(curves["grad_norm"]))
            train = float(curves["loss"][since:].mean())
            row = {
                "lane": lane,
                "step": step,
                **{name: label(value) for name, value in member.lane.items()},
                "loss": train,
                "train_loss": train,
                **scores,
                "diverged": int(bad.argmax()) + 1 if bad.any() else None,
            }
            if row["diverged"] is not None and not any(
                r["lane"] == lane and r["diverged"] for r in self.records
            ):
                self.bar.note(f"lane {lane} diverged at step {row['diverged']}: {member.lane}")
            rows.append(row)
            self._lead(row)
        self.records.extend(rows)
        if self.folder:
            self.folder.add(rows)

    def _lead(self, row: dict) -> None:
        score = self.settings.score(row)
        if math.isfinite(score) and (self.leader is None or score < self.leader[0]):
            self.leader = score, row

    def _best_so_far(self) -> str:
        if self.leader is None:
            return ""
        name = self.settings.best.removeprefix("-")
        return f"best {name} {self.leader[1][name]:.4g} in lane {self.leader[1]['lane']}"

    def _keep(self, chunk: Chunk, states: Any) -> None:
        """Keeps the adapters for `SweepResult.lora`, which cuts out those of a lane when it is called."""
        lora = whole(states).lora
        if self.programs.mesh is not None:  # off the mesh: its lanes lie on several devices, or processes
            lora = jax.tree.map(lambda x: jnp.asarray(host(x)), lora)
        for slot, member in enumerate(chunk.slots[: chunk.real]):
            self.loras[member.index] = lambda member=member, slot=slot: own_lora(member, lora, slot)


def agreed(values: list[int], *, of_all: bool = False) -> list[int]:
    """The values of the first process, or those of all in turn: what processes have to do alike."""
    if jax.process_count() == 1:
        return values
    if of_all:
        return np.ravel(multihost_utils.process_allgather(np.asarray(values))).tolist()
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values))).tolist()


def moved(chunk: Chunk, former: dict[int, Any]) -> Any:
    """The states of a chunk, gathered from the chunks in which its lanes were before."""
    made, at = [], 0
    for _, size in chunk.parts:
        some = []
        for member in chunk.slots[at : at + size]:
            old, states, slot = former[member.index]
            places = [i for i, (_, n) in enumerate(old.parts) for _ in range(n)]
            part = places[slot]
            inside = slot - side_by_side.offsets(old.parts)[part]
            some.append(jax.tree.map(lambda x, i=inside: x[i], states[part]))
        made.append(jax.tree.map(lambda *xs: jnp.stack(xs), *some))
        at += size
    return tuple(made)


def head(asked: Settings) -> dict[str, Any]:
    """The first line of a sweep's file: its settings, and the versions and machine that ran it."""
    key = asked.key if asked.key.dtype == np.uint32 else jax.random.key_data(asked.key)
    return {
        "sweep": FORMAT,
        "steps": asked.steps,
        "every": asked.every,
        "data": asked.data,
        "halving": list(asked.halving),
        "best": asked.best,
        "split": {name: label(value) for name, value in asked.split.items()},
        "key": np.asarray(key).tolist(),
        "lanes": [{name: label(value) for name, value in lane.items()} for lane in asked.lanes],
        "versions": {"python": platform.python_version()}
        # Of the modules themselves: a checkout on the path has no metadata.
        | {name: sys.modules[name].__version__ for name in ("lorax_fn", "jax", "optax", "numpy")},
        "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} of them",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
