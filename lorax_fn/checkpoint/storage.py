"""How adapters lie on disk: static facts as JSON, arrays by Orbax, a crc32 of every file and of the facts.

Each adapter is an entry ``{path, method, static {field: value}, arrays {field: facts}}``. A static value is a
number, a string, a bool or null; ``[...]`` is a tuple and an object of stack, inputs and outputs a Layout.
The facts of an array are shape and dtype, and for PRNG keys their implementation; the array itself is called
``<number of the entry>.<field>``. `checkpoint` and the training checkpoints of `fit` both lie so. Orbax is
imported when a function here is called.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn.methods
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.layouts import Layout


class LoraCheckpointWarning(UserWarning):
    """A checkpoint was not read in full: a damaged one was passed over, or adapters were left out.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraCheckpointWarning, UserWarning)
      True
    """


class DamagedError(LoraError):
    """A checkpoint of which a part is missing or changed."""


def describe(lora: Mapping[str, Adapter]) -> tuple[list[dict], dict[str, Any]]:
    """One entry an adapter, and the arrays by name (keys as raw words); arrays are not copied or moved."""
    entries, arrays = [], {}
    for i, (path, adapter) in enumerate(sorted(lora.items())):
        static, held = _fields(path, adapter)
        arrays |= {f"{i}.{field}": raw(value) for field, value in held.items()}
        facts = {field: array_facts(value) for field, value in held.items()}
        entries.append({"path": path, "method": type(adapter).__name__, "static": static, "arrays": facts})
    return entries, arrays


def named_facts(entries: list[dict]) -> dict[str, dict]:
    """The facts of every array of ``entries``, by the array's name."""
    return {
        f"{i}.{field}": facts for i, entry in enumerate(entries) for field, facts in entry["arrays"].items()
    }


def check_known(entries: list[dict]) -> None:
    """Raises a `LoraError` where an entry's method or fields are of no imported class."""
    classes = _methods()
    unknown = [entry for entry in entries if not _known(entry, classes)]
    if unknown:
        raise error(
            "the checkpoint holds adapters of an unknown method, or with unknown fields.",
            path=[entry["path"] for entry in unknown],
            got=sorted({f"{e['method']}({', '.join([*e['static'], *e['arrays']])})" for e in unknown}),
            want=sorted(name for name, found in classes.items() if len(found) == 1),
            do="update lorax_fn, or import the one module that defines the method before loading.",
        )


def build(entries: list[dict], arrays: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters of ``entries``, which `check_known` has seen; ``arrays`` are device arrays by name."""
    classes = _methods()
    lora = {}
    for i, entry in enumerate(entries):
        (cls,) = classes[entry["method"]]
        values = {name: _decode(value) for name, value in entry["static"].items()}
        values |= {field: arrays[f"{i}.{field}"] for field in entry["arrays"]}
        lora[entry["path"]] = cls(**values)
    return lora


def _methods() -> dict[str, list[type[Adapter]]]:
    """Every adapter class by its name: those of `lorax_fn.methods`, and any other that is imported."""
    for module in pkgutil.iter_modules(lorax_fn.methods.__path__, "lorax_fn.methods."):
        importlib.import_module(module.name)
    classes: dict[str, list[type[Adapter]]] = {}
    queue = list(Adapter.__subclasses__())
    while queue:
        cls = queue.pop()
        queue += cls.__subclasses__()
        classes.setdefault(cls.__name__, []).append(cls)
    for name, found in classes.items():  # a user's class of the same name takes no method's place
        classes[name] = [cls for cls in found if cls.__module__.startswith("lorax_fn.")] or found
    return classes


def _known(entry: dict, classes: dict[str, list[type[Adapter]]]) -> bool:
    found = classes.get(entry["method"], [])
    fields = {field.name for cls in found for field in dataclasses.fields(cls)}
    return len(found) == 1 and entry["static"].keys() | entry["arrays"].keys() <= fields


def _fields(path: str, adapter: Adapter) -> tuple[dict, dict]:
    """An adapter's static fields as JSON values, and its arrays; None where a field holds none."""
    static, arrays, wrong = {}, {}, []
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        try:
            if isinstance(value, jax.Array | np.ndarray):  # numpy scalars are static facts
                arrays[field.name] = value
            else:
                static[field.name] = _encode(value)
        except TypeError:
            wrong.append(field.name)
    if wrong:
        raise error(
            "an adapter's field can't be stored.",
            path=[f"{path}: {name}" for name in wrong],
            got=[type(getattr(adapter, name)).__name__ for name in wrong],
            want="an array; or a static number, string, bool, None, Layout or tuple of these",
            do="give the method fields of these kinds.",
        )
    return static, arrays


def _encode(value: Any) -> Any:
    if isinstance(value, Layout):
        return {name: list(getattr(value, name)) for name in ("stack", "inputs", "outputs")}
    if isinstance(value, tuple):
        return [_encode(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return Layout(**value)
    return tuple(_decode(part) for part in value) if isinstance(value, list) else value


# --- arrays


def _key_impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None


def raw(x: Any) -> Any:
    """``x``, or the words of a PRNG key."""
    return jax.random.key_data(x) if _key_impl(x) else x


def array_facts(x: Any) -> dict:
    """Shape and dtype as stored, and the implementation of PRNG keys."""
    words = raw(x)
    return {"shape": list(words.shape), "dtype": str(words.dtype), "key": _key_impl(x)}


def to_device(x: np.ndarray, facts: dict) -> jax.Array:
    """A stored array on the default device, as a key again where it was one."""
    array = jnp.array(x)
    if array.dtype != x.dtype:
        raise error(
            "this JAX can't hold the checkpoint's arrays.",
            got=f"{x.dtype} would become {array.dtype}",
            do='jax.config.update("jax_enable_x64", True).',
        )
    return jax.random.wrap_key_data(array, impl=facts["key"]) if facts["key"] else array


def storable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What Orbax is handed: it refuses arrays of no elements (their facts say all) and trees of no leaf."""
    return {name: x for name, x in arrays.items() if x.size} or {"none": np.zeros(1)}


def read_arrays(folder: pathlib.Path, facts: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """Every array of ``facts`` by name, on the host; `check_files` goes before."""
    import orbax.checkpoint as ocp

    blank = {name: np.empty(fact["shape"], jnp.dtype(fact["dtype"])) for name, fact in facts.items()}
    stored = {name: array for name, array in blank.items() if array.size}
    if stored:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore(folder, stored)
    return {name: np.asarray(array) for name, array in (blank | stored).items()}


# --- files


def file_sums(folder: pathlib.Path) -> dict[str, int]:
    """``{name: crc32}`` of every file below ``folder``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): zlib.crc32(file.read_bytes()) for file in files}


def check_files(folder: pathlib.Path, sums: dict[str, int]) -> None:
    """Raises a `LoraError` that names every file which is missing or changed.

    It goes before Orbax, which leaves broken event loops behind when several reads fail at once.
    """
    found = file_sums(folder)
    wrong = [folder / name for name, crc in sums.items() if found.get(name) != crc]
    if wrong:
        raise damaged(wrong, "missing files, or content that does not match its crc32")


def _crc(facts: dict) -> int:
    rest = {name: value for name, value in facts.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def write_facts(path: pathlib.Path, facts: dict) -> None:
    """Writes ``facts`` and their own crc32 as JSON, down to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(facts | {"crc32": _crc(facts)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_facts(path: pathlib.Path, form: str, version: int) -> dict:
    """Reads what `write_facts` wrote; another format or version, or any damage, is a `LoraError`."""
    try:
        facts = json.loads(path.read_text("utf-8"))
        found = facts["format"], facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise damaged(path, f"{type(failure).__name__}: {failure}") from failure
    if facts.get("crc32") != _crc(facts):  # first: a flipped byte may lie in the format's name
        raise damaged(path, "content that does not match its own crc32")
    if found != (form, version):
        raise error(
            "unknown checkpoint format.",
            path=path,
            got="{} version {}".format(*found),
            want=f"{form} version {version}",
            do="update lorax_fn.",
        )
    return facts


def damaged(path: Any, got: str) -> DamagedError:
    """The error of a checkpoint that is not what was written."""
    text = error(
        "the checkpoint is damaged.",
        path=path,
        got=got,
        do="restore the directory from a copy, or save the adapters again.",
    )
    return DamagedError(str(text))
