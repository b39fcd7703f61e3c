"""`adapt`: runs an unchanged function on a base tree and its adapters, without building a weight."""

import contextlib
import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

import lorax_fn.transform.products  # noqa: F401  (registers its rules)
from lorax_fn.core.trees import error, flatten_with_paths, is_array, is_tracer
from lorax_fn.targets.roles import check_fits
from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.control import CONTROL
from lorax_fn.transform.factored import Sum, build, is_factored, wrap
from lorax_fn.transform.rules import RULES
from lorax_fn.transform.stored import abstract

FALLBACKS = ("warn", "error", "allow")


def adapt(fn: Callable, *, argnum: int = 0, fallback: str = "warn") -> Callable:
    """Makes a function of ``(params, ...)`` one of ``(params, lora, ...)``, without touching it.

    Wherever ``fn`` uses an adapted weight ``W``, the result computes with ``W + scale * A @ B`` in its
    factored form, ``x @ W + scale * (x @ A) @ B`` (equation 3 of Hu et al.,
    https://arxiv.org/abs/2106.09685). Neither ``W + AB`` nor, in the gradient by ``lora``, a cotangent of
    ``W`` is ever built. The function is traced once a set of argument types, as `jax.jit` does; arrays are
    traced, everything else (bools, strings, numbers, callables) is static. It works under and over every
    JAX transformation. Called eagerly, it runs operation by operation.

    No gradient is stopped: ``jax.grad`` by ``params`` is that of the merged function. Differentiate by
    ``argnums=1``, the adapters, and the base costs nothing.

    Args:
      fn: any JAX function; its argument ``argnum`` is the parameter tree.
      argnum: position of the parameters in ``fn``; the result takes the adapters right after it.
      fallback: what happens where an operation has no rule and the whole weight must be built: ``"warn"``
        (once a weight and operation), ``"error"`` or ``"allow"``. Values are right in every case. Without a
        rule are functions of a weight's entries (``sin(w)``), reshapes that mix its inputs and outputs, and a
        weight given to a ``custom_vjp``, changed by a loop, or returned by a branch, ``shard_map`` or ``fn``.

    Returns:
      ``fn2`` with ``fn``'s signature and ``lora`` inserted after argument ``argnum``;
      ``fn2(params, {}, ...)`` is ``fn(params, ...)``.

    Raises:
      LoraError: at the call, where ``lora`` does not fit ``params``, or under ``fallback="error"``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> params, lora = lx.split(params, rank=1)
      >>> apply = lx.adapt(lambda params, x: x @ params["dense"]["kernel"])
      >>> apply(params, lora, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    if fallback not in FALLBACKS:
        raise error(f"unknown fallback {fallback!r}.", want=FALLBACKS, do="pass one of them.")
    walk = Walk(fallback)
    traces = Traces(fn)

    @functools.wraps(fn)
    def adapted(*args, **kwargs):
        if len(args) < argnum + 2:
            raise error(
                "the adapters are missing from the call.",
                got=f"{len(args)} positional arguments",
                want=f"params as argument {argnum} and lora as argument {argnum + 1}, both positional",
                do="call fn2(params, lora, ...).",
            )
        params, lora = args[argnum], args[argnum + 1]
        args = (*args[: argnum + 1], *args[argnum + 2 :])
        named, treedef = flatten_with_paths(params)
        check_fits(dict(named), lora)
        leaves = [wrap(path, leaf, lora.get(path)) for path, leaf in named]
        if not any(is_factored(leaf) for leaf in leaves):
            params = jax.tree_util.tree_unflatten(treedef, leaves)
            return fn(*args[:argnum], params, *args[argnum + 1 :], **kwargs)
        trace = traces.of((*args[:argnum], Leaves(leaves, treedef), *args[argnum + 1 :]), kwargs)
        results = walk.returned(walk.evaluate(trace.jaxpr, trace.consts, trace.values))
        return jax.tree_util.tree_unflatten(trace.out_tree, results)

    # jax.jit reads the signature for static_argnames: it must be that of the function with lora in it.
    del adapted.__wrapped__
    signature = _with_lora(fn, argnum)
    if signature is not None:
        adapted.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return adapted


def _with_lora(fn: Callable, argnum: int) -> inspect.Signature | None:
    """``fn``'s signature with ``lora`` after argument ``argnum``; None where that has no place in it."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables have none
        return None
    parameters = list(signature.parameters.values())
    if argnum >= len(parameters) or parameters[argnum].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return None
    name = "lora"
    while name in signature.parameters:
        name = "new_" + name
    before = parameters[argnum]
    return signature.replace(
        parameters=[*parameters[: argnum + 1], before.replace(name=name), *parameters[argnum + 1 :]]
    )


class Leaves:
    """The flattened parameters of a call; not a pytree, so that factored weights pass as they are."""

    def __init__(self, leaves: list, treedef: Any):
        self.leaves, self.treedef = leaves, treedef


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced call: run ``jaxpr`` on ``values``; ``slots`` says which of them are parameters."""

    jaxpr: Any
    consts: Sequence[Any]
    values: list[Any]
    slots: list[int | None]
    out_tree: Any


class Traces:
    """The jaxprs of one function, one for each set of static values and argument types."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.jitted: dict[Hashable, Callable] = {}

    def of(self, args: tuple, kwargs: dict) -> Trace:
        """Traces a call in which the parameters are given as `Leaves`."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Leaves))
        where = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Leaves))
        params = leaves[where]
        slots = [None] * where + list(range(len(params.leaves))) + [None] * (len(leaves) - where - 1)
        leaves[where : where + 1] = params.leaves
        dynamic = [is_array(leaf) or is_factored(leaf) for leaf in leaves]
        static = [None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        structure = (treedef, params.treedef, where, len(params.leaves), tuple(dynamic))
        jitted = self._jitted(structure, static)
        values = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
        types = [abstract(v.base if is_factored(v) else v) for v in values]
        traced = jitted.trace(*types)
        jaxpr, consts = jx.opened(traced.jaxpr)
        if len(jaxpr.invars) != len(values):  # fn closes over tracers: only make_jaxpr hands them out
            jaxpr, consts = jx.opened(jax.make_jaxpr(jitted.__wrapped__)(*types))
        slots = [slot for slot, d in zip(slots, dynamic, strict=True) if d]
        return Trace(jaxpr, consts, values, slots, traced.out_tree)

    def _jitted(self, structure: tuple, static: list) -> Callable:
        key = (structure, tuple((type(leaf), leaf) for leaf in static))
        try:
            known = self.jitted.get(key)
        except TypeError:  # an unhashable static value: trace it anew, as there is nothing to find it by
            return self._flat(structure, static)
        if known is None:
            known = self.jitted[key] = self._flat(structure, static)
            if len(self.jitted) > 256:
                del self.jitted[next(iter(self.jitted))]
        return known

    def _flat(self, structure: tuple, static: list) -> Callable:
        treedef, params_treedef, where, count, dynamic = structure

        def flat(*values):
            rest = iter(values)
            leaves = [next(rest) if d else leaf for leaf, d in zip(static, dynamic, strict=True)]
            params = jax.tree_util.tree_unflatten(params_treedef, leaves[where : where + count])
            leaves[where : where + count] = [params]
            args, kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
            return self.fn(*args, **kwargs)

        flat.__name__ = flat.__qualname__ = getattr(self.fn, "__name__", "fn")
        return jax.jit(flat)


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
            else "a quantised weight has to be unpacked in full: this use of it is no product.",
            path=report.path,
            shape=report.shape,
            got=f"primitive {report.primitive!r}; {report.where}{report.line}",
            do='leave the weight out (exclude=...), or accept the cost: lx.adapt(fn, fallback="allow").'
            if report.adapted
            else 'do not quantise it, or accept the cost: lx.adapt(fn, fallback="allow").',
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
