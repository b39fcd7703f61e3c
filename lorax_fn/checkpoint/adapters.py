"""Adapters on disk: Orbax stores the arrays; static fields and a fingerprint of the base are JSON.

A checkpoint is a directory with ``adapter.json`` and ``arrays-<id>/`` (Orbax). The JSON names the array
directory, so a new version appears atomically when that one file is replaced:

    format, version     "lorax_fn.adapter", 2
    arrays              name of the array directory
    files               {name: {size, crc32}} for every file in it
    adapters            one entry per path, as described in `storage`
    base                one entry per leaf of params: path, shape, dtype, crc32 of a sample; or null
    extra               the tree given to `save`: structure, shapes and dtypes, weakly typed leaves; or null
    crc32               of all the above, as is ``facts.sha256`` in the array directory

Version 1, which had no sizes, extra or sha256, can still be read. `load` also reads the adapters of a
training checkpoint (`checkpoint/runs.py`). Orbax is imported when a function here is called.
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
    path: str | os.PathLike[str], lora: dict[str, Adapter], *, params: PyTree = None, extra: PyTree = None
) -> None:
    """Writes adapters to a directory atomically: a crash leaves either the old checkpoint or the new one.

    With several processes, all of them must call it: arrays spread over processes are gathered, and the first
    process writes.

    Args:
      path: directory to create, or an older adapter checkpoint to replace. Other files in it stay.
      lora: ``dict[str, Adapter]``; arrays are stored bit for bit.
      params: the base that ``lora`` belongs to. Its paths, shapes and dtypes, and a hash of at most 4096
        elements of each concrete float leaf, are stored for `load` to compare. Always pass it if the init
        moved a part of the weights into the adapters (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), because such
        adapters give wrong results on the original base.
      extra: what training changed besides the adapters, ``state.extra``, such as batch statistics: any tree
        of arrays and numbers. `load_extra` reads it.

    Raises:
      LoraError: ``lora`` is not a dict of adapters, came out of `dropout`, does not fit ``params`` or has a
        field that can't be stored; ``extra`` contains anything but arrays and numbers; ``path`` contains
        something that is not an adapter checkpoint, is a remote address, or can't be written.

    Warns:
      LoraCheckpointWarning: ``params`` contain running statistics, and no ``extra`` was given; or no
        ``params`` were given, and the init moved a part of the weights into the adapters.

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


def load(path: str | os.PathLike[str], *, params: PyTree = None, strict: bool = True) -> dict[str, Adapter]:
    """Reads the adapters that `save` wrote, or those of a training checkpoint of `fit`.

    Checksums are verified first, which detects damage and static fields that do not belong to the arrays. A
    checksum is not a signature: load only files that you trust.

    Args:
      path: the checkpoint's directory; or the ``checkpoint_dir`` of `fit`, whose newest intact checkpoint is
        read; or one ``step-<number>`` directory in it.
      params: the base to train or merge on, which is compared with the one that `save` was given. Abstract
        leaves are compared by shape and dtype only.
      strict: False also loads onto another base. Adapters without a leaf in ``params``, or with a leaf of
        another shape, are left out; a `LoraCheckpointWarning` lists them and all other differences.

    Returns:
      The same ``dict[str, Adapter]``, bit for bit, on the default device. `load_extra` reads the rest of what
      training changed.

    Raises:
      LoraError: there is no checkpoint at ``path``; it is damaged, of a later format or of an unknown method;
        or ``params`` differ from the base it was saved with, or it was saved without one.

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


def load_extra(path: str | os.PathLike[str], like: PyTree = None) -> PyTree:
    """Reads what training changed besides the adapters: the ``extra`` given to `save`, or that of a run.

    Args:
      path: as for `load`.
      like: a tree of the same structure, such as the ``extra`` that training began with; arrays may be
        abstract. Required if the tree has nodes other than dicts, lists, tuples and None (``nnx.State``).

    Returns:
      The tree, bit for bit, on the default device; None if a run's state had no extra. The extra of a run
      under pmap keeps its device axis.

    Raises:
      LoraError: as for `load`; or `save` was given no ``extra``, or its structure is not that of ``like``.

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
    """The checkpoint's directory, facts and arrays, and (structure, facts, weak, names) of its extra."""
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
    """The facts of an adapter checkpoint, after checking them and its files."""
    if not os.path.lexists(path / FACTS):
        raise error(
            "there is no adapter checkpoint here.",
            path=path,
            got=f"no {FACTS} in it" if path.exists() else "no such directory",
            do="check the path; a checkpoint is a directory.",
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
    """The adapters that fit ``params``. A warning lists the others, and all other differences."""
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
    """Warns that adapters whose init moved a part of W are useless without the remaining base."""
    moved = [name for name, adapter in lora.items() if getattr(adapter, "residual", False)]
    if moved:
        listed = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        warnings.warn(
            f"{path} is saved without the params that its adapters belong to: their init took a part of W "
            f"({listed}), so they give wrong results on the original weights.\n"
            "  do: save(path, lora, params=params) with the params that split returned, or save "
            "lx.ranks.to_plain(original, params, lora), which fits the original ones.",
            LoraCheckpointWarning,
            stacklevel=3,
        )


def _check_statistics(params: PyTree, extra: PyTree) -> None:
    """Warns if the base contains statistics that training may have changed, and no extra is saved."""
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
            "adapters. If training changed them, save(path, lora, params=..., extra=state.extra) keeps them, "
            "and load_extra reads them; if not, pass extra={}.",
            LoraCheckpointWarning,
            stacklevel=3,
        )


def _check_replaceable(path: pathlib.Path) -> None:
    ours = re.compile(f"{STAGE.pattern}|{re.escape(LOCK)}")  # left by a save that was killed
    others = [file for file in path.iterdir() if not ours.fullmatch(file.name)] if path.is_dir() else []
    new = not os.path.lexists(path) or (path.is_dir() and not others)
    # Only the text is searched, so that a damaged checkpoint can be replaced too.
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
    """Writes everything into a staging directory inside ``path``, then moves it into place."""
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
    """Makes the staged checkpoint appear at ``path`` by one rename, and removes the previous one."""
    before = _files_of(path)
    os.replace(stage / arrays, path / arrays)
    os.replace(stage / FACTS, path / FACTS)  # from here on the new arrays are the checkpoint
    for old in path.iterdir():
        if STAGE.fullmatch(old.name) and old != stage:
            sweep(old)  # left by a crash
        elif ARRAYS.fullmatch(old.name) and old.name != arrays and not old.is_symlink():
            if old.name in before:
                remove(old, SEAL, before[old.name])
            else:
                sweep(old)


def _files_of(path: pathlib.Path) -> dict[str, list[str]]:
    """The array directory of the checkpoint to replace, and its files; empty if it is damaged."""
    try:
        facts: Any = parse(read_small(path / FACTS, 64 << 20, path), path)
        schema.check(path, facts, schema.adapter_facts(facts["version"]))
    except (DamagedError, LoraError, KeyError, TypeError):
        return {}
    return {facts["arrays"]: list(facts["files"])}
