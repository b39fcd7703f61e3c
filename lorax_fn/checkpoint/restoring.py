"""Reads the checkpoints of `fit`: finds the newest intact one, and restores the state in it."""

import dataclasses
import os
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.checkpoint import schema
from lorax_fn.checkpoint.files import DamagedError, check_files, check_seal, damaged, read_facts
from lorax_fn.checkpoint.fingerprint import differences
from lorax_fn.checkpoint.storage import (
    LoraCheckpointWarning,
    build,
    check_known,
    describe,
    named_facts,
    packed_facts,
    raw,
    read_arrays,
    to_device,
    unpacked,
)
from lorax_fn.checkpoint.trees import leaf_facts, leaves_of, restored
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree

FORMAT, VERSION, FACTS = "lorax_fn.training", 2, "train.json"
NAME = re.compile(r"step-(\d{8,})")


def check_base(
    path: pathlib.Path, saved: list[dict] | None, given: list[dict], *, moved: bool = False
) -> None:
    """Raises a `LoraError` that lists every path where the saved fingerprint and that of params differ.

    ``moved`` says that the init of these adapters moved a part of W, so that their base is not the original.
    """
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
            do="pass the params that split returned with this lora, or save adapters of the original ones: "
            "lx.ranks.to_plain(original, params, lora)."
            if moved
            else "load the base that the adapters were trained on.",
        )


def find_snapshot(path: pathlib.Path, *, rename: bool = False) -> tuple[pathlib.Path, dict] | None:
    """A training checkpoint, or the newest intact one of a ``checkpoint_dir``, and its facts; or None.

    Damaged ones are skipped with a warning; if all are damaged, a `LoraError` is raised.
    """
    if NAME.fullmatch(path.name) and is_snapshot(path):
        return path, _checked(path)
    candidates = [step for step in steps(path) if is_snapshot(step)]
    for candidate in candidates:
        try:
            return candidate, _checked(candidate)
        except DamagedError as failure:
            moved = _free(candidate, "damaged") if rename else None
            note = f"; it was renamed to {moved}" if rename else ""
            text = f"{failure}\npassed over; the next older checkpoint is used{note}"
            warnings.warn(text, LoraCheckpointWarning, stacklevel=2)
            if moved is not None:
                os.replace(candidate, moved)
    if candidates:
        raise damaged(candidates, "no checkpoint that is whole")
    return None


def move_aside(path: pathlib.Path) -> None:
    """Renames what is in the place of a checkpoint but is not one, so that nothing of it is lost."""
    moved = _free(path, "moved")
    os.replace(path, moved)
    warnings.warn(
        f"{path} is not a checkpoint of fit but is in the place of one; it was renamed to {moved}",
        LoraCheckpointWarning,
        stacklevel=2,
    )


def _free(path: pathlib.Path, why: str) -> pathlib.Path:
    """An unused name beside ``path``."""
    names = (f"{path.name}.{why}{number}" for number in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def is_snapshot(path: pathlib.Path) -> bool:
    """Whether a directory is a checkpoint of `fit`, intact or damaged."""
    parts = (FACTS, "arrays", "batches-0.json")
    return path.is_dir() and not path.is_symlink() and any(os.path.lexists(path / part) for part in parts)


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The entries of a directory that have the name of a checkpoint, newest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_snapshot(path: pathlib.Path, facts: dict) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint that `find_snapshot` found."""
    rest = {f"state.{i}": fact for i, fact in enumerate(facts["state"])}
    every = named_facts(facts["adapters"]) | rest
    if not facts.get("packed"):
        return read_arrays(path / "arrays", every)
    return unpacked(read_arrays(path / "arrays", packed_facts(every)), every)


def _checked(path: pathlib.Path) -> dict:
    facts = read_facts(path / FACTS, FORMAT, (1, VERSION))
    check_seal(path / "arrays", facts)
    schema.check(path / FACTS, facts, schema.training_facts(facts["version"]))
    if facts["step"] != step_of(path):
        raise damaged(path / FACTS, f"the facts of step {facts['step']}")
    check_known(path / FACTS, facts["adapters"], facts["base"], stacked=True)
    check_files(path, facts["files"])
    return facts


# --- the state


def others(state: Any) -> dict[str, PyTree]:
    """All parts of a state except the adapters."""
    return {"opt_state": state.opt_state, "step": state.step, "key": state.key, "extra": state.extra}


def began_with(state: Any) -> dict:
    """The key of a run, as JSON."""
    key = once(state).key
    words = np.asarray(raw(key)).reshape(-1)[:64]
    fact = leaf_facts([("key", key)])[0]
    return {"impl": fact["key"], "words": [int(word) for word in words]}


def check_key(path: pathlib.Path, facts: dict, arrays: dict[str, np.ndarray], given: dict) -> None:
    """Raises a `LoraError` if a run with another key is about to continue from this checkpoint.

    Both the key in the checkpoint and the key that the run began with are accepted: the user may pass a state
    that was trained before, and a custom step may change its key.
    """
    index = next(i for i, leaf in enumerate(facts["state"]) if leaf["path"] == "key")
    words = [int(word) for word in arrays[f"state.{index}"].reshape(-1)[:64]]
    saved = {"impl": facts["state"][index]["key"], "words": words}
    first = facts.get("key", saved)
    if given not in (first, saved):
        code = f"jax.numpy.array({first['words']}, 'uint32')"
        if first["impl"]:
            code = f"jax.random.wrap_key_data({code}, impl={first['impl']!r})"
        raise error(
            "the state has another key than the run in this directory.",
            path=path,
            got=f"a key of words {given['words']}",
            want=f"{first['words']}, with which that run began",
            do="give each run its own checkpoint_dir; to continue from this one, create the state with\n"
            + code,
        )


def restored_state(path: pathlib.Path, facts: dict, like: Any, key: dict) -> Any:
    """The stored state with the structure and the shardings of ``like``, whose key is ``key``."""
    single = once(like)
    adapters, _ = describe(single.lora)
    want = leaf_facts(leaves_of(others(single)))
    wrong = [*_unlike(facts["adapters"], adapters), *_unlike(facts["state"], want)]
    if wrong:
        raise error(
            "the state is not of the kind that the checkpoint holds.",
            path=wrong,
            got=f"{len(wrong)} differences from {path.name}",
            want="the same adapters (method, rank, alpha, layout), optimizer and extra",
            do="create the state as before, or use another checkpoint_dir; "
            "lx.checkpoint.load reads the adapters alone.",
        )
    arrays = read_snapshot(path, facts)
    check_key(path, facts, arrays, key)
    stored = {name: to_device(arrays[name], fact) for name, fact in named_facts(adapters).items()}
    rest = restored(want, facts["weak"], arrays, "state")
    parts = jax.tree.unflatten(jax.tree.structure(others(like)), rest)
    return jax.tree.map(_placed, dataclasses.replace(like, lora=build(adapters, stored), **parts), like)


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
    """The facts of an entry, nested ones under ``field.fact``."""
    flat = {}
    for name, value in entry.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": part for key, part in inner.items()}
    return flat


def _placed(value: jax.Array, like: Any) -> Any:
    """``value`` with the sharding of ``like``, and copied to all devices of a pmap."""
    if not isinstance(like, jax.Array) or not like.committed:
        return value
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(like)
        return jax.random.wrap_key_data(_placed(raw(value), raw(like)), impl=impl)
    host = np.broadcast_to(np.asarray(value), like.shape)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def once(state: Any) -> Any:
    """The state without the leading device axis of pmap, which ``extra`` keeps."""
    if not np.ndim(state.step):
        return state

    def first(x):
        return x.addressable_shards[0].data[0] if isinstance(x, jax.Array) else x[0]

    lora, opt_state, step, key = jax.tree.map(first, (state.lora, state.opt_state, state.step, state.key))
    return dataclasses.replace(state, lora=lora, opt_state=opt_state, step=step, key=key)
