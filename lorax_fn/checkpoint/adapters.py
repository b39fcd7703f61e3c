"""Adapters on disk: arrays by Orbax, every static fact and a fingerprint of the base beside them.

A checkpoint is a directory that holds ``adapter.json`` and ``arrays-<id>/`` (Orbax). The JSON names the array
directory, so replacing that one file is what makes a new version appear, whole or not at all:

    format, version     "lorax_fn.adapter", 2
    arrays              name of the array directory
    files               {name: {size, crc32}} of every file in it
    adapters            one entry per path, as `storage` says
    base                one entry per leaf of params: path, shape, dtype, crc32 of a sample; or null
    extra               what `save` was given so: structure, facts of the leaves, weak types; or null
    crc32               of all the above; ``facts.sha256`` in the array directory is of all that too

Version 1 had no sizes, no extra and no sha256; it is read as before. `load` reads the adapters of a training
checkpoint (`checkpoint/runs.py`) too. Orbax is imported when a function here is called.
"""

import os
import pathlib
import re
import sys
import uuid
import warnings
from typing import Any

import jax
import numpy as np

from lorax_fn.checkpoint import schema
from lorax_fn.checkpoint.files import (
    SEAL,
    DamagedError,
    check_files,
    check_seal,
    file_sums,
    local,
    parse,
    read_facts,
    read_small,
    remove,
    sweep,
    unwritable,
    write_facts,
    write_seal,
)
from lorax_fn.checkpoint.fingerprint import differences, fingerprint
from lorax_fn.checkpoint.lock import NAME as LOCK
from lorax_fn.checkpoint.lock import Lock
from lorax_fn.checkpoint.restoring import check_base, find_snapshot, read_snapshot
from lorax_fn.checkpoint.storage import (
    LoraCheckpointWarning,
    build,
    check_known,
    checkpointer,
    describe,
    named_facts,
    read_arrays,
    storable,
    to_device,
)
from lorax_fn.checkpoint.trees import (
    by_name,
    fitted,
    gathered,
    leaf_facts,
    leaves_of,
    restored,
    skeleton,
    together,
    weak_paths,
)
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.fitting import check_adapters, check_fits, misfits
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_array

FORMAT, VERSION, FACTS = "lorax_fn.adapter", 2, "adapter.json"
STAGE, ARRAYS = re.compile(r"\.new-[0-9a-f]{12}"), re.compile(r"arrays-[0-9a-f]{12}")


def save(
    path: str | os.PathLike, lora: dict[str, Adapter], *, params: PyTree = None, extra: PyTree = None
) -> None:
    """Writes adapters to a directory, atomically: a crash leaves the old checkpoint or the new one.

    Where several processes run, all of them call it: arrays that no process holds whole are gathered, and the
    first process writes.

    Args:
      path: directory to make, or an older adapter checkpoint to replace. Other files in it stay.
      lora: ``dict[str, Adapter]``; arrays keep their dtype, bit for bit.
      params: the base that ``lora`` belongs to. Its paths, shapes, dtypes and a hash of at most 4096 elements
        of each float leaf are stored, for `load` to compare; of abstract leaves no hash is. Give it wherever
        an init moved a part of the weights into the adapters (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA): no
        adapter tells that by itself, and on the original base it is wrong.
      extra: what training moved besides the adapters: ``state.extra``, such as batch statistics. Any tree of
        arrays and numbers; `load_extra` reads it.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, came out of `dropout`, does not fit ``params`` or has a
        field that can't be stored; ``extra`` holds something else than arrays and numbers; ``path`` holds
        something that is not an adapter checkpoint, is the address of a remote store, or can't be written.

    Warns:
      LoraCheckpointWarning: ``params`` hold running statistics, and no ``extra`` was given.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> from lorax_fn import checkpoint
      >>> params, lora = {"b": jnp.zeros(2)}, {"b": lx.Full(jnp.ones(2))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint.save(f"{folder}/adapter", lora, params=params)
      ...     checkpoint.load(f"{folder}/adapter", params=params)["b"].value
      Array([1., 1.], dtype=float32)
    """
    folder = local(path, write=True)
    check_adapters(lora)
    if params is not None:
        check_fits(dict(flatten_with_paths(params)[0]), lora)
        _check_statistics(params, extra)
    else:
        _warn_of_residuals(path, lora)
    adapters, arrays = describe(lora)
    named = leaves_of(extra)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": f"arrays-{uuid.uuid4().hex[:12]}",
        "files": None,
        "adapters": adapters,
        "base": None if params is None else fingerprint(params),
        "extra": None
        if extra is None
        else {"tree": skeleton(extra), "leaves": leaf_facts(named), "weak": weak_paths(named)},
    }
    content = {name: gathered(x) for name, x in (arrays | by_name(named, "extra")).items()}
    with together("save"):
        if jax.process_index() == 0:
            _check_replaceable(folder)
            try:
                _write(folder, facts, content)
            except LoraError:
                raise
            except Exception as failure:  # Orbax and its libraries raise errors of many kinds
                do = "make room on the disk, or save to another path; what was there before is still there."
                raise unwritable(folder, failure, do) from failure


def load(path: str | os.PathLike, *, params: PyTree = None, strict: bool = True) -> dict[str, Adapter]:
    """Reads the adapters that `save` wrote, or those of a training checkpoint of `fit`.

    What is read is checked against sums first: damage, and facts that do not belong to the arrays, are found.
    A sum is no signature: load only what you would trust anyway.

    Args:
      path: the checkpoint's directory; or the ``checkpoint_dir`` of `fit`, whose newest checkpoint that is
        whole is then read; or one ``step-<number>`` directory in it.
      params: the base to train or merge on, compared with the one that `save` was given. Abstract leaves are
        compared by shape and dtype alone.
      strict: False loads onto another base, too: adapters that have no leaf in ``params``, or one of another
        shape, are left out; a `LoraCheckpointWarning` lists them and all that differs.

    Returns:
      The same ``dict[str, Adapter]``, bit for bit, on the default device. Statistics that training moved are
      what `load_extra` reads.

    Raises:
      LoraError: there is no checkpoint at ``path``, it is damaged, of a later format or of an unknown method;
        or ``params`` differ from the base it was saved with (every differing path is named), or it was saved
        without one.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> from lorax_fn import checkpoint
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint.save(f"{folder}/adapter", {"b": lx.Full(jnp.ones(2, jnp.bfloat16))})
      ...     checkpoint.load(f"{folder}/adapter")["b"].value.dtype
      dtype(bfloat16)
    """
    folder, facts, arrays, _ = _found(local(path))
    given = None if params is None else fingerprint(params, facts["version"])
    if given is not None and strict:
        moved = any(entry["static"].get("residual") for entry in facts["adapters"])
        check_base(folder, facts["base"], given, moved=moved)
    stored = named_facts(facts["adapters"])
    lora = build(facts["adapters"], {name: to_device(arrays[name], fact) for name, fact in stored.items()})
    return lora if given is None or strict else _fitting(folder, facts["base"], params, given, lora)


def load_extra(path: str | os.PathLike, like: PyTree = None) -> PyTree:
    """Reads what training moved besides the adapters: the ``extra`` that `save` was given, or that of a run.

    Args:
      path: as for `load`.
      like: a tree of the same structure, such as the ``extra`` that training began with; arrays may be
        abstract. Needed where the tree has nodes other than dicts, lists, tuples and None (``nnx.State``).

    Returns:
      The tree, bit for bit, on the default device; None where the state of a run had no extra. That of a run
      under pmap keeps the axis of devices.

    Raises:
      LoraError: as `load`; or `save` was given no ``extra``, or it is not of the structure of ``like``.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> from lorax_fn import checkpoint
      >>> lora, statistics = {"b": lx.Full(jnp.ones(2))}, {"bn": {"mean": jnp.ones(2)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint.save(f"{folder}/adapter", lora, extra=statistics)
      ...     checkpoint.load_extra(f"{folder}/adapter")
      {'bn': {'mean': Array([1., 1.], dtype=float32)}}
    """
    folder, facts, arrays, kept = _found(local(path))
    if kept is None:
        raise error(
            "this checkpoint was saved without extra.",
            path=folder,
            do="save(path, lora, params=params, extra=state.extra); for adapters alone, load(path).",
        )
    tree, leaves, weak, names = kept
    stored = restored(leaves, weak, {f"extra.{i}": arrays[name] for i, name in enumerate(names)}, "extra")
    return fitted(folder, tree, leaves, stored, like)


def _found(path: pathlib.Path) -> tuple[pathlib.Path, dict, dict[str, np.ndarray], tuple | None]:
    """Where the checkpoint is, its facts and arrays, and (structure, facts, weak, names) of its extra."""
    if not (path / FACTS).is_file() and (snapshot := find_snapshot(path)) is not None:
        path, facts = snapshot
        extra = [(i, leaf) for i, leaf in enumerate(facts["state"]) if leaf["path"].split("/")[0] == "extra"]
        leaves = [{**leaf, "path": leaf["path"].removeprefix("extra").removeprefix("/")} for _, leaf in extra]
        weak = [name.removeprefix("extra").removeprefix("/") for name in facts["weak"] if name[:5] == "extra"]
        kept = facts.get("extra"), leaves, weak, [f"state.{i}" for i, _ in extra]
        return path, facts, read_snapshot(path, facts), kept
    facts = _read(path)
    extra = facts.get("extra")
    names = named_facts(facts["adapters"])
    if extra is None:
        return path, facts, read_arrays(path / facts["arrays"], names), None
    names |= {f"extra.{i}": leaf for i, leaf in enumerate(extra["leaves"])}
    kept = extra["tree"], extra["leaves"], extra["weak"], [f"extra.{i}" for i in range(len(extra["leaves"]))]
    return path, facts, read_arrays(path / facts["arrays"], names), kept


def _read(path: pathlib.Path) -> dict:
    """The facts of an adapter checkpoint, all of them and its files checked."""
    if not os.path.lexists(path / FACTS):
        raise error(
            "there is no adapter checkpoint here.",
            path=path,
            got=f"no {FACTS} in it" if path.exists() else "no such directory",
            do="check the path; save writes a directory.",
        )
    facts = read_facts(path / FACTS, FORMAT, (1, VERSION))
    schema.check(path / FACTS, facts.get("arrays"), schema.ARRAYS)
    check_seal(path / facts["arrays"], facts)
    schema.check(path / FACTS, facts, schema.adapter_facts(facts["version"]))
    check_known(path / FACTS, facts["adapters"], facts["base"])
    check_files(path / facts["arrays"], facts["files"])
    return facts


def _fitting(
    path: pathlib.Path, base: list[dict] | None, params: PyTree, given: list[dict], lora: dict
) -> dict:
    """The adapters that fit ``params``; a warning says what does not, and what else differs."""
    skipped = {name: got for name, got, _ in misfits(dict(flatten_with_paths(params)[0]), lora)}
    lines = [f"  {name}: skipped: {got}" for name, got in skipped.items()]
    if base is None:
        lines.append("  nothing was compared: the checkpoint was saved without its base")
    differing = differences(base, given) if base else {}
    lines += [f"  {name}: {what}" for name, what in differing.items()]
    if lines:
        text = f"{path} belongs to another base; {len(skipped)} of {len(lora)} adapters were skipped:"
        warnings.warn("\n".join([text, *lines]), LoraCheckpointWarning, stacklevel=3)
    return {name: adapter for name, adapter in lora.items() if name not in skipped}


def _warn_of_residuals(path: Any, lora: dict[str, Adapter]) -> None:
    """Says that adapters which took a part of W are of no use without the base that is left of it."""
    moved = [name for name, adapter in lora.items() if getattr(adapter, "residual", False)]
    if moved:
        listed = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        warnings.warn(
            f"{path} is saved without the params that its adapters belong to: their init took a part of W "
            f"({listed}), so that on the original weights they give other numbers.\n"
            "  do: save(path, lora, params=params) with the params that split returned, or save what "
            "lx.ranks.to_plain(original, params, lora) makes for the original ones.",
            LoraCheckpointWarning,
            stacklevel=3,
        )


def _check_statistics(params: PyTree, extra: PyTree) -> None:
    """Warns where the base holds statistics that training may move, and nobody says where they are."""
    if extra is not None:
        return
    nnx = sys.modules.get("flax.nnx")
    found = [
        path for path, x in flatten_with_paths(params)[0] if "batch_stats" in path.split("/") and is_array(x)
    ]
    if nnx is not None:
        boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.BatchStat))
        found += [type(x).__name__ for x in boxes if isinstance(x, nnx.BatchStat)]
    if found:
        warnings.warn(
            f"{len(found)} running statistics in params, such as {found[0]}, are not saved with these "
            "adapters. If training moved them, save(path, lora, params=..., extra=state.extra) keeps them, "
            "and load_extra reads them; if not, extra={} says so.",
            LoraCheckpointWarning,
            stacklevel=3,
        )


def _check_replaceable(path: pathlib.Path) -> None:
    ours = re.compile(f"{STAGE.pattern}|{re.escape(LOCK)}")  # what a save that was killed left
    others = [file for file in path.iterdir() if not ours.fullmatch(file.name)] if path.is_dir() else []
    new = not os.path.lexists(path) or (path.is_dir() and not others)
    # by the text alone: a damaged checkpoint may be replaced too
    facts = path / FACTS
    old = facts.is_file() and not facts.is_symlink() and FORMAT.encode() in facts.read_bytes()
    if not (new or old):
        raise error(
            "this path holds something that is not an adapter checkpoint.",
            path=path,
            got="a directory of other files" if path.is_dir() else "a file",
            want="a new path, an empty directory or an older adapter checkpoint",
            do="choose another path; nothing was overwritten.",
        )


def _write(path: pathlib.Path, facts: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes all of it into a directory of its own inside ``path``, then puts it in place."""
    fresh = not path.exists()
    stage = path / f".new-{facts['arrays'].removeprefix('arrays-')}"
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(path)
        try:
            stage.mkdir()
            _write_arrays(stage / facts["arrays"], arrays)
            facts["files"] = file_sums(stage / facts["arrays"])
            write_seal(stage / facts["arrays"], facts)
            write_facts(stage / FACTS, facts)
            _publish(stage, path, facts["arrays"])
        finally:
            sweep(stage)
            lock.release()
    finally:
        if fresh and not any(path.iterdir()):
            path.rmdir()


def _write_arrays(path: pathlib.Path, tree: dict[str, np.ndarray]) -> None:
    with checkpointer() as writer:
        writer.save(path, storable(tree))


def _publish(stage: pathlib.Path, path: pathlib.Path, arrays: str) -> None:
    """Makes the staged checkpoint appear at ``path`` by one rename, and removes the one before."""
    before = _files_of(path)
    os.replace(stage / arrays, path / arrays)
    os.replace(stage / FACTS, path / FACTS)  # from here on the new arrays are the checkpoint
    for old in path.iterdir():
        if STAGE.fullmatch(old.name) and old != stage:
            sweep(old)  # what a crash left
        elif ARRAYS.fullmatch(old.name) and old.name != arrays and not old.is_symlink():
            if old.name in before:
                remove(old, SEAL, before[old.name])
            else:
                sweep(old)


def _files_of(path: pathlib.Path) -> dict[str, list[str]]:
    """The array directory of the checkpoint that is replaced, and its files; nothing where it is damaged."""
    try:
        facts: Any = parse(read_small(path / FACTS, 64 << 20, path), path)
        schema.check(path, facts, schema.adapter_facts(facts["version"]))
    except (DamagedError, LoraError, KeyError, TypeError):
        return {}
    return {facts["arrays"]: list(facts["files"])}
