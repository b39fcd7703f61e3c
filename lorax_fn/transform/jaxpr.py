"""Everything that differs between JAX versions, and what the walk has to know about jaxprs.

Since JAX 0.12 a closed jaxpr is a plain ``Jaxpr`` that carries its constants.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import DropVar, Literal
from jax.extend.core import primitives as prims

from lorax_fn.core.trees import is_tracer


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and its constants, from a closed or an open jaxpr of any JAX version."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def surely(comparison: Callable[[], bool]) -> bool:
    """The result of a comparison of sizes; False if a symbolic size (of `jax.export`) leaves it open."""
    try:
        return bool(comparison())
    except Exception as problem:
        if type(problem).__name__ != "InconclusiveDimensionOperation":  # its class is in a banned module
            raise
        return False


def is_literal(atom: Any) -> bool:
    return isinstance(atom, Literal)


def is_dropped(var: Any) -> bool:
    return isinstance(var, DropVar)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation as it is and returns its results, always as a list."""
    if eqn.primitive.name == "ragged_dot_general" and len(values) == 3:  # a fourth would be an offset
        return [ragged_dot(values, **eqn.params)]
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def bind_with(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs one equation with some of its parameters changed."""
    return [eqn.primitive.bind(*values, **{**eqn.params, **changed})]


# What `jax.lax.ragged_dot` asks of the general form: rows [rows, n], factors [groups, n, m].
GROUPED = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))


def ragged_dot(operands: Sequence[Any], ragged_dot_dimension_numbers: Any = GROUPED, **options: Any) -> Any:
    """`jax.lax.ragged_dot_general` of which a `jax.vmap` may map any operand, or several.

    JAX batches it only if all operands are mapped, along their first axes; it refuses one `vmap` inside
    another, and a product of which nothing is mapped.
    """
    rows, factors, sizes = (mapped_with(x, operands) for x in operands)
    result = lax.ragged_dot_general(rows, factors, sizes, ragged_dot_dimension_numbers, **options)
    return mapped_with(result, operands)  # and so is its cotangent


_LINEAR: ContextVar[bool] = ContextVar("linear", default=False)


@contextlib.contextmanager
def linear() -> Iterator[None]:
    """Within the rule of a derivative, which has to be linear in its tangents: `never` is not."""
    token = _LINEAR.set(True)
    try:
        yield
    finally:
        _LINEAR.reset(token)


def mapped_with(x: Any, others: Sequence[Any]) -> Any:
    """``x`` itself, but mapped inside a `jax.vmap` that maps one of ``others``.

    ``never`` is False and depends on them, so choosing by it changes nothing, and a compiler removes it.
    """
    if _LINEAR.get() or not any(map(is_tracer, (x, *others))):
        return x
    never = functools.reduce(jnp.logical_or, [jnp.any(other != other) for other in others]) & False
    return jnp.where(never, jnp.zeros((), x.dtype), x)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """The name stack, traceback and configuration under which the equation was traced."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def source_line(*eqns: Any) -> str:
    """``file:line (function)`` of the user's code behind the first equation that knows it.

    Inside functions that JAX itself jits, such as `jax.nn.relu`, no equation does: pass the equations around
    it as well.
    """
    lines = (source_info_util.summarize(eqn.source_info) for eqn in eqns)
    return next(filter(None, lines), "")


def name_stack(eqn: Any) -> str:
    return str(eqn.source_info.name_stack)


def order(jaxpr: Any) -> list[tuple[Any, list[Any]]]:
    """What to run: ``(equation, variables that nothing reads afterwards)``.

    Equations without effects whose results nothing reads are left out.
    """
    # Going backwards from the results, an equation runs if it has effects or if one of its results is needed,
    # and a variable dies at its last reader.
    needed = {v for v in jaxpr.outvars if not is_literal(v)}
    steps = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            read = {v for v in eqn.invars if not is_literal(v)}
            steps.append((eqn, list(read - needed)))
            needed |= read
    return steps[::-1]


def before_bias(jaxpr: Any) -> set[Any]:
    """The variables whose only reader is an equation that adds something smaller to them: a bias."""
    readers: dict[Any, list[Any]] = {}
    broadcast = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive is prims.broadcast_in_dim_p:
            broadcast.update(eqn.outvars)
        for var in eqn.invars:
            if not is_literal(var):
                readers.setdefault(var, []).append(eqn)
    found = set()
    for var, (eqn, *more) in readers.items():
        if eqn.primitive is prims.add_p and not more and var not in jaxpr.outvars:
            (other,) = [v for v in eqn.invars if v is not var]
            # A bias is smaller than what it is added to, or was broadcast to its shape.
            smaller = not is_literal(other) and surely(lambda a=other, b=var: a.aval.size < b.aval.size)
            if smaller or (not is_literal(other) and other in broadcast):
                found.add(var)
    return found


def varies(jaxpr: Any, var: Any) -> list[int]:
    """The axes along which an array may differ from entry to entry, as far as the equations show.

    A mask is written for one side of a weight and then broadcast to its shape: ``[n] -> [n, 1] -> [n, m]``
    varies along axis 0 alone.
    """
    # This follows the mask back to what made it, through operations that add no axis along which it varies.
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}

    def axes(atom: Any) -> set[int]:
        every = {i for i, size in enumerate(atom.aval.shape) if not surely(lambda n=size: n == 1)}
        eqn = None if is_literal(atom) else makers.get(atom)
        if eqn is None or not every:
            return every
        if eqn.primitive is prims.broadcast_in_dim_p:
            place = eqn.params["broadcast_dimensions"]
            return {int(place[i]) for i in axes(eqn.invars[0])}
        if eqn.primitive.name in ("not", "convert_element_type", "copy"):
            return axes(eqn.invars[0])
        return every

    return sorted(axes(var))


def handed_on(jaxpr: Any) -> list[int | None]:
    """For each result, the position of the input that it is, also through inner calls and loops, or None."""
    place: dict[Any, int | None] = {var: i for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in (NAMES["jit"], NAMES["remat"], NAMES["scan"]):
            # An inner function passes an operand on if one of its results is that operand.
            inner = handed_on(opened(eqn.params["jaxpr"])[0])
            if name == NAMES["scan"]:  # carries that every iteration passes on unchanged, and slices
                n, m = scan_counts(eqn)
                carried = [i if i == n + k else None for k, i in enumerate(inner[:m])]
                inner = carried + [i if i is not None and i >= n + m else None for i in inner[m:]]
            for out, i in zip(eqn.outvars, inner, strict=False):
                if i is not None and not is_literal(eqn.invars[i]):
                    place[out] = place.get(eqn.invars[i])
    return [None if is_literal(var) else place.get(var) for var in jaxpr.outvars]


def jit_like(eqn: Any, fn: Callable) -> Callable:
    """``jax.jit(fn)`` with the name, inlining and shardings of a jit equation."""
    fn.__name__ = fn.__qualname__ = eqn.params["name"]
    options = {"keep_unused": eqn.params["keep_unused"]}
    if eqn.params["inline"] is True:
        options["inline"] = True
    if eqn.params["compiler_options_kvs"]:
        options["compiler_options"] = dict(eqn.params["compiler_options_kvs"])
    return jax.jit(fn, **options)


def jit_shardings(eqn: Any, which: str) -> list[Any]:
    """The shardings that a jit equation asks of its ``in`` or ``out`` values; None where it asks for none."""
    return [s if isinstance(s, jax.sharding.Sharding) else None for s in eqn.params[f"{which}_shardings"]]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """The number of a scan equation's operands that are constants, and the number that are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # JAX 0.12 groups the operands in a flat tree
    return len(list(consts)), len(list(carry))


def scan_options(eqn: Any) -> dict[str, Any]:
    """Keyword arguments of `jax.lax.scan` that repeat a scan equation."""
    params = eqn.params
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    if params.get("_split_transpose"):
        options["_split_transpose"] = True
    return options


def shard_map_like(eqn: Any, fn: Callable, in_specs: Any) -> Callable:
    """``jax.shard_map(fn)`` with the mesh, outputs and checks of a shard_map equation."""
    params = eqn.params
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return jax.shard_map(
        fn,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=list(params["out_specs"]),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )


NAMES = {name: getattr(prims, f"{name}_p").name for name in (
    "jit", "scan", "while", "cond", "remat", "custom_jvp_call", "custom_vjp_call", "closed_call",
)}  # fmt: skip
