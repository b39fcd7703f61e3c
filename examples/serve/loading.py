"""Reads adapters from folders, as `lx.checkpoint.save` or PEFT writes them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import lorax_fn as lx


def load_adapter(folder: Path, params: Any) -> dict:
    """The adapter in ``folder``; raises a `LoraError` if it does not fit ``params``."""
    if (folder / "adapter_config.json").is_file():
        return lx.peft.load(folder, params, mapping=lx.mappings.preset("llama", "examples"))
    inner = folder / "adapter"  # where examples/finetune_smollm2.py puts it
    return lx.checkpoint.load(inner if inner.is_dir() else folder, params=params)


def reader(folder: Path, params: Any, held: int = 64) -> Callable[[str], dict]:
    """Builds ``load(name)``, which keeps the last ``held`` adapters in host memory."""

    @functools.lru_cache(maxsize=held)
    def read(name: str, changed: int) -> dict:
        del changed  # part of the key
        return jax.device_get(load_adapter(folder / name, params))

    return lambda name: read(name, (folder / name).stat().st_mtime_ns)
