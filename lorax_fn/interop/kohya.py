"""Adapters of image models, in files of Kohya, LyCORIS, ComfyUI and diffusers: `load` and `save`.

Keys are ``<module>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``; the scale is alpha / rank, and 1
where a file of this kind has no alpha. One file may hold several components of a pipeline.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error, nearest
from lorax_fn.core.fitting import check_adapters, check_fits
from lorax_fn.core.trees import PyTree, flatten_with_paths
from lorax_fn.interop.files import open_tensors, write_tensors
from lorax_fn.interop.kohya_keys import (
    STYLES,
    check_component,
    is_of_another,
    known_ends,
    names_of,
    split_key,
    written_name,
)
from lorax_fn.interop.peft_config import value_of
from lorax_fn.interop.peft_keys import on_device
from lorax_fn.interop.peft_methods import low_rank_piece, lycoris_adapter
from lorax_fn.interop.peft_write import Writing
from lorax_fn.interop.pieces import Piece, outputs_of, side_by_side, to_adapter, unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.stacks import cut, joined
from lorax_fn.interop.weights import Leaves, known, known_by_adapters, to_matrix

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    component: str = "unet",
    mapping: Mapping[str, str] | None = None,
    layout: Mapping[Any, Any] | None = None,
    strict: bool = True,
) -> dict[str, Adapter]:
    """Reads one component's adapters from a file of Kohya, LyCORIS, ComfyUI or diffusers.

    LoRA and LoCon (convolutions, also with a core in the middle), DoRA by outputs, LoHa and LoKr.

    Args:
      path: the ``.safetensors`` file.
      params: the base of that component.
      component: ``"unet"``, ``"transformer"``, ``"text_encoder"``, ``"text_encoder_2"`` or
        ``"text_encoder_3"``; keys of other components are ignored.
      mapping: pairs of a module's name, as in diffusers or transformers, and a path; None is the names
        themselves.
      layout: as in `lorax_fn.split`.
      strict: False ignores keys that have no place.

    Returns:
      ``{path: Adapter}`` in the tree's order.

    Raises:
      LoraError: the file is damaged, of another key layout, or does not fit; all keys are listed.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"mid_block.attentions.0.proj_in.weight": jnp.ones((6, 8))}
      >>> _, lora = lx.split(params, rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.kohya.save(f"{folder}/a.safetensors", lora)
      ...     list(lx.kohya.load(f"{folder}/a.safetensors", params))
      ['mid_block.attentions.0.proj_in.weight']
    """
    check_component(component)
    leaves, places = known(params, mapping, layout)
    with open_tensors(path) as file:
        tensors = {name: file[name] for name in file.names if not is_of_another(name, component)}
        config = _metadata(file.metadata, component)
    lora = _Reading(leaves, places, component, config, strict).run(tensors)
    return on_device(lora)


def save(
    path: str | os.PathLike[str],
    lora: dict[str, Adapter],
    *,
    component: str = "unet",
    params: PyTree = None,
    mapping: Mapping[str, str] | None = None,
    style: str = "kohya",
    keep_others: bool = False,
) -> None:
    """Writes one component's adapters as a file for image programs.

    Args:
      path: the ``.safetensors`` file.
      lora: LoRA, DoRA, LoHa or LoKr adapters by path.
      component: as in `load`.
      params: the base, abstract or not, by which convolutions are known.
      mapping: as in `load`.
      style: ``"kohya"``; ``"diffusers"`` (dotted names, PEFT's config beside them); or ``"comfyui"``.
      keep_others: whether an older file at ``path`` keeps the keys of its other components.

    Raises:
      LoraError: an adapter cannot be expressed in such a file, or a leaf has no name.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> from lorax_fn.interop.files import read_tensors
      >>> _, lora = lx.split({"conv_in.weight": jnp.ones((6, 8))}, rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.kohya.save(f"{folder}/a.safetensors", lora)
      ...     sorted(read_tensors(f"{folder}/a.safetensors"))
      ['lora_unet_conv_in.alpha', 'lora_unet_conv_in.lora_down.weight', 'lora_unet_conv_in.lora_up.weight']
    """
    check_component(component)
    if style not in STYLES:
        raise error(
            "unknown style.", got=repr(style), want=f"one of {', '.join(STYLES)}", do='style="kohya".'
        )
    check_adapters(lora)
    leaves, places = known_by_adapters(params, lora, mapping)
    if params is not None:
        check_fits(dict(flatten_with_paths(params)[0]), lora)
    writing = Writing(lora, places, leaves, params is not None, for_peft=False)
    tensors, facts = writing.run()
    _check_writable(tensors, facts, style)
    made = _renamed(tensors, writing.modules, component, style, facts)
    metadata = {"format": "pt"}
    if style == "diffusers":
        metadata[METADATA] = json.dumps({f"{component}.{k}": v for k, v in facts.items()}, sort_keys=True)
    target = pathlib.Path(path)
    if keep_others and target.exists():
        with open_tensors(target) as older:
            made |= {n: older[n] for n in older.names if is_of_another(n, component)}
    write_tensors(target, made, metadata)


class _Reading:
    def __init__(self, leaves: Leaves, places: list[Place], component: str, config: Mapping, strict: bool):
        self.leaves, self.config, self.strict = leaves, config, strict
        self.by_name: dict[str, list[Place]] = {}
        for place in places:
            if place.tensor.endswith(".weight"):
                for name in names_of(place.module, component):
                    self.by_name.setdefault(name, []).append(place)
        self.wrong: list[str] = []
        self.unexpected: list[str] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Adapter]:
        modules: dict[str, dict[str, np.ndarray]] = {}
        for key, x in tensors.items():
            found = split_key(key)
            if found is None:
                self.unexpected.append(key)
            else:
                modules.setdefault(found[0], {})[found[1]] = x
        if not modules:
            raise error(
                "no key of this component has a known layout.",
                got=sorted(tensors)[:4] or "no key at all",
                want=f"keys that end in one of {', '.join(known_ends())}",
                do="check component=.",
            )
        lora: dict[str, Any] = {}
        pieces: dict[str, list[tuple[Place, Piece]]] = {}
        others: dict[str, list[tuple[Place, Any]]] = {}  # LoHa and LoKr
        for name, parts in modules.items():
            places = self._places(name)
            if not places:
                self.unexpected.append(f"{name}; nearest {nearest(name, list(self.by_name), 2)}")
                continue
            for place in places:
                try:
                    self._one(place, dict(parts), others, pieces)
                except ValueError as failure:
                    self.wrong.append(f"{name}: {failure}")
        for path, found in others.items():
            try:
                lora[path] = joined(found, self.leaves.layouts[path], self.leaves.by_path[path].shape)
            except ValueError as failure:
                self.wrong.append(f"{path}: {failure}")
        if self.wrong or (self.unexpected and self.strict):
            facts = {"shape": self.wrong, "extra": self.unexpected if self.strict else []}
            raise error(
                "this file does not fit these params, and nothing was loaded.",
                **{name: lines for name, lines in facts.items() if lines},
                do="check params, component= and mapping=; strict=False ignores keys that have no place.",
            )
        for path, found in pieces.items():
            lora[path] = self._joined(path, found)
        return {path: lora[path] for path in self.leaves.by_path if path in lora}

    def _places(self, name: str) -> list[Place]:
        places = self.by_name.get(name, [])
        modules = {place.module for place in places}
        if len(modules) > 1:
            raise error(
                "two modules share this name.",
                path=sorted(modules),
                got=name,
                do="mapping= with one of them.",
            )
        return places

    def _one(self, place: Place, parts: dict, others: dict, pieces: dict) -> None:
        self.leaves.settle(place, False)
        layout, shape = self.leaves.entry_layout(place), self.leaves.entry_shape(place)
        kind = self.leaves.kind(place.path)
        if layout is None:
            raise ValueError(f"which axes {place.path} contracts is open: layout=lx.usage(fn, params, *args)")
        for part, x in parts.items():
            if not x.size or not np.isfinite(x.astype(np.float32)).all():
                raise ValueError(f"{part} is {'empty' if not x.size else 'not finite'}")
        alpha = parts.pop("alpha", None)
        if alpha is not None and alpha.size != 1:
            raise ValueError(f"alpha of shape {alpha.shape}")
        if any(part.startswith(("hada", "lokr")) for part in parts):
            rank = _lycoris_rank(parts)
            both_whole = "lokr_w1" in parts and "lokr_w2" in parts  # LyCORIS then takes no alpha at all
            number = float(rank) if alpha is None or both_whole else float(alpha.reshape(()))
            made: Any = lycoris_adapter(parts, layout, shape, kind, number, rank, place)
            if place.theirs is not None:
                made = cut(made, unit_index(place.theirs, made.b1.shape[-1], place.module))
            others.setdefault(place.path, []).append((place, made))
            return
        down, up, mid = (parts.get(name) for name in ("down", "up", "mid"))
        if down is None or up is None:
            raise ValueError(f"only {', '.join(sorted(parts))}: the other half is missing")
        if mid is not None:
            down = _with_core(down, mid)
        rank = int(down.shape[0])
        number = self._alpha(place.module, rank) if alpha is None else float(alpha.reshape(()))
        if down.ndim == 4 and kind != "convolution" and down.shape[2:] == (1, 1):
            down, up = down[:, :, 0, 0], up.reshape(up.shape[0], -1)  # 1 x 1, and a linear weight here
        elif down.ndim == 2 and kind == "convolution":
            down = down.reshape(*down.shape, *(1,) * (len(layout.inputs) - 1))
        named = {"lora_A.weight": down, "lora_B.weight": up}
        if "dora" in parts:
            scale = parts["dora"]
            if scale.size != up.shape[0] or (scale.ndim == 2 and scale.shape[0] == 1):
                raise ValueError(
                    f"dora_scale {scale.shape}: LyCORIS' norms by inputs are not DoRA's by outputs"
                )
            named["lora_magnitude_vector"] = scale
        config = {"use_dora": "dora" in parts, "use_rslora": self.config.get("use_rslora", False)}
        piece = low_rank_piece(named, layout, shape, kind, number, None, config, place)
        if place.theirs is not None:
            piece = outputs_of(piece, unit_index(place.theirs, piece.b.shape[-1], place.module))
        pieces.setdefault(place.path, []).append((place, piece))

    def _alpha(self, module: str, rank: int) -> float:
        """Without an alpha of its own a module has scale 1, or what PEFT's config beside the file says."""
        if "lora_alpha" not in self.config:
            return float(rank)
        return float(value_of(module, self.config.get("alpha_pattern"), self.config["lora_alpha"]))

    def _joined(self, path: str, found: list[tuple[Place, Piece]]) -> Any:
        layout, leaf = self.leaves.layouts[path], self.leaves.by_path[path]
        m = math.prod(layout.shapes(leaf.shape)[2])
        entries: dict[tuple[int, ...], list[tuple[np.ndarray, Piece]]] = {}
        for place, piece in found:
            entries.setdefault(place.entry, []).append((unit_index(place.ours, m, path), piece))
        joined = {e: side_by_side(parts, m) for e, parts in entries.items()}

        def norms() -> np.ndarray:
            return np.sqrt(np.square(to_matrix(np.asarray(leaf, np.float32), layout)).sum(-2))

        return to_adapter(joined, layout, tuple(leaf.shape), norms)


def _with_core(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """LoCon's Tucker form: a core ``(r, r, *window)`` over a 1 x 1 ``down``."""
    flat = down.reshape(*down.shape[:2], -1)[:, :, 0]
    if mid.ndim < 3 or mid.shape[1] != down.shape[0] or down.size != flat.size:
        raise ValueError(f"lora_mid {mid.shape} for lora_down {down.shape}")
    return np.einsum("ij...,jn->in...", mid, flat)


def _lycoris_rank(parts: Mapping[str, np.ndarray]) -> int:
    for name, axis in (("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in parts:
            return int(parts[name].shape[axis])
    return 1  # both factors of LoKr are whole: there is no rank


def _metadata(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """PEFT's config as diffusers keeps it, for one component."""
    try:
        facts = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as failure:
        raise error(
            "the file's metadata is not JSON.", got=str(failure), do="save the file again."
        ) from failure
    facts = facts if isinstance(facts, dict) else {}
    found = {k.removeprefix(f"{component}."): v for k, v in facts.items() if k.startswith(f"{component}.")}
    numbers = {"lora_alpha": found.get("lora_alpha", 1), **(found.get("alpha_pattern") or {})}
    wrong = {k: v for k, v in numbers.items() if isinstance(v, bool) or not isinstance(v, int | float)}
    if wrong or any(not math.isfinite(v) for v in numbers.values()):
        raise error(
            "alphas in the file's metadata are not numbers.", got=wrong or numbers, do="save the file again."
        )
    return found


def _check_writable(tensors: Mapping[str, Any], facts: Mapping[str, Any], style: str) -> None:
    if style == "diffusers" and facts["peft_type"] != "LORA":
        raise error(
            "diffusers reads neither LoHa nor LoKr.",
            got=facts["peft_type"],
            do='style="kohya" for other programs, or fold it: lx.merge(params, lora).',
        )
    whole = [
        n
        for n in tensors
        if not any(f".{part}" in n for part in ("lora_A", "lora_B", "lora_mag", "hada_", "lokr_"))
    ]
    if whole or facts["peft_type"] not in ("LORA", "LOHA", "LOKR"):
        raise error(
            "a file of this kind holds LoRA, DoRA, LoHa and LoKr of linear weights and convolutions alone.",
            path=whole or facts["peft_type"],
            do="save these as PEFT does: lx.peft.save(path, lora).",
        )


def _renamed(
    tensors: Mapping[str, np.ndarray],
    modules: Mapping[str, tuple[int, float]],
    component: str,
    style: str,
    facts: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """PEFT's keys in the words of a style, and an alpha for each module."""
    words = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    made: dict[str, np.ndarray] = {}
    for module, (rank, alpha) in modules.items():
        name = written_name(module, component, style)
        prefix = f"base_model.model.{module}."
        for key, x in tensors.items():
            if not key.startswith(prefix):
                continue
            end = key[len(prefix) - 1 :]
            if style != "diffusers":
                end = words.get(end, end)
                if end == ".lora_magnitude_vector":
                    end, x = ".dora_scale", x.reshape(-1, *(1,) * (1 if x.ndim == 1 else x.ndim - 1))
            made[name + end] = x
        whole = f"{name}.lokr_w1" in made and f"{name}.lokr_w2" in made
        if whole:  # LyCORIS then takes no alpha
            made[f"{name}.lokr_w2"] = made[f"{name}.lokr_w2"] * (alpha / rank)
        if style != "diffusers":
            number = 1.0 if whole else alpha * math.sqrt(rank) if facts.get("use_rslora") else alpha
            made[f"{name}.alpha"] = np.asarray(number, np.float32)
    return made
