"""`adapt`: runs an unchanged function on a base tree and its adapters, without building a weight."""

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

import lorax_fn.transform.products
from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_tracer
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.contractions import build
from lorax_fn.transform.control import CONTROL
from lorax_fn.transform.factored import Sum, is_factored
from lorax_fn.transform.rules import RULES


@dataclasses.dataclass(frozen=True)
class Report:
    """One use of a weight that has no rule."""

    path: str
    shape: tuple[int, ...]
    primitive: str
    where: str
    line: str  # empty within a function that JAX itself jits, until the call of that is known
    adapted: bool = True  # else stored, with no adapter on it

    def of(self, paths: dict[str, tuple[str, ...]]) -> "Report":
        """The same report about the caller's weight: inside a jit weights are named by operand position."""
        return dataclasses.replace(self, path=" + ".join(p for i in self.path.split(" + ") for p in paths[i]))


class Walk:
    """Evaluates jaxprs on ordinary arrays and factored weights."""

    def __init__(self, fallback: str):
        self.fallback = fallback
        self.reported: set[tuple[str, str]] = set()
        self.sinks: list[list[Report]] = []
        self.around: list[Any] = []  # the control flow that the current equation is in
        self.known: dict[Hashable, tuple[Any, Any]] = {}

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        biased = self.once(("bias", id(jaxpr)), jaxpr, lambda: jx.before_bias(jaxpr))
        for index, eqn, dying in self.once(("order", id(jaxpr)), jaxpr, lambda: jx.order(jaxpr)):
            values = [v.val if jx.is_literal(v) else env[v] for v in eqn.invars]
            with jx.equation_context(eqn):
                if any(map(is_factored, values)):
                    values = [v.added() if isinstance(v, Sum) else v for v in values]
                    results = self._apply(eqn, index, values, env)
                elif any(isinstance(value, Sum) for value in values):
                    results = _bias_first(eqn, values)
                else:
                    results = jx.bind(eqn, values)
                results = [
                    r.added() if isinstance(r, Sum) and v not in biased else r
                    for v, r in zip(eqn.outvars, results, strict=True)
                ]
            env.update((v, r) for v, r in zip(eqn.outvars, results, strict=True) if not jx.is_dropped(v))
            for var in dying:
                del env[var]
        return [v.val if jx.is_literal(v) else env[v] for v in jaxpr.outvars]

    def _apply(self, eqn: Any, index: int, values: list, env: dict) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in CONTROL:
            self.around.append(eqn)
            try:
                return CONTROL[name](self, eqn, index, values)
            finally:
                self.around.pop()
        results = RULES[name](eqn, index, values) if name in RULES else NotImplemented
        if results is NotImplemented:
            values = self.dense(eqn, values)
            for var, value in zip(eqn.invars, values, strict=True):
                if not jx.is_literal(var) and is_factored(env[var]) and env[var].lookup:
                    env[var] = value  # looked-up rows are built once, however many operations read them
            results = jx.bind(eqn, values)
        return results

    def dense(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Ordinary arrays only: factored weights are built, which is reported."""
        if not any(map(is_factored, values)):  # asked of every loop value: looks up no source line
            return list(values)
        where = f"name stack {jx.name_stack(eqn) or '(none)'}; "
        return [self._built(value, eqn.primitive.name, where, jx.source_line(eqn)) for value in values]

    def returned(self, values: Sequence[Any]) -> list[Any]:
        return [self._built(value, "return", "", "the function returns the weight") for value in values]

    def _built(self, value: Any, primitive: str, where: str, line: str) -> Any:
        if not is_factored(value):
            return value
        if not value.lookup:
            report = Report(" + ".join(value.paths), value.shape, primitive, where, line, bool(value.parts))
            self.report(report)
        return build(value)

    @contextlib.contextmanager
    def collecting(self, sink: list[Report]) -> Iterator[None]:
        """Puts reports into ``sink``, to be told again for each caller: what is around differs then."""
        self.sinks.append(sink)
        around, self.around = self.around, []
        try:
            yield
        finally:
            self.sinks.pop()
            self.around = around

    def report(self, report: Report) -> None:
        if not report.line:
            report = dataclasses.replace(report, line=jx.source_line(*reversed(self.around)))
        if self.sinks:
            self.sinks[-1].append(report)
            return
        if self.fallback == "allow":
            return
        problem = error(
            "an adapted weight has to be built in full: this use of it has no low-rank rule."
            if report.adapted
            else "a quantized weight has to be unpacked in full: this use of it is no product.",
            path=report.path,
            shape=report.shape,
            got=f"primitive {report.primitive!r}; {report.where}{report.line}",
            do='leave the weight out (exclude=...), or accept the cost: lx.adapt(fn, fallback="allow").'
            if report.adapted
            else 'do not quantize it, or accept the cost: lx.adapt(fn, fallback="allow").',
        )
        if self.fallback == "error":
            raise problem
        if (report.path, report.primitive) not in self.reported:
            self.reported.add((report.path, report.primitive))
            warnings.warn(str(problem), LoraFallbackWarning, stacklevel=_level_of_user())

    def once(self, key: Hashable, alive: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave for ``key``, an id of ``alive``; the oldest are forgotten."""
        if key not in self.known:
            self.known[key] = (alive, make())
            if len(self.known) > 8192:
                del self.known[next(iter(self.known))]
        return self.known[key][1]

    def in_one_piece(self, eqn: Any, fn: Callable, *values: Any) -> Any:
        """Calls ``fn``, jitted once an equation where the call is eager: a loop is one operation there."""
        if any(map(is_tracer, jax.tree_util.tree_leaves(values))):
            return fn(*values)
        return self.once(("eager", id(eqn)), eqn, lambda: jax.jit(fn))(*values)


OWN_CODE = tuple(os.path.dirname(file) + os.sep for file in (lorax_fn.__file__, jax.__file__))


def _level_of_user() -> int:
    """The stack level of the user's call, for `warnings.warn`: the first neither in here nor in JAX."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(OWN_CODE):
        frame, level = frame.f_back, level + 1
    return level


def _bias_first(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """An addition to sums that wait for it; see `Sum`."""
    (total,) = jx.bind(eqn, [v.base if isinstance(v, Sum) else v for v in values])
    for value in values:
        total = total + value.change if isinstance(value, Sum) else total
    return [total]


class LoraFallbackWarning(UserWarning):
    """A weight had to be built in full because an operation on it has no low-rank rule.

    Example:
      >>> import warnings, jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"kernel": jnp.ones((3, 2))}, rank=1)
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     _ = lx.adapt(lambda params: jnp.sin(params["kernel"]))(params, lora)
      >>> caught[0].category.__name__
      'LoraFallbackWarning'
    """
