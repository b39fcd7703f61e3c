"""Which leaves are weights, with which layout, and which of them the user asked for.

Patterns name leaves; `classify` says what each leaf is, from conventions, a traced `Usage` or stated layouts;
`choose` brings the two together. Whatever these rules leave open is an error that prints the line to paste.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_fn.core.errors import error, nearest
from lorax_fn.core.layouts import Layout, WeightUse
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, arrays, is_float
from lorax_fn.targets.conventions import (
    EMBEDDING_NAMES,
    PASTE,
    WEIGHT_NAMES,
    Role,
    by_convention,
    by_use,
    equinox_layers,
    linear_or_head,
)
from lorax_fn.targets.patterns import Pattern, components, find, label_of, union


def classify(params: PyTree, layout: Mapping | None = None) -> dict[str, Role]:
    """Says of every array leaf whether it is a weight, and with which layout.

    Without ``layout``, conventions decide; a quantized weight has the layout that it was quantized by. A
    leaf is a weight only if its name is ``kernel``, ``w``, ``weight``, ``weight_ih`` or ``weight_hh`` and
    it is 2-D, or its sibling bias fixes stack and output axes in exactly one way. ``kernel`` and ``w`` are
    (in, out), as Flax and Haiku store them; the others are (out, in), square or not. An Equinox layer's
    type decides before any name. Where every parameter is called ``weight``, the module's name tells norms
    and embeddings. A kernel with two input axes, such as ``out`` of Flax attention, is linear unless its
    module's name holds ``conv``; one with more is a convolution. With as many input as output channels that
    may be transposed: it is open but under Flax's own name.

    Args:
      params: the parameter tree; abstract leaves are fine.
      layout: a `Usage`, or ``{pattern: Layout}``, where the first match wins and conventions serve the rest.

    Returns:
      ``{path: Role}`` in the tree's order.

    Raises:
      LoraError: ``layout`` is of another model, matches nothing, or is not a partition of a weight's axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_fn.targets.roles import classify
      >>> roles = classify({"out": {"kernel": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)}})
      >>> print(roles["out/kernel"].layout)
      Layout(stack=(), inputs=(0, 1), outputs=(2,))
    """
    leaves = arrays(params)
    if layout is not None and not isinstance(layout, Mapping):
        want = "a Usage, or {pattern: lx.Layout(...)}"
        raise error("layout= is no mapping.", got=repr(layout), want=want, do=PASTE)
    if layout and all(isinstance(use, WeightUse) for use in layout.values()):
        _check_usage(leaves, layout)
        return {path: by_use(path, leaf, layout.get(path)) for path, leaf in leaves.items()}
    nodes = equinox_layers(params)
    roles = {path: by_convention(path, leaf, leaves, nodes.get(path)) for path, leaf in leaves.items()}
    kept = {path: leaf.layout for path, leaf in leaves.items() if is_stored(leaf)}  # known when quantized
    for path, stated in (kept | _stated(leaves, layout or {})).items():
        if not is_float(leaves[path]):
            roles[path] = Role("unserved", stated, f"not float ({leaves[path].dtype})")
        elif roles[path].kind in ("open", "other"):
            roles[path] = linear_or_head(path, stated)
        else:
            roles[path] = dataclasses.replace(roles[path], layout=stated)
    return roles


def _check_usage(leaves: Mapping[str, Any], usage: Mapping[str, WeightUse]) -> None:
    wrong = [p for p, use in usage.items() if p not in leaves or tuple(leaves[p].shape) != tuple(use.shape)]
    if wrong:
        raise error(
            "layout= is the usage of other params.",
            path=wrong,
            got=[
                tuple(leaves[p].shape) if p in leaves else f"missing; nearest {nearest(p, list(leaves))}"
                for p in wrong
            ],
            want=[tuple(usage[p].shape) for p in wrong],
            do=f"trace the function with these params: {PASTE}",
        )


def _stated(leaves: Mapping[str, Any], layouts: Mapping[Pattern, Layout]) -> dict[str, Layout]:
    """The layouts that the user wrote down, checked."""
    strange = [f"{label_of(p)}: {x!r}" for p, x in layouts.items() if not isinstance(x, Layout)]
    if strange:
        raise error(
            "layout= holds no layouts.", got=strange, want="{pattern: lx.Layout(...)}", do=f"or {PASTE}"
        )
    stated: dict[str, Layout] = {}
    wrong: list[tuple[str, str]] = []
    for pattern, layout in layouts.items():
        hits = union(find([pattern], leaves, "layout"))
        weights = [p for p in hits if components(p)[-1] in WEIGHT_NAMES + EMBEDDING_NAMES]
        for path in weights or hits:  # "attn/q" means its kernel, not its bias
            stated.setdefault(path, layout)
            axes = sorted(layout.stack + layout.inputs + layout.outputs)
            if axes != list(range(len(leaves[path].shape))):
                wrong.append((path, f"{layout} for shape {tuple(leaves[path].shape)}"))
    if wrong:
        raise error(
            "a layout is not a partition of its weight's axes.",
            path=[path for path, _ in wrong],
            got=[got for _, got in wrong],
            want="each axis, from 0, exactly once among stack, inputs and outputs",
            do=f"correct it, or {PASTE}",
        )
    return stated


def choose(
    leaves: Mapping[str, Any], roles: Mapping[str, Role], targets, exclude, full, rows: Sequence[str] = ()
) -> tuple[dict[str, Layout], list[str]]:
    """The leaves to adapt and the leaves to train whole, in the tree's order.

    Args:
      leaves: array leaves by path.
      roles: what each is, from `classify`.
      targets: patterns, or None for every linear weight.
      exclude: patterns or None; wins over ``targets``.
      full: patterns or None; wins over both.
      rows: paths of leaves of which rows train, no patterns.

    Returns:
      ``({path: Layout}, [path])``: the weights to adapt, and the leaves to train whole.

    Raises:
      LoraError: a pattern names nothing or no weight, a named leaf is not float, a layout is open, a leaf is
        asked for in two ways, or nothing is left to train.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_fn.core.trees import arrays, choose, classify
      >>> params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "k": {"kernel": jnp.ones((4, 4))}}
      >>> layouts, whole = choose(arrays(params), classify(params), "q", None, "bias")
      >>> list(layouts), whole
      (['q/kernel'], ['q/bias'])
    """
    whole = union(find(full, leaves, "full"))
    left_out = whole + union(find(exclude, leaves, "exclude"))
    named = _named_weights(leaves, roles, targets)
    asked = [path for path in leaves if path in named and path not in left_out]
    fixed = [path for path in whole if not is_float(leaves[path])]
    if fixed:
        raise error(
            "full= names leaves that are not float.",
            path=fixed,
            got=[f"{leaves[p].dtype}{tuple(leaves[p].shape)}" for p in fixed],
            want="float leaves: others have no gradient",
            do="narrow the pattern.",
        )
    twice = [path for path in rows if path in asked or path in whole]
    if twice:
        raise error(
            "rows= names leaves that are adapted or trained whole, too.",
            path=twice,
            want="one way to train a leaf",
            do=f"exclude={twice!r}, or leave them out of rows=.",
        )
    unserved = [path for path in asked if roles[path].kind == "unserved"]
    if unserved:
        raise error(
            "these weights cannot be adapted.",
            path=unserved,
            got=[f"{leaves[p].dtype}{tuple(leaves[p].shape)}: {roles[p].reason}" for p in unserved],
            want="float weights that a low-rank rule serves",
            do=f"exclude={unserved!r}, or cast them to a float dtype.",
        )
    layouts = {path: layout for path in asked if (layout := roles[path].layout) is not None}
    undecided = [path for path in asked if path not in layouts]
    if undecided:
        raise error(
            "the layout of these weights is open.",
            path=undecided,
            got=[f"{tuple(leaves[p].shape)}: {roles[p].reason}" for p in undecided],
            want="one reading of which axes are stack, inputs and outputs",
            do=f"{PASTE}, or layout={{{undecided[0]!r}: lx.Layout(inputs=..., outputs=...)}}",
        )
    if not (asked or whole or rows) or (
        targets is None and not named
    ):  # with targets=() full= may stand alone
        large = [path for path in leaves if len(leaves[path].shape) > 1]
        raise error(
            "there is no weight to adapt.",
            path=large or "no array of two or more axes",
            got=[roles[path].reason or "a weight, but excluded" for path in large] or "nothing",
            want="at least one weight",
            do=f"name targets=, or let the program say which leaves are weights: {PASTE}",
        )
    return layouts, [path for path in leaves if path in whole]


def _named_weights(leaves: Mapping[str, Any], roles: Mapping[str, Role], targets) -> set[str]:
    if targets is None:
        return {path for path, role in roles.items() if role.kind in ("linear", "open")}
    found = find(targets, leaves, "targets")
    empty = [(label, hits) for label, hits in found if all(roles[p].kind == "other" for p in hits)]
    if empty:
        raise error(
            f"a pattern in targets= names no weight: {', '.join(label for label, _ in empty)}",
            path=union(empty),
            got=[f"{tuple(leaves[p].shape)}: {roles[p].reason}" for p in union(empty)],
            want="at least one weight a pattern",
            do=f"train such a leaf whole with full=, or let the program say what it is: {PASTE}",
        )
    return {path for path in union(found) if roles[path].kind != "other"}
