"""Which inputs of a traced function its outputs depend on, as far as gradients go."""

from collections.abc import Sequence
from typing import Any

from lorax_fn.transform import jaxpr as jx

# The body of these is one jaxpr with the operands as inputs and the results as outputs.
_PLAIN_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call")


def reached(jaxpr: Any, wanted: Sequence[bool] | None = None) -> list[bool]:
    """For each input, whether a gradient can reach it.

    False is certain: the input is unused, nothing made from it is returned, or all of that passes through
    ``stop_gradient``. Loops and branches are not looked into: what enters them counts as used if any of
    their results is used.

    Args:
      jaxpr: an open jaxpr.
      wanted: for each output, whether it counts; None means that all do.
    """
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not jx.is_literal(v)}
    # Backwards: the operands of an equation are live if one of its results is.
    for eqn in reversed(jaxpr.eqns):
        results = [v in live for v in eqn.outvars]
        if any(results) and eqn.primitive.name != "stop_gradient":
            used = _operands(eqn, results)
            live.update(v for v, use in zip(eqn.invars, used, strict=True) if use and not jx.is_literal(v))
    return [v in live for v in jaxpr.invars]


def _operands(eqn: Any, results: list[bool]) -> list[bool]:
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name in _PLAIN_CALLS and body is not None:
        inner = jx.opened(body)[0]
        if len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(results):
            return reached(inner, results)
    return [True] * len(eqn.invars)
