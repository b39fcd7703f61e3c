"""The schema of a checkpoint's JSON, all of which is checked before anything is read or allocated.

A form is a function ``form(value) -> problem or None``, composed of smaller ones: ``record`` of named parts,
``mapping``, ``listed``, ``either``. A problem begins with its location: ``/adapters/0/path: ...``.
"""

import collections
import functools
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.checkpoint.files import damaged

Form = Callable[[Any], str | None]
SIZE = 1 << 48  # the largest axis; an array also has less than 2^60 bytes, which no disk holds
DEPTH = 32  # the deepest tree


def check(path: pathlib.Path, facts: Any, form: Form) -> None:
    """Raises a `LoraError` if ``facts`` are not of ``form``."""
    problem = form(facts)
    if problem:
        raise damaged(path, problem)


def integer(low: int, high: int) -> Form:
    def found(x):
        ok = type(x) is int and low <= x <= high
        return None if ok else f"{reprlib.repr(x)}, which is not an int from {low} to {high}"

    return found


def number(x: Any) -> str | None:
    ok = type(x) in (int, float) and abs(x) <= 1e300
    return None if ok else f"{reprlib.repr(x)}, which is not a finite number"


def flag(x: Any) -> str | None:
    return None if isinstance(x, bool) else f"{reprlib.repr(x)}, which is not true or false"


def null(x: Any) -> str | None:
    return None if x is None else f"{reprlib.repr(x)}, which is not null"


def text(most: int, pattern: str | None = None) -> Form:
    def found(x):
        ok = isinstance(x, str) and len(x) <= most and (pattern is None or re.fullmatch(pattern, x))
        like = f" like {pattern}" if pattern else ""
        return None if ok else f"{reprlib.repr(x)}, which is not a text{like} of at most {most} characters"

    return found


def anything(x: Any) -> str | None:
    del x
    return None


def listed(form: Form, most: int = 1 << 20) -> Form:
    def found(x):
        if not isinstance(x, list) or len(x) > most:
            return f"{reprlib.repr(x)}, which is not a list of at most {most} entries"
        return next((f"/{i}{_join(p)}" for i, part in enumerate(x) if (p := form(part))), None)

    return found


def mapping(key: Form, form: Form, most: int = 1 << 20) -> Form:
    def found(x):
        if not isinstance(x, dict) or len(x) > most:
            return f"{reprlib.repr(x)}, which is not an object of at most {most} names"
        for name, part in x.items():
            problem = key(name) or form(part)
            if problem:
                return f"/{name[:80]}{_join(problem)}"
        return None

    return found


def record(forms: dict[str, Form], optional: dict[str, Form] | None = None) -> Form:
    every = forms | (optional or {})

    def found(x):
        if not isinstance(x, dict):
            return f"{reprlib.repr(x)}, which is not an object"
        odd = [*(f"{name!r} is missing" for name in forms if name not in x)]
        odd += [f"{reprlib.repr(name)} is not known" for name in x if name not in every]
        if odd:
            return "; ".join(odd[:5])
        return next((f"/{name}{_join(p)}" for name, part in x.items() if (p := every[name](part))), None)

    return found


def either(*forms: Form) -> Form:
    def found(x):
        problems = [form(x) for form in forms]
        return None if None in problems else problems[-1]

    return found


def all_of(*forms: Form) -> Form:
    return lambda x: next((p for form in forms if (p := form(x))), None)


def _join(problem: str) -> str:
    return problem if problem.startswith("/") else f": {problem}"


# --- arrays


def dtype(x: Any) -> str | None:
    """The name of a JAX dtype."""
    ok = isinstance(x, str) and _is_dtype(x[:40])
    return None if ok else f"{reprlib.repr(x)}, which is not a JAX dtype"


@functools.lru_cache
def _is_dtype(name: str) -> bool:
    try:
        found = jnp.dtype(name)
    except TypeError:
        return False
    return str(found) == name and bool(jnp.issubdtype(found, jnp.number) or found == jnp.bool_)


def _few_bytes(fact: dict) -> str | None:
    size = math.prod(fact["shape"]) * jnp.dtype(fact["dtype"]).itemsize
    return None if size < 1 << 60 else f"/shape: {size} bytes, which no array has"


def _key_words(fact: dict) -> str | None:
    """Checks that a key's implementation is one of JAX's, and that its words have the right shape."""
    if fact["key"] is None:
        return None
    try:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=fact["key"])))
    except Exception:  # JAX has no specific error for an unknown implementation.
        return f"/key: {reprlib.repr(fact['key'])}, which is not an implementation of PRNG keys"
    ends = fact["shape"][max(len(fact["shape"]) - words.ndim, 0) :]
    if ends != list(words.shape) or fact["dtype"] != str(words.dtype):
        return f"/key: {fact['key']!r} with words of shape {fact['shape']} and dtype {fact['dtype']}"
    return None


SHAPE = listed(integer(0, SIZE), most=64)
_ARRAY: dict[str, Form] = {"shape": SHAPE, "dtype": dtype, "key": either(null, text(40))}
ARRAY = all_of(record(_ARRAY), _few_bytes, _key_words)
PATH = text(1 << 16)
LEAF = all_of(record(_ARRAY | {"path": PATH}), _few_bytes, _key_words)


# --- adapters


def _axes_once(x: dict) -> str | None:
    axes = [axis for part in x.values() for axis in part]
    return None if sorted(axes) == list(range(len(axes))) else f"axes {axes}, each of which must appear once"


LAYOUT = all_of(record(dict.fromkeys(("stack", "inputs", "outputs"), listed(integer(0, 63), 64))), _axes_once)
_SCALAR = either(null, flag, text(1 << 16), LAYOUT, number)


def static(x: Any, depth: int = 0) -> str | None:
    """A static value as `serializing.encode` writes it: a scalar, a Layout, or a list of these."""
    if not isinstance(x, list) or depth > 8:
        return _SCALAR(x)
    return listed(lambda part: static(part, depth + 1))(x)


NAME = text(200, r"[^\W\d]\w*")


def _once(x: dict) -> str | None:
    both = sorted(x["static"].keys() & x["arrays"].keys())
    return f"{both}, which are both arrays and static" if both else None


_KIND = {"method": NAME, "static": mapping(NAME, static, 200), "arrays": mapping(NAME, ARRAY, 200)}
_KINDS = all_of(record(_KIND), _once)


def entries(x: Any) -> str | None:
    """One entry per adapter; entries that differ only in their path are checked once."""
    alike: dict[str, str | None] = {}

    def entry(value):
        if not isinstance(value, dict) or "path" not in value:
            return f"{reprlib.repr(value)}, which is not an object with a path"
        rest = {name: part for name, part in value.items() if name != "path"}
        kind = json.dumps(rest)
        if kind not in alike:
            alike[kind] = _KINDS(rest)
        return PATH(value["path"]) or alike[kind]

    return listed(entry)(x)


def unique_paths(x: list[dict]) -> str | None:
    times = collections.Counter(entry["path"] for entry in x)
    twice = sorted(path for path, count in times.items() if count > 1)
    return f"two entries for {twice[:5]}" if twice else None


ADAPTERS = all_of(entries, unique_paths)


# --- the base, trees and files

CRC = integer(0, 2**32 - 1)
BASE = either(
    null, listed(record({"path": PATH, "shape": SHAPE, "dtype": text(200), "crc32": either(null, CRC)}))
)


def structure(x: Any, depth: int = 0) -> str | None:
    """The skeleton of a tree, as `trees.skeleton` writes it."""
    if x in ("*", "none") or (x is None and not depth):
        return None
    if depth > DEPTH or not isinstance(x, dict) or len(x) != 1:
        return f"{reprlib.repr(x)}, which is not the structure of a tree of at most {DEPTH} levels"
    kind, parts = next(iter(x.items()))
    key = either(text(1 << 16), integer(-(2**63), 2**63))
    if kind == "dict":
        problem = listed(lambda pair: None if isinstance(pair, list) and len(pair) == 2 else "not a pair")(
            parts
        )
        problem = problem or next((p for name, _ in parts if (p := key(name))), None)
        parts = [part for _, part in parts] if not problem else []
    elif kind in ("list", "tuple"):
        problem = listed(anything)(parts)
    else:
        problem = f"a node of kind {reprlib.repr(kind)}"
    return problem or next((p for part in parts if (p := structure(part, depth + 1))), None)


def _inside(name: Any) -> str | None:
    """The name of a file below the directory, which can't lead out of it."""
    ok = isinstance(name, str) and 0 < len(name) < 4096 and not re.search(r"[\\\0]", name)
    ok = ok and all(part not in ("", ".", "..") for part in name.split("/"))
    return None if ok else f"{reprlib.repr(name)}, which is not a file below the directory"


FILES = {
    1: mapping(_inside, CRC),
    2: mapping(_inside, record({"size": integer(0, SIZE), "crc32": CRC})),
}
VERSION = integer(1, 2)
ARRAYS = text(80, r"arrays-[0-9a-f]{12}")


def extra(x: Any) -> str | None:
    """The extra that was saved with adapters."""
    return either(null, record({"tree": structure, "leaves": listed(LEAF), "weak": listed(PATH)}))(x)


def adapter_facts(version: int) -> Form:
    """The form of ``adapter.json``."""
    forms = {
        "format": text(80),
        "version": VERSION,
        "arrays": ARRAYS,
        "files": FILES[version],
        "adapters": ADAPTERS,
        "base": BASE,
        "crc32": CRC,
    }
    return record(forms | ({"extra": extra} if version > 1 else {}))


def training_facts(version: int) -> Form:
    """The form of ``train.json``."""
    loop = {
        "best": listed(
            all_of(listed(number, 2), lambda x: None if len(x) == 2 else "not a score and a step")
        ),
        "since": integer(0, 2**63),
        "stopped": flag,
    }
    forms = {
        "format": text(80),
        "version": VERSION,
        "step": integer(0, 2**63),
        "files": FILES[version],
        "adapters": ADAPTERS,
        "state": listed(LEAF),
        "weak": listed(PATH),
        "base": BASE,
        "loop": record(loop),
        "crc32": CRC,
    }
    key = record({"impl": either(null, text(40)), "words": listed(integer(0, 2**64), 64)})
    later = {"extra": structure, "key": key, "packed": flag}
    return record(forms | (later if version > 1 else {}))
