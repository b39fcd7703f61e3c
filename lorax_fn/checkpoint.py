"""Adapters on disk: arrays by Orbax, every static fact and a fingerprint of the base beside them.

A checkpoint is a directory that holds ``adapter.json`` and ``arrays-<id>/`` (Orbax). The JSON names the array
directory, so replacing that one file is what makes a new version appear, whole or not at all:

    format, version     "lorax_fn.adapter", 1
    arrays              name of the array directory
    files               {name: crc32} of every file in it
    adapters            one entry a path: path, method, static {field: value}, arrays {field: facts}
    base                one entry a leaf of params: path, shape, dtype, crc32 of a sample; or null
    crc32               of all the above

A static value is a number, a string, a bool or null; ``[...]`` is a tuple and an object of stack, inputs and
outputs a Layout. The facts of an array are shape and dtype, and for PRNG keys their implementation. Orbax is
imported when a function here is called.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import pkgutil
import shutil
import uuid
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn.methods
from lorax_fn.targets import check_fits
from lorax_fn.training.step import check_adapters
from lorax_fn.types import Adapter, Layout, PyTree, error, flatten_with_paths, is_abstract, is_array

FORMAT, VERSION, FACTS = "lorax_fn.adapter", 1, "adapter.json"
SAMPLE = 4096  # elements a leaf that the fingerprint reads


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
    adapters, tree = [], {}
    for i, (name, adapter) in enumerate(sorted(lora.items())):
        static, arrays = _fields(name, adapter)
        # Orbax refuses arrays of no elements; their facts say all there is to them
        tree |= {f"{i}.{field}": _to_host(value) for field, value in arrays.items() if value.size}
        facts = {field: _array_facts(value) for field, value in arrays.items()}
        adapters.append({"path": name, "method": type(adapter).__name__, "static": static, "arrays": facts})
    unique = uuid.uuid4().hex[:12]
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": f"arrays-{unique}",
        "files": None,
        "adapters": adapters,
        "base": None if params is None else _fingerprint(params),
    }
    stage = path.parent / f".{path.name}.{unique}"
    try:
        stage.mkdir(parents=True)
        _write_arrays(stage / facts["arrays"], tree)
        facts["files"] = _files(stage / facts["arrays"])
        _write_facts(stage / FACTS, facts)
        _publish(stage, path, facts["arrays"])
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load(path: str | os.PathLike, *, params: PyTree = None) -> dict[str, Adapter]:
    """Reads the adapters that `save` wrote.

    Args:
      path: the checkpoint's directory.
      params: the base to train or merge on, compared with the one that `save` was given. Abstract leaves are
        compared by shape and dtype alone.

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
    facts = _read_facts(path)
    classes = _methods()
    unknown = [entry for entry in facts["adapters"] if not _known(entry, classes)]
    if unknown:
        raise error(
            "the checkpoint holds adapters of an unknown method, or with unknown fields.",
            path=[entry["path"] for entry in unknown],
            got=sorted({f"{e['method']}({', '.join([*e['static'], *e['arrays']])})" for e in unknown}),
            want=sorted(name for name, found in classes.items() if len(found) == 1),
            do="update lorax_fn, or import the one module that defines the method before loading.",
        )
    if params is not None:
        _check_base(path, facts["base"], params)
    arrays = _read_arrays(path, facts)
    lora = {}
    for i, entry in enumerate(facts["adapters"]):
        (cls,) = classes[entry["method"]]
        values = {name: _decode(value) for name, value in entry["static"].items()}
        values |= {field: _from_host(arrays[f"{i}.{field}"], fact) for field, fact in entry["arrays"].items()}
        lora[entry["path"]] = cls(**values)
    return lora


def _fingerprint(params: PyTree) -> list[dict]:
    """What tells one base from another: path, shape, dtype and crc32 of a strided sample of every array.

    It is the same on every run and for every sharding; abstract leaves have no crc32.
    """
    return [
        {
            "path": path,
            "shape": list(np.shape(leaf)),
            "dtype": str(leaf.dtype),
            "crc32": None if is_abstract(leaf) else zlib.crc32(_sample(leaf).tobytes()),
        }
        for path, leaf in flatten_with_paths(params)[0]
        if is_array(leaf)
    ]


def _sample(leaf: Any) -> np.ndarray:
    """At most `SAMPLE` elements at even strides; never the whole of a big or sharded array."""
    leaf = jax.random.key_data(leaf) if _key_impl(leaf) else jax.tree.leaves(leaf)[0]  # codes, if quantised
    shape = np.shape(leaf)
    size = math.prod(shape)
    if not shape or not size:
        return np.asarray(leaf)
    index = np.unravel_index(np.arange(0, size, -(-size // SAMPLE)), shape)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh.explicit_axes:
        replicated = jax.NamedSharding(sharding.mesh, jax.P())
        return np.asarray(leaf.at[index].get(out_sharding=replicated))
    return np.asarray(leaf[index])


def _check_base(path: pathlib.Path, saved: list[dict] | None, params: PyTree) -> None:
    if saved is None:
        raise error(
            "the checkpoint was saved without its base.",
            path=path,
            got="no fingerprint to compare params with",
            do="save(path, lora, params=params), or load(path) without params.",
        )
    was = {entry["path"]: entry for entry in saved}
    now = {entry["path"]: entry for entry in _fingerprint(params)}
    lines = []
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'missing' if new is None else 'extra'} in params")
        elif old["shape"] != new["shape"]:
            lines.append(f"{name}: shape: {old['shape']} saved, {new['shape']} in params")
        elif old["dtype"] != new["dtype"]:
            lines.append(f"{name}: dtype: {old['dtype']} saved, {new['dtype']} in params")
        elif old["crc32"] != new["crc32"] and None not in (old["crc32"], new["crc32"]):
            lines.append(f"{name}: content: other values")
    if lines:
        raise error(
            "params are not the base that the adapters were saved with.",
            path=lines,
            got=f"{len(lines)} leaves that differ",
            want="the same paths, shapes, dtypes and content",
            do="load the base that the adapters were trained on.",
        )


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


def _key_impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None


def _to_host(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _key_impl(x) else x)


def _from_host(x: np.ndarray, facts: dict) -> jax.Array:
    array = jnp.asarray(x)
    if array.dtype != x.dtype:
        raise error(
            "this JAX can't hold the checkpoint's arrays.",
            got=f"{x.dtype} would become {array.dtype}",
            do='jax.config.update("jax_enable_x64", True).',
        )
    return jax.random.wrap_key_data(array, impl=facts["key"]) if facts["key"] else array


def _array_facts(x: Any) -> dict:
    """Shape and dtype as stored, and the implementation of PRNG keys."""
    host = _to_host(x)
    return {"shape": list(host.shape), "dtype": str(host.dtype), "key": _key_impl(x)}


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
        checkpointer.save(path, tree or {"none": np.zeros(1)})


def _crc(facts: dict) -> int:
    rest = {name: value for name, value in facts.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _write_facts(path: pathlib.Path, facts: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(facts | {"crc32": _crc(facts)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


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


def _read_facts(path: pathlib.Path) -> dict:
    if not (path / FACTS).is_file():
        raise error(
            "there is no adapter checkpoint here.",
            path=path,
            got=f"no {FACTS} in it" if path.exists() else "no such directory",
            do="check the path; save writes a directory.",
        )
    try:
        facts = json.loads((path / FACTS).read_text("utf-8"))
        known, version = facts["format"] == FORMAT, facts["version"]
    except (ValueError, KeyError, TypeError) as failure:
        raise _damaged(path / FACTS, f"{type(failure).__name__}: {failure}") from failure
    if not known or version != VERSION:
        raise error(
            "unknown checkpoint format.",
            path=path / FACTS,
            got=f"{facts['format']} version {version}",
            want=f"{FORMAT} version {VERSION}",
            do="update lorax_fn.",
        )
    if facts.get("crc32") != _crc(facts):
        raise _damaged(path / FACTS, "content that does not match its own crc32")
    return facts


def _files(path: pathlib.Path) -> dict[str, int]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): zlib.crc32(file.read_bytes()) for file in files}


def _read_arrays(path: pathlib.Path, facts: dict) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    folder = path / facts["arrays"]
    # before Orbax sees them: it leaves broken event loops behind when several reads fail at once
    found = _files(folder)
    wrong = [folder / name for name, crc in facts["files"].items() if found.get(name) != crc]
    if wrong:
        raise _damaged(wrong, "missing files, or content that does not match its crc32")
    blank = {
        f"{i}.{field}": np.empty(fact["shape"], jnp.dtype(fact["dtype"]))
        for i, entry in enumerate(facts["adapters"])
        for field, fact in entry["arrays"].items()
    }
    stored = {key: array for key, array in blank.items() if array.size}
    if stored:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore(folder, stored)
    return {key: np.asarray(array) for key, array in (blank | stored).items()}


def _damaged(path: Any, got: str) -> Exception:
    return error(
        "the checkpoint is damaged.",
        path=path,
        got=got,
        do="restore the directory from a copy, or save the adapters again.",
    )
