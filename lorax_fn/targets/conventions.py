"""The role of a leaf: whether it is a weight, and which of its axes are stack, inputs and outputs.

There are three sources, with one function each: the type of an Equinox layer, the leaf's name with its
sibling bias, and the traced use of the leaf. None of them guesses: what they cannot decide stays open.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any

from lorax_fn.core.layouts import Layout, WeightUse
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_float
from lorax_fn.targets.known_names import (
    EMBEDDING_NAMES,
    OUT_IN_NAMES,
    WEIGHT_NAMES,
    is_head,
    is_norm,
    is_table,
    may_be_table,
    module_of,
)
from lorax_fn.targets.patterns import components

PASTE = "layout=lx.usage(fn, params, *args)"


# The default names of Linen and Haiku for convolutions that are not transposed.
_PLAIN_CONVOLUTION = re.compile(r"Conv_\d+|conv\d_d(_\d+)?")


# Torch stores the window of a convolution in the last axes; no linear weight is that small.
_WINDOWS = ((1, 1), (3, 3), (5, 5), (7, 7))


@dataclasses.dataclass(frozen=True)
class Role:
    """What one leaf is to this library.

    Args:
      kind: ``"linear"`` is adapted by default; ``"head"``, ``"embedding"``, ``"convolution"`` and ``"used"``
        only if named. ``"open"`` (a weight whose layout is unknown) and ``"unserved"`` (a weight that cannot
        be adapted) raise if they are targets. ``"statistic"`` is left alone unless its whole path is named.
        ``"other"`` is not a weight.
      layout: its axes, or None if they are unknown.
      reason: why it is not adapted by default; empty for ``"linear"``.
      traced: whether this comes from a traced function, so that tracing would add nothing.
    """

    kind: str
    layout: Layout | None = None
    reason: str = ""
    traced: bool = False


def by_convention(path: str, leaf: Any, leaves: Mapping[str, Any], node: Any) -> Role:
    """The role of a leaf by its name, its sibling bias in ``leaves``, and its Equinox layer, if any."""
    name, ndim = components(path)[-1], len(leaf.shape)
    known = name in WEIGHT_NAMES
    if not is_float(leaf):
        return Role("unserved" if known and ndim >= 2 else "other", reason=f"not float ({leaf.dtype})")
    if not known and name not in EMBEDDING_NAMES:
        return Role("other", reason=f"by convention, {name!r} names no weight")
    if ndim < 2:
        return Role("other", reason="fewer than two axes")
    if node is not None:
        return _by_node(path, ndim, *node)
    # Torch-style trees call every parameter `weight`, so the module's name must tell what it is.
    module, torch = module_of(path), name == "weight"
    if torch and is_norm(module):
        return Role("other", reason=f"norm, by its module's name {module!r}")
    bias, window = _sibling_bias(path, name, leaves), tuple(leaf.shape[-2:])
    if torch and ndim >= 4 and bias is None and window in _WINDOWS:
        return Role(
            "convolution", reason=f"convolution, by its last axes {window}; which it contracts is open"
        )
    biased = bias == tuple(leaf.shape[:1])  # a table has no bias
    if name in EMBEDDING_NAMES or (torch and is_table(path) and not biased and not is_head(path)):
        if ndim == 2:
            return Role("embedding", Layout((), (0,), (1,)), "embedding")
        return Role("embedding", reason="embedding; which axis holds its rows is open")
    return _by_bias(path, leaf, leaves, module, name)


def _by_node(path: str, ndim: int, kind: str, core: int) -> Role:
    """The role of an Equinox layer's weight. The type decides the last ``core`` axes; others are a stack."""
    s = ndim - core
    if kind == "norm" or s < 0:
        return Role("other", reason="norm")
    stack, first, rest = tuple(range(s)), (s,), tuple(range(s + 1, ndim))
    if kind == "embedding":
        return Role("embedding", Layout(stack, first, rest), "embedding")
    found = Layout(stack, rest, first)
    if kind == "convolution":
        return Role("convolution", found, "convolution")
    return linear_or_head(path, found)


def _by_bias(path: str, leaf: Any, leaves: Mapping[str, Any], module: str, name: str) -> Role:
    """The role of a weight whose axes follow from its rank and its sibling bias."""
    shape, bias = tuple(leaf.shape), _sibling_bias(path, name, leaves)
    if bias == shape:
        return Role("other", reason="elementwise: its bias has its own shape")
    if name == "weight" and len(shape) == 2 and may_be_table(module) and bias is None and not is_head(path):
        return _open(path, f"{module!r} may be an embedding (rows are inputs) or a projection")
    fits = _layouts(shape, bias, name in OUT_IN_NAMES)
    found = fits[0] if len(fits) == 1 else None
    n_inputs = len(found.inputs) if found else 0
    conv_name = "conv" in module.lower() and len(shape) > 2 and n_inputs != 1
    if conv_name or (n_inputs >= 2 and name in OUT_IN_NAMES) or n_inputs >= 3:
        if found is None or _may_be_transposed(module, shape, found, name in OUT_IN_NAMES):
            return Role("convolution", reason="convolution; which axes it contracts is open")
        return Role("convolution", found, "convolution")
    if found is None and bias is None:
        return _open(path, "no bias says which axes it contracts")
    if found is None:
        return _open(path, f"its bias {bias} fits in {len(fits)} ways")
    if len(shape) > 2 and "conv" in path.lower():
        return _open(path, f"a convolution by its path, a projection by its bias {bias}")
    return linear_or_head(path, found)


def _may_be_transposed(module: str, shape: tuple[int, ...], found: Layout, out_in: bool) -> bool:
    """Whether a convolution may be transposed: with as many inputs as outputs, a bias fits either order."""
    if "transpose" in module.lower():
        return True
    (out_axis,) = found.outputs[-1:]
    in_axis = out_axis + 1 if out_in else out_axis - 1
    return shape[in_axis] == shape[out_axis] and not _PLAIN_CONVOLUTION.fullmatch(module)


def _layouts(shape: tuple[int, ...], bias: tuple[int, ...] | None, out_in: bool) -> list[Layout]:
    """All layouts that are compatible with the shape and a bias ``[*s, *m]``."""
    ndim = len(shape)
    if bias is None:
        if ndim != 2:
            return []
        return [Layout((), (1,), (0,)) if out_in else Layout((), (0,), (1,))]
    fits, q = [], len(bias)
    for s in range(q if q < ndim else 0):
        stack, m = tuple(range(s)), q - s
        outputs = tuple(range(s, q)) if out_in else tuple(range(ndim - m, ndim))
        inputs = tuple(i for i in range(ndim) if i not in stack + outputs)
        if bias == tuple(shape[i] for i in stack + outputs):
            fits.append(Layout(stack, inputs, outputs))
    return fits


def by_use(path: str, leaf: Any, use: WeightUse | None) -> Role:
    """The role of a leaf by its use in the traced function."""
    return dataclasses.replace(_by_use(path, leaf, use), traced=True)


def _by_use(path: str, leaf: Any, use: WeightUse | None) -> Role:
    """`by_use` without ``traced``."""
    name = components(path)[-1]
    weight_like = name in WEIGHT_NAMES and len(leaf.shape) >= 2
    if not is_float(leaf):
        return Role("unserved" if weight_like else "other", reason=f"not float ({leaf.dtype})")
    if use is None or not use.ops:
        return Role("other", reason="not used by the traced function")
    if not use.moves:
        reason = "no gradient reaches it: its result is not returned, or passes stop_gradient"
        return Role("unserved" if weight_like else "other", use.layout, reason)
    ops = ", ".join(use.ops)
    if use.layout is None:
        source = "; ".join(use.source)
        reason = f"used by {ops}: no low-rank layout" + (f" ({source})" if source else "")
        return Role("unserved" if weight_like else "other", reason=reason)
    if "conv_general_dilated" in use.ops:
        return Role("convolution", use.layout, "convolution")
    matmul = "dot_general" in use.ops or "ragged_dot_general" in use.ops
    if "gather" in use.ops or name in EMBEDDING_NAMES:
        return Role("embedding", use.layout, "embedding, also used for logits" if matmul else "embedding")
    if not matmul:
        return Role("used", use.layout, f"used by {ops}: no matrix product")
    return linear_or_head(path, use.layout)


def equinox_layers(params: PyTree) -> dict[str, tuple[str, int]]:
    """``{path of a weight: (kind, number of axes that are not a stack)}`` of the Equinox layers in a tree.

    Equinox is consulted only if it is imported already; otherwise no tree can contain its layers.
    """
    nn = getattr(sys.modules.get("equinox"), "nn", None)
    if nn is None:
        return {}
    kinds = {
        "linear": (nn.Linear, nn.GRUCell, nn.LSTMCell),
        "embedding": (nn.Embedding,),
        "convolution": (nn.Conv, nn.ConvTranspose),
        "norm": (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm),
    }
    types = tuple(t for group in kinds.values() for t in group)
    layers = {}
    for path, node in flatten_with_paths(params, is_leaf=lambda x: isinstance(x, types))[0]:
        for kind, group in kinds.items():
            if isinstance(node, group):
                core = 2 + node.num_spatial_dims if kind == "convolution" else 2
                layers.update({f"{path}/{name}".lstrip("/"): (kind, core) for name in OUT_IN_NAMES})
    return layers


def linear_or_head(path: str, layout: Layout) -> Role:
    """The role of a linear weight, which is a head if its path says so."""
    return Role("head", layout, "output head by name") if is_head(path) else Role("linear", layout)


def _open(path: str, why: str) -> Role:
    """The role of a weight with unknown layout: a head, which needs none by default, or open."""
    return Role("head" if is_head(path) else "open", reason=why)


def _sibling_bias(path: str, name: str, leaves: Mapping[str, Any]) -> tuple[int, ...] | None:
    prefix = path[: len(path) - len(name)]
    for bias in ("b", "bias") if name == "w" else ("bias", "b"):
        if prefix + bias in leaves:
            return tuple(leaves[prefix + bias].shape)
    return None
