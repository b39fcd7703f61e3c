"""Writes the checkpoints of `fit`: adapters, optimizer state, step, key, extra and data position.

The base is not stored. A ``checkpoint_dir`` contains ``step-<number>/`` directories, each with

    arrays/             every array of the state, by Orbax, and the sha256 of ``train.json``
    batches-<p>.json    the position of process p in its batches
    train.json          format, version, step, files {name: {size, crc32}}, adapters (as in `storage`), state
                        (facts of all other leaves), weak (paths of weakly typed leaves), extra (its
                        structure), key (with which the run began), base (fingerprint of the frozen tree),
                        loop (evaluations so far), packed (whether arrays of one dtype are concatenated),
                        crc32 of all that

A thread writes ``.step-<number>``, which is renamed when everything is on disk. Damage is detected by
checksums; a damaged checkpoint is renamed to ``step-<number>.damaged`` and skipped with a warning. While a
run writes here, ``.lorax_fn.lock`` keeps other runs out. Files with other names are neither read nor deleted.
The state of a pmap is stored once rather than once per device, except for ``extra``.
"""

import contextlib
import json
import os
import pathlib
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.checkpoint.files import (
    DamagedError,
    damaged,
    file_sums,
    local,
    parse,
    read_small,
    remove,
    sweep,
    unwritable,
    write_facts,
    write_seal,
)
from lorax_fn.checkpoint.fingerprint import fingerprint
from lorax_fn.checkpoint.lock import Lock
from lorax_fn.checkpoint.restoring import (
    FACTS,
    FORMAT,
    VERSION,
    began_with,
    check_base,
    find_snapshot,
    is_snapshot,
    move_aside,
    once,
    others,
    restored_state,
    step_of,
    steps,
)
from lorax_fn.checkpoint.storage import checkpointer, describe, host_writer, packed, storable
from lorax_fn.checkpoint.trees import by_name, leaf_facts, leaves_of, skeleton, together, weak_paths
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.trees import PyTree

STAGE = re.compile(r"\.step-\d{8,}")


class Snapshots:
    """The training checkpoints of one directory, written one at a time by a thread."""

    def __init__(self, folder: str | os.PathLike, params: PyTree, keep: int | None, keep_best: int):
        self.folder = local(folder, write=True)
        self.params, self.base = params, fingerprint(params)
        self.keep, self.keep_best = keep, keep_best
        self.key: dict | None = None
        self.pending: Future | None = None
        self.lock: Lock | None = None
        if (self.folder / "adapter.json").is_file():
            raise error(
                "this checkpoint holds only adapters: no optimizer state, step or key to continue from.",
                path=self.folder,
                do="start a new run from them: lora = lx.checkpoint.load(path, params=params), "
                "state = lx.TrainState.create(lora=lora, ...), and another checkpoint_dir.",
            )
        with together("take the directory of"):
            if _first_process():
                self._take()
        self.checkpointer = checkpointer(together=True)
        self.writer = host_writer()
        self.thread = ThreadPoolExecutor(1, "lorax_fn.fit")

    def _take(self) -> None:
        """Creates the directory, locks it, and removes what a crash left half-written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(self.folder)
            self._sweep()
        except OSError as failure:
            if self.lock is not None:
                self.lock.release()
            do = "pass a checkpoint_dir that this process can write to; no step was taken."
            raise unwritable(self.folder, failure, do) from failure

    def _sweep(self) -> None:
        for stage in self.folder.iterdir():
            if STAGE.fullmatch(stage.name):
                sweep(stage)

    def restore(self, state: Any) -> tuple[Any, dict, Any] | None:
        """``(state, facts of the loop, data position)`` of the newest intact checkpoint, or None."""
        if not _first_process():  # The first process renames damaged checkpoints before the others look.
            _meet("find")
        found = find_snapshot(self.folder, rename=_first_process())
        if _first_process():
            _meet("find")
        given = began_with(state)
        self.key = given
        if found is None:
            return None
        path, facts = found
        same = facts["version"] == VERSION
        check_base(path, facts["base"], self.base if same else fingerprint(self.params, facts["version"]))
        restored = restored_state(path, facts, state, given)
        self.key = facts.get("key", given)
        own = path / f"batches-{jax.process_index()}.json"
        if not own.is_file():
            raise error(
                "the checkpoint has no data position for this process.",
                path=own,
                got=f"{jax.process_count()} processes",
                want=f"{len(list(path.glob('batches-*.json')))}, as when it was saved",
                do="start as many processes as before.",
            )
        return restored, facts["loop"], _position(own)

    def save(self, state: Any, step: int, loop: dict, position: Any) -> None:
        """Copies ``state`` to the host and returns; a thread writes it."""
        self.wait()
        stage = self.folder / f".step-{step:08d}"
        self.key = self.key or began_with(state)
        state = once(state)
        adapters, arrays = describe(state.lora)
        rest = leaves_of(others(state))
        arrays |= by_name(rest, "state")
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": None,
            "adapters": adapters,
            "state": leaf_facts(rest),
            "weak": weak_paths(rest),
            "extra": skeleton(state.extra),
            "key": self.key,
            "base": self.base,
            "loop": loop,
            "packed": _packs(),
        }
        try:
            if _first_process():
                if os.path.lexists(stage):
                    sweep(stage)
                stage.mkdir(parents=True)
            _meet("stage")
            own = stage / f"batches-{jax.process_index()}.json"
            own.write_text(json.dumps(position), "utf-8")
            if facts["packed"]:
                arrays = packed(jax.device_get(arrays))
            else:
                self.checkpointer.save(stage / "arrays", storable(jax.tree.map(_whole, arrays)))
        except Exception as failure:
            raise self._failed(stage, failure) from failure
        self.pending = self.thread.submit(self._publish, stage, facts, arrays)

    def _publish(self, stage: pathlib.Path, facts: dict, arrays: dict) -> None:
        try:
            if facts["packed"]:
                self.writer.save(stage / "arrays", storable(arrays))
            self.checkpointer.wait_until_finished()
            if _first_process():
                facts["files"] = file_sums(stage)
                write_seal(stage / "arrays", facts)
                write_facts(stage / FACTS, facts)
                final = self.folder / stage.name.removeprefix(".")
                if is_snapshot(final):  # a run that was started over
                    _remove(final)
                if os.path.lexists(final):
                    move_aside(final)
                os.replace(stage, final)
                self._prune(facts)
        except Exception as failure:
            raise self._failed(stage, failure) from failure

    def _prune(self, facts: dict) -> None:
        if self.keep is None:
            return
        kept = {step for _, step in facts["loop"]["best"][: self.keep_best]}
        ours = [path for path in steps(self.folder) if is_snapshot(path)]
        older = [path for path in ours if step_of(path) <= facts["step"]]
        for path in older[self.keep :]:
            if step_of(path) not in kept:
                _remove(path)

    def _failed(self, stage: pathlib.Path, failure: Exception) -> LoraError:
        if _first_process():
            sweep(stage)
        last = [path for path in steps(self.folder) if is_snapshot(path)]
        source = last[0] if last else "the beginning"
        do = f"make room on the disk and start again: the run goes on from {source}."
        return unwritable(self.folder / stage.name.removeprefix("."), failure, do)

    def check(self) -> None:
        """Raises the thread's error, if it is done and had one."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and raises its error if there was one."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """Waits for all processes: when it returns, each of them can read the checkpoint."""
        self.wait()
        _meet("finish")

    def close(self) -> None:
        """Lets a pending checkpoint finish, without raising its error, which `wait` does."""
        self.thread.shutdown(wait=True)
        self.checkpointer.close()
        self.writer.close()
        if self.lock is not None:
            with contextlib.suppress(OSError):
                self._sweep()  # Threads of a write that failed may have gone on until here.
            self.lock.release()


def _position(file: pathlib.Path) -> Any:
    """The position of a process in its batches, as `Feed.position` gave it."""
    found = parse(read_small(file, 64 << 20, file.parent), file)
    if not isinstance(found, dict):
        raise damaged(file, "JSON that does not describe a position")
    return found


def _remove(path: pathlib.Path) -> None:
    """Deletes a checkpoint, but no other files in its directory."""
    try:
        facts = parse(read_small(path / FACTS, 64 << 20, path), path)
        remove(path, FACTS, facts["files"])
    except (DamagedError, KeyError, TypeError):
        sweep(path)  # A damaged one does not say which files are its own.


def _whole(x: Any) -> Any:
    """An array that Orbax can write: global, or numpy if each process holds all of it."""
    local_only = isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1
    return np.asarray(x) if local_only else x


def _packs() -> bool:
    """Whether arrays are concatenated before writing, which needs a single process that holds all of them."""
    return jax.process_count() == 1


def _first_process() -> bool:
    return jax.process_index() == 0


def _meet(name: str) -> None:
    """A barrier of all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lorax_fn.fit: {name}")
