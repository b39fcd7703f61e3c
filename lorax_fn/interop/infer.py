"""A mapping from names and shapes alone: a proposal where one fits best, an error between equals."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree, arrays
from lorax_fn.interop.weights import Leaves

# One word for what programs call by different names; an empty one carries no meaning.
_WORDS = {
    **dict.fromkeys(("query", "wq"), "q"),
    **dict.fromkeys(("key", "wk"), "k"),
    **dict.fromkeys(("value", "wv"), "v"),
    **dict.fromkeys(("out", "wo", "output", "attn_vec"), "o"),
    **dict.fromkeys(("attention", "selfattention", "selfattn"), "attn"),
    **dict.fromkeys(("ffn", "ff", "feedforward", "ffw", "densereludense"), "mlp"),
    **dict.fromkeys(("wte", "embedding", "embeddings", "embedder", "embedded", "tok", "tokens"), "embed"),
    **dict.fromkeys(("ln", "layernorm", "rmsnorm"), "norm"),
    **dict.fromkeys(("unembed", "logits", "classifier"), "head"),
    **dict.fromkeys(("fc", "linear", "dense", "proj", "projection", "kernel", "weight", "w", "scale"), ""),
    **dict.fromkeys(
        ("model", "params", "self", "layers", "layer", "block", "blocks", "h", "einsum", "lm"), ""
    ),
    **dict.fromkeys(("transformer", "module", "b"), ""),
}
_LEAST = 0.3  # of the words of both that two names share


def infer_mapping(
    names_and_shapes: Mapping[str, Sequence[int]], params: PyTree, *, layout: Mapping | None = None
) -> dict[str, str]:
    """Proposes a mapping by which tensors of others fill a tree: by shapes, and by the words of their names.

    Args:
      names_and_shapes: ``{tensor: shape}`` of a checkpoint.
      params: the tree, abstract or not.
      layout: as in `lorax_fn.split`.

    Returns:
      A dict of pairs, to be read, corrected and kept.

    Raises:
      LoraError: two tensors, or two leaves, are equally likely; or nothing fits a leaf. All are listed.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {f"layer_{i}": {"q": {"kernel": jnp.ones((8, 4))}} for i in range(2)}
      >>> shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (4, 8) for i in range(2)}
      >>> lx.mappings.infer_mapping(shapes, params)
      {'model.layers.{i}.self_attn.q_proj': 'layer_{i}/q/kernel'}
    """
    leaves = Leaves(params, layout)
    theirs = _templates({name: tuple(shape) for name, shape in names_and_shapes.items()})
    ours = _templates({path: tuple(leaf.shape) for path, leaf in arrays(params).items()})
    scores = {
        (name, path): score
        for name, path in itertools.product(theirs, ours)
        if _fits(theirs[name], ours[path]) and (score := _alike(name, path)) >= _LEAST
    }
    pairs, unsure = {}, []
    while scores:
        best = max(scores.values())
        top = [pair for pair, score in scores.items() if score == best]
        names, paths = [pair[0] for pair in top], [pair[1] for pair in top]
        for name, path in top:
            if names.count(name) > 1 or paths.count(path) > 1:
                unsure.append(f"{name}: {path}")
            else:
                pairs[name] = path
        scores = {p: s for p, s in scores.items() if p[0] not in names and p[1] not in paths}
    open_paths = [path for path in ours if path not in pairs.values()]
    if unsure or open_paths:
        raise error(
            "no mapping follows from names and shapes alone.",
            **({"equals": unsure} if unsure else {}),
            **(
                {"path": [f"{path} {ours[path][1]}: nothing fits" for path in open_paths]}
                if not unsure
                else {}
            ),
            do="write these pairs, and take the rest: "
            + ", ".join(f"{_module(name)!r}: {path!r}" for name, path in list(pairs.items())[:4]),
        )
    turned = _turned(pairs, theirs, ours, leaves)
    return {_module(name) + ("^T" if name in turned else ""): path for name, path in pairs.items()}


def _templates(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """``{name with placeholders: (how many there are, shape)}``; names of other shapes stay apart."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((_template(name), shape), []).append(name)
    several = [template for template, _ in groups]
    found = {}
    for (template, shape), names in groups.items():
        if several.count(template) > 1 or len(names) == 1:
            found |= dict.fromkeys(names, (1, shape))
        else:
            found[template] = (len(names), shape)
    return found


def _template(name: str) -> str:
    letters = iter("ijklmn")
    return re.sub(r"(?<=[._/])\d+(?=[._/]|$)", lambda match: "{" + next(letters, match[0]) + "}", name)


def _fits(theirs: tuple[int, tuple[int, ...]], ours: tuple[int, tuple[int, ...]]) -> bool:
    """Whether as many tensors fill as many leaves, each or side by side along the first axis."""
    (count, shape), (leaves, leaf) = theirs, ours
    if count != leaves:
        if leaves != 1 or not leaf or leaf[0] != count:
            return False
        leaf = leaf[1:]
    if math.prod(shape) != math.prod(leaf):
        return False
    if len(shape) < 2 or len(leaf) < 2:
        return True
    parts = {
        math.prod(leaf[i] for i in some)
        for r in range(len(leaf))
        for some in itertools.combinations(range(len(leaf)), r)
    }
    return shape[0] in parts


def _alike(name: str, path: str) -> float:
    """The share of words that two names have in common; a bias is similar only to biases."""
    if name.endswith("bias") != (path.rpartition("/")[2] in ("bias", "b")):
        return 0.0
    a, b = _words(name), _words(path)
    return len(a & b) / len(a | b) if a | b else 0.0


def _words(name: str) -> frozenset[str]:
    name = re.sub(r"\{\w+\}", "", name)
    name = name.replace("input_layernorm", "attn_norm").replace("pre_attention", "attn")
    name = name.replace("post_attention_layernorm", "mlp_norm").replace("layer_norm", "norm")
    parts = [part.lower() for part in re.split(r"[._/]|(?<=[a-z])(?=[A-Z])", name) if part]
    return frozenset(word for part in parts if (word := _WORDS.get(part, part)) and not word.isdigit())


def _module(name: str) -> str:
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    return name if name.endswith(".bias") else f"{name}="


def _turned(pairs: Mapping[str, str], theirs: Mapping, ours: Mapping, leaves: Leaves) -> set[str]:
    """The weights that are stored (in, out), by their shapes; a square one only beside others of its kind."""
    turned, square = set(), []
    for name, path in pairs.items():
        shape = theirs[name][1]
        layout: Any = next(
            (leaves.layouts[p] for p in leaves.layouts if _template(p) == path or p == path), None
        )
        if len(shape) != 2 or layout is None or leaves.kind(_first(path, leaves)) == "embedding":
            continue
        n = math.prod(layout.shapes(ours[path][1])[1])
        if shape[0] != shape[1] and shape[0] == n:
            turned.add(name)
        elif shape[0] == shape[1]:
            square.append(name)
    like = [name for name in square if _module(name).rpartition(".")[2].startswith("c_")]
    if turned and len(like) < len(square):
        raise error(
            "these square weights may be stored (out, in) or (in, out).",
            path=[pairs[name] for name in square if name not in like],
            got="others of this checkpoint are (in, out)",
            do="write their pairs by hand, with ^T where torch has a Conv1D.",
        )
    return turned | set(like if turned else ())


def _first(path: str, leaves: Leaves) -> str:
    return next(p for p in leaves.by_path if p == path or _template(p) == path)
