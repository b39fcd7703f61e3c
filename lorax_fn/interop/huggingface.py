"""Base weights of Hugging Face checkpoints: `load` them into any tree, tensor by tensor, and `save` them."""

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import error, nearest
from lorax_fn.core.trees import PyTree, arrays, flatten_with_paths, replace_leaves
from lorax_fn.interop import bitsandbytes
from lorax_fn.interop.checkpoints import INDEX, ONE, Table, open_checkpoint
from lorax_fn.interop.files import write_json, write_tensors
from lorax_fn.interop.filling import filled
from lorax_fn.interop.hub import local_folder
from lorax_fn.interop.pieces import unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.saving import byte_size, check_savable, saved_name, shard_names, shards_of, to_file
from lorax_fn.interop.weights import (
    Leaves,
    from_matrix,
    from_torch,
    known,
    outputs_axis,
    to_torch,
)
from lorax_fn.quantization.blocks import encode
from lorax_fn.quantization.formats import check_options

# Buffers of older checkpoints, which every program computes by itself.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|num_batches_tracked)")
_HEADS = re.compile(r"(.*\.)?(lm_head|embed_tokens|embed_out|decoder|shared|word_embeddings)\.(weight|bias)")


def load(
    path: str | os.PathLike[str],
    like: PyTree,
    *,
    mapping: Mapping[str, str] | None = None,
    dtype: Any = None,
    shardings: Any = None,
    layout: Mapping[Any, Any] | None = None,
    quantize: str | None = None,
    block: int = 64,
    targets: Any = None,
    strict: bool = True,
    revision: str | None = None,
) -> PyTree:
    """Reads base weights into a tree of given shapes, holding one tensor at a time beside the tree.

    Args:
      path: a folder with ``model.safetensors``, or shards and their index; or ``org/name`` on the Hub.
        Weights that bitsandbytes stored in 4 bits come as `Quantized`, without a float copy; their scales are
        float32 (4.5 bits per weight), also where the file has codes for them (4.127).
      like: the tree to fill, of arrays or `jax.ShapeDtypeStruct`, as ``jax.eval_shape(model.init, ...)``
        gives.
      mapping: pairs of a module's name and a path, see `lorax_fn.interop.mappings`; None is the names
        themselves.
      dtype: dtype of all float leaves; None is that of each leaf of ``like``.
      shardings: one sharding for all, or a tree of them like ``like``; None is the default device.
      layout: as in `lorax_fn.split`.
      quantize: ``"nf4"``, ``"int4"`` or ``"int8"``: linear weights are quantized as they are read.
      block: weights that share a scale, where ``quantize`` is given.
      targets: which weights to quantize, as in `lorax_fn.quantize`.
      strict: False ignores tensors that have no place in ``like``.
      revision: branch, tag or commit on the Hub.

    Returns:
      A tree like ``like`` of arrays.

    Raises:
      LoraError: files are damaged; leaves have no tensor, tensors no leaf, or shapes differ: all are listed.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"up.weight": jnp.ones((6, 8)), "up.bias": jnp.zeros(6)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.huggingface.save(folder, params)
      ...     lx.huggingface.load(folder, params)["up.weight"].shape
      (6, 8)
    """
    if quantize is not None:
        check_options(quantize, block)
    folder = local_folder(path, ("*.safetensors", "*.json"), revision)
    leaves, places = known(like, mapping, layout)
    chosen = _to_quantize(like, leaves, quantize, targets)
    kept = _shardings(like, shardings)
    with open_checkpoint(folder) as table:
        sources = _checked(table, leaves, places, strict)
        new = {}
        for leaf_path, leaf in leaves.by_path.items():
            of = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
            parts = [(place, sources[place]) for place in places if place.path == leaf_path]
            how = _Reader(
                table, leaves, leaf_path, np.dtype(of), quantize if leaf_path in chosen else None, block
            )
            new[leaf_path] = filled(how, parts, kept.get(leaf_path))
    return replace_leaves(like, new)


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    mapping: Mapping[str, str] | None = None,
    layout: Mapping[Any, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes weights as a checkpoint that transformers loads, in shards where they are large.

    Args:
      path: the folder, made where it is missing.
      params: arrays in the dtypes to write.
      mapping: as in `load`; every leaf needs a place.
      layout: as in `lorax_fn.split`.
      config: the contents of ``config.json``, such as the base model's; None writes no such file.
      shard_bytes: the largest file.

    Raises:
      LoraError: a leaf has no name, a fused tensor of others lacks parts, or weights are quantized.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.huggingface.save(folder, {"up": {"kernel": jnp.ones((8, 6))}}, mapping={"up": "up/kernel"})
      ...     [file.name for file in pathlib.Path(folder).iterdir()]
      ['model.safetensors']
    """
    folder = pathlib.Path(path)
    leaves, places = known(params, mapping, layout)
    check_savable(leaves, places)
    by_tensor: dict[str, list[Place]] = {}
    for place in places:
        by_tensor.setdefault(saved_name(place, leaves), []).append(place)
    sizes = {name: byte_size(found, leaves) for name, found in by_tensor.items()}
    shards = shards_of(sizes, shard_bytes)
    names = [ONE] if len(shards) == 1 else shard_names(len(shards))
    for name, group in zip(names, shards, strict=True):
        write_tensors(folder / name, {t: to_file(by_tensor[t], leaves) for t in group}, {"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, group in zip(names, shards, strict=True) for tensor in group}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    stale = [p for p in folder.glob("model*.safetensors") if p.name not in names]
    for file in [*stale, *([folder / INDEX] if len(shards) == 1 else [])]:
        file.unlink(missing_ok=True)  # of an older checkpoint here, which would be read with the new one
    if config is not None:
        write_json(folder / "config.json", config)


class _Reader:
    """How one leaf is read: `part` gives the array, or `Quantized`, of one entry of its stack."""

    def __init__(
        self, table: Table, leaves: Leaves, path: str, dtype: np.dtype, format: str | None, block: int
    ):
        self.table, self.leaves, self.path, self.dtype = table, leaves, path, dtype
        self.format, self.block = format, block
        self.leaf = leaves.by_path[path]

    def part(self, parts: Sequence[tuple[Place, str]]) -> Any:
        """One entry: a tensor, or several side by side in its outputs."""
        place, name = parts[0]
        layout, shape = self.leaves.entry_layout(place), self.leaves.entry_shape(place)
        if len(parts) == 1 and place.ours is None:
            stored = bitsandbytes.stored(self.table, name, layout, shape, self.dtype)
            if stored is not None:
                return stored
            x = self._whole(place, name, shape)
        else:
            assert layout is not None
            m = math.prod(layout.shapes(shape)[2])
            n = math.prod(shape) // m
            wide = np.empty((n, m), self.dtype)
            for place, name in parts:
                index = unit_index(place.ours, m, self.path)
                wide[:, index] = _matrix(self.table[name], place, self.leaves.kind(self.path)).astype(
                    self.dtype
                )
            x = from_matrix(wide, layout, shape)
        if self.format is not None and layout is not None:
            return _quantized(np.asarray(x), layout, self.format, self.block, self.path)
        return x

    def _whole(self, place: Place, name: str, shape: tuple[int, ...]) -> np.ndarray:
        layout, kind = self.leaves.entry_layout(place), self.leaves.kind(self.path)
        x = self.table[name]
        if place.theirs is not None:
            axis = outputs_axis(place, layout, kind)
            x = np.take(x, unit_index(place.theirs, x.shape[axis], name), axis)
        found = from_torch(x, place, layout, kind, shape)
        assert found is not None  # shapes were checked before anything was read
        return found.astype(self.dtype)


def _matrix(x: np.ndarray, place: Place, kind: str) -> np.ndarray:
    del kind
    return x if place.turned else x.T


def _quantized(x: np.ndarray, layout: Any, format: str, block: int, path: str) -> Any:
    if not np.isfinite(x.astype(np.float32)).all():
        raise error("weights that are not finite cannot be quantized.", path=path, do="mend the checkpoint.")
    return jax.jit(encode, static_argnums=(1, 2, 3, 4))(x, layout, format, block, True)


def _to_quantize(like: PyTree, leaves: Leaves, format: str | None, targets: Any) -> set[str]:
    if format is None:
        return set()
    from lorax_fn.targets.roles import choose

    linear = [path for path, role in leaves.roles.items() if role.kind == "linear"]
    return set(choose(leaves.by_path, leaves.roles, linear if targets is None else targets, None, None)[0])


def _shardings(like: PyTree, shardings: Any) -> dict[str, Any]:
    if shardings is None:
        return {}
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(arrays(like), shardings)
    named = dict(flatten_with_paths(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))[0])
    lost = [path for path in arrays(like) if path not in named]
    if lost:
        raise error(
            "shardings= lacks leaves of like.",
            path=lost,
            do="one sharding for all, or a tree of them like like.",
        )
    return named


# --- which tensor each place reads


def _checked(table: Table, leaves: Leaves, places: list[Place], strict: bool) -> dict[Place, str]:
    """The name of each place's tensor in the file; or an error that lists all that is wrong."""
    rename = _renaming(table, places)
    sources, missing, shapes = {}, [], []
    for place in places:
        found = [name for name in _names(place, rename) if name in table]
        if not found:
            near = nearest(place.tensor, list(table), 2)
            missing.append(f"{place.path}: no {place.tensor} in the checkpoint; nearest {near}")
            continue
        sources[place] = found[0]
        got = table.shape(found[0])
        wanted = _wanted_shape(place, leaves)
        if not (bitsandbytes.is_stored_there(table, found[0]) or _shape_fits(place, leaves, got)):
            shapes.append(f"{found[0]} {got}, where {wanted} fits {place.path}")
    covered = {place.path for place in places}
    missing += [f"{path}: no pair of mapping= names it" for path in leaves.by_path if path not in covered]
    missing += _gaps(leaves, places)
    used = set(sources.values())
    extra = [name for name in table if name not in used and not _BUFFERS.fullmatch(name)]
    extra = [name for name in extra if not bitsandbytes.belongs(name, used)]
    extra = [name for name in extra if not _tied(table, name, used)] if strict else []
    if missing or extra or shapes:
        facts = {"missing": missing, "extra": extra, "shape": shapes}
        raise error(
            "this checkpoint does not fit the tree, and nothing was loaded.",
            **{name: lines for name, lines in facts.items() if lines},
            do="correct mapping= or like=; layout=lx.usage(fn, params, *args) says which axes weights "
            "contract; strict=False ignores what is extra.",
        )
    return sources


def _names(place: Place, rename: Any) -> list[str]:
    """The names that a tensor may have: older files say gamma and beta; a parameter has no ``.weight``."""
    name = rename(place.tensor)
    older = re.sub(r"\.weight$", ".gamma", re.sub(r"\.bias$", ".beta", name))
    return [name, name.removesuffix(".weight"), older]


def _renaming(table: Table, places: list[Place]) -> Any:
    """Files of a bare model lack the first part of a name, ``transformer.`` or ``bert.``."""

    def cut(name: str) -> str:
        return name.partition(".")[2]

    whole = sum(place.tensor in table for place in places)
    bare = sum(cut(place.tensor) in table for place in places)
    return cut if not whole and bare else lambda name: name


def _shape_fits(place: Place, leaves: Leaves, got: tuple[int, ...]) -> bool:
    layout, kind = leaves.entry_layout(place), leaves.kind(place.path)
    x = np.broadcast_to(np.int8(0), got)
    shape = leaves.entry_shape(place)
    if place.theirs is not None and got:
        axis = outputs_axis(place, layout, kind)
        index = place.theirs.index(got[axis])
        if index is None:
            return False
        x = np.broadcast_to(
            np.int8(0), [len(index) if i == axis % len(got) else n for i, n in enumerate(got)]
        )
    if place.ours is None:
        return from_torch(x, place, layout, kind, shape) is not None
    if layout is None:
        return False
    _, n, m = layout.shapes(shape)
    index = place.ours.index(math.prod(m))
    return index is not None and _matrix(x, place, kind).shape == (math.prod(n), len(index))


def _wanted_shape(place: Place, leaves: Leaves) -> tuple[int, ...]:
    shape = leaves.entry_shape(place)
    layout, kind = leaves.entry_layout(place), leaves.kind(place.path)
    return to_torch(np.broadcast_to(np.int8(0), shape), place, layout, kind).shape


def _gaps(leaves: Leaves, places: list[Place]) -> list[str]:
    """Leaves of which some stack entries or outputs have no tensor."""
    lines = []
    by_path: dict[str, dict[tuple, list[Place]]] = {}
    for place in places:
        by_path.setdefault(place.path, {}).setdefault(place.entry, []).append(place)
    for path, entries in by_path.items():
        first = next(iter(entries.values()))[0]
        sizes = [leaves.by_path[path].shape[i] for i in leaves.entry_axes(first)]
        if len(entries) != math.prod(sizes):
            lines.append(
                f"{path}: {len(entries)} of {math.prod(sizes)} stack entries have a pair in mapping="
            )
        for found in entries.values():
            units = [p.ours for p in found if p.ours is not None]
            if units and sum((u.last - u.first) / u.count for u in units) < 0.999:
                lines.append(f"{path}: some of its outputs have no pair in mapping=")
                break
    return lines


def _tied(table: Table, name: str, used: set[str]) -> bool:
    """Whether a head or embedding is a second copy of one that has a place."""
    if not _HEADS.fullmatch(name):
        return False
    same = [n for n in used if table.shape(n) == table.shape(name) and table.dtype(n) == table.dtype(name)]
    return bool(same) and any(np.array_equal(table[name], table[n]) for n in same)
