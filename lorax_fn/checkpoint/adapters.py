"""Adapters on disk: arrays by Orbax, every static fact and a fingerprint of the base beside them.

A checkpoint is a directory that holds ``adapter.json`` and ``arrays-<id>/`` (Orbax). The JSON names the array
directory, so replacing that one file is what makes a new version appear, whole or not at all:

    format, version     "lorax_fn.adapter", 1
    arrays              name of the array directory
    files               {name: crc32} of every file in it
    adapters            one entry a path, as `storage` says
    base                one entry a leaf of params: path, shape, dtype, crc32 of a sample; or null
    crc32               of all the above

`load` reads the adapters of a training checkpoint (`training/snapshots.py`) too. Orbax is imported when a
function here is called.
"""

import os
import pathlib
import shutil
import uuid
import warnings

import numpy as np

from lorax_fn.checkpoint.fingerprint import differences, fingerprint
from lorax_fn.checkpoint.runs import check_base, find_snapshot, read_snapshot
from lorax_fn.checkpoint.storage import (
    LoraCheckpointWarning,
    build,
    check_files,
    check_known,
    describe,
    file_sums,
    named_facts,
    read_arrays,
    read_facts,
    storable,
    to_device,
    write_facts,
)
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters, check_fits, misfits
from lorax_fn.core.trees import PyTree, flatten_with_paths

FORMAT, VERSION, FACTS = "lorax_fn.adapter", 1, "adapter.json"


def save(path: str | os.PathLike, lora: dict[str, Adapter], *, params: PyTree = None) -> None:
    """Writes adapters to a directory, atomically: a crash leaves the old checkpoint or the new one.

    Args:
      path: directory to make, or an older adapter checkpoint to replace.
      lora: ``dict[str, Adapter]``; arrays keep their dtype, bit for bit.
      params: the base that ``lora`` belongs to. Its paths, shapes, dtypes and a hash of at most 4096 elements
        a leaf are stored, for `load` to compare; of abstract leaves no hash is.

    Raises:
      LoraError: ``lora`` is no dict of adapters, came out of `dropout`, does not fit ``params`` or has a
        field that can't be stored; ``path`` holds something that is not an adapter checkpoint.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> from lorax_fn import checkpoint
      >>> params, lora = {"b": jnp.zeros(2)}, {"b": lx.Full(jnp.ones(2))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint.save(f"{folder}/adapter", lora, params=params)
      ...     checkpoint.load(f"{folder}/adapter", params=params)["b"].value
      Array([1., 1.], dtype=float32)
    """
    path = pathlib.Path(os.path.abspath(path))
    check_adapters(lora)
    if params is not None:
        check_fits(dict(flatten_with_paths(params)[0]), lora)
    _check_replaceable(path)
    adapters, arrays = describe(lora)
    unique = uuid.uuid4().hex[:12]
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": f"arrays-{unique}",
        "files": None,
        "adapters": adapters,
        "base": None if params is None else fingerprint(params),
    }
    stage = path.parent / f".{path.name}.{unique}"
    try:
        stage.mkdir(parents=True)
        _write_arrays(stage / facts["arrays"], {name: np.asarray(x) for name, x in arrays.items()})
        facts["files"] = file_sums(stage / facts["arrays"])
        write_facts(stage / FACTS, facts)
        _publish(stage, path, facts["arrays"])
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load(path: str | os.PathLike, *, params: PyTree = None, strict: bool = True) -> dict[str, Adapter]:
    """Reads the adapters that `save` wrote, or those of a training checkpoint of `fit`.

    Args:
      path: the checkpoint's directory; or the ``checkpoint_dir`` of `fit`, whose newest checkpoint that is
        whole is then read; or one ``step-<number>`` directory in it.
      params: the base to train or merge on, compared with the one that `save` was given. Abstract leaves are
        compared by shape and dtype alone.
      strict: False loads onto another base, too: adapters that have no leaf in ``params``, or one of another
        shape, are left out; a `LoraCheckpointWarning` lists them and all that differs.

    Returns:
      The same ``dict[str, Adapter]``, bit for bit, on the default device.

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
    path = pathlib.Path(os.path.abspath(path))
    if (path / FACTS).is_file() or (snapshot := find_snapshot(path)) is None:
        facts, arrays = _read(path)
    else:
        path, facts = snapshot
        check_known(facts["adapters"])
        arrays = read_snapshot(path, facts)
    if params is not None and strict:
        check_base(path, facts["base"], fingerprint(params))
    stored = named_facts(facts["adapters"])
    lora = build(facts["adapters"], {name: to_device(arrays[name], fact) for name, fact in stored.items()})
    return lora if params is None or strict else _fitting(path, facts["base"], params, lora)


def _read(path: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    if not (path / FACTS).is_file():
        raise error(
            "there is no adapter checkpoint here.",
            path=path,
            got=f"no {FACTS} in it" if path.exists() else "no such directory",
            do="check the path; save writes a directory.",
        )
    facts = read_facts(path / FACTS, FORMAT, VERSION)
    check_known(facts["adapters"])
    check_files(path / facts["arrays"], facts["files"])
    return facts, read_arrays(path / facts["arrays"], named_facts(facts["adapters"]))


def _fitting(path: pathlib.Path, base: list[dict] | None, params: PyTree, lora: dict) -> dict:
    """The adapters that fit ``params``; a warning says what does not, and what else differs."""
    skipped = {name: got for name, got, _ in misfits(dict(flatten_with_paths(params)[0]), lora)}
    lines = [f"  {name}: skipped: {got}" for name, got in skipped.items()]
    if base is None:
        lines.append("  nothing was compared: the checkpoint was saved without its base")
    differing = differences(base, fingerprint(params)) if base else {}
    lines += [f"  {name}: {what}" for name, what in differing.items()]
    if lines:
        text = f"{path} belongs to another base; {len(skipped)} of {len(lora)} adapters were skipped:"
        warnings.warn("\n".join([text, *lines]), LoraCheckpointWarning, stacklevel=3)
    return {name: adapter for name, adapter in lora.items() if name not in skipped}


def _check_replaceable(path: pathlib.Path) -> None:
    new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    # by the text alone: a damaged checkpoint may be replaced too
    old = (path / FACTS).is_file() and FORMAT.encode() in (path / FACTS).read_bytes()
    if not (new or old):
        raise error(
            "this path holds something that is not an adapter checkpoint.",
            path=path,
            got="a directory of other files" if path.is_dir() else "a file",
            want="a new path, an empty directory or an older adapter checkpoint",
            do="choose another path; nothing was overwritten.",
        )


def _write_arrays(path: pathlib.Path, tree: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, storable(tree))


def _publish(stage: pathlib.Path, path: pathlib.Path, arrays: str) -> None:
    """Makes the staged checkpoint appear at ``path`` by one rename."""
    if not path.exists() or not any(path.iterdir()):
        os.replace(stage, path)
        return
    os.replace(stage / arrays, path / arrays)
    os.replace(stage / FACTS, path / FACTS)  # from here on the new arrays are the checkpoint
    for old in path.glob("arrays-*"):
        if old.name != arrays:
            shutil.rmtree(old, ignore_errors=True)
