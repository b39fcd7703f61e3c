"""`classify` finds the role of each leaf, and `choose` the leaves that the user's patterns name.

Roles come from conventions, a traced `Usage` or stated layouts. What they leave open raises an error with the
line to paste.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_fn.core.errors import SHOWN, error, nearest
from lorax_fn.core.layouts import Layout, WeightUse
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, arrays, is_float
from lorax_fn.targets.conventions import PASTE, Role, by_convention, by_use, equinox_layers, linear_or_head
from lorax_fn.targets.known_names import EMBEDDING_NAMES, WEIGHT_NAMES
from lorax_fn.targets.patterns import Pattern, as_list, components, find, first_match, label_of, union
from lorax_fn.targets.statistics import statistics

ALL_LINEAR = "all-linear"  # PEFT's name for the default targets


def classify(params: PyTree, layout: Mapping | None = None) -> dict[str, Role]:
    """Decides for every array leaf whether it is a weight, and with which layout.

    Without ``layout``, conventions decide; a quantized weight keeps the layout with which it was quantized. A
    leaf is a weight only if its name is ``kernel``, ``w``, ``weight``, ``weight_ih`` or ``weight_hh``, and
    it is 2-D or its sibling bias determines stack and output axes uniquely. ``kernel`` and ``w`` are
    (in, out), as in Flax and Haiku; the others are (out, in). The type of an Equinox layer takes precedence
    over names. If every parameter is called ``weight``, the module's name identifies norms and embeddings.
    Output heads are recognized by the names that real models give them. A kernel with two input axes, such as
    ``out`` of Flax attention, is linear unless its module's name contains ``conv``; one with more is a
    convolution. A convolution with as many input as output channels may be transposed, so its layout is open
    unless its name is Flax's or Haiku's default for plain convolutions. Running statistics are not weights.

    Args:
      params: the parameter tree; leaves may be abstract.
      layout: a `Usage`; or ``{pattern: Layout}``, where the first match wins and conventions decide the rest;
        or both, ``{**usage, pattern: Layout}``, where the stated layouts win.

    Returns:
      ``{path: Role}`` in the tree's order.

    Raises:
      LoraError: ``layout`` is that of another model, a pattern in it matches or decides nothing, or a layout
        is not a partition of a weight's axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_fn.targets.roles import classify
      >>> roles = classify({"out": {"kernel": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)}})
      >>> print(roles["out/kernel"].layout)
      Layout(stack=(), inputs=(0, 1), outputs=(2,))
    """
    return roles_of(params, arrays(params), layout)


def roles_of(params: PyTree, leaves: Mapping[str, Any], layout: Mapping | None = None) -> dict[str, Role]:
    """`classify` for callers that already have the leaves of ``params``."""
    if layout is not None and not isinstance(layout, Mapping):
        want = "a Usage, or {pattern: lx.Layout(...)}"
        raise error("layout= is not a mapping.", got=repr(layout), want=want, do=PASTE)
    layout = layout or {}
    uses = {path: use for path, use in layout.items() if isinstance(use, WeightUse)}
    stated = {pattern: x for pattern, x in layout.items() if not isinstance(x, WeightUse)}
    if uses:
        _check_usage(leaves, uses)
        roles = {path: by_use(path, leaf, uses.get(path)) for path, leaf in leaves.items()}
        kept = {}
    else:
        nodes = equinox_layers(params)
        roles = {path: by_convention(path, leaf, leaves, nodes.get(path)) for path, leaf in leaves.items()}
        kept = {path: leaf.layout for path, leaf in leaves.items() if is_stored(leaf)}  # as quantized
    for path, axes in (kept | _stated(leaves, roles, stated)).items():
        if not is_float(leaves[path]):
            roles[path] = Role("unserved", axes, f"not float ({leaves[path].dtype})")
        elif roles[path].kind in ("open", "other", "unserved"):
            roles[path] = linear_or_head(path, axes)
        else:
            roles[path] = dataclasses.replace(roles[path], layout=axes)
    for path in statistics(params, leaves):
        roles[path] = dataclasses.replace(roles[path], kind="statistic", reason="a running statistic")
    return roles


def _check_usage(leaves: Mapping[str, Any], usage: Mapping[str, WeightUse]) -> None:
    known = list(leaves)
    wrong = [p for p, use in usage.items() if p not in leaves or tuple(leaves[p].shape) != tuple(use.shape)]
    if wrong:
        raise error(
            "layout= is the usage of other params.",
            path=wrong,
            got=[
                tuple(leaves[p].shape)
                if p in leaves
                else "missing" + (f"; nearest {nearest(p, known)}" if i <= SHOWN else "")
                for i, p in enumerate(wrong)
            ],
            want=[tuple(usage[p].shape) for p in wrong],
            do=f"trace the function with these params: {PASTE}",
        )


def _stated(
    leaves: Mapping[str, Any], roles: Mapping[str, Role], layouts: Mapping[Pattern, Layout]
) -> dict[str, Layout]:
    """The layouts that the user stated, after checks."""
    strange = [f"{label_of(p)}: {x!r}" for p, x in layouts.items() if not isinstance(x, Layout)]
    if strange:
        raise error(
            "layout= has a value that is not a Layout.",
            got=strange,
            want="{pattern: lx.Layout(...)}",
            do=f"or {PASTE}",
        )
    if not layouts:
        return {}
    # "attn/q" means its kernel, not its bias, and "*" means all kernels: only a pattern that names no weight
    # refers to other leaves.
    weights = {p for p, leaf in leaves.items() if _weight_like(p, leaf, roles[p])}
    hits = {
        pattern: paths
        for pattern, (_, paths) in zip(layouts, find(list(layouts), leaves, "layout"), strict=True)
    }
    named = {p for paths in hits.values() for p in paths if not any(q in weights for q in paths)}
    stated, _ = first_match(
        layouts, leaves, "layout", dict.fromkeys(weights | named), lambda path: roles[path].reason
    )
    wrong = [
        path
        for path, layout in stated.items()
        if sorted(layout.stack + layout.inputs + layout.outputs) != list(range(len(leaves[path].shape)))
    ]
    if wrong:
        raise error(
            "a layout is not a partition of its weight's axes.",
            path=wrong,
            got=[f"{stated[path]} for shape {tuple(leaves[path].shape)}" for path in wrong],
            want="each axis, from 0, exactly once among stack, inputs and outputs",
            do=f"correct it, or {PASTE}",
        )
    return stated


def _weight_like(path: str, leaf: Any, role: Role) -> bool:
    if role.kind not in ("other", "statistic"):
        return True
    return len(leaf.shape) > 1 and components(path)[-1] in WEIGHT_NAMES + EMBEDDING_NAMES


def choose(
    leaves: Mapping[str, Any], roles: Mapping[str, Role], targets, exclude, full, rows: Sequence[str] = ()
) -> tuple[dict[str, Layout], list[str]]:
    """Chooses the leaves to adapt and the leaves to train whole, in the tree's order.

    Args:
      leaves: array leaves by path.
      roles: the role of each leaf, from `classify`.
      targets: patterns, or None or ``"all-linear"`` for every linear weight.
      exclude: patterns or None; wins over ``targets``.
      full: patterns or None; wins over both.
      rows: paths (not patterns) of the leaves in which some rows train.

    Returns:
      ``({path: Layout}, [path])``: the weights to adapt, and the leaves to train whole.

    Raises:
      LoraError: a pattern names nothing, no weight or nothing to exclude; a named leaf is not float; a layout
        is open; a leaf would train in two ways; or nothing is left to train.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_fn.core.trees import arrays
      >>> from lorax_fn.targets.roles import choose, classify
      >>> params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "k": {"kernel": jnp.ones((4, 4))}}
      >>> layouts, whole = choose(arrays(params), classify(params), "q", None, "bias")
      >>> list(layouts), whole
      (['q/kernel'], ['q/bias'])
    """
    whole = _named_whole(leaves, roles, full)
    named = _named_weights(leaves, roles, targets)
    left_out = whole + _left_out(leaves, roles, exclude, named)
    asked = [path for path in leaves if path in named and path not in set(left_out)]
    twice = [path for path in rows if path in asked or path in whole]
    if twice:
        raise error(
            "rows= names leaves that are also adapted or trained whole.",
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
            want="float weights whose uses have low-rank rules",
            do=_remedy_of_unserved(unserved, leaves, roles),
        )
    layouts = {path: layout for path in asked if (layout := roles[path].layout) is not None}
    undecided = [path for path in asked if path not in layouts]
    if undecided:
        raise error(
            "the layout of these weights is open.",
            path=undecided,
            got=[f"{tuple(leaves[p].shape)}: {roles[p].reason}" for p in undecided],
            want="to know which axes are stack, inputs and outputs",
            do=f"{PASTE}, or layout={{{undecided[0]!r}: lx.Layout(inputs=..., outputs=...)}}",
        )
    if not (asked or whole or rows) or (is_default(targets) and not named):  # targets=() allows full= alone
        large = [path for path in leaves if len(leaves[path].shape) > 1]
        raise error(
            "there is no weight to adapt.",
            path=large or "no array of two or more axes",
            got=[roles[path].reason or "a weight, but excluded" for path in large] or "nothing",
            want="at least one weight",
            do="name them in targets=" + _or_trace(roles, "or let the program say which leaves are weights"),
        )
    return layouts, [path for path in leaves if path in set(whole)]


def is_default(targets: Any) -> bool:
    """Whether ``targets=`` is the default, every linear weight."""
    return targets is None or (isinstance(targets, str) and targets == ALL_LINEAR)


def _named_whole(leaves: Mapping[str, Any], roles: Mapping[str, Role], full: Any) -> list[str]:
    """The float leaves to train whole; running statistics only if a pattern is their whole path."""
    whole: list[str] = []
    wrong: list[str] = []
    for pattern, (_, hits) in zip(as_list(full), find(full, leaves, "full"), strict=True):
        moved = [p for p in hits if is_float(leaves[p]) and (roles[p].kind != "statistic" or p == pattern)]
        whole += moved
        wrong += hits if not moved else [p for p in hits if p == pattern and p not in moved]
    if wrong:
        raise error(
            "full= names leaves that are not float, or that are running statistics.",
            path=wrong,
            got=[f"{leaves[p].dtype}{tuple(leaves[p].shape)}: {_why_fixed(roles[p])}" for p in wrong],
            want="float leaves, which have a gradient; a running statistic only by its whole path",
            do="narrow the pattern to biases, norms or heads, such as 'bn/scale'.",
        )
    return list(dict.fromkeys(whole))


def _why_fixed(role: Role) -> str:
    return role.reason if role.kind == "statistic" else "it has no gradient"


def _left_out(
    leaves: Mapping[str, Any], roles: Mapping[str, Role], exclude: Any, named: set[str]
) -> list[str]:
    found = find(exclude, leaves, "exclude")
    idle = [(label, hits) for label, hits in found if not any(path in named for path in hits)]
    if idle:
        raise error(
            "a pattern in exclude= excludes nothing.",
            path=union(idle),
            got=[label for label, _ in idle],
            why=[
                f"{hits[0]}: {roles[hits[0]].reason or 'a weight, but not among targets'}" for _, hits in idle
            ],
            want="patterns that name at least one target",
            do="delete the pattern; what it names is not adapted anyway.",
        )
    return union(found)


def _remedy_of_unserved(paths: list[str], leaves: Mapping[str, Any], roles: Mapping[str, Role]) -> str:
    """The remedies for weights that are not float, or have a use without a low-rank rule."""
    stated = [path for path in paths if is_float(leaves[path])]
    lines = [f"exclude={paths!r}"]
    if stated:
        usage = "**usage, " if roles[stated[0]].traced else ""
        lines.append(f"or say which axes it contracts: layout={{{usage}{stated[0]!r}: lx.Layout(...)}}")
    dtypes = [str(leaves[path].dtype) for path in paths if path not in stated]
    if any(dtype.startswith("complex") for dtype in dtypes):
        lines.append("or keep real and imaginary parts of complex weights as two float leaves")
    if any(not dtype.startswith("complex") for dtype in dtypes):
        lines.append("or cast integers to a float dtype")
    return ", ".join(lines) + "."


def _or_trace(roles: Mapping[str, Role], how: str) -> str:
    """``how``, with the line to paste, unless the roles come from a trace already."""
    return "." if any(role.traced for role in roles.values()) else f", {how}: {PASTE}"


def _named_weights(leaves: Mapping[str, Any], roles: Mapping[str, Role], targets: Any) -> set[str]:
    default = {path for path, role in roles.items() if role.kind in ("linear", "open")}
    patterns = as_list(targets)
    if is_default(targets):
        return default
    everything = any(is_default(pattern) for pattern in patterns)
    patterns = [pattern for pattern in patterns if not is_default(pattern)]
    chosen: set[str] = set()
    empty: list[tuple[str, list[str]]] = []
    for pattern, (label, hits) in zip(patterns, find(patterns, leaves, "targets"), strict=True):
        weights = [p for p in hits if roles[p].kind not in ("other", "statistic")]
        weights += [p for p in hits if roles[p].kind == "statistic" and p == pattern]
        chosen.update(weights)
        if not weights:
            empty.append((label, hits))
    if empty:
        more = _or_trace(roles, "or let the program say what it is")
        raise error(
            f"a pattern in targets= names no weight: {', '.join(label for label, _ in empty)}",
            path=union(empty),
            got=[f"{tuple(leaves[p].shape)}: {roles[p].reason}" for p in union(empty)],
            want="at least one weight per pattern",
            do=f"train such a leaf whole with full={more}",
        )
    return chosen | default if everything else chosen
