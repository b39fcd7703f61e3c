"""Other programs' names and our paths: a mapping is a dict of pairs, and this file says what they mean.

    "model.layers.{i}.self_attn.q_proj": "params/layer_{i}/attn/q/kernel"   one module per leaf
    "model.layers.{i}.self_attn.q_proj": "params/layers/attn/q/kernel"      {i} runs along a stack axis
    "model.layers.{i}.self_attn.q_proj": "layer_{i}/qkv/w[0]"               entry 0 of a stack axis
    "transformer.h.{i}.attn.c_attn[0/3]^T": "layer_{i}/q/kernel"            the first third of a fused weight

The name on the left is a torch module, whose ``weight`` is meant, or a tensor: it then ends in ``.weight``,
``.bias`` or ``=`` (``"vit.embeddings.cls_token="``). The bias beside one of our weights needs no pair.
``[a:b/n@g]`` on either side takes units ``a`` to ``b`` of the ``n`` into which each of ``g`` groups of
outputs is cut (``@1`` may be left out): ``[0/3]`` is q of q, k and v one after the other, ``[0/3@16]``
that of 16 heads that have a q, k and v each. ``^T`` says that torch stores this weight (in, out), as GPT-2
does; ``^E`` that it is an Embedding where its name does not say so, as T5's ``shared``. Shapes need not be
stated: a weight's `Layout` says which of its axes are inputs and outputs.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lorax_fn.core.errors import error, nearest
from lorax_fn.core.layouts import Layout
from lorax_fn.targets.conventions import EMBEDDING_NAMES, WEIGHT_NAMES

_TAIL = re.compile(r"(?P<name>.*?)(\[(?P<inside>[^\]]*)\])?(\^(?P<mark>[TE]))?")
_UNITS = re.compile(r"(\d+)(?::(\d+))?/(\d+)(?:@(\d+))?")
_BRACE = re.compile(r"\{(\w+)\}")


class Preset(dict):
    """A mapping for a family of models; some of its pairs may match nothing in a given tree.

    Args:
      pairs: names of others and paths of ours.
      layouts: ``{path: Layout}``, with the placeholders of the paths, where conventions leave one open.
      by_shapes: of ``{path: leaf}`` of a whole tree, the layouts that follow from their shapes together.
      convolutions: which of ``layouts`` are of convolutions.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        layouts: Mapping[str, Layout] | None = None,
        by_shapes: Callable[[Mapping[str, Any]], dict[str, Layout]] | None = None,
        convolutions: Collection[str] = (),
    ):
        super().__init__(pairs)
        self.layouts, self.by_shapes, self.convolutions = dict(layouts or {}), by_shapes, set(convolutions)

    def layouts_of(self, leaves: Mapping[str, Any]) -> dict[str, Layout]:
        """The layouts of those leaves that have as many axes."""
        found = {} if self.by_shapes is None else self.by_shapes(leaves)
        for path, layout in self.layouts.items():
            pattern = _pattern(path)
            found |= {
                leaf: layout
                for leaf, x in leaves.items()
                if pattern.fullmatch(leaf) and len(x.shape) == layout.ndim
            }
        return found

    def is_convolution(self, path: str) -> bool:
        """Whether a leaf is said to be the kernel of a convolution."""
        return any(_pattern(known).fullmatch(path) for known in self.convolutions)


@dataclasses.dataclass(frozen=True)
class Units:
    """Units ``first`` to ``last`` of the ``count`` into which each of ``groups`` groups of outputs is cut."""

    first: int
    last: int
    count: int
    groups: int = 1

    def index(self, size: int) -> np.ndarray | None:
        """Which of ``size`` outputs these are, or None where ``size`` cannot be cut so."""
        if size % (self.count * self.groups):
            return None
        cut = np.arange(size).reshape(self.groups, self.count, -1)
        return cut[:, self.first : self.last].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of another program, or some of its outputs, and its place in one of our trees.

    Args:
      tensor: its full name.
      path: the leaf.
      entry: the index along the first stack axes of the leaf; ``()`` is the whole leaf.
      theirs: which outputs of that tensor; None is all.
      ours: which outputs of the leaf's entry; None is all.
      turned: whether that tensor is stored (in, out).
      embedding: whether their module is said to be an Embedding.
      same: whether both are stored alike, as in a tree made from a torch state dict.
    """

    tensor: str
    path: str
    entry: tuple[int, ...] = ()
    theirs: Units | None = None
    ours: Units | None = None
    turned: bool = False
    embedding: bool = False
    same: bool = False

    @property
    def module(self) -> str:
        """The torch module that owns the tensor as its weight; of a bare parameter, its own name."""
        return self.tensor.removesuffix(".weight")


def find_places(
    mapping: Mapping[str, str] | None, leaves: Mapping[str, Any], layouts: Mapping[str, Layout]
) -> list[Place]:
    """Every tensor that a mapping names, in the mapping's order.

    Raises:
      LoraError: the mapping is not a dict of such pairs, a pair matches no leaf, or two pairs name the same
        tensor or the same part of a leaf.
    """
    if mapping is None:
        return [Place(path.replace("/", "."), path, same=True) for path in leaves]
    if not isinstance(mapping, Mapping) or not all(isinstance(x, str) for p in mapping.items() for x in p):
        raise error(
            "mapping= is not a dict of names.",
            got=repr(mapping)[:200],
            want='{"model.layers.{i}.self_attn.q_proj": "params/layer_{i}/attn/q/kernel"}',
            do="write it as such pairs, or take one of lx.mappings.preset.",
        )
    places, lost = [], []
    for foreign, ours in mapping.items():
        found = _places_of_pair(foreign, ours, leaves, layouts)
        places += found
        if not found:
            lost.append((foreign, ours))
    if lost and not isinstance(mapping, Preset):
        raise error(
            "pairs of mapping= match nothing in params.",
            path=[ours for _, ours in lost],
            got=[foreign for foreign, _ in lost],
            nearest=[path for _, ours in lost for path in nearest(ours, list(leaves), 2)],
            do="correct the path on the right; a placeholder stands for one component of it.",
        )
    places += _implied_biases(places, leaves)
    _check_once(places)
    return places


def _places_of_pair(
    foreign: str, ours: str, leaves: Mapping[str, Any], layouts: Mapping[str, Layout]
) -> list[Place]:
    name, inside, mark = _parsed(foreign)
    path, index, twisted = _parsed(ours)
    names, bound = _BRACE.findall(name), _BRACE.findall(path)
    unknown = sorted(set(bound) - set(names))
    theirs, mine = _units(inside), _units(index)
    steps = () if index is None or mine is not None else (index,)
    bad_index = bool(steps) and not str(index).isdigit()
    if unknown or twisted or bad_index or (inside is not None and theirs is None) or (theirs and mine):
        raise error(
            "a pair of mapping= cannot be read.",
            got=f"{foreign!r}: {ours!r}",
            want="placeholders of ours that theirs has, too; [0] or [0/3] behind a path, ^T behind names",
            do='as in "h.{i}.c_attn[0/3]^T": "layer_{i}/q/kernel".',
        )
    running = [x for x in dict.fromkeys(names) if x not in bound]
    tensor = name[:-1] if name.endswith("=") else name
    if not name.endswith(("=", ".weight", ".bias")):
        tensor = f"{name}.weight"
    places = []
    pattern = _pattern(path)
    for leaf in leaves:
        match = pattern.fullmatch(leaf)
        if match is None:
            continue
        sizes = _stack_sizes(leaf, leaves[leaf], layouts.get(leaf), len(running) + len(steps))
        for entry in itertools.product(*map(range, sizes[: len(running)])):
            values = match.groupdict() | dict(zip(running, map(str, entry), strict=True))
            filled = _BRACE.sub(lambda m, values=values: values[m[1]], tensor)
            where = entry + tuple(int(step) for step in steps)
            if steps and where[-1] >= sizes[-1]:
                raise error(
                    "a pair of mapping= points beyond a stack axis.",
                    path=leaf,
                    got=f"[{where[-1]}]",
                    want=f"less than {sizes[-1]}",
                    do=f"correct {ours!r}.",
                )
            places.append(Place(filled, leaf, where, theirs, mine, mark == "T", mark == "E"))
    return places


def _stack_sizes(path: str, leaf: Any, layout: Layout | None, wanted: int) -> tuple[int, ...]:
    """The sizes of the stack axes that a pair runs along: the first axes of a leaf without layout."""
    shape = tuple(leaf.shape)
    axes = layout.stack if layout is not None else tuple(range(len(shape)))
    if len(axes) < wanted:
        raise error(
            "a pair of mapping= runs along more stack axes than its weight has.",
            path=path,
            got=f"{wanted} along {layout or shape}",
            want="one stack axis for each placeholder that the path lacks, and one for [index]",
            do="layout={pattern: lx.Layout(stack=(0,), ...)}, or layout=lx.usage(fn, params, *args).",
        )
    return tuple(shape[i] for i in axes[:wanted])


def _parsed(text: str) -> tuple[str, str | None, str | None]:
    match = _TAIL.fullmatch(text)
    assert match is not None  # every part of it is optional
    return match["name"], match["inside"], match["mark"]


def _units(inside: str | None) -> Units | None:
    match = _UNITS.fullmatch(inside or "")
    if match is None:
        return None
    first, last, count, groups = match.groups()
    units = Units(int(first), int(last or int(first) + 1), int(count), int(groups or 1))
    return units if units.first < units.last <= units.count and units.groups else None


def _pattern(path: str) -> re.Pattern:
    seen, out = set(), []
    for i, part in enumerate(_BRACE.split(path)):
        if i % 2 == 0:
            out.append(re.escape(part))
        else:
            out.append(f"(?P={part})" if part in seen else f"(?P<{part}>[^/.]+)")
            seen.add(part)
    return re.compile("".join(out))


def _implied_biases(places: list[Place], leaves: Mapping[str, Any]) -> list[Place]:
    """A bias beside a weight of ours is the bias of the same module."""
    spoken = {place.path for place in places}
    implied = []
    for place in places:
        owner, _, last = place.path.rpartition("/")
        if "." in last and not owner:
            owner, _, last = place.path.rpartition(".")
        known = (*WEIGHT_NAMES, *EMBEDDING_NAMES, "scale")
        if not place.tensor.endswith(".weight") or last not in known:
            continue
        for name in ("bias", "b"):
            path = place.path[: len(place.path) - len(last)] + name
            if path in leaves and path not in spoken:
                bias = dataclasses.replace(place, tensor=f"{place.module}.bias", path=path, turned=False)
                implied.append(bias)
                break
    return implied


def _check_once(places: list[Place]) -> None:
    seen: dict[Any, Place] = {}
    for place in places:
        for key in ((place.tensor, place.theirs), (place.path, place.entry, place.ours)):
            if key in seen:
                raise error(
                    "two pairs of mapping= name the same thing.",
                    path=[seen[key].path, place.path],
                    got=[seen[key].tensor, place.tensor],
                    want="one place for each tensor",
                    do="leave one of the two pairs out.",
                )
            seen[key] = place
