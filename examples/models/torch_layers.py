"""Layers of a transformer, from torch's tensors of one layer each to arrays that a scan runs over."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def array(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    """A tensor by name, as a float32 array."""
    return np.asarray(tensors[name], np.float32)


def stacked(tensors: Mapping[str, Any], name: str, layers: int) -> np.ndarray:
    """``[layers, ...]``, a tensor of each layer."""
    return np.stack([array(tensors, f"encoder.layer.{i}.{name}") for i in range(layers)])


def modules(tensors: Mapping[str, Any], names: Mapping[str, str], layers: int) -> dict[str, Any]:
    """Variables of each layer's linear modules and norms.

    Args:
      tensors: arrays by name; linear weights are ``[out, in]``.
      names: the name of each module in torch, and ours; those of norms start with ``norm``.
      layers: how many there are.

    Returns:
      ``{ours: {"kernel" [layers, in, out] or "scale" [layers, width], "bias" [layers, out]}}``.
    """
    found = {}
    for theirs, ours in names.items():
        weight, bias = (stacked(tensors, f"{theirs}.{part}", layers) for part in ("weight", "bias"))
        norm = ours.startswith("norm")
        found[ours] = {
            "scale" if norm else "kernel": weight if norm else weight.swapaxes(1, 2),
            "bias": bias,
        }
    return found
