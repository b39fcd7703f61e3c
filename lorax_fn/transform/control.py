"""Control flow: factored weights cross it in parts, as constants, stacked inputs or loop invariants.

Every function is ``rule(walk, eqn, values) -> list of results``; ``walk`` evaluates inner jaxprs. A loop, a
cond or a checkpoint runs as a function ``run(walk, ...)`` that is given its own walk, so that it can be kept
and traced again by another call.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.choices import cond
from lorax_fn.transform.dropping import Refused
from lorax_fn.transform.factored import Factored, Part, folded, is_factored
from lorax_fn.transform.low_rank_products import scale_absorbed
from lorax_fn.transform.picks import chosen
from lorax_fn.transform.stored import Later, along_axes, is_unbuilt, local, restacked, scanned


def signature(values: Any) -> Hashable:
    """What a trace of a function of these values depends on, apart from dtypes and numbers."""
    # The tree holds what is static in a weight: axes of its parts, scale, rate and path. Dtypes are left to
    # jit's own cache.
    leaves, treedef = jax.tree_util.tree_flatten(values)
    return treedef, tuple(np.shape(leaf) for leaf in leaves)


def jit(walk, eqn, values):
    """An inner jit stays one function, rewritten once per jaxpr and traced once per operand structure.

    Inside it, weights are named by operand position, so that equal layers of an unrolled model share one
    trace; what that trace notes is repeated for each caller's weights. Two operands that are the same weight
    share a name, because dropout draws are counted by name.
    """
    # The function is kept under the inner jaxpr, which JAX shares among calls with the same types.
    closed = eqn.params["jaxpr"]
    asked = jx.jit_shardings(eqn, "in"), jx.jit_shardings(eqn, "out")

    def make():
        # The walk inside waits: its reports and draws are passed on once per call of `fn`, under its names.
        jaxpr, consts = jx.opened(closed)
        notes: dict[Hashable, Any] = {}

        def inner(*args):
            waiting = walk.waiting()
            constrained = [_constrained(a, s) for a, s in zip(args, asked[0], strict=True)]
            results = waiting.evaluate(jaxpr, consts, constrained)
            notes[signature(args)] = waiting.notes
            return [_constrained(r, s) for r, s in zip(results, asked[1], strict=True)]

        return jx.jit_like(eqn, inner), notes

    key = ("jit", id(closed), eqn.params["name"], *map(tuple, asked))
    fn, notes = walk.once(key, closed, make)
    names: dict[tuple[str, ...], str] = {}
    for i, value in enumerate(values):
        if is_factored(value):
            names.setdefault(value.paths, str(i))
    paths = {name: weight for weight, name in names.items()}
    inside = tuple(_renamed(v, (names[v.paths],)) if is_factored(v) else v for v in walk.entering(values))
    try:
        results = fn(*inside)
    except Refused as refused:  # inside, the weight was named by its position
        raise refused.of(paths) from None
    walk.take(notes[signature(inside)], paths)
    results = [
        _renamed(r, tuple(p for name in r.paths for p in paths[name])) if is_factored(r) else r
        for r in results
    ]
    return _leaving(results, values)


def _renamed(value: Factored, names: tuple[str, ...]) -> Factored:
    return dataclasses.replace(value, paths=names)


def _leaving(results: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Results of an inner function: a weight that it returns counts its draws as it did outside."""
    outside = {v.paths: v.parts.get("draws") for v in values if is_factored(v) and "key" in v.parts}

    def left(w: Any) -> Any:
        if not is_factored(w) or "draws" not in w.parts:
            return w
        parts = {name: part for name, part in w.parts.items() if name != "draws"}
        before = outside.get(w.paths)
        return dataclasses.replace(w, parts=parts if before is None else {**parts, "draws": before})

    return [left(result) for result in results]


def _constrained(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    if is_factored(value):
        # A sharding of W says nothing about its blocks of codes and scales.
        if is_unbuilt(value.base):  # its codes stay where they are
            return value
        return dataclasses.replace(value, base=lax.with_sharding_constraint(value.base, sharding))
    return lax.with_sharding_constraint(value, sharding)


def closed_call(walk, eqn, values):
    jaxpr, consts = jx.opened(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])
    return walk.evaluate(jaxpr, consts, values)


def checkpoint(walk, eqn, values):
    jaxpr, consts = jx.opened(eqn.params["jaxpr"])
    if eqn.params["differentiated"]:
        # This is the recomputation in a backward pass: a barrier keeps XLA from merging it with the forward
        # pass.
        if eqn.params["prevent_cse"] is not False:
            values = lax.optimization_barrier(values)
        return walk.evaluate(jaxpr, consts, values)
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}

    # W + a b is never kept as a residual: the checkpoint saves base and factors as it would save W alone.
    def run(walk, *args):
        def inner(*args):
            walk.notes.draws.clear()  # should JAX trace this twice, then the second trace counts
            return walk.evaluate(jaxpr, consts, args)

        return jax.checkpoint(inner, **options)(*args)

    return _leaving(walk.in_one_piece(eqn, run, *walk.entering(values)), values)


LOOP = np.uint32(0xFFFFFFFF)  # folded into dropout keys ahead of the iteration number; no draw has it


def _any_dropped(values: Any) -> bool:
    return any(is_factored(v) and "key" in v.parts for v in values)


def _at(values: Sequence[Any], number: Any) -> list[Any]:
    """The values, with new keys for weights under dropout: those of one iteration, or of the whole loop."""
    return [
        v.with_part(v.base, "key", folded(v.parts["key"], number)) if _any_dropped([v]) else v for v in values
    ]


def while_loop(walk, eqn, values):
    cond_jaxpr, cond_fixed = jx.opened(eqn.params["cond_jaxpr"])
    body_jaxpr, body_fixed = jx.opened(eqn.params["body_jaxpr"])
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]

    def run(walk, cond_consts, body_consts, init):
        carry = _Carry(walk, eqn, body_jaxpr, m, len(init))
        # Carried weights that the body passes on unchanged stay outside the loop's state: the body closes
        # over them, still factored.
        constant, moving = carry.parted(init)
        # A counter is needed only where dropout has to draw anew in every iteration.
        counter = jnp.uint32(0) if _any_dropped((*body_consts, *constant)) else None
        looped, stepped = _at(body_consts, LOOP), _at(constant, LOOP)

        def cond(state):
            args = [*cond_consts, *carry.joined(constant, state[1])]
            return walk.inner().evaluate(cond_jaxpr, cond_fixed, args)[0]

        def body(state):
            counter, moving = state
            args = [*looped, *carry.joined(stepped, moving)]
            if counter is not None:
                # Each iteration folds its number into the keys, so the mask of one weight differs between
                # iterations.
                args, counter = _at(args, counter), counter + jnp.uint32(1)
            results = walk.inner().evaluate(body_jaxpr, body_fixed, args)
            return counter, carry.parted(carry.settled(results))[1]

        return carry.joined(constant, lax.while_loop(cond, body, (counter, moving))[1])

    values = walk.looping(values)
    # A weight that the body changes is built before the loop: its factors would have to change shape from one
    # iteration to the next.
    init = _Carry(walk, eqn, body_jaxpr, m, len(values) - n - m).settled(values[n + m :])
    return walk.in_one_piece(eqn, run, values[:n], values[n : n + m], init)


class _Carry:
    """Separates a loop's invariant carries, which may stay factored, from those that change."""

    def __init__(self, walk, eqn, body, consts: int, count: int):
        self.walk, self.eqn = walk, eqn
        # The operands are the body's constants, then what it carries. Carry k is invariant if result k of the
        # body is that very operand.
        self.invariant = [i == consts + k for k, i in enumerate(jx.handed_on(body)[:count])]

    def settled(self, values):
        """The carried values, factored only where the loop leaves them unchanged."""
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


def scan(walk, eqn, values):
    jaxpr, fixed = jx.opened(eqn.params["jaxpr"])
    n, m = jx.scan_counts(eqn)
    options = jx.scan_options(eqn)

    def run(walk, consts, init, xs):
        carry = _Carry(walk, eqn, jaxpr, n, m)
        # A carried value that every iteration passes on unchanged is a constant of the loop: a weight among
        # those stays factored, and the loop carries only the others.
        constant, moving = carry.parted(init)
        # Weights that every iteration sees whole get its number folded into their keys; slices have their own
        # keys.
        dropped = _any_dropped((*consts, *constant))
        counter = jnp.arange(options["length"], dtype=jnp.uint32) if dropped else None
        looped, stepped = _at(consts, LOOP), _at(constant, LOOP)
        # Factored weights are scanned as their arrays, each with the stack axis first; `rebuild` makes the
        # weight of one iteration from its slices.
        xs = [x if not is_factored(x) or scanned(x.base) else walk.dense(eqn, [x])[0] for x in xs]
        pieces = [unstack(x) if is_factored(x) else (x, None) for x in xs]
        rebuild = [fn for _, fn in pieces]

        def body(moving, step):
            counter, leaves = step
            invariant = [*looped, *carry.joined(stepped, moving)]
            if counter is not None:
                invariant = _at(invariant, counter)
            slices = [leaf if fn is None else fn(leaf) for leaf, fn in zip(leaves, rebuild, strict=True)]
            results = walk.inner().evaluate(jaxpr, fixed, [*invariant, *slices])
            # Flax NNX returns every layer's weights from the loop: they stay factored.
            ys = [v if _stays_factored(v) else walk.dense(eqn, [v])[0] for v in results[m:]]
            return carry.parted(carry.settled(results[:m]))[1], ys

        # Factors are scanned together with their base, so each iteration contributes one slice of the
        # gradients of a and b, and the scan itself stacks them.
        moving, ys = lax.scan(body, moving, (counter, [leaf for leaf, _ in pieces]), **options)
        ys = [_restacked(y, options["length"]) if is_factored(y) else y for y in ys]
        return [*carry.joined(constant, moving), *ys]

    values = walk.looping(values)
    init = _Carry(walk, eqn, jaxpr, n, m).settled(values[n : n + m])
    return walk.in_one_piece(eqn, run, values[:n], init, values[n + m :])


def _stays_factored(value: Any) -> bool:
    return is_factored(value) and not value.lookup and restacked(value.base, 1) is not None


def _restacked(w: Factored, length: int) -> Factored:
    """A weight that every iteration returned: all its arrays got a leading axis, which is a stack axis."""
    # The W [n, m] of L iterations is now [L, n, m], and a part [n, r] is [L, n, r]: axis 0 is new in all of
    # them.
    base = restacked(w.base, length)
    return w.with_parts(base, lambda part: Part(part.array, (0, *part.renamed(lambda i: i + 1).axes)))


def unstack(w: Factored) -> tuple[Any, Any]:
    """What a loop over the leading axis scans, and how an iteration puts its weight together again."""
    # For W [L, n, m]: a [L, n, r] and b [L, r, m] are scanned, a VeRA's shared a [n, r] is not.
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
            # Axis 0 is gone in an iteration, and the others move up by one.
            axes = tuple(axis - 1 if axis > 0 else axis for axis in part.axes if axis != 0)
            parts[name] = Part(arrays[name] if moves[name] else part.array, axes)
        return dataclasses.replace(w, base=piece_of(piece), parts=parts)

    return leaves, rebuild


def shard_map(walk, eqn, values):
    """Shards the factors as the weight's own axes are sharded; every device holds the whole rank."""
    jaxpr, consts = jx.opened(eqn.params["jaxpr"])

    def specs(value, spec):
        if not is_factored(value):
            return spec
        # A spec may have fewer entries than the weight has axes; each part takes the entries of its own axes.
        # For W [n, m] with P(None, 'model'), a [n, r] is whole on every device and b [r, m] is split along
        # its columns.
        entries = (*spec, *(None,) * (value.ndim - len(spec)))
        return value.with_parts(
            along_axes(value.base, entries) if is_unbuilt(value.base) else spec,
            lambda part: Part(PartitionSpec(*(None if i < 0 else entries[i] for i in part.axes)), part.axes),
        )

    def run(walk, *args):
        def inner(*args):
            walk.notes.draws.clear()  # should JAX trace this twice, then the second trace counts
            args = [
                dataclasses.replace(v, base=local(v.base, var.aval)) if is_factored(v) else v
                for v, var in zip(args, jaxpr.invars, strict=True)
            ]
            return walk.dense(eqn, walk.evaluate(jaxpr, consts, args))

        in_specs = tuple(specs(v, s) for v, s in zip(args, eqn.params["in_specs"], strict=True))
        return jx.shard_map_like(eqn, inner, in_specs)(*args)

    values = [walk.dense(eqn, [v])[0] if is_factored(v) and isinstance(v.base, Later) else v for v in values]
    return walk.in_one_piece(eqn, run, *walk.entering(values))


def custom_jvp(walk, eqn, values):
    """Walks both the function and its own derivative rule with the factors kept apart.

    The tangent of ``base + a b`` is ``(dbase + da b) + a db``. A rule is linear in the tangent, so it is
    walked once for each of the two terms, both of them factored.
    """
    jaxpr, consts = jx.opened(eqn.params["call_jaxpr"])
    values = list(map(chosen, values))
    if any(set(v.parts) - {"a", "b", "scale"} or is_unbuilt(v.base) for v in values if is_factored(v)):
        return jx.bind(eqn, walk.dense(eqn, values))
    if any(v.tap for v in values if is_factored(v)):  # a tap ignores the cotangent, so no rule is needed
        return walk.dense(eqn, walk.evaluate(jaxpr, consts, values))
    # An array scale may be trained too (in VeRA), so it goes into the factors, which have tangents.
    values = [scale_absorbed(v) if is_factored(v) else v for v in values]
    floats = [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.floating)]

    def rule(*primals_and_tangents):
        primals, tangents = primals_and_tangents[: len(values)], primals_and_tangents[len(values) :]

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
        # Tangents are structured like the primals: that of a weight is a weight, with a tangent per array.
        pairs = [(primals[i], tangents[i]) for i in floats]
        bases = [v.base if is_factored(v) else v for v in (*primals, *(t for _, t in pairs))]
        # The user's rule is traced on the bases alone, because it knows nothing of factors; the walk then
        # runs it on weights.
        rule_jaxpr, rule_consts = jx.opened(jax.make_jaxpr(rule)(*bases))

        def walked(given):
            with jx.linear():
                results = walk.dense(eqn, walk.evaluate(rule_jaxpr, rule_consts, [*primals, *given]))
            return results[: len(results) // 2], results[len(results) // 2 :]

        # First comes dbase + da b, then 0 + a db. For anything but a weight the second term is zero.
        out, d_out = walked([_with_factors(t, v, a=t) for v, t in pairs])
        if any(is_factored(v) for v, _ in pairs):
            _, rest = walked([_with_factors(_zero(t), v, b=t) for v, t in pairs])
            d_out = [x if x.dtype == jax.dtypes.float0 else x + y for x, y in zip(d_out, rest, strict=True)]
        return out, d_out

    return inner(*values)


def _with_factors(tangent: Any, primal: Any, **factors: Any) -> Any:
    """A tangent with some of its factors; the others are the primal's."""
    if not is_factored(tangent):
        return tangent
    # For dbase + da b, the result has the tangent's base and a, and the primal's b; for 0 + a db, it has a
    # zero base, the primal's a and the tangent's b.
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
