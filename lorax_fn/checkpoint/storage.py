"""The form of adapters on disk: static fields as JSON, arrays by Orbax.

Each adapter is an entry ``{path, method, static {field: value}, arrays {field: facts}}``. A static value is a
number, a string, a bool or null; a list stands for a tuple, and an object with stack, inputs and outputs for
a Layout. The facts of an array are its shape, its dtype, and the implementation of PRNG keys; the array
itself is stored as ``<number of the entry>.<field>``. The checkpoints of `save` and of `fit` both use this
form. Orbax is imported when a function here is called.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import pkgutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn.methods
from lorax_fn.checkpoint.files import damaged
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.serializing import decode, encode
from lorax_fn.methods.low_rank import SCALINGS, LowRank


class LoraCheckpointWarning(UserWarning):
    """A checkpoint was read or saved incompletely.

    A damaged one was skipped, adapters that do not fit were left out, or something that the adapters need was
    not saved.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraCheckpointWarning, UserWarning)
      True
    """


def describe(lora: Mapping[str, Adapter]) -> tuple[list[dict], dict[str, Any]]:
    """One entry per adapter, and the arrays by name, keys as raw words. Arrays are not copied or moved."""
    entries, arrays = [], {}
    for i, (path, adapter) in enumerate(sorted(lora.items())):
        static, held = _fields(path, adapter)
        arrays |= {f"{i}.{field}": raw(value) for field, value in held.items()}
        facts = {field: array_facts(value) for field, value in held.items()}
        entries.append({"path": path, "method": type(adapter).__name__, "static": static, "arrays": facts})
    return entries, arrays


def named_facts(entries: list[dict]) -> dict[str, dict]:
    """The facts of every array of ``entries``, by name."""
    return {
        f"{i}.{field}": facts for i, entry in enumerate(entries) for field, facts in entry["arrays"].items()
    }


def check_known(
    path: pathlib.Path, entries: list[dict], base: list[dict] | None, *, stacked: bool = False
) -> None:
    """Raises a `LoraError` if the class of an entry is unknown, or if no adapter can have its fields.

    The fields must fit each other and the base leaf of the same path. If the base may be ``stacked`` (the
    params of a pmap have a device axis), only the path is checked.
    """
    classes = _methods()
    unknown = [entry for entry in entries if not _known(entry, classes)]
    if unknown:
        raise error(
            "the checkpoint holds adapters of an unknown method, or with unknown fields.",
            path=[entry["path"] for entry in unknown],
            got=sorted({f"{e['method']}({', '.join([*e['static'], *e['arrays']])})" for e in unknown}),
            want=sorted(name for name, found in classes.items() if len(found) == 1),
            do="update lorax_fn, or import the module that defines the method before loading.",
        )
    shapes = None if base is None else {leaf["path"]: tuple(leaf["shape"]) for leaf in base}
    seen: dict[str, str | None] = {}
    wrong = {}
    for entry in entries:
        (cls,) = classes[entry["method"]]
        known = shapes is None or entry["path"] in shapes
        shape = shapes.get(entry["path"]) if shapes and not stacked else None
        kind = json.dumps([entry["method"], entry["static"], entry["arrays"], shape])  # most are alike
        if kind not in seen:
            seen[kind] = _problem(cls, entry, shape)
        problem = seen[kind] if known else "there is no such leaf in the base"
        if problem:
            wrong[f"{entry['path']}: {problem}"] = None
    if wrong:
        raise damaged(path, [*wrong][:20])


def build(entries: list[dict], arrays: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters of ``entries``, which `check_known` has checked, from device arrays by name."""
    classes = _methods()
    lora = {}
    for i, entry in enumerate(entries):
        (cls,) = classes[entry["method"]]
        lora[entry["path"]] = _made(cls, entry, {field: arrays[f"{i}.{field}"] for field in entry["arrays"]})
    return lora


def _made(cls: type[Adapter], entry: dict, arrays: Mapping[str, Any]) -> Adapter:
    return cls(**{name: decode(value) for name, value in entry["static"].items()}, **arrays)


def _problem(cls: type[Adapter], entry: dict, shape: tuple[int, ...] | None) -> str | None:
    """Why no adapter can have the fields of ``entry``, or can't change a leaf of ``shape``; else None."""
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in entry["static"] | entry["arrays"]
    ]
    if missing:
        return f"{cls.__name__} without {', '.join(missing)}"
    if not cls.__module__.startswith("lorax_fn."):
        return None  # Only the author of the class knows which values are valid.
    for name, value in entry["static"].items():
        if name in FIELDS and not FIELDS[name](value):
            return f"{name}={str(value)[:80]}"
    try:
        adapter = _made(cls, entry, {name: _abstract(facts) for name, facts in entry["arrays"].items()})
        return _trial(adapter, shape) or _rank_problem(adapter)
    except Exception as failure:  # A method may fail in any way on fields that it never created.
        return f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"


def _abstract(facts: dict) -> jax.ShapeDtypeStruct:
    plain = jax.ShapeDtypeStruct(tuple(facts["shape"]), jnp.dtype(facts["dtype"]))
    if not facts["key"]:
        return plain
    return jax.eval_shape(lambda words: jax.random.wrap_key_data(words, impl=facts["key"]), plain)


def _rank_problem(adapter: Adapter) -> str | None:
    """What is wrong if the rank exceeds that of the arrays, or its length is not that of the stack."""
    rank: Any = getattr(adapter, "rank", None)
    ranks: tuple[int, ...] = rank if isinstance(rank, tuple) else (rank,)
    axes = adapter.axes()
    widths = [
        np.shape(getattr(adapter, name))[along.index(None)] for name, along in axes.items() if None in along
    ]
    if isinstance(rank, tuple) and isinstance(adapter, LowRank):
        stack = math.prod(adapter.shape[axis] for axis in adapter.layout.stack)
        if not adapter.layout.stack or len(rank) != stack:
            return f"ranks {rank} for a stack of {stack}"
    if isinstance(rank, int | tuple) and widths and max(ranks, default=0) > max(widths):
        return f"rank {rank} for arrays of rank {max(widths)}"
    return None


def _trial(adapter: Any, shape: tuple[int, ...] | None) -> str | None:
    """Why the adapter does not fit a leaf of ``shape``, or of the shape that it implies if that is None."""
    if adapter.under_dropout:
        return "a dropout key, which save refuses"
    if adapter.is_stacked and shape is None:
        return None  # It is stacked for `jax.vmap`.
    if isinstance(adapter, LowRank):
        adapter.layout.shapes(adapter.shape)
        shape = adapter.shape if shape is None else shape
    elif shape is None:
        return None
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    problem = adapter.problem(leaf)
    if problem is not None:
        return f"{problem}, but the base has a leaf of shape {shape}"
    # An adapter of rank 0 changes nothing and has no scale.
    empty = any(not x.size for x in jax.tree.leaves(adapter))
    got = shape if empty else jax.eval_shape(lambda held, w: held.weight(w), adapter, leaf).shape
    return None if got == shape else f"a weight of shape {got} instead of {shape}"


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(holds, value)) if isinstance(value, list) else holds(value)


# Checks of the static fields of this package's methods. The schema has checked that numbers are finite.
FIELDS = {
    "alpha": _each(_number),
    "rank": _each(_count),
    "scaling": lambda value: isinstance(value, str) and value in SCALINGS,
    "layout": lambda value: isinstance(value, dict),
    "rate": lambda value: _number(value) and 0 <= value < 1,
    "ids": lambda value: isinstance(value, list) and _each(_count)(value) and len(set(value)) == len(value),
    "sizes": lambda value: isinstance(value, list) and _each(_count)(value),
}


def _methods() -> dict[str, list[type[Adapter]]]:
    """All adapter classes by name: those of `lorax_fn.methods`, and any others that are imported."""
    for module in pkgutil.iter_modules(lorax_fn.methods.__path__, "lorax_fn.methods."):
        importlib.import_module(module.name)
    classes: dict[str, list[type[Adapter]]] = {}
    queue = list(Adapter.__subclasses__())
    while queue:
        cls = queue.pop()
        queue += cls.__subclasses__()
        classes.setdefault(cls.__name__, []).append(cls)
    for name, found in classes.items():  # A user's class never replaces a method of the package.
        classes[name] = [cls for cls in found if cls.__module__.startswith("lorax_fn.")] or found
    return classes


def _known(entry: dict, classes: dict[str, list[type[Adapter]]]) -> bool:
    found = classes.get(entry["method"], [])
    fields = {field.name for cls in found for field in dataclasses.fields(cls)}
    return len(found) == 1 and entry["static"].keys() | entry["arrays"].keys() <= fields


def _fields(path: str, adapter: Adapter) -> tuple[dict, dict]:
    """An adapter's static fields as JSON values, and its arrays; a field that is None is static."""
    static, arrays, wrong = {}, {}, []
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        try:
            if isinstance(value, jax.Array | np.ndarray):  # numpy scalars are static
                arrays[field.name] = value
            else:
                static[field.name] = encode(value)
                json.dumps(static[field.name], allow_nan=False)
        except (TypeError, ValueError):
            wrong.append(field.name)
    if wrong:
        raise error(
            "an adapter's field can't be stored.",
            path=[f"{path}: {name}" for name in wrong],
            got=[type(getattr(adapter, name)).__name__ for name in wrong],
            want="an array; or a static finite number, string, bool, None, Layout or tuple of these",
            do="use only such types for the method's fields.",
        )
    return static, arrays


# --- arrays


def _key_impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None


def raw(x: Any) -> Any:
    """``x``, or the words of a PRNG key."""
    return jax.random.key_data(x) if _key_impl(x) else x


def array_facts(x: Any) -> dict:
    """The stored shape and dtype of an array, and the implementation if it holds PRNG keys."""
    words = raw(x)
    return {"shape": list(words.shape), "dtype": str(words.dtype), "key": _key_impl(x)}


def to_device(x: np.ndarray, facts: dict) -> jax.Array:
    """A stored array on the default device, wrapped as PRNG keys if it was one."""
    array = jnp.array(x)
    if array.dtype != x.dtype:
        raise error(
            "this JAX can't hold the checkpoint's arrays.",
            got=f"{x.dtype} would become {array.dtype}",
            do='jax.config.update("jax_enable_x64", True).',
        )
    return jax.random.wrap_key_data(array, impl=facts["key"]) if facts["key"] else array


def storable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays to hand to Orbax, which refuses empty arrays (their facts suffice) and empty trees."""
    return {name: x for name, x in arrays.items() if x.size} or {"none": np.zeros(1)}


def packed(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of each dtype, flattened and concatenated: ``{"packed.<dtype>": [numbers]}``.

    A state has hundreds of arrays, and Orbax takes as long for one of ten numbers as for one of a million.
    """
    runs: dict[str, list[np.ndarray]] = {}
    for _, x in sorted(arrays.items()):
        runs.setdefault(f"packed.{np.dtype(x.dtype)}", []).append(np.asarray(x).reshape(-1))
    return {name: np.concatenate(parts) for name, parts in runs.items()}


def packed_facts(facts: Mapping[str, dict]) -> dict[str, dict]:
    """The facts of the arrays that `packed` returns for arrays with ``facts``."""
    sizes: dict[str, int] = {}
    for fact in facts.values():
        sizes[fact["dtype"]] = sizes.get(fact["dtype"], 0) + math.prod(fact["shape"])
    return {
        f"packed.{dtype}": {"shape": [size], "dtype": dtype, "key": None} for dtype, size in sizes.items()
    }


def unpacked(runs: Mapping[str, np.ndarray], facts: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """The inverse of `packed`."""
    taken = dict.fromkeys(runs, 0)
    arrays = {}
    for name, fact in sorted(facts.items()):
        run, size = f"packed.{fact['dtype']}", math.prod(fact["shape"])
        arrays[name] = runs[run][taken[run] : taken[run] + size].reshape(fact["shape"])
        taken[run] += size
    return arrays


def checkpointer(*, together: bool = False) -> Any:
    """An Orbax checkpointer for this process alone, or ``together`` for arrays that all processes save."""
    import orbax.checkpoint as ocp

    if together or jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    mine = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"lorax_fn.{uuid.uuid4().hex}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def host_writer() -> Any:
    """An Orbax checkpointer for a few host arrays, which are on disk when its ``save`` returns."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def read_arrays(folder: pathlib.Path, facts: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """Reads every array of ``facts`` to the host, by name, after `check_files`."""
    wanted = {name: fact for name, fact in facts.items() if all(fact["shape"])}
    stored = {}
    try:
        with checkpointer() as reader:
            held = reader.metadata(folder).item_metadata.tree
            wrong = [name for name, fact in wanted.items() if not _is_held(held.get(name), fact)]
            wrong += sorted(held.keys() - wanted.keys() - {"none"})
            if wrong:
                raise damaged(folder, [f"{name}: not stored as the facts say" for name in wrong[:20]])
            # Orbax restores all or nothing, so arrays that are not wanted are read too.
            blank = {name: np.empty(x.shape, x.dtype) for name, x in held.items()}
            stored = reader.restore(folder, blank) if wanted else {}
    except LoraError:
        raise
    except Exception as failure:  # Orbax and its libraries raise many kinds of errors, even MemoryError.
        odd = "\\" in str(folder) or "gs:" in folder.parts  # Orbax takes these for patterns and addresses.
        do = "rename the directory to a name without a backslash, other than gs:." if odd else ""
        raise damaged(folder, f"{type(failure).__name__}: {str(failure)[-500:]}", do) from failure
    empty = {
        name: np.empty(fact["shape"], jnp.dtype(fact["dtype"]))
        for name, fact in facts.items()
        if name not in wanted
    }
    return empty | {name: np.asarray(stored[name]) for name in wanted}


def _is_held(found: Any, fact: dict) -> bool:
    return found is not None and (list(found.shape), str(jnp.dtype(found.dtype))) == (
        fact["shape"],
        fact["dtype"],
    )
