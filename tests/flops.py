"""FLOPs of contractions, twice: counted in a traced gradient, and derived from the plain function on paper.

`counted` reads the gradient that JAX made of the adapted function. `Factored` never sees it: it walks the
function as its author wrote it and adds up what equation 3 of the LoRA paper, the chain rule and the
checkpoints say must be computed, no more. Both count dot products, grouped products and convolutions; what a
convolution multiplies with zeros of padding or dilation is no product. Elementwise work is left out: in tiny
models it hides the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lorax_fn as lx
from lorax_fn.core.trees import flatten_with_paths
from lorax_fn.transform import jaxpr as jx

# One operation ----------------------------------------------------------------------------------------


def contraction(eqn: Any) -> int | None:
    """FLOPs of one equation as it stands; None where it is no contraction."""
    shapes, out = [v.aval.shape for v in eqn.invars], eqn.outvars[0].aval.shape
    name = eqn.primitive.name
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(shapes[0][i] for i in summed)
    if name == "ragged_dot_general":
        dims = eqn.params["ragged_dot_dimension_numbers"]
        (summed, _), _ = dims.dot_dimension_numbers
        # Where the tokens themselves are summed, each goes to the product of its own group alone.
        groups = 1 if dims.rhs_group_dimensions else shapes[2][0]
        return 2 * math.prod(out) * math.prod(shapes[0][i] for i in summed) // groups
    if name == "conv_general_dilated":
        dims = eqn.params["dimension_numbers"]
        batch, features, *_ = dims.out_spec
        return 2 * out[batch] * out[features] * shapes[1][dims.rhs_spec[1]] * window_products(eqn)
    return None


def window_products(eqn: Any) -> int:
    """Pairs of an output place and a window place that meet an entry of the input, not a zero put in."""
    dims, params, pairs = eqn.params["dimension_numbers"], eqn.params, 1
    (x, w), out = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
    for i, (x_axis, w_axis, out_axis) in enumerate(
        zip(dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:], strict=True)
    ):
        stride, before = params["window_strides"][i], params["padding"][i][0]
        holes, spread = params["lhs_dilation"][i], params["rhs_dilation"][i]
        places = (o * stride + k * spread - before for o in range(out[out_axis]) for k in range(w[w_axis]))
        pairs *= sum(p % holes == 0 and 0 <= p // holes < x[x_axis] for p in places)
    return pairs


def inner(eqn: Any) -> Any:
    """The jaxpr that an equation calls once, or None."""
    if eqn.primitive.name in (*CALLS, jx.NAMES["remat"]):
        return jx.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])[0]
    return None


CALLS = {jx.NAMES[name] for name in ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call")}


# Counted in a traced program --------------------------------------------------------------------------


def counted(jaxpr: Any, wanted: Sequence[bool] | None = None) -> tuple[int, list[bool]]:
    """FLOPs behind the wanted results, and which inputs they need; the compiler drops the rest as well."""
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not jx.is_literal(v)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        wants = [v in live for v in eqn.outvars]
        if any(wants) or eqn.effects:
            flops, needs = _equation(eqn, wants)
            total += flops
            live |= {v for v, n in zip(eqn.invars, needs, strict=True) if n and not jx.is_literal(v)}
    return total, [v in live for v in jaxpr.invars]


def _equation(eqn: Any, wants: list[bool]) -> tuple[int, list[bool]]:
    name, every = eqn.primitive.name, [True] * len(eqn.invars)
    if inner(eqn) is not None:
        return counted(inner(eqn), wants)
    if name == jx.NAMES["scan"]:
        body = jx.opened(eqn.params["jaxpr"])[0]
        n, m = jx.scan_counts(eqn)
        while True:  # what is carried is wanted by the next iteration
            flops, needs = counted(body, wants)
            carried = [w or n for w, n in zip(wants[:m], needs[n : n + m], strict=True)]
            if carried == wants[:m]:
                return eqn.params["length"] * flops, needs
            wants = carried + wants[m:]
    if name == jx.NAMES["cond"]:
        return max(counted(jx.opened(branch)[0], wants)[0] for branch in eqn.params["branches"]), every
    if name == jx.NAMES["while"]:
        assert counted(jx.opened(eqn.params["body_jaxpr"])[0])[0] == 0, "nobody knows how often it runs"
    return contraction(eqn) or 0, every


# Derived from the plain function ----------------------------------------------------------------------

WEIGHT, ACTIVE = "a view of an adapted weight", "depends on the adapters"
VIEWS = {
    "transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "rev", "slice",
    "split", "concatenate", "expand_dims", "dynamic_slice", "mul", "pvary",
}  # fmt: skip
LINEAR = VIEWS - {"mul", "dynamic_slice"} | {"add", "add_any", "sub", "neg", "reduce_sum", "pad"}
CONSTANT = {"stop_gradient", "lt", "gt", "ge", "le", "eq", "ne", "argmax", "sign", "floor", "is_finite"}


class Factored:
    """What a gradient by the factors of rank ``rank`` must compute, read off the plain function."""

    def __init__(self, rank: int):
        self.rank = rank

    def total(self, jaxpr: Any, weights: Sequence[bool]) -> int:
        """FLOPs of value and gradient, where ``weights`` tells the inputs that are adapted."""
        return self._block(jaxpr, [WEIGHT if w else None for w in weights])[0]

    def _block(self, jaxpr: Any, marks: Sequence[Any], policy: Any = False) -> tuple[int, list]:
        """FLOPs of a block, forward and backward, and the marks of its results.

        ``policy`` is that of a checkpoint around it, False without one.
        """
        steps, results = inlined(jaxpr)
        mark = dict(zip(jaxpr.invars, marks, strict=True))
        total = 0
        for step in steps:
            flops, out = self._step(step, [mark.get(v) for v in step.ins])
            total += flops
            mark.update(zip(step.outs, out, strict=True))
        if policy is None:
            total += self._recomputed(steps, mark)
        return total, [mark.get(v) for v in results]

    def _step(self, step: Any, marks: list) -> tuple[int, list]:
        name, eqn = step.eqn.primitive.name, step.eqn
        if name == jx.NAMES["remat"]:
            policy = eqn.params["policy"]
            assert policy in (None, jax.checkpoint_policies.dots_saveable), policy
            return self._block(inner(eqn), marks, policy)
        if name == jx.NAMES["scan"]:
            return self._scan(eqn, marks)
        assert name not in (jx.NAMES["cond"], jx.NAMES["while"]) or not any(marks), name
        if contraction(eqn) is not None:
            first, second = self.forward(eqn, marks)
            return first + second + self.backward(eqn, marks), [ACTIVE if any(marks) else None]
        if name == "gather" and marks[0] == WEIGHT:  # rows of A, times B: forward, by the rows, by B
            return 3 * 2 * self.rank * eqn.outvars[0].aval.size, [ACTIVE]
        if WEIGHT in marks:
            assert name in VIEWS and ACTIVE not in marks, f"{name} of a weight"
            return 0, [WEIGHT] * len(step.outs)
        active = any(marks) and name not in CONSTANT
        return 0, [ACTIVE if active and v.aval.dtype.kind == "f" else None for v in eqn.outvars]

    def _scan(self, eqn: Any, marks: list) -> tuple[int, list]:
        body = jx.opened(eqn.params["jaxpr"])[0]
        n, m = jx.scan_counts(eqn)
        while True:
            flops, out = self._block(body, marks)
            carried = [old or new for old, new in zip(marks[n : n + m], out[:m], strict=True)]
            if carried == marks[n : n + m]:
                return eqn.params["length"] * flops, out
            marks = [*marks[:n], *carried, *marks[n + m :]]

    # Equation 3: x W + (x A) B.

    def forward(self, eqn: Any, marks: list) -> tuple[int, int]:
        """The product as written and its way down to the rank; then the way up."""
        if WEIGHT not in marks:
            return contraction(eqn), 0
        down, up = self.skinny(eqn, marks)
        return contraction(eqn) + down, up

    def skinny(self, eqn: Any, marks: list) -> tuple[int, int]:
        """FLOPs of ``x A`` and of ``(x A) B``: with B rows of n and m entries, 2 B n r and 2 B r m."""
        w = eqn.invars[marks.index(WEIGHT)].aval
        whole, out = contraction(eqn), eqn.outvars[0].aval
        if eqn.primitive.name == "conv_general_dilated":
            features = out.shape[eqn.params["dimension_numbers"].out_spec[1]]
            down = self.rank * eqn.params["feature_group_count"] * whole // features
            return down, 2 * self.rank * out.size
        if eqn.primitive.name == "ragged_dot_general":
            kept = out.shape[1]
            return whole * self.rank // kept, 2 * self.rank * out.size
        position = marks.index(WEIGHT)
        summed, batched = (both[position] for both in eqn.params["dimension_numbers"])
        kept = math.prod(n for i, n in enumerate(w.shape) if i not in (*summed, *batched))
        return whole * self.rank // kept, 2 * self.rank * out.size

    def backward(self, eqn: Any, marks: list) -> int:
        """By each operand that depends on the adapters once more; by a factor too, never by the weight."""
        whole = contraction(eqn)
        if WEIGHT not in marks:
            return whole * marks.count(ACTIVE)
        down, up = self.skinny(eqn, marks)
        by_factors = down + 2 * up  # dA; d(x A) and dB
        return by_factors + (whole + down) * marks.count(ACTIVE)

    # Checkpoints: what the gradient reads of a block is computed again.

    def _recomputed(self, steps: list, mark: dict) -> int:
        total, read = 0, set()
        for step in reversed(steps):
            marks = [mark.get(v) for v in step.ins]
            name = step.eqn.primitive.name
            if any(v in read for v in step.outs):
                total += sum(self.forward(step.eqn, marks)) if contraction(step.eqn) is not None else 0
                read.update(step.ins)
            elif WEIGHT in marks and contraction(step.eqn) is not None:
                total += self.skinny(step.eqn, marks)[0]  # dB reads x A, if nothing reads the product
            if not any(mark.get(v) == ACTIVE for v in step.outs) or name in LINEAR:
                continue
            if name == "mul" or contraction(step.eqn) is not None:
                read.update(v for i, v in enumerate(step.ins) if any(marks[:i] + marks[i + 1 :]))
            else:
                read.update(step.ins)
        return total


class Step:
    """One equation of an inlined block; ``ins`` and ``outs`` name its values within the block."""

    def __init__(self, eqn: Any, ins: list, outs: list):
        self.eqn, self.ins, self.outs = eqn, ins, outs


def inlined(jaxpr: Any) -> tuple[list[Step], list]:
    """The equations that the results need, with every plain call replaced by what it calls."""
    steps: list[Step] = []

    def put(jaxpr: Any, names: dict) -> list:
        for eqn in jaxpr.eqns:
            ins = [object() if jx.is_literal(v) else names.setdefault(v, object()) for v in eqn.invars]
            if eqn.primitive.name in CALLS:
                called = inner(eqn)
                outs = put(called, dict(zip(called.invars, ins, strict=True)))
            else:
                outs = [object() for _ in eqn.outvars]
                steps.append(Step(eqn, ins, outs))
            names.update(zip(eqn.outvars, outs, strict=True))
        return [None if jx.is_literal(v) else names.get(v) for v in jaxpr.outvars]

    results = put(jaxpr, {v: v for v in jaxpr.invars})
    needed, kept = set(results), []
    for step in reversed(steps):
        if needed & set(step.outs):
            kept.append(step)
            needed.update(step.ins)
    return kept[::-1], results


# The check ---------------------------------------------------------------------------------------------

RANK = 3


def loss_of(out):
    return jnp.sum(jnp.square(out.astype(jnp.float32)))


def traced(fn, *args):
    return jx.opened(jax.make_jaxpr(fn)(*args))[0]


def arrays_of(params):
    """Leaves of a tree that are arrays, and how to put them back beside those that are none."""
    leaves, treedef = jax.tree.flatten(params)
    where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def whole(arrays):
        known = dict(zip(where, arrays, strict=True))
        return jax.tree.unflatten(treedef, [known.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in where], whole


def gradient_flops(forward, lora, params, args):
    """Counted in value and gradient by ``lora`` of the sum of squares of ``forward(lora, params, *args)``."""
    arrays, whole = arrays_of(params)

    def value_and_grad(lora, arrays, *args):
        return jax.value_and_grad(lambda lora: loss_of(forward(lora, whole(arrays), *args)))(lora)

    return counted(traced(value_and_grad, lora, arrays, *args))[0]


def factored_flops(fn, lora, params, args):
    arrays, whole = arrays_of(params)
    adapted = [path in lora for path, leaf in flatten_with_paths(params)[0] if hasattr(leaf, "shape")]
    jaxpr = traced(lambda arrays, *args: loss_of(fn(whole(arrays), *args)), arrays, *args)
    others = [False] * (len(jaxpr.invars) - len(adapted))
    return Factored(RANK).total(jaxpr, adapted + others)


def check_flops(fn, lora, params, args):
    """Asserts that value and gradient of ``fn`` through `adapt` cost what they must, to the last FLOP."""
    run = lx.adapt(fn, fallback="error")
    got = gradient_flops(lambda lora, params, *args: run(params, lora, *args), lora, params, args)
    want = factored_flops(fn, lora, params, args)
    assert got == want > 0, f"{got} counted, {want} on paper: {got / want:.4f}"
