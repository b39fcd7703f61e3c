"""The walk: runs a traced function on a base tree and its adapters, without building any weight."""

import dataclasses
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_tracer
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.choices import select
from lorax_fn.transform.control import CONTROL, signature
from lorax_fn.transform.edits import EDITS
from lorax_fn.transform.factored import Factored, Part, Sum, folded, is_factored
from lorax_fn.transform.gathers import GATHERS
from lorax_fn.transform.low_rank_products import build
from lorax_fn.transform.picks import chosen
from lorax_fn.transform.products import PRODUCTS
from lorax_fn.transform.rules import MOVES

# Every primitive that has a rule; no name is in two of the tables.
RULES = {**MOVES, **EDITS, **GATHERS, **PRODUCTS}
# Rules that leave the factors of many adapters side by side; for every other rule, one is picked first.
KEEP_MANY = {*MOVES, *GATHERS, "dot_general"} - {"mul", "div"}


@dataclasses.dataclass(frozen=True)
class Report:
    """One use of a weight that has no rule."""

    path: str
    shape: tuple[int, ...]
    primitive: str
    where: str
    line: str  # empty inside a function that JAX itself jits, until the call of that function is known
    adapted: bool = True  # False for a stored weight without an adapter

    def of(self, paths: dict[str, tuple[str, ...]]) -> "Report":
        """The same report about the caller's weight: inside a jit, weights are named by operand position."""
        return dataclasses.replace(self, path=" + ".join(p for i in self.path.split(" + ") for p in paths[i]))


@dataclasses.dataclass
class Notes:
    """What a walk leaves for its caller: reports of weights built, and counts of dropout draws.

    An inner function is traced once and called often, so its notes are kept beside the trace.
    """

    reports: list[Report] = dataclasses.field(default_factory=list)
    draws: dict[str, int] = dataclasses.field(default_factory=dict)  # path -> number of draws so far


class Memory:
    """What one adapted function remembers between calls; calls may come from several threads at once."""

    def __init__(self, most: int = 8192):
        self.lock = threading.Lock()
        self.known: dict[Hashable, tuple[Any, Any]] = {}
        self.told: set[tuple[str, str]] = set()  # (path, primitive) of each warning so far
        self.most = most


@dataclasses.dataclass(frozen=True)
class Walk:
    """Evaluates jaxprs on ordinary arrays and factored weights.

    Each call has a walk of its own, and so does each inner function of a call: nothing that changes during
    a call is shared except `Memory`, which is locked.

    Args:
      fallback: what to do where a weight has to be built.
      memory: what stays from call to call.
      around: the control flow around the current equation, the outermost first.
      notes: what this walk leaves for its caller.
      quiet: whether reports wait in ``notes``, because the caller is not known yet.
    """

    fallback: str
    memory: Memory = dataclasses.field(default_factory=Memory)
    around: tuple[Any, ...] = ()
    notes: Notes = dataclasses.field(default_factory=Notes)
    quiet: bool = False

    def call(self) -> "Walk":
        """The walk of one call, which shares only the memory with other calls."""
        return dataclasses.replace(self, notes=Notes())

    def inner(self) -> "Walk":
        """The walk of a function inside this one: it counts draws from zero."""
        return dataclasses.replace(self, notes=Notes(self.notes.reports))

    def waiting(self) -> "Walk":
        """The walk of a function whose callers come later: reports wait, since each has other weights."""
        return dataclasses.replace(self, notes=Notes(), around=(), quiet=True)

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        # A variable holds an array, a `Factored` weight, or for a moment a `Sum` that waits for its bias.
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        biased = self.once(("bias", id(jaxpr)), jaxpr, lambda: jx.before_bias(jaxpr))
        for eqn, dying in self.once(("order", id(jaxpr)), jaxpr, lambda: jx.order(jaxpr)):
            values = [v.val if jx.is_literal(v) else env[v] for v in eqn.invars]
            with jx.equation_context(eqn):
                # Equations without a weight run as they are: most of a model is like that, and each costs one
                # bind.
                if any(map(is_factored, values)):
                    values = [v.added() if isinstance(v, Sum) else _nonempty(v) for v in values]
                    results = self._apply(eqn, values, env, jaxpr)
                elif any(isinstance(value, Sum) for value in values):
                    results = _bias_first(eqn, values)
                else:
                    results = jx.bind(eqn, values)
                results = [
                    r.added() if isinstance(r, Sum) and v not in biased else r
                    for v, r in zip(eqn.outvars, results, strict=True)
                ]
            env.update((v, r) for v, r in zip(eqn.outvars, results, strict=True) if not jx.is_dropped(v))
            # Values that nothing reads again are freed at once, as in eager JAX: a walk of a large model
            # holds no more memory than the model itself would.
            for var in dying:
                del env[var]
        return [v.val if jx.is_literal(v) else env[v] for v in jaxpr.outvars]

    def _apply(self, eqn: Any, values: list, env: dict, jaxpr: Any) -> Sequence[Any]:
        name = eqn.primitive.name
        if not any(map(is_factored, values)):  # the weights had no entries
            return jx.bind(eqn, values)
        # Control flow gets a walk that knows where it is, so that a report from inside finds a source line.
        if name in CONTROL:
            return CONTROL[name](dataclasses.replace(self, around=(*self.around, eqn)), eqn, values)
        given = values if name in KEEP_MANY else [chosen(v) for v in values]
        if name == "select_n":  # its rule has to know along which axes the mask varies
            results = select(self, eqn, given, jx.varies(jaxpr, eqn.invars[0]))
        else:
            results = RULES[name](self, eqn, given) if name in RULES else NotImplemented
        if results is NotImplemented:
            values = self.dense(eqn, values)
            for var, value in zip(eqn.invars, values, strict=True):
                if not jx.is_literal(var) and is_factored(env[var]) and env[var].lookup:
                    env[var] = value  # looked-up rows are built once, however many operations read them
            results = jx.bind(eqn, values)
        return results

    # Weights that have to be built, and the reports about them.

    def dense(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The values as ordinary arrays: factored weights are built, which is reported."""
        if not any(map(is_factored, values)):  # the usual case, for which no source line is looked up
            return list(values)
        where = f"name stack {jx.name_stack(eqn) or '(none)'}; "
        return [self._built(value, eqn.primitive.name, where, jx.source_line(eqn)) for value in values]

    def returned(self, values: Sequence[Any]) -> list[Any]:
        return [self._built(value, "return", "", "the function returns the weight") for value in values]

    def _built(self, value: Any, primitive: str, where: str, line: str) -> Any:
        if not is_factored(value):
            return value
        # Rows that were looked up are an activation, and the program builds them anyway: no report.
        if not value.lookup:
            report = Report(" + ".join(value.paths), value.shape, primitive, where, line, bool(value.parts))
            self.report(report)
        return build(value)

    def report(self, report: Report) -> None:
        # Functions that JAX itself jits, such as jax.nn.relu, have no line in the user's code: the report
        # gives the line of the call around them.
        if not report.line:
            report = dataclasses.replace(report, line=jx.source_line(*reversed(self.around)))
        if self.quiet:
            self.notes.reports.append(report)
            return
        if self.fallback == "allow":
            return
        if self.fallback == "error":
            raise _problem(report)
        # One warning per weight and primitive, and not one per call.
        with self.memory.lock:
            new = (report.path, report.primitive) not in self.memory.told
            self.memory.told.add((report.path, report.primitive))
        if new:
            warnings.warn(str(_problem(report)), LoraFallbackWarning, stacklevel=_level_of_user())

    # Dropout: each product of a weight draws its own mask, from the weight's key and the number of the draw.

    def drawn(self, w: Factored) -> Part:
        """The weight's keys for its next product.

        The first draw of a weight takes its key as it is; later draws take that key folded with their number.
        So masks depend on nothing else in the program, nor on whether a jit or a checkpoint is around it.
        """
        # Weights that were joined have no key (dropout is refused where they are joined), so there is one
        # path.
        (path,) = w.paths
        count = self.notes.draws.get(path, 0)
        self.notes.draws[path] = count + 1
        return _keys_after(w, count)

    def entering(self, values: Sequence[Any]) -> list[Any]:
        """Operands of an inner function: a weight under dropout brings the number of its draws so far."""

        def entered(w: Any) -> Any:
            if not _draws(w) or not (count := self.notes.draws.get(w.paths[0], 0)):
                return w
            # Inside, draws are counted from zero. The count so far is an array, so that layers with different
            # counts share the trace of one inner jit.
            before = w.parts["draws"].array if "draws" in w.parts else jnp.uint32(0)
            return w.with_part(w.base, "draws", Part(before + jnp.uint32(count), ()))

        return [entered(value) for value in values]

    def looping(self, values: Sequence[Any]) -> list[Any]:
        """Operands of a loop, which counts as one draw of each weight under dropout."""
        # The key is advanced here by that one draw, and iterations fold their number into it.
        looped = [
            _with_keys(w, _keys_after(w, self.notes.draws.get(w.paths[0], 0))) if _draws(w) else w
            for w in values
        ]
        self.count({w.paths[0]: 1 for w in values if _draws(w)})
        return looped

    def count(self, draws: dict[str, int]) -> None:
        """Adds the draws of an inner function to this walk's own."""
        for path, more in draws.items():
            self.notes.draws[path] = self.notes.draws.get(path, 0) + more

    def take(self, notes: Notes, paths: dict[str, tuple[str, ...]]) -> None:
        """Takes over the notes of an inner function; ``paths`` says which weights its names stand for."""
        for report in notes.reports:
            self.report(report.of(paths))
        self.count({paths[name][0]: count for name, count in notes.draws.items()})

    # Memory.

    @property
    def known(self) -> dict[Hashable, tuple[Any, Any]]:
        return self.memory.known

    def once(self, key: Hashable, alive: Any, make: Callable[[], Any]) -> Any:
        """The result of ``make`` for ``key``, which has the id of ``alive``; the oldest are forgotten.

        Two threads may both make it; the first result stays. ``alive`` is kept, because otherwise another
        object could get its id.
        """
        # Making may take long (a trace) or come back here, so the lock is not held meanwhile.
        with self.memory.lock:
            known = self.memory.known.get(key)
        if known is None:
            made = (alive, make())
            with self.memory.lock:
                known = self.memory.known.setdefault(key, made)
                if len(self.memory.known) > self.memory.most:
                    del self.memory.known[next(iter(self.memory.known))]
        return known[1]

    def in_one_piece(self, eqn: Any, run: Callable, *values: Any) -> Any:
        """``run(walk, *values)``, jitted once per equation if the call is eager: a loop is one operation.

        ``run`` may depend on the equation and on the structure and shapes of the values, which are the key.
        """
        # Under a trace the loop becomes part of what is traced.
        if any(map(is_tracer, jax.tree_util.tree_leaves(values))):
            walk = self.inner()
            results = run(walk, *values)
            self.count(walk.notes.draws)
            return results

        def make():
            notes = Notes()

            def traced(*values):
                walk = dataclasses.replace(self, notes=Notes())
                results = run(walk, *values)
                notes.reports, notes.draws = walk.notes.reports, walk.notes.draws
                return results

            return jax.jit(traced), notes

        fn, notes = self.once(("eager", id(eqn), signature(values)), eqn, make)
        results = fn(*values)
        self.notes.reports.extend(notes.reports)
        self.count(notes.draws)
        return results


def _nonempty(value: Any) -> Any:
    """The value; a weight without entries becomes an ordinary array, as there is nothing to keep apart."""
    return jnp.zeros(value.shape, value.dtype) if is_factored(value) and 0 in value.shape else value


def _draws(value: Any) -> bool:
    return is_factored(value) and "key" in value.parts


def _keys_after(w: Factored, count: int) -> Part:
    """The keys of the draw after ``count`` others here and, before them, those of outer functions."""
    part = w.parts["key"]
    if "draws" in w.parts:
        return folded(part, w.parts["draws"].array + jnp.uint32(count))
    return folded(part, count) if count else part


def _with_keys(w: Factored, keys: Part) -> Factored:
    parts = {name: part for name, part in w.parts.items() if name != "draws"}
    return dataclasses.replace(w, parts={**parts, "key": keys})


def _problem(report: Report) -> Exception:
    if report.adapted:
        what = "an adapted weight has to be built in full: this use of it has no low-rank rule."
        do = f"leave the weight out: lx.split(..., exclude=[{report.path!r}]); or accept the cost: "
    else:
        what = "a quantized weight has to be unpacked in full: this use of it is not a product."
        do = f"leave it out: lx.quantize(..., exclude=[{report.path!r}]); or accept the cost: "
    return error(
        what,
        path=report.path,
        shape=report.shape,
        got=f"primitive {report.primitive!r}; {report.where}{report.line}",
        do=do + 'lx.adapt(fn, fallback="allow").',
    )


OWN_CODE = os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(jax.__file__) + os.sep


def _level_of_user() -> int:
    """The stack level of the user's call, for `warnings.warn`: the first outside this package and JAX."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(OWN_CODE):
        frame, level = frame.f_back, level + 1
    return level


def _bias_first(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an addition whose operands include sums that wait for it; see `Sum`."""
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
