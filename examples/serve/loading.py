"""Reads an adapter from a folder: one of `lx.checkpoint.save`, or one in PEFT's format."""

from pathlib import Path
from typing import Any

import lorax_fn as lx


def load_adapter(folder: Path, params: Any) -> dict:
    """The adapter in ``folder``; raises a `LoraError` if it does not fit ``params``."""
    if (folder / "adapter_config.json").is_file():
        return lx.peft.load(folder, params, mapping=lx.mappings.preset("llama", "examples"))
    inner = folder / "adapter"  # where examples/finetune_smollm2.py puts it
    return lx.checkpoint.load(inner if inner.is_dir() else folder, params=params)
