"""Our leaves as tensors of a checkpoint: fused where other programs fuse them, and in shards."""

import math
from collections.abc import Mapping

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import is_concrete
from lorax_fn.interop.pieces import unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.weights import Leaves, entry_of, outputs_axis, to_matrix, to_torch


def check_savable(leaves: Leaves, places: list[Place]) -> None:
    covered = {place.path for place in places}
    lost = [path for path in leaves.by_path if path not in covered]
    if lost:
        raise error(
            "these leaves have no name in mapping=.",
            path=lost,
            do="add their pairs, or save a tree without them.",
        )
    stored = [path for path, x in leaves.by_path.items() if is_stored(x)]
    if stored:
        raise error(
            "quantized weights cannot be written into a checkpoint of this kind.",
            path=stored,
            do="lx.huggingface.save(path, lx.dequantize(params)).",
        )
    abstract = [path for path, x in leaves.by_path.items() if not is_concrete(x)]
    if abstract:
        raise error("abstract leaves have no numbers to save.", path=abstract, do="save concrete params.")


def saved_name(place: Place, leaves: Leaves) -> str:
    """A stack along which no placeholder runs is one bare parameter, such as experts."""
    layout = leaves.entry_layout(place)
    return place.module if layout is not None and layout.stack and not place.same else place.tensor


def byte_size(places: list[Place], leaves: Leaves) -> int:
    return sum(
        math.prod(leaves.entry_shape(p)) * np.dtype(leaves.by_path[p.path].dtype).itemsize for p in places
    )


def to_file(places: list[Place], leaves: Leaves) -> np.ndarray:
    """One tensor of the checkpoint, from all the leaves that hold a part of it."""
    parts = []
    for place in places:
        x = entry_of(np.asarray(leaves.by_path[place.path]), leaves.entry_axes(place), place.entry)
        layout, kind = leaves.entry_layout(place), leaves.kind(place.path)
        if place.ours is not None and layout is not None:
            matrix = to_matrix(x, layout)
            matrix = matrix[:, unit_index(place.ours, matrix.shape[1], place.path)]
            parts.append((place, matrix if place.turned else matrix.T))
        else:
            parts.append((place, to_torch(x, place, layout, kind)))
    place, x = parts[0]
    if place.theirs is None:
        return x
    axis = outputs_axis(place, leaves.entry_layout(place), leaves.kind(place.path))
    units = place.theirs
    size = x.shape[axis] * units.count // (units.last - units.first)
    whole = np.zeros([size if i == axis % x.ndim else n for i, n in enumerate(x.shape)], x.dtype)
    done = 0
    for place, x in parts:
        index = unit_index(place.theirs, size, place.tensor)
        np.moveaxis(whole, axis, 0)[index] = np.moveaxis(x, axis, 0)
        done += len(index)
    if done != size:
        raise error(
            "a fused tensor lacks some of its parts.",
            path=[place.path for place, _ in parts],
            got=f"{done} of {size} outputs of {place.tensor}",
            do="add the pairs of its other parts to mapping=.",
        )
    return whole


def shards_of(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sorted(sizes.items()):
        if shards[-1] and total + size > limit:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def shard_names(count: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
