"""Safetensors and JSON files of unknown origin: read with care, written completely or not at all.

Safetensors is the only format of tensors here, because reading a pickle runs code. The library of that name
is imported when a function here is called.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorax_fn.core.errors import LoraError, error

LARGEST_JSON = 32 * 2**20  # bytes; an index of a thousand shards is far smaller
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class LoraFileWarning(UserWarning):
    """Something in another program's file has no meaning here and was ignored.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraFileWarning, UserWarning)
      True
    """


def needs(module: str, extra: str) -> Any:
    """Imports an optional module, or says which extra of this package installs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise error(
            f"{module} is not installed.",
            got=str(failure),
            do=f"pip install 'lorax_fn[{extra}]'",
        ) from failure


def unreadable(path: Any, got: str, do: str = "fetch or save the file again.") -> LoraError:
    """The error of a file that is not what it should be."""
    return error("this file cannot be read.", path=path, got=got, do=do)


def refuse_pickle(path: pathlib.Path) -> None:
    """Raises where ``path`` is a pickle: reading one runs whatever code is in it."""
    if path.suffix in PICKLES:
        raise error(
            "this file is a pickle, and reading a pickle runs the code in it.",
            path=path,
            want="a .safetensors file",
            do="convert it where you trust it: safetensors.torch.save_file(torch.load(old), new).",
        )


class Tensors:
    """An open safetensors file: names, shapes and dtypes at once, each tensor when it is asked for."""

    def __init__(self, path: pathlib.Path, handle: Any):
        self.path, self._handle = path, handle
        self.names: list[str] = sorted(handle.keys())

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._handle.metadata() or {})

    def shape(self, name: str) -> tuple[int, ...]:
        with _as_lora_error(self.path):
            return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The file's own word for a tensor's dtype: ``"F32"``, ``"BF16"``, ``"U8"``."""
        with _as_lora_error(self.path):
            return str(self._handle.get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> np.ndarray:
        with _as_lora_error(self.path):
            return self._handle.get_tensor(name)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Tensors]:
    """Opens a safetensors file; anything wrong with it raises `LoraError`."""
    path = pathlib.Path(path)
    refuse_pickle(path)
    if not path.is_file():
        raise unreadable(path, "no such file", "check the path.")
    safetensors = needs("safetensors", "peft")
    with _as_lora_error(path):
        # Read, not mapped: a mapped file's pages count as this process's memory. Older ones only map.
        how = {"backend": "pread"} if _version(safetensors) >= (0, 8) else {}
        opened = safetensors.safe_open(str(path), framework="np", **how)
        handle = opened.__enter__()
        tensors = Tensors(path, handle)
        _check_sizes(tensors)
    try:
        yield tensors
    finally:
        opened.__exit__(None, None, None)


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", module.__version__)[:2])


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file by name."""
    with open_tensors(path) as tensors:
        return {name: tensors[name] for name in tensors.names}


def _check_sizes(tensors: Tensors) -> None:
    """No tensor can be larger than the file that holds it; the library checks the rest of the header."""
    size = os.path.getsize(tensors.path)
    for name in tensors.names:
        if len(tensors.shape(name)) > 32 or math.prod(tensors.shape(name)) > 8 * size:
            raise unreadable(tensors.path, f"{name} of shape {tensors.shape(name)} in {size} bytes")


@contextlib.contextmanager
def _as_lora_error(path: Any) -> Iterator[None]:
    try:
        yield
    except LoraError:
        raise
    except Exception as failure:
        raise unreadable(path, f"{type(failure).__name__}: {failure}") from failure
    except BaseException as failure:
        if type(failure).__name__ != "PanicException":  # what Rust code raises where it gives up
            raise
        raise unreadable(path, f"the reader gave up: {failure}") from failure


def write_tensors(path: pathlib.Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; it appears by one rename when all of it is on disk."""
    numpy = needs("safetensors.numpy", "peft")
    # asarray with an order, as ascontiguousarray makes a vector of a single number
    arrays = {name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}
    with appearing(path) as stage:
        numpy.save_file(arrays, str(stage), metadata=dict(metadata))


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new file beside ``path`` that takes its place at the end, and vanishes if writing it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(number)
    stage = pathlib.Path(name)
    try:
        yield stage
        stage.chmod(0o644)
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; NaN, a nesting without end or a file of many megabytes is a `LoraError`."""
    if not path.is_file():
        raise unreadable(path, "no such file", "check the path.")
    if path.stat().st_size > LARGEST_JSON:
        raise unreadable(path, f"{path.stat().st_size} bytes of JSON")
    try:
        found = json.loads(path.read_text("utf-8"), parse_constant=_not_json)
    except (ValueError, RecursionError, OSError) as failure:
        raise unreadable(path, f"{type(failure).__name__}: {failure}") from failure
    if not isinstance(found, dict):
        raise unreadable(path, f"a JSON {type(found).__name__}, not an object")
    return found


def _not_json(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def write_text(path: pathlib.Path, text: str) -> None:
    with appearing(path) as stage:
        stage.write_text(text, "utf-8")


def write_json(path: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes JSON as PEFT does: sorted, two spaces, no line feed at the end."""
    write_text(path, json.dumps(dict(facts), indent=2, sort_keys=True))
