"""Adapters as PEFT's tensors and config: what the format cannot express is refused, never dropped."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.interop.peft_config import PREFIX
from lorax_fn.interop.peft_keys import is_conv1d_name, registered
from lorax_fn.interop.peft_lycoris import write_loha, write_lokr, write_vera
from lorax_fn.interop.peft_methods import torch_a
from lorax_fn.interop.pieces import Piece, covered, from_adapter, outputs_of, side_by_side, unit_index
from lorax_fn.interop.places import Place
from lorax_fn.interop.weights import Leaves, entry_of, is_embedding, to_torch
from lorax_fn.methods.loha import LoHa
from lorax_fn.methods.lokr import LoKr
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import LowRank
from lorax_fn.methods.vera import VeRA
from lorax_fn.methods.whole import Full, Rows

# Defaults that PEFT 0.21 writes, which other readers of its files expect.
DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


class Writing:
    """One set of adapters on its way into one adapter file."""

    def __init__(
        self,
        lora: Mapping[str, Adapter],
        places: list[Place],
        leaves: Leaves,
        whole_tree: bool,
        for_peft=True,
    ):
        self.lora, self.leaves, self.whole_tree = lora, leaves, whole_tree
        self.for_peft = for_peft  # or for programs that see a split in the tensors themselves
        self.all_places = places
        self.places: dict[str, list[Place]] = {}
        for place in places:
            self.places.setdefault(place.path, []).append(place)
        self.tensors: dict[str, np.ndarray] = {}
        self.modules: dict[str, tuple[int, float]] = {}  # rank and alpha of each adapted module
        self.parameters: dict[str, tuple[str, Piece]] = {}  # expert parameters: owner, piece
        self.full: dict[str, np.ndarray] = {}
        self.rows: dict[str, list[int]] = {}
        self.fused: dict[str, list[tuple[np.ndarray, Piece]]] = {}
        self.kinds: dict[str, str] = {}
        self.turned = False

    def run(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        lost = [path for path in self.lora if path not in self.places]
        if lost:
            raise error(
                "no pair of mapping= names these leaves.",
                path=lost,
                got=sorted({type(self.lora[path]).__name__ for path in lost}),
                want="a module's name for each adapted leaf",
                do="add their pairs to mapping=.",
            )
        residual = [path for path, x in self.lora.items() if getattr(x, "residual", False)]
        if residual:
            raise error(
                "these adapters belong to what their init left of the weights, not to the weights.",
                path=residual,
                want="adapters of the original weights",
                do="plain = lx.ranks.to_plain(params0, params, lora), with the params0 that split was given.",
            )
        kinds = {_kind(path, x) for path, x in self.lora.items()} - {None}
        if len(kinds) > 1:
            raise error(
                "one PEFT file holds adapters of one kind.",
                got=sorted(map(str, kinds)),
                path=[f"{path}: {_kind(path, x)}" for path, x in self.lora.items() if _kind(path, x)],
                do="save each kind in a folder of its own, as {path: x for path, x in lora.items() if ...}.",
            )
        kind = next(iter(kinds), "lora")
        adapted: dict[str, Any] = {p: x for p, x in self.lora.items() if isinstance(x, LowRank)}
        write = {"vera": write_vera, "loha": write_loha, "lokr": write_lokr}.get(str(kind))
        config = self._low_rank(adapted) if write is None else write(self, adapted)
        for path, adapter in self.lora.items():
            if isinstance(adapter, Rows):
                self._write_rows(path, adapter)
            elif isinstance(adapter, Full):
                self._write_full(path, adapter)
        return self.tensors, self._with_the_rest(config)

    # --- LoRA, DoRA, and every method that is a product of two factors

    def _low_rank(self, lora: Mapping[str, Any]) -> dict[str, Any]:
        dora = any(getattr(x, "magnitude", None) is not None for x in lora.values())
        scalings = {x.scaling for x in lora.values() if hasattr(x, "scaling")}
        for path, adapter in lora.items():
            for place in self.places[path]:
                self._cut(path, adapter, place)
        for module, parts in self.fused.items():
            places = [p for p in self.all_places if p.module == module]
            m = self.outputs(places[0])
            if not covered(parts, m):
                parts = [*parts, *self._zero_parts(module, parts, m, dora)]
            self._module(places[0], side_by_side(parts, m))
        self._experts()
        config: dict[str, Any] = {"peft_type": "LORA", "use_dora": dora}
        if len(scalings) > 1:
            raise error(
                "one PEFT file has one scaling.",
                got=sorted(scalings),
                do="split with one scaling, or save the adapters apart.",
            )
        config["use_rslora"] = scalings == {"rslora"}
        config |= self.numbers("lora_alpha")
        config["fan_in_fan_out"] = self.turned
        if self.parameters:
            config["target_parameters"] = sorted(self.parameters)
        return config

    def _cut(self, path: str, adapter: Any, place: Place) -> None:
        """The part of an adapter that one module of others holds."""
        piece = from_adapter(path, adapter, place.entry)
        if piece.rank == 0:
            return
        if place.ours is not None:
            piece = outputs_of(piece, unit_index(place.ours, piece.b.shape[-1], path))
        if place.theirs is not None:
            index = unit_index(place.theirs, self.outputs(place), place.module)
            self.fused.setdefault(place.module, []).append((index, piece))
        else:
            self._module(place, piece)

    def outputs(self, place: Place) -> int:
        """How many outputs the module of others has."""
        layout = self.leaves.entry_layout(place)
        assert layout is not None
        m = math.prod(layout.shapes(self.leaves.entry_shape(place))[2])
        if place.theirs is None:
            return m
        return m * place.theirs.count // (place.theirs.last - place.theirs.first)

    def _zero_parts(self, module: str, parts: list, m: int, dora: bool) -> list:
        """Outputs of a fused module that have no adapter here: a B of zeros, under the first one's A."""
        if dora:
            raise error(
                "some parts of a fused module have a DoRA adapter and others have none.",
                path=module,
                do="adapt all of its parts: PEFT's magnitude is one vector for them all.",
            )
        taken = np.concatenate([index for index, _ in parts])
        index, first = np.setdiff1d(np.arange(m), taken), parts[0][1]
        zeros = np.zeros((*first.b.shape[:-1], len(index)), first.b.dtype)
        return [(index, Piece(first.a, zeros, first.alpha, first.rank, first.scaling))]

    def _module(self, place: Place, piece: Piece) -> None:
        module, kind = place.module, self.leaves.kind(place.path)
        layout, shape = self.leaves.entry_layout(place), self.leaves.entry_shape(place)
        assert layout is not None
        layout = getattr(self.lora.get(place.path), "layout", None) if place.same else layout
        assert layout is not None
        if piece.a.ndim > 2 or not place.tensor.endswith(".weight"):
            name = module if piece.a.ndim > 2 and not place.same else place.tensor
            if piece.magnitude is not None:
                raise error(
                    "PEFT has no DoRA of expert parameters.",
                    path=place.path,
                    do="fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save.",
                )
            self.parameters[name] = (place.path, piece)
            return
        self.modules[module] = (piece.rank, piece.alpha)
        self.kinds[module] = kind
        key = f"{PREFIX}{module}"
        if kind not in ("convolution",) and is_embedding(place, kind):
            self.tensors[f"{key}.lora_embedding_A"] = piece.a.T
            self.tensors[f"{key}.lora_embedding_B"] = piece.b.T
            magnitude = piece.magnitude
            self.kinds[module] = "embedding"
        else:
            window = (1,) * (len(layout.inputs) - 1) if kind == "convolution" else ()
            self.tensors[f"{key}.lora_A.weight"] = torch_a(piece.a, layout, shape, kind)
            self.tensors[f"{key}.lora_B.weight"] = piece.b.T.reshape(*piece.b.T.shape, *window)
            magnitude = piece.magnitude
            if magnitude is not None and window:
                magnitude = magnitude.reshape(1, -1, *window)
            in_out = place.same and layout.inputs[:1] == (0,) and len(shape) == 2
            self.turned |= place.turned or in_out
            if in_out and kind != "convolution":
                _check_conv1d_name(module)
        if magnitude is not None:
            self.tensors[f"{key}.lora_magnitude_vector"] = magnitude

    def _experts(self) -> None:
        """Parameters of one module nest by registration: the one registered last is outermost."""
        owners: dict[str, list[str]] = {}
        order = list(dict.fromkeys(p.tensor for p in self.all_places))
        for name in sorted(
            self.parameters, key=lambda n: order.index(n) if n in order else order.index(f"{n}.weight")
        ):
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        for owner, names in owners.items():
            same = self.places[self.parameters[names[0]][0]][0].same
            names = registered(names, same) if len(names) > 1 else names
            for depth, name in enumerate(reversed(names)):
                piece = self.parameters[name][1]
                key = f"{PREFIX}{owner}{'.base_layer' * depth}"
                a, b = np.swapaxes(piece.a, -1, -2), np.moveaxis(piece.b, (-1, -2), (0, 1))
                self.tensors[f"{key}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
                self.tensors[f"{key}.lora_B.weight"] = b.reshape(b.shape[0], -1)
                self.modules[name] = (piece.rank, piece.alpha)

    def numbers(self, alpha_name: str) -> dict[str, Any]:
        """The commonest rank and alpha, and patterns for all others."""
        ranks = Counter(rank for rank, _ in self.modules.values())
        alphas = Counter(_plain(alpha) for _, alpha in self.modules.values())
        rank = min(ranks, key=lambda r: (-ranks[r], r)) if ranks else 8
        alpha = min(alphas, key=lambda x: (-alphas[x], x)) if alphas else 8
        return {
            "r": rank,
            alpha_name: alpha,
            "rank_pattern": {m: r for m, (r, _) in sorted(self.modules.items()) if r != rank},
            "alpha_pattern": {
                m: _plain(x) for m, (_, x) in sorted(self.modules.items()) if _plain(x) != alpha
            },
        }

    # --- what trains whole

    def _write_rows(self, path: str, rows: Rows) -> None:
        for place in self.places[path]:
            if place.entry or place.theirs or place.ours:
                raise error(
                    "rows of a stacked or fused table have no place in a PEFT file.",
                    path=path,
                    do="train it whole with full=.",
                )
            key = f"{PREFIX}{place.module}.token_adapter.trainable_tokens_delta"
            self.tensors[key] = np.asarray(rows.values)
            self.rows[place.module] = [int(i) for i in rows.ids]

    def _write_full(self, path: str, adapter: Full) -> None:
        value = np.asarray(adapter.value)
        for place in self.places[path]:
            if place.theirs is not None or place.ours is not None:
                raise error(
                    "a part of a fused module alone cannot be trained whole in a PEFT file.",
                    path=path,
                    got=place.tensor,
                    do="save the weights instead: lx.huggingface.save(path, lx.merge(params, lora)).",
                )
            layout, kind = self.leaves.entry_layout(place), self.leaves.kind(path)
            x = entry_of(value, self.leaves.entry_axes(place), place.entry)
            self.full[place.tensor] = to_torch(x, place, layout, kind)

    def _with_the_rest(self, config: dict[str, Any]) -> dict[str, Any]:
        """Targets, biases and saved modules, in the words of the config."""
        config = DEFAULTS | config if config["peft_type"] == "LORA" else {"inference_mode": True, **config}
        named = [m for m in self.modules if m not in self.parameters]
        config["target_modules"] = self._targets(named)
        if self.rows:
            config["trainable_token_indices"] = dict(sorted(self.rows.items()))
        biases = [t for t in self.full if t.endswith(".bias") and t[:-5] + ".weight" not in self.full]
        saved = sorted({t.rpartition(".")[0] for t in self.full if t not in biases})
        if biases and config["peft_type"] != "LORA":
            saved, biases = sorted({*saved, *(t.rpartition(".")[0] for t in biases)}), []
        if biases:
            config["bias"] = "lora_only" if {t[:-5] for t in biases} <= set(named) else "all"
        for tensor, x in self.full.items():
            module = tensor.rpartition(".")[0]
            inner = tensor in biases and module in self.modules
            if tensor not in biases and module in self.modules:
                raise error(
                    "a module is adapted and trained whole at once.",
                    path=module,
                    do="exclude its weight from the adapters.",
                )
            self.tensors[f"{PREFIX}{module}.base_layer.bias" if inner else f"{PREFIX}{tensor}"] = x
        if saved:
            config["modules_to_save"] = saved
        return config

    def _targets(self, modules: list[str]) -> list[str]:
        """Ends of names where they name exactly these modules among all of the tree, else full names."""
        known = (
            {p.module for p in self.all_places if p.tensor.endswith(".weight")} if self.whole_tree else set()
        )
        ends = {m.rpartition(".")[2] for m in modules}
        hit = {m for m in known if m.rpartition(".")[2] in ends}
        return sorted(ends if known and hit == set(modules) and not ends & _numbers_in(ends) else modules)


def _numbers_in(names: set[str]) -> set[str]:
    return {name for name in names if name.isdigit()}


def _kind(path: str, adapter: Any) -> str | None:
    """The kind of an adapter, which must be the same for all adapters of a file."""
    if isinstance(adapter, Full | Rows):
        return None
    if not isinstance(adapter, LowRank):
        raise error(
            f"a {type(adapter).__name__} cannot be expressed in a PEFT file.",
            path=path,
            do="fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save.",
        )
    names = {VeRA: "vera", LoHa: "loha", LoKr: "lokr"}
    if type(adapter) in names:
        return names[type(adapter)]
    if not adapter.adds and not (isinstance(adapter, LoRA) and hasattr(adapter, "magnitude")):
        raise error(
            f"a {type(adapter).__name__} cannot be expressed in a PEFT file.",
            path=path,
            do="fold it: lx.merge(params, lora), and save the weights with lx.huggingface.save.",
        )
    return "dora" if getattr(adapter, "magnitude", None) is not None else "lora"


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _check_conv1d_name(module: str) -> None:
    """An (in, out) weight in a tree of torch's names is a Conv1D's, or an Embedding's of another name."""
    if not is_conv1d_name(module):
        raise error(
            "this weight is stored (in, out), as those of GPT-2's Conv1D and of an Embedding are.",
            path=module,
            want="a mapping that says which: ^T for Conv1D, ^E for an Embedding",
            do=f'mapping={{"{module}^E": "{module}.weight", ...}}, with a pair for every adapted leaf.',
        )
