"""Makes adapters known to other serializers: `flax.serialization` and `jax.export`.

Both require every pytree class to be registered, which `register` does for an adapter class. Static fields
are written too, so that a reader gets the numbers that the writer had: Flax stores them beside the arrays and
refuses to restore into an adapter whose static fields differ; `jax.export` stores them with the tree.

Equinox's ``tree_serialise_leaves`` writes only leaves and does not consult their class. After reading, alpha,
rank and scaling are those of the tree it was read into, not those that were saved. Use `lorax_fn.checkpoint`
instead.
"""

import collections
import dataclasses
import importlib.abc
import importlib.util
import json
import sys
from typing import Any

import jax
import jax.export
import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout

FLAX = "flax.serialization"
AXES = ("stack", "inputs", "outputs")
_classes: list[type] = []
_names: collections.Counter = collections.Counter()


def encode(value: Any) -> Any:
    """A static value as JSON: scalars, strings and None as they are, tuples as lists, a Layout as an object.

    Raises:
      TypeError: the value has any other type.
    """
    if isinstance(value, Layout):
        return {name: list(getattr(value, name)) for name in AXES}
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, dict):
        return Layout(**value)
    return tuple(decode(part) for part in value) if isinstance(value, list) else value


def register(cls: type) -> None:
    """Registers an adapter class, already a pytree, with `jax.export` and `flax.serialization`."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    _names[name] += 1
    again = f"#{_names[name]}" if _names[name] > 1 else ""  # a notebook cell that was run a second time
    jax.export.register_pytree_node_serialization(
        cls, serialized_name=name + again, serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
    )
    _classes.append(cls)
    if FLAX in sys.modules:
        _tell_flax(sys.modules[FLAX], cls)


def _to_bytes(static: Any) -> bytes:
    try:
        return json.dumps(encode(static)).encode()
    except TypeError as failure:
        raise error(
            "an adapter's static field can't be exported.",
            got=f"a value of type {failure}",
            want="a number, string, bool, None, Layout or a tuple of these",
            do="use only such types for the method's static fields.",
        ) from None


def _from_bytes(data: bytes) -> Any:
    return decode(json.loads(data))


def _tell_flax(serialization: Any, cls: type) -> None:
    serialization.register_serialization_state(cls, _state_of, _with_state, override=True)


def _parts(adapter: Any) -> tuple[dict[str, Any], str]:
    """An adapter's fields that are children of the pytree, by name, and the others as one line of JSON."""
    children = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=lambda x: x is not adapter)[0]
    held = {path[0].name: child for path, child in children}
    rest = [field.name for field in dataclasses.fields(adapter) if field.name not in held]
    static = {"method": type(adapter).__name__} | {name: encode(getattr(adapter, name)) for name in rest}
    return held, json.dumps(static)


def _state_of(adapter: Any) -> dict[str, Any]:
    from flax import serialization

    held, static = _parts(adapter)
    return {name: serialization.to_state_dict(child) for name, child in held.items()} | {"static": static}


def _with_state(adapter: Any, state: Any) -> Any:
    from flax import serialization

    held, static = _parts(adapter)
    found = state.get("static") if isinstance(state, dict) else None
    if found != static or state.keys() - {"static"} != held.keys():
        raise error(
            "the stored adapter is not of the same kind as the one it is restored into.",
            got=found if found != static else f"arrays {sorted(state.keys() - {'static'})}",
            want=static if found != static else f"arrays {sorted(held)}",
            do="restore into the adapters of the same split: method, rank, alpha and layout must agree.",
        )
    return dataclasses.replace(
        adapter,
        **{
            name: serialization.from_state_dict(child, state[name], name=name) for name, child in held.items()
        },
    )


class _WhenFlaxComes(importlib.abc.MetaPathFinder):
    """Registers the adapters with Flax when Flax is imported; importing it here would take seconds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != FLAX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            for cls in _classes:
                _tell_flax(module, cls)

        spec.loader.exec_module = run_and_register
        return spec


if FLAX not in sys.modules:
    sys.meta_path.insert(0, _WhenFlaxComes())
