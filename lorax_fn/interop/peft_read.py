"""Tensors of a PEFT file as adapters of a tree: every key has a place, or all that have none are listed."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error, nearest
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import dense
from lorax_fn.core.trees import is_abstract
from lorax_fn.interop.peft_config import PREFIX, is_targeted, unused_keys, value_of
from lorax_fn.interop.peft_keys import REQUIRED, by_module, has, registered, token_ids
from lorax_fn.interop.peft_methods import low_rank_piece, lycoris_adapter, module_outputs, vera_adapter
from lorax_fn.interop.pieces import Piece, covered, outputs_of, side_by_side, to_adapter, unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.stacks import cut, joined
from lorax_fn.interop.weights import Leaves, entry_of, from_torch, outputs_axis, to_matrix
from lorax_fn.methods.whole import Full, Rows


class Reading:
    """One adapter file on its way into one tree."""

    def __init__(self, config: Mapping[str, Any], places: list[Place], leaves: Leaves, strict: bool):
        self.config, self.leaves, self.strict = config, leaves, strict
        self.places: dict[str, list[Place]] = {}
        for place in places:
            self.places.setdefault(place.tensor, []).append(place)
        self.lora: dict[str, Adapter] = {}
        self.pieces: dict[str, list[tuple[Place, Piece]]] = {}
        self.others: dict[str, list[tuple[Place, Any]]] = {}  # LoHa, LoKr and VeRA
        self.unexpected: list[str] = []
        self.missing: list[str] = []
        self.misshaped: list[str] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Adapter]:
        modules, plain, strange = by_module(tensors)
        self.unexpected += strange
        shared = {name: modules[""].pop(name) for name in ("vera_A", "vera_B") if name in modules.get("", {})}
        parameters = self._expert_parameters(modules)
        for module, parts in modules.items():
            if parts:
                self._module(module, parts, parameters.get(module), shared)
        for name, x in plain.items():
            self._plain(name, x)
        self._missing_modules(set(modules) | set(parameters))
        self._check_patterns([parameters.get(m, m) for m in modules if m])
        self._raise()
        for path, found in self.pieces.items():
            self.lora[path] = self._joined(path, found)
        for path, others in self.others.items():
            try:
                self._put(path, joined(others, self.leaves.layouts[path], self.leaves.by_path[path].shape))
            except ValueError as failure:
                self.misshaped.append(f"{path}: {failure}")
        self._raise()
        return {path: self.lora[path] for path in self.leaves.by_path if path in self.lora}

    # --- names

    def _expert_parameters(self, modules: Mapping[str, dict]) -> dict[str, str]:
        """``{module or module.base_layer...: parameter}`` of ``target_parameters``."""
        wanted = self.config.get("target_parameters") or []
        if not isinstance(wanted, list) or not all(isinstance(x, str) for x in wanted):
            raise error(
                "target_parameters is not a list of names.",
                got=repr(wanted),
                do="correct adapter_config.json.",
            )
        found: dict[str, list[str]] = {}
        for tensor, places in self.places.items():
            name = places[0].module
            if any(name == t or name.endswith(f".{t}") for t in wanted):
                found.setdefault(name.rpartition(".")[0], []).append(name)
            elif any(tensor == t or tensor.endswith(f".{t}") for t in wanted):
                found.setdefault(tensor.rpartition(".")[0], []).append(tensor)
        chosen = {}
        for owner, parameters in found.items():
            levels = [owner + ".base_layer" * i for i in range(len(parameters))]
            present = [level for level in levels if level in modules]
            for level, parameter in self._levels(present, parameters, modules):
                chosen[level] = parameter
        return chosen

    def _levels(self, levels: list[str], parameters: list[str], modules: Mapping[str, dict]):
        """Which parameter each nested layer adapts: by shape, else by the order of registration."""
        if len(levels) < 2:
            fits = [p for p in parameters if levels and self._fits(modules[levels[0]], p)]
            return [(levels[0], fits[0] if len(fits) == 1 else parameters[-1])] if levels else []
        by_shape = [[p for p in parameters if self._fits(modules[level], p)] for level in levels]
        if all(len(fits) == 1 for fits in by_shape) and len({fits[0] for fits in by_shape}) == len(levels):
            return [(level, fits[0]) for level, fits in zip(levels, by_shape, strict=True)]
        ordered = registered(parameters, all(self._places_of(p)[0].same for p in parameters))
        return list(zip(levels, reversed(ordered), strict=True))

    def _fits(self, parts: Mapping[str, np.ndarray], parameter: str) -> bool:
        place = self._places_of(parameter)[0]
        shape, layout = self.leaves.entry_shape(place), self.leaves.entry_layout(place)
        sizes = shape[-2:] if layout is None else self._sizes(place, layout)
        a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if a is None or b is None or not a.ndim == b.ndim == 2:
            return False
        return sorted((a.shape[1], b.shape[0])) == sorted(sizes)

    def _sizes(self, place: Place, layout: Layout) -> tuple[int, int]:
        """How many inputs and outputs the module of a place has."""
        _, n, m = layout.shapes(self.leaves.entry_shape(place))
        return math.prod(n), module_outputs(math.prod(m), place)

    def _places_of(self, module: str) -> list[Place]:
        return self.places.get(f"{module}.weight", []) or self.places.get(module, [])

    # --- what each key becomes

    def _module(self, module: str, parts: dict, parameter: str | None, shared: Mapping) -> None:
        lonely = [f"{module}.{REQUIRED[p]}" for p in parts if p in REQUIRED and not has(parts, REQUIRED[p])]
        self.missing += [f"{PREFIX}{name}: the other half is there" for name in lonely]
        places = self._places_of(parameter or module)
        if not places:
            near = nearest(module, [p[0].module for p in self.places.values()], 2)
            self.unexpected.append(f"{PREFIX}{module}.({', '.join(sorted(parts))}); nearest {near}")
        if lonely or not places:
            return
        for name, x in parts.items():
            if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != "bfloat16":
                self.misshaped.append(f"{PREFIX}{module}.{name}: {x.dtype}, not a float dtype")
                return
            if not x.size or not np.isfinite(x.astype(np.float32)).all():
                self.misshaped.append(f"{PREFIX}{module}.{name}: {'empty' if not x.size else 'not finite'}")
                return
        if "trainable_tokens_delta" in parts:
            self._rows(module, places, parts.pop("trainable_tokens_delta"))
        if not parts:
            return
        bias = parts.pop("lora_B.bias", None)
        for place in places:
            table = "lora_embedding_A" in parts and place.same
            if parameter is None:
                self.leaves.settle(place, table)
            if table and self.leaves.layouts.get(place.path) == Layout((), (1,), (0,)):
                self.leaves.turn(place.path, Layout((), (0,), (1,)), "embedding")
            self._adapted(parameter or module, place, parts, parameter is not None, shared)
        if bias is not None:
            self._lora_bias(module, bias, parts)

    def _adapted(self, module: str, place: Place, parts: Mapping, bare: bool, shared: Mapping) -> None:
        layout = self._layout(place, parts, bare)
        if layout is None:
            return
        shape, kind = self.leaves.entry_shape(place), self.leaves.kind(place.path)
        alpha, rank = self._numbers(module, parts)
        named = (f"{PREFIX}{module}", self.misshaped)
        try:
            if any(name.startswith(("hada_", "lokr_", "vera_")) for name in parts):
                made: Any
                if "vera_lambda_b" in parts:
                    made = vera_adapter(parts, shared, layout, shape, place)
                else:
                    made = lycoris_adapter(parts, layout, shape, kind, alpha, rank, place)
                if place.theirs is not None:
                    made = cut(made, unit_index(place.theirs, made.b1.shape[-1], module))
                self.others.setdefault(place.path, []).append((place, made))
                return
            piece = low_rank_piece(parts, layout, shape, kind, alpha, rank, self.config, place)
        except ValueError as failure:
            self.misshaped.append(f"{named[0]}: {failure}")
            return
        if place.theirs is not None:
            piece = outputs_of(piece, unit_index(place.theirs, piece.b.shape[-1], module))
        self.pieces.setdefault(place.path, []).append((place, piece))

    def _numbers(self, module: str, parts: Mapping) -> tuple[float, int | None]:
        config = self.config
        kind = config["peft_type"]
        if kind == "VERA":
            return 1.0, None
        if kind == "ADALORA":
            first = config.get("init_r") or config.get("r")
            if not isinstance(first, int) or first < 1:
                raise error(
                    "an AdaLoRA config without init_r has no scale.",
                    do="add the init_r with which it was made.",
                )
            alpha = float(config["lora_alpha"])
            return (alpha if alpha > 0 else float(first)) / (first + 1e-5), None
        default = config["lora_alpha" if kind == "LORA" else "alpha"]
        alpha = value_of(module, config.get("alpha_pattern"), default)
        return float(alpha), value_of(module, config.get("rank_pattern"), config.get("r"))

    def _layout(self, place: Place, parts: Mapping, bare: bool) -> Layout | None:
        """The layout of the entry, or None where the sizes contradict it."""
        layout = self.leaves.entry_layout(place)
        shape = self.leaves.entry_shape(place)
        if (
            layout is None and bare and len(shape) in (2, 3)
        ):  # a parameter by torch's convention: (.., out, in)
            stack = tuple(range(len(shape) - 2))
            layout = Layout(stack, (len(shape) - 1,), (len(shape) - 2,))
        if layout is None:
            role = self.leaves.roles[place.path]
            self.misshaped.append(
                f"{place.path}: {role.reason or 'no layout'}; layout=lx.usage(fn, params, *args) says which "
                "axes it contracts"
            )
            return None
        a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if not bare or a is None or b is None:
            return layout
        if (a.shape[1], b.shape[0]) != self._sizes(place, layout):
            return Layout(layout.stack, layout.outputs, layout.inputs)  # PEFT's inputs are the last axis
        return layout

    def _rows(self, module: str, places: list[Place], values: np.ndarray) -> None:
        ids = token_ids(module, self.config)
        place = places[0]
        shape = self.leaves.by_path[place.path].shape
        layout = self.leaves.layouts.get(place.path)
        linear = layout is not None and not place.same and self.leaves.kind(place.path) in ("linear", "head")
        axis = layout.outputs[0] if linear and layout is not None else 0  # of a head, tokens are outputs
        good = len(shape) == 2 and values.shape == (len(ids or ()), shape[1 - axis])
        if not good or ids is None or max(ids) >= shape[axis] or place.entry:
            self.misshaped.append(
                f"{PREFIX}{module}: rows {ids} of shape {values.shape} for a table {tuple(shape)}"
            )
            return
        self._put(place.path, Rows(values, tuple(ids), axis))

    def _lora_bias(self, module: str, bias: np.ndarray, parts: Mapping) -> None:
        """PEFT adds ``scale * bias`` to the output, which equals a base bias that is larger by as much."""
        places = self.places.get(f"{module}.bias", [])
        alpha, rank = self._numbers(module, parts)
        b = parts.get("lora_B.weight")
        scale = 1.0 if b is None else Piece(b, b, alpha, rank or b.shape[1], self._scaling()).scale
        if not places:
            self.unexpected.append(
                f"{PREFIX}{module}.lora_B.bias: the weight has no bias in params that could hold it"
            )
        for place in places:
            leaf = self.leaves.by_path[place.path]
            if is_abstract(leaf):
                raise error(
                    "lora_bias is added to the base's own bias, and these params have no numbers.",
                    path=place.path,
                    do="load onto concrete params.",
                )
            self._full(place, bias, f"{module}.lora_B.bias", add=scale)

    def _scaling(self) -> str:
        return "rslora" if self.config.get("use_rslora") else "lora"

    def _plain(self, name: str, x: np.ndarray) -> None:
        """A tensor that is trained whole: of ``modules_to_save``, a bias, or a saved embedding."""
        places = self.places.get(name.replace(".base_layer.", "."), [])
        if not places:
            self.unexpected.append(f"{PREFIX}{name}; nearest {nearest(name, list(self.places), 2)}")
        for place in places:
            if name.endswith(".base_layer.weight"):
                self._base_embedding(place, x, name)
            else:
                self._full(place, x, name)

    def _base_embedding(self, place: Place, x: np.ndarray, name: str) -> None:
        """An adapted embedding is saved with its base: the same as in params, or not of this base."""
        leaf = self.leaves.by_path[place.path]
        same = tuple(leaf.shape) == x.shape and (
            is_abstract(leaf)
            or np.allclose(np.asarray(dense(leaf), np.float32), x.astype(np.float32), atol=1e-3)
        )
        if not same:
            self.misshaped.append(f"{PREFIX}{name} {x.shape}: the adapter was trained on another embedding")

    def _full(self, place: Place, x: np.ndarray, name: str, add: float | None = None) -> None:
        path, layout = place.path, self.leaves.entry_layout(place)
        leaf, kind = self.leaves.by_path[path], self.leaves.kind(path)
        if place.theirs is not None:
            axis = outputs_axis(place, layout, kind)
            x = np.take(x, unit_index(place.theirs, x.shape[axis], name), axis)
        shape = self.leaves.entry_shape(place)
        value = from_torch(x, place, layout, kind, shape) if place.ours is None else None
        if value is None or not np.isfinite(value.astype(np.float32)).all():
            self.misshaped.append(f"{PREFIX}{name} {x.shape}: {shape} of finite numbers is wanted at {path}")
            return
        if (
            path in self.lora
            and not place.entry
            or path in self.lora
            and not isinstance(self.lora[path], Full)
        ):
            self.misshaped.append(f"{PREFIX}{name}: {path} is adapted already, and a leaf has one adapter")
            return
        if add is None and not place.entry:
            self.lora[path] = Full(value)
            return
        if is_abstract(leaf):
            raise error(
                "one entry of a stacked leaf alone needs params with numbers.",
                path=path,
                do="load onto concrete params.",
            )
        base = self.lora.get(path)
        whole = np.array(base.value if isinstance(base, Full) else np.asarray(dense(leaf), np.float32))
        part = entry_of(whole, self.leaves.entry_axes(place), place.entry)
        part[...] = value if add is None else part + np.float32(add) * value.astype(np.float32)
        self.lora[path] = Full(whole)

    def _put(self, path: str, adapter: Adapter) -> None:
        if path in self.lora or path in self.pieces:
            self.misshaped.append(f"{path}: adapted twice, and a leaf has one adapter")
        self.lora[path] = adapter

    # --- joining and checking

    def _joined(self, path: str, found: list[tuple[Place, Piece]]) -> Any:
        leaf = self.leaves.by_path[path]
        place = found[0][0]
        layout = self.leaves.layouts.get(path) or self._layout(place, {}, True)
        if not place.entry and place.ours is None and place.theirs is None:
            layout = self._bare_layout(place, found[0][1], layout)
        assert layout is not None
        m = math.prod(layout.shapes(leaf.shape)[2])
        entries: dict[tuple[int, ...], list[tuple[np.ndarray, Piece]]] = {}
        for place, piece in found:
            index = unit_index(place.ours, m, path)
            entries.setdefault(place.entry, []).append((index, piece))
        if path in self.lora:
            self.misshaped.append(f"{path}: adapted and replaced, and a leaf has one adapter")
        joined = {
            e: parts[0][1] if covered(parts, m) and len(parts) == 1 else side_by_side(parts, m)
            for e, parts in entries.items()
        }
        kinds = {piece.magnitude is None for piece in joined.values()}
        if len(kinds) > 1 or (not all(kinds) and any(not covered(p, m) for p in entries.values())):
            self.misshaped.append(f"{path}: some of its entries have a magnitude and others have none")
            return None

        def norms() -> np.ndarray:
            return np.sqrt(np.square(to_matrix(np.asarray(dense(leaf), np.float32), layout)).sum(-2))

        return to_adapter(joined, layout, tuple(leaf.shape), norms)

    def _bare_layout(self, place: Place, piece: Piece, layout: Layout | None) -> Layout | None:
        """Of a parameter whose inputs PEFT takes for outputs."""
        if layout is None:
            return None
        _, n, m = layout.shapes(self.leaves.entry_shape(place))
        if (piece.a.shape[-2], piece.b.shape[-1]) == (math.prod(n), math.prod(m)):
            return layout
        return Layout(layout.stack, layout.outputs, layout.inputs)

    def _missing_modules(self, found: set[str]) -> None:
        """Modules that the config targets and the file lacks, among the weights that PEFT adapts."""
        for places in self.places.values():
            module, path = places[0].module, places[0].path
            served = self.leaves.roles[path].kind in ("linear", "head", "convolution", "embedding")
            if served and places[0].tensor.endswith(".weight") and module not in found:
                if is_targeted(module, self.config) or self._all_linear(path):
                    self.missing.append(f"{PREFIX}{module}: targeted by the config")

    def _all_linear(self, path: str) -> bool:
        return self.config.get("target_modules") == "all-linear" and self.leaves.roles[path].kind == "linear"

    def _check_patterns(self, modules: list[str]) -> None:
        if not self.strict or self.config["peft_type"] == "ADALORA":
            return
        plain = [re.sub(r"(\.base_layer)+$", "", module) for module in modules]
        idle = {
            name: keys
            for name in ("rank_pattern", "alpha_pattern")
            if (keys := unused_keys(self.config.get(name), plain))
        }
        if idle:
            raise error(
                "patterns of this config match no module of the file.",
                got=[f"{name}: {', '.join(map(repr, keys))}" for name, keys in idle.items()],
                nearest=[m for keys in idle.values() for key in keys for m in nearest(key, plain, 1)],
                do="correct adapter_config.json; or strict=False, since PEFT ignores them.",
            )

    def _raise(self) -> None:
        lost = [] if self.strict is False else self.missing
        extra = [] if self.strict is False else self.unexpected
        halves = [x for x in self.missing if x.endswith("half is there")]
        if not (lost or extra or halves or self.misshaped):
            return
        facts = {"missing": lost or halves, "extra": extra, "shape": self.misshaped}
        raise error(
            "this adapter does not fit these params, and nothing was loaded.",
            **{name: lines for name, lines in facts.items() if lines},
            do="check params and mapping=, pairs of a module and a path; strict=False takes what fits.",
        )
