"""GPT-2's Conv1D in trees of torch's names: the one weight that torch stores (in, out)."""

from collections.abc import Mapping
from typing import Any

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.trees import arrays
from lorax_fn.interop.peft_config import PREFIX
from lorax_fn.interop.weights import Leaves
from lorax_fn.targets.conventions import OUT_IN_NAMES
from lorax_fn.targets.patterns import components, find, union

# Modules of these names are ordinary ones in every model that has them.
LINEAR = {
    *"qkvo",
    *(f"{x}_proj" for x in ("q", "k", "v", "o", "out", "up", "gate", "down")),
    "query",
    "key",
    "value",
}


def turn_conv1d(tensors: Mapping[str, Any], leaves: Leaves, layout: Any) -> None:
    """Where a config says ``fan_in_fan_out``, some modules are Conv1D: A's width tells which.

    PEFT writes the flag of whichever module came last, so at least one module is a Conv1D. Which of the
    square weights are is certain if no module is clearly an ordinary one, or if only one name is left.

    Raises:
      LoraError: a square weight may be either.
    """
    stated = set()
    if layout:
        by_usage = all(isinstance(key, str) and key in leaves.by_path for key in layout)
        stated = set(layout) if by_usage else set(union(find(list(layout), arrays(leaves.by_path), "layout")))
    explained = any(leaves.layouts.get(path) == Layout((), (0,), (1,)) for path in stated)
    turned, plain, square = [], [], []
    for path, role in leaves.roles.items():
        a = tensors.get(f"{PREFIX}{path.replace('/', '.').removesuffix('.weight')}.lora_A.weight")
        linear = role.layout == Layout((), (1,), (0,)) and components(path)[-1] in OUT_IN_NAMES
        if a is None or path in stated or not linear:
            continue
        out, n = leaves.by_path[path].shape
        (square if out == n else turned if a.shape[1] == out else plain).append(path)
    named = {path for path in square if _name(path) in LINEAR}
    rest = [path for path in square if path not in named]
    if plain or named:
        square = rest if len({_name(path) for path in rest}) == 1 and not turned and not explained else []
    if rest and not square and not explained:
        raise error(
            "these square weights may be stored (out, in), or (in, out) as GPT-2's Conv1D are.",
            path=rest,
            got="fan_in_fan_out: true, and modules of both kinds",
            want="a stated layout",
            do=f"layout=lx.usage(fn, params, *args), or layout={{{rest[0]!r}: lx.Layout((), (0,), (1,))}}",
        )
    for path in turned + square:
        leaves.turn(path, Layout((), (0,), (1,)))


def _name(path: str) -> str:
    return components(path)[-2] if len(components(path)) > 1 else ""
