"""The checkpoints of `fit`: adapters, optimizer state, step, key, extra and data position; never the base.

A ``checkpoint_dir`` holds ``step-<number>/`` directories, each with

    arrays/             every array of the state, by Orbax
    batches-<p>.json    where in its batches process p is
    train.json          format, version, step, files {name: crc32}, adapters (as in `storage`), state (facts
                        of all other leaves), weak (paths of those weakly typed), base (fingerprint of the
                        frozen tree), loop (evaluations so far), crc32 of all that

It is written as ``.step-<number>`` by a thread, and appears by one rename when everything is on disk. What is
damaged afterwards is found by the sums, renamed to ``step-<number>.damaged`` and passed over with a warning.
The state of a pmap is stored once, not once a device, but for ``extra``.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.checkpoint.fingerprint import differences, fingerprint
from lorax_fn.checkpoint.storage import (
    DamagedError,
    LoraCheckpointWarning,
    array_facts,
    build,
    check_files,
    damaged,
    describe,
    file_sums,
    named_facts,
    raw,
    read_arrays,
    read_facts,
    storable,
    to_device,
    write_facts,
)
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.trees import PyTree, is_array, named_leaves

FORMAT, VERSION, FACTS = "lorax_fn.training", 1, "train.json"
NAME = re.compile(r"step-(\d{8,})")


class Snapshots:
    """The training checkpoints of one directory: one is written at a time, by a thread."""

    def __init__(self, folder: str | os.PathLike, params: PyTree, keep: int | None, keep_best: int):
        import orbax.checkpoint as ocp

        self.folder = pathlib.Path(os.path.abspath(folder))
        self.base = fingerprint(params)
        self.keep, self.keep_best = keep, keep_best
        self.pending: Future | None = None
        if (self.folder / "adapter.json").is_file():
            raise error(
                "this checkpoint holds adapters alone: no optimizer state, step or key to go on from.",
                path=self.folder,
                do="start anew from them: lora = lx.checkpoint.load(path, params=params), "
                "state = lx.Any.create(lora=lora, ...), and another checkpoint_dir.",
            )
        if _first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stage in self.folder.glob(".step-*"):  # what a crash left half-written
                shutil.rmtree(stage, ignore_errors=True)
        self.checkpointer = ocp.StandardCheckpointer()
        self.thread = ThreadPoolExecutor(1, "lorax_fn.fit")

    def restore(self, state: Any) -> tuple[Any, dict, Any] | None:
        """``(state, facts of the loop, data position)`` of the newest checkpoint that is whole, or None."""
        if not _first_process():  # the first one moves what is damaged out of the way
            _meet("find")
        found = find_snapshot(self.folder, rename=_first_process())
        if _first_process():
            _meet("find")
        if found is None:
            return None
        path, facts = found
        check_base(path, facts["base"], self.base)
        restored = _restored(path, facts, state)
        own = path / f"batches-{jax.process_index()}.json"
        if not own.is_file():
            raise error(
                "the checkpoint has no data position for this process.",
                path=own,
                got=f"{jax.process_count()} processes",
                want=f"{len(list(path.glob('batches-*.json')))}, as when it was saved",
                do="start as many processes as before.",
            )
        return restored, facts["loop"], json.loads(own.read_text("utf-8"))

    def save(self, state: Any, step: int, loop: dict, position: Any) -> None:
        """Copies ``state`` to the host and goes on; a thread writes it."""
        self.wait()
        stage = self.folder / f".step-{step:08d}"
        state = _once(state)
        adapters, arrays = describe(state.lora)
        rest = _rest(state)
        arrays |= {f"state.{i}": raw(x) for i, (_, x) in enumerate(rest)}
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": None,
            "adapters": adapters,
            "state": [{"path": path, **array_facts(x)} for path, x in rest],
            "weak": [path for path, x in rest if getattr(x, "weak_type", False)],
            "base": self.base,
            "loop": loop,
        }
        try:
            if _first_process():
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir(parents=True)
            _meet("stage")
            own = stage / f"batches-{jax.process_index()}.json"
            own.write_text(json.dumps(position), "utf-8")
            self.checkpointer.save(stage / "arrays", storable(jax.tree.map(_whole, arrays)))
        except Exception as failure:
            raise self._failed(stage, failure) from failure
        self.pending = self.thread.submit(self._publish, stage, facts)

    def _publish(self, stage: pathlib.Path, facts: dict) -> None:
        try:
            self.checkpointer.wait_until_finished()
            if _first_process():
                facts["files"] = file_sums(stage)
                write_facts(stage / FACTS, facts)
                final = self.folder / stage.name.removeprefix(".")
                if final.exists():  # of a run that was started over; the new one is on disk already
                    shutil.rmtree(final)
                os.replace(stage, final)
                self._prune(facts)
        except Exception as failure:
            raise self._failed(stage, failure) from failure

    def _prune(self, facts: dict) -> None:
        if self.keep is None:
            return
        kept = {step for _, step in facts["loop"]["best"][: self.keep_best]}
        older = [path for path in _steps(self.folder) if _number(path) <= facts["step"]]
        for path in older[self.keep :]:
            if _number(path) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, stage: pathlib.Path, failure: Exception) -> LoraError:
        if _first_process():
            shutil.rmtree(stage, ignore_errors=True)
        last = _steps(self.folder)
        source = last[0] if last else "the beginning"
        return error(
            "a checkpoint could not be written.",
            path=self.folder / stage.name.removeprefix("."),
            got=f"{type(failure).__name__}: {str(failure)[-500:]}",
            do=f"make room on the disk and start again: it goes on from {source}.",
        )

    def check(self) -> None:
        """Raises what the thread met, if it is done."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written and raises what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """`wait` of all processes: when it returns, the checkpoint can be read by each of them."""
        self.wait()
        _meet("finish")

    def close(self) -> None:
        """Lets a checkpoint under way be finished; says nothing of its failure (`wait` does that)."""
        self.thread.shutdown(wait=True)
        self.checkpointer.close()


def check_base(path: pathlib.Path, saved: list[dict] | None, given: list[dict]) -> None:
    """Raises a `LoraError` that lists every path in which two fingerprints differ: saved, and of params."""
    if saved is None:
        raise error(
            "the checkpoint was saved without its base.",
            path=path,
            got="no fingerprint to compare params with",
            do="save(path, lora, params=params), or load(path) without params.",
        )
    found = differences(saved, given)
    if found:
        raise error(
            "params are not the base that the adapters were saved with.",
            path=[f"{name}: {what}" for name, what in found.items()],
            got=f"{len(found)} leaves that differ",
            want="the same paths, shapes, dtypes and content",
            do="load the base that the adapters were trained on.",
        )


def find_snapshot(path: pathlib.Path, *, rename: bool = False) -> tuple[pathlib.Path, dict] | None:
    """A training checkpoint, or the newest whole one of a ``checkpoint_dir``, and its facts, if there is one.

    A damaged one is passed over with a warning; where all are damaged, that is an error.
    """
    if NAME.fullmatch(path.name) and path.is_dir():
        return path, _checked(path)
    candidates = _steps(path)
    for candidate in candidates:
        try:
            return candidate, _checked(candidate)
        except DamagedError as failure:
            moved = candidate.with_name(f"{candidate.name}.damaged")
            note = (
                f"\npassed over; the next older checkpoint is used{f', it is now {moved}' if rename else ''}"
            )
            warnings.warn(f"{failure}{note}", LoraCheckpointWarning, stacklevel=2)
            if rename:
                shutil.rmtree(moved, ignore_errors=True)
                os.replace(candidate, moved)
    if candidates:
        raise damaged(candidates, "no checkpoint that is whole")
    return None


def read_snapshot(path: pathlib.Path, facts: dict) -> dict[str, np.ndarray]:
    """Every array of a checkpoint that `find_snapshot` found."""
    rest = {f"state.{i}": fact for i, fact in enumerate(facts["state"])}
    return read_arrays(path / "arrays", named_facts(facts["adapters"]) | rest)


def _checked(path: pathlib.Path) -> dict:
    facts = read_facts(path / FACTS, FORMAT, VERSION)
    check_files(path, facts["files"])
    return facts


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a directory, the newest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_number, reverse=True)


def _number(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("step-"))


def _others(state: Any) -> dict[str, PyTree]:
    return {"opt_state": state.opt_state, "step": state.step, "key": state.key, "extra": state.extra}


def _rest(state: Any) -> list[tuple[str, Any]]:
    """Every leaf of the state but the adapters', as ``(path, array)``; Python numbers become arrays."""
    named = named_leaves(_others(state))
    return [(path, leaf if is_array(leaf) else jnp.asarray(leaf)) for path, leaf in named]


def _restored(path: pathlib.Path, facts: dict, like: Any) -> Any:
    """The stored state with the structure and the shardings of ``like``."""
    once = _once(like)
    adapters, _ = describe(once.lora)
    want = [{"path": name, **array_facts(x)} for name, x in _rest(once)]
    wrong = [*_unlike(facts["adapters"], adapters), *_unlike(facts["state"], want)]
    if wrong:
        raise error(
            "the state is not of the kind that the checkpoint holds.",
            path=wrong,
            got=f"{len(wrong)} entries of {path.name} that the state does not have so",
            want="the same adapters (method, rank, alpha, layout), optimizer and extra",
            do="create the state as before, or take another checkpoint_dir; "
            "lx.checkpoint.load reads the adapters alone.",
        )
    arrays = read_snapshot(path, facts)
    lora = build(
        adapters, {name: to_device(arrays[name], fact) for name, fact in named_facts(adapters).items()}
    )
    rest = [to_device(arrays[f"state.{i}"], fact) for i, fact in enumerate(want)]
    rest = [_weak(x) if fact["path"] in facts["weak"] else x for x, fact in zip(rest, want, strict=True)]
    others = jax.tree.unflatten(jax.tree.structure(_others(like)), rest)
    return jax.tree.map(_placed, dataclasses.replace(like, lora=lora, **others), like)


def _weak(x: jax.Array) -> jax.Array:
    """``x`` weakly typed, as it was: a strong type would compile the step again and may widen its results."""
    return jnp.full(x.shape, np.zeros((), x.dtype).item()).at[...].set(x)


def _unlike(saved: list[dict], now: list[dict]) -> list[str]:
    was, have = {entry["path"]: entry for entry in saved}, {entry["path"]: entry for entry in now}
    lines = []
    for name in sorted(was.keys() | have.keys()):
        old, new = was.get(name), have.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'not in the state' if new is None else 'not in the checkpoint'}")
        elif old != new:
            was_flat, now_flat = _flat(old), _flat(new)
            lines += [
                f"{name}: {key}: {was_flat.get(key)} saved, {now_flat.get(key)} in the state"
                for key in sorted(was_flat.keys() | now_flat.keys())
                if was_flat.get(key) != now_flat.get(key)
            ]
    return lines


def _flat(entry: dict) -> dict:
    """Facts of an entry, and those of its fields by ``field.fact``."""
    flat = {}
    for name, value in entry.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": part for key, part in inner.items()}
    return flat


def _placed(value: jax.Array, like: Any) -> Any:
    """``value`` where ``like`` lies, and copied over the devices of a pmap."""
    if not isinstance(like, jax.Array) or not like.committed:
        return value
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(like)
        return jax.random.wrap_key_data(_placed(raw(value), raw(like)), impl=impl)
    host = np.broadcast_to(np.asarray(value), like.shape)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def _whole(x: Any) -> Any:
    """What Orbax can write: global arrays, or numpy where each process holds all of it."""
    local = isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1
    return np.asarray(x) if local else x


def _once(state: Any) -> Any:
    """The state without the device axis that pmap puts before each of its arrays; ``extra`` keeps it."""
    if not np.ndim(state.step):
        return state

    def first(x):
        return x.addressable_shards[0].data[0] if isinstance(x, jax.Array) else x[0]

    lora, opt_state, step, key = jax.tree.map(first, (state.lora, state.opt_state, state.step, state.key))
    return dataclasses.replace(state, lora=lora, opt_state=opt_state, step=step, key=key)


def _first_process() -> bool:
    return jax.process_index() == 0


def _meet(name: str) -> None:
    """All processes wait for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lorax_fn.fit: {name}")
