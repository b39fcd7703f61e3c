"""Control flow: factored weights cross it in parts, as constants, stacked inputs or loop invariants.

Every function is ``rule(walk, eqn, index, values) -> list of results``; ``walk`` evaluates inner jaxprs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.factored import Factored, Part, is_factored
from lorax_fn.transform.stored import Later, along_axes, is_unbuilt, local, scanned


def with_new_key(value: Any, use: Any) -> Any:
    """A weight under dropout draws other masks at each place and iteration that it enters."""
    if not is_factored(value) or "key" not in value.parts:
        return value
    part = value.parts["key"]
    keys = jax.vmap(lambda k: jax.random.fold_in(k, use))(part.array.reshape(-1)).reshape(part.array.shape)
    return value.with_part(value.base, "key", Part(keys, part.axes))


def jit(walk, eqn, index, values):
    """An inner jit stays one function: rewritten once a jaxpr, traced by jax once an operand structure.

    Inside it weights are named by operand position, so that equal layers of an unrolled model share one
    trace; what that trace reports is told again for each caller's weights.
    """
    closed = eqn.params["jaxpr"]
    asked = jx.jit_shardings(eqn, "in"), jx.jit_shardings(eqn, "out")

    def make():
        jaxpr, consts = jx.opened(closed)
        reports: dict[Any, list] = {}

        def inner(*args):
            with walk.collecting(reports.setdefault(jax.tree_util.tree_structure(args), [])):
                args = [_constrained(a, s) for a, s in zip(args, asked[0], strict=True)]
                results = walk.evaluate(jaxpr, consts, args)
                return [_constrained(r, s) for r, s in zip(results, asked[1], strict=True)]

        return jx.jit_like(eqn, inner), reports

    key = ("jit", id(closed), eqn.params["name"], *map(tuple, asked))
    fn, reports = walk.once(key, closed, make)
    paths = {str(i): v.paths for i, v in enumerate(values) if is_factored(v)}
    values = tuple(_renamed(with_new_key(v, index), {v.paths: (str(i),)} if is_factored(v) else {})
                   for i, v in enumerate(values))  # fmt: skip
    results = fn(*values)
    for report in reports.get(jax.tree_util.tree_structure(values), []):
        walk.report(report.of(paths))
    return [
        _renamed(r, {r.paths: tuple(p for i in r.paths for p in paths[i])} if is_factored(r) else {})
        for r in results
    ]


def _renamed(value: Any, names: dict) -> Any:
    return dataclasses.replace(value, paths=names[value.paths]) if is_factored(value) else value


def _constrained(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    if is_factored(value):
        if is_unbuilt(value.base):  # its codes stay where they are
            return value
        return dataclasses.replace(value, base=lax.with_sharding_constraint(value.base, sharding))
    return lax.with_sharding_constraint(value, sharding)


def closed_call(walk, eqn, index, values):
    jaxpr, consts = jx.opened(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])
    return walk.evaluate(jaxpr, consts, [with_new_key(v, index) for v in values])


def checkpoint(walk, eqn, index, values):
    jaxpr, consts = jx.opened(eqn.params["jaxpr"])
    values = [with_new_key(v, index) for v in values]

    def inner(*args):
        return walk.evaluate(jaxpr, consts, args)

    if eqn.params["differentiated"]:
        # The recomputation of a backward pass: a barrier keeps it apart from the forward's own values.
        if eqn.params["prevent_cse"] is not False:
            values = lax.optimization_barrier(values)
        return inner(*values)
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return walk.in_one_piece(eqn, jax.checkpoint(inner, **options), *values)


def cond(walk, eqn, index, values):
    which, *operands = values
    operands = [with_new_key(v, index) for v in operands]

    def branch(closed):
        jaxpr, consts = jx.opened(closed)
        return lambda *args: walk.dense(eqn, walk.evaluate(jaxpr, consts, args))

    branches = [branch(closed) for closed in eqn.params["branches"]]
    return walk.in_one_piece(eqn, lambda i, *args: lax.switch(i, branches, *args), which, *operands)


def while_loop(walk, eqn, index, values):
    cond_jaxpr, cond_fixed = jx.opened(eqn.params["cond_jaxpr"])
    body_jaxpr, body_fixed = jx.opened(eqn.params["body_jaxpr"])
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _Carry(walk, eqn, body_jaxpr, m, len(values) - n - m)

    def run(cond_consts, body_consts, init):
        constant, moving = carry.parted(init)
        # A counter only where dropout has to tell the iterations apart.
        counter = jnp.int32(0) if _any_dropped((*body_consts, *constant)) else None

        def cond(state):
            return walk.evaluate(cond_jaxpr, cond_fixed, [*cond_consts, *carry.joined(constant, state[1])])[0]

        def body(state):
            counter, moving = state
            args = [*body_consts, *carry.joined(constant, moving)]
            if counter is not None:
                args, counter = [with_new_key(v, counter) for v in args], counter + 1
            results = walk.evaluate(body_jaxpr, body_fixed, args)
            return counter, carry.parted(carry.settled(results))[1]

        return carry.joined(constant, lax.while_loop(cond, body, (counter, moving))[1])

    values = [with_new_key(v, index) for v in values]
    init = carry.settled(values[n + m :])
    return walk.in_one_piece(eqn, run, values[:n], values[n : n + m], init)


def _any_dropped(values: Any) -> bool:
    return any(is_factored(v) and "key" in v.parts for v in values)


class _Carry:
    """Tells a loop's invariant carries, which may stay factored, from those that change."""

    def __init__(self, walk, eqn, body, consts: int, count: int):
        carried = body.invars[consts : consts + count]
        self.walk, self.eqn = walk, eqn
        self.invariant = [out is var for out, var in zip(body.outvars[:count], carried, strict=True)]

    def settled(self, values):
        """The carried values, factored only where the loop leaves them alone."""
        return [
            v if same else self.walk.dense(self.eqn, [v])[0]
            for v, same in zip(values, self.invariant, strict=True)
        ]

    def parted(self, values):
        pairs = list(zip(values, self.invariant, strict=True))
        return [v for v, same in pairs if same], [v for v, same in pairs if not same]

    def joined(self, constant, moving):
        constant, moving = iter(constant), iter(moving)
        return [next(constant if same else moving) for same in self.invariant]


def scan(walk, eqn, index, values):
    jaxpr, fixed = jx.opened(eqn.params["jaxpr"])
    n, m = jx.scan_counts(eqn)
    carry = _Carry(walk, eqn, jaxpr, n, m)
    options = jx.scan_options(eqn)

    def run(consts, init, xs):
        constant, moving = carry.parted(init)
        counter = jnp.arange(options["length"]) if _any_dropped((*consts, *constant)) else None
        xs = [x if not is_factored(x) or scanned(x.base) else walk.dense(eqn, [x])[0] for x in xs]
        pieces = [unstack(x) if is_factored(x) else (x, None) for x in xs]
        rebuild = [fn for _, fn in pieces]

        def body(moving, step):
            counter, leaves = step
            invariant = [*consts, *carry.joined(constant, moving)]
            if counter is not None:
                invariant = [with_new_key(v, counter) for v in invariant]
            slices = [leaf if fn is None else fn(leaf) for leaf, fn in zip(leaves, rebuild, strict=True)]
            results = walk.evaluate(jaxpr, fixed, [*invariant, *slices])
            # Flax NNX hands every layer's weights out again: they stay factored.
            ys = [_handed_out(walk, eqn, v, slices, whole, i) for i, v in enumerate(results[m:])]
            return carry.parted(carry.settled(results[:m]))[1], ys

        whole: dict[int, int] = {}  # which ys are a stored weight among the xs
        moving, ys = lax.scan(body, moving, (counter, [leaf for leaf, _ in pieces]), **options)
        ys = [_restacked(y) if is_factored(y) else y for y in ys]
        ys = [xs[whole[i]] if i in whole else y for i, y in enumerate(ys)]
        return [*carry.joined(constant, moving), *ys]

    values = [with_new_key(v, index) for v in values]
    init = carry.settled(values[n : n + m])
    return walk.in_one_piece(eqn, run, values[:n], init, values[n + m :])


def _handed_out(walk, eqn, value: Any, slices: list, whole: dict[int, int], i: int) -> Any:
    """What an iteration gives for ``ys[i]``; nothing for a stored weight that it only hands on."""
    if not is_factored(value) or value.lookup:
        return walk.dense(eqn, [value])[0]
    if not is_unbuilt(value.base):
        return value
    for j, piece in enumerate(slices):
        if piece is value:
            whole[i] = j
            return None
    return walk.dense(eqn, [value])[0]


def _restacked(w: Factored) -> Factored:
    """A weight that every iteration handed out: all its arrays got a leading axis, which is a stack axis."""
    return w.with_parts(w.base, lambda part: Part(part.array, (0, *part.renamed(lambda i: i + 1).axes)))


def unstack(w: Factored) -> tuple[Any, Any]:
    """What a loop over the leading axis scans, and how an iteration puts its weight together again."""
    moves = {name: 0 in part.axes for name, part in w.parts.items()}

    def leading(part: Part) -> Any:
        where = part.axes.index(0)
        return part.array if where == 0 else jnp.moveaxis(part.array, where, 0)

    whole, piece_of = scanned(w.base)  # pyright: ignore[reportGeneralTypeIssues]
    leaves = (whole, {name: leading(part) for name, part in w.parts.items() if moves[name]})

    def rebuild(slices):
        piece, arrays = slices
        parts = {}
        for name, part in w.parts.items():
            axes = tuple(axis - 1 if axis > 0 else axis for axis in part.axes if axis != 0)
            parts[name] = Part(arrays[name] if moves[name] else part.array, axes)
        return dataclasses.replace(w, base=piece_of(piece), parts=parts)

    return leaves, rebuild


def shard_map(walk, eqn, index, values):
    """The factors are sharded as the weight's own axes are; the rank is on every device."""
    jaxpr, consts = jx.opened(eqn.params["jaxpr"])

    def specs(value, spec):
        if not is_factored(value):
            return spec
        entries = (*spec, *(None,) * (value.ndim - len(spec)))
        return value.with_parts(
            along_axes(value.base, entries) if is_unbuilt(value.base) else spec,
            lambda part: Part(PartitionSpec(*(None if i < 0 else entries[i] for i in part.axes)), part.axes),
        )

    def inner(*args):
        args = [
            dataclasses.replace(v, base=local(v.base, var.aval)) if is_factored(v) else v
            for v, var in zip(args, jaxpr.invars, strict=True)
        ]
        return walk.dense(eqn, walk.evaluate(jaxpr, consts, args))

    values = [
        v if not is_factored(v) or not isinstance(v.base, Later) else walk.dense(eqn, [v])[0] for v in values
    ]
    in_specs = tuple(specs(v, s) for v, s in zip(values, eqn.params["in_specs"], strict=True))
    mapped = jx.shard_map_like(eqn, inner, in_specs)
    return walk.in_one_piece(eqn, mapped, *(with_new_key(v, index) for v in values))


def custom_jvp(walk, eqn, index, values):
    """The function and its own derivative rule are both walked with the factors apart.

    The tangent of ``base + a b`` is ``(dbase + da b) + a db``: a rule is linear in it, so it is walked
    once for each of the two, both of them factored.
    """
    jaxpr, consts = jx.opened(eqn.params["call_jaxpr"])
    if any(set(v.parts) - {"a", "b", "scale"} or is_unbuilt(v.base) for v in values if is_factored(v)):
        return jx.bind(eqn, walk.dense(eqn, values))
    floats = [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.floating)]
    count = len(values)

    def rule(*primals_and_tangents):
        primals, tangents = primals_and_tangents[:count], primals_and_tangents[count:]

        def dense(*some):
            every = list(primals)
            for i, value in zip(floats, some, strict=True):
                every[i] = value
            return jx.bind(eqn, every)

        return jax.jvp(dense, [primals[i] for i in floats], list(tangents))

    @jax.custom_jvp
    def inner(*args):
        return walk.dense(eqn, walk.evaluate(jaxpr, consts, args))

    @inner.defjvp
    def inner_jvp(primals, tangents):
        pairs = [(primals[i], tangents[i]) for i in floats]
        bases = [v.base if is_factored(v) else v for v in (*primals, *(t for _, t in pairs))]
        rule_jaxpr, rule_consts = jx.opened(jax.make_jaxpr(rule)(*bases))

        def walked(given):
            results = walk.dense(eqn, walk.evaluate(rule_jaxpr, rule_consts, [*primals, *given]))
            return results[: len(results) // 2], results[len(results) // 2 :]

        out, d_out = walked([_with_factors(t, v, a=t) for v, t in pairs])
        if any(is_factored(v) for v, _ in pairs):
            _, rest = walked([_with_factors(_zero(t), v, b=t) for v, t in pairs])
            d_out = [x if x.dtype == jax.dtypes.float0 else x + y for x, y in zip(d_out, rest, strict=True)]
        return out, d_out

    return inner(*values)


def _with_factors(tangent: Any, primal: Any, **factors: Any) -> Any:
    """A tangent with some of its factors; all else (the constant scale) is the primal's."""
    if not is_factored(tangent):
        return tangent
    parts = {**primal.parts, **{name: weight.parts[name] for name, weight in factors.items()}}
    return dataclasses.replace(tangent, parts=parts)


def _zero(t: Any) -> Any:
    return dataclasses.replace(t, base=jnp.zeros_like(t.base)) if is_factored(t) else jnp.zeros_like(t)


CONTROL = {
    jx.NAMES["custom_jvp_call"]: custom_jvp,
    "shard_map": shard_map,
    jx.NAMES["jit"]: jit,
    jx.NAMES["closed_call"]: closed_call,
    jx.NAMES["remat"]: checkpoint,
    jx.NAMES["cond"]: cond,
    jx.NAMES["while"]: while_loop,
    jx.NAMES["scan"]: scan,
}
