"""Rules for the primitives that consume a weight (products) or put several side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lorax_fn.transform import jaxpr as jx
from lorax_fn.transform.columns import in_b, pays, scaled_product
from lorax_fn.transform.dropping import Refused, dropped
from lorax_fn.transform.factored import RANK, Factored, Part, Sum, align, is_factored
from lorax_fn.transform.low_rank_products import absorbed, build, contract, low_rank_product
from lorax_fn.transform.meshes import explicit_mesh, sharding_without
from lorax_fn.transform.rules import Rules
from lorax_fn.transform.stored import moved, product
from lorax_fn.transform.taps import EXACT, echo, inputs_of_tap

PRODUCTS = Rules()


@PRODUCTS.of(prims.dot_general_p)
def _dot_general(walk, eqn, values):
    lhs, rhs = values
    if is_factored(lhs) and is_factored(rhs):  # two weights multiplied: build the one that is looked-up rows
        if lhs.lookup != rhs.lookup:
            lhs, rhs = (build(lhs), rhs) if lhs.lookup else (lhs, build(rhs))
        else:
            return NotImplemented
    # From here on w is the weight and x the data, whichever side of the product they are on.
    w, x = (lhs, rhs) if is_factored(lhs) else (rhs, lhs)
    # int, because vmap writes numpy integers into equations, which compare elementwise with tuples.
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = jax.tree.map(int, eqn.params["dimension_numbers"])
    w_first = w is lhs
    w_sum, x_sum = (lhs_sum, rhs_sum) if w_first else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if w_first else (rhs_batch, lhs_batch)
    # Axes of the weight are named by their numbers. An axis of x that meets one of them has the same name,
    # any other is ("x", i); so x [B, T, n] @ W [n, m] has xs = (x0, x1, 0) and out = (x0, x1, 1).
    shared = dict(zip((*x_batch, *x_sum), (*w_batch, *w_sum), strict=True))  # axis of x -> axis of w
    xs = [shared.get(i, ("x", i)) for i in range(x.ndim)]
    # dot_general returns batch axes first, then the free axes of its left operand, then those of its right.
    x_free = [name for i, name in enumerate(xs) if i not in shared]
    w_free = [i for i in range(w.ndim) if i not in (*w_batch, *w_sum)]
    out = [*w_batch, *(w_free + x_free if w_first else x_free + w_free)]
    # A stored weight without an adapter needs the product alone, which unpacks it.
    if not w.parts:
        return product(eqn, (w.base, x) if w_first else (x, w.base))
    column = w.parts.get("column")
    after = None
    if column is not None:  # column * (x @ W) if it survives, (x * column) @ W if it is contracted
        if not set(column.axes) & set(w_sum):
            after = column
        elif set(column.axes) <= {n for n in xs if isinstance(n, int)}:
            x = x * align(column.array.astype(x.dtype), column.axes, xs)
        else:
            return NotImplemented
    # The frozen half is the program's own product, with its precision and output dtype. It is never fused
    # with the change, so the gradient with respect to lora needs no W-sized array.
    base = product(eqn, (w.base, x) if w_first else (x, w.base))[0]
    known = [n for n in out if not isinstance(n, int) or w.has("a", n) or w.has("b", n) or n in xs]
    if after is not None and set(after.axes) <= set(w.parts["b"].axes):
        if known == out and pays(w, x, out, w_sum, base):
            precision = eqn.params["precision"]
            return [scaled_product(w, x, xs, out, base, precision=precision, walk=walk)]
        # Its gradient then needs base alone; for column * (base + change), XLA would keep all three arrays.
        base = base * align(after.array.astype(base.dtype), after.axes, out)
        w, after = in_b(w, after), None
    change = low_rank_product(w, x, xs, out, dtype=base.dtype, precision=eqn.params["precision"], walk=walk)
    # An axis that W repeats (a vmapped copy) is in no factor: the change is the same along it.
    change = _placed_like(base, align(change, known, out) if known != out else change)
    if after is None:
        return [Sum(base, change)]
    total = base + change
    return [total * align(after.array.astype(total.dtype), after.axes, out)]


def _placed_like(base: Any, change: Any) -> Any:
    """``change`` with the sharding that the program asked for its product, where mesh axes are Explicit."""
    if not explicit_mesh(base):
        return change
    asked = jax.typeof(base).sharding
    # An axis along which the change is broadcast has size 1 there and can't be sharded.
    spec = [entry if change.shape[i] == base.shape[i] else None for i, entry in enumerate(asked.spec)]
    return jax.sharding.reshard(change, jax.NamedSharding(asked.mesh, jax.P(*spec)))


@PRODUCTS.of(prims.conv_general_dilated_p)
def _convolution(walk, eqn, values):
    """One factor keeps the window, strides and dilation; the other is a 1x1 convolution on its rank side.

    With g groups there are g * r channels between the two: the 1x1 works within each group.
    """
    x, w = values
    params = eqn.params
    if is_factored(x) and x.lookup and is_factored(w):
        x = build(x)  # looked-up rows are an activation
    if is_factored(x) or params["batch_group_count"] != 1:
        return NotImplemented
    if not w.parts:
        return product(eqn, [x, w.base])
    # The factor with the window axes is the wide one: if it is A, it is [*window, in, r], and B is [r, out].
    out_axis, in_axis, *window = params["dimension_numbers"].rhs_spec
    spatial = "a" if w.has("a", window[0] if window else in_axis) else "b"
    wide, point = w.parts[spatial], w.parts["b" if spatial == "a" else "a"]
    if set(wide.axes) == {in_axis, *window, RANK} and set(point.axes) == {out_axis, RANK}:
        window_first = True
    elif set(wide.axes) == {out_axis, *window, RANK} and set(point.axes) == {in_axis, RANK}:
        window_first = False
    else:
        return NotImplemented
    # The frozen half is the program's own convolution.
    base = product(eqn, [x, w.base])[0]
    # Dropout drops entries of x ahead of A. With the window in B, A is a 1x1 whose inputs the window sees
    # several times, and one mask for each would not be dropout of W's inputs.
    if "key" in w.parts:
        if spatial != "a" or not window_first:
            raise Refused("dropout of a convolution drops inputs ahead of the window only.", w.paths)
        x, _ = dropped(w, x, [("x", i) for i in range(x.ndim)], walk.drawn(w))
    x = inputs_of_tap(x) if w.tap else x
    groups, dtype = params["feature_group_count"], x.dtype
    if "scale" in w.parts:  # one number, or one per rank: no other scale fits a kernel
        by = w.parts["scale"]
        if by.axes not in ((), (RANK,)):
            return NotImplemented
        point = Part(point.array * align(by.array.astype(point.array.dtype), by.axes, point.axes), point.axes)
    at_x, at_y = params["dimension_numbers"].lhs_spec[1], params["dimension_numbers"].out_spec[1]
    swapped = out_axis if window_first else in_axis  # the axis of the kernel that the rank replaces
    kernel = align(wide.array.astype(dtype), wide.axes, [RANK if i == swapped else i for i in range(w.ndim)])
    point = align(
        point.array.astype(dtype), point.axes, [in_axis, RANK] if not window_first else [RANK, out_axis]
    )
    if window_first:
        # The window takes x to g * r channels, each group from its own inputs; the 1x1 then takes r -> out
        # within each group.
        kernel = lax.concatenate([kernel] * groups, out_axis)
        changed = {"preferred_element_type": None, **sharding_without(base, at_y)}
        changed |= {"precision": (EXACT, EXACT)} if w.tap else {}
        h = jx.bind_with(eqn, [x, kernel], **changed)[0] * w.scale
        h = echo(h) if w.tap else h
        point = lax.reshape(point, (point.shape[0], groups, w.shape[out_axis] // groups))
        change = _within_groups(h, at_y, point, groups, base.dtype, params["precision"])
    else:
        # The 1x1, which is the same for every group, takes in -> r: [N, H, W, g * c] -> [N, H, W, g * r].
        point = lax.broadcast_in_dim(point, (point.shape[0], groups, point.shape[1]), (0, 2))
        h = _within_groups(x, at_x, point, groups, dtype, params["precision"]) * w.scale
        # The window then makes the outputs from those, with the strides and groups of the program.
        change = jx.bind(eqn, [h, kernel])[0]
    total = base + change
    column = w.parts.get("column")
    if column is not None:
        if column.axes != (out_axis,):
            return NotImplemented
        total = total * lax.expand_dims(
            column.array.astype(total.dtype), [i for i in range(total.ndim) if i != at_y]
        )
    return [total]


def _within_groups(x: Any, feature: int, point: Any, groups: int, dtype: Any, precision: Any) -> Any:
    """``point`` ``[c, g, d]`` applied to the channel axis of ``x``, g * c channels in, g * d out."""
    # [N, H, W, g * c] -> [N, H, W, g, c], so that one dot product with [c, g, d] serves every group at once,
    # with g as its batch axis.
    split = lax.reshape(x, (*x.shape[:feature], groups, x.shape[feature] // groups, *x.shape[feature + 1 :]))
    rest = [("x", i) for i in range(x.ndim)]
    names = [*rest[:feature], "group", "in", *rest[feature + 1 :]]
    out = ["out" if n == "in" else n for n in names]
    y = contract(split, names, point, ["in", "group", "out"], out, dtype=dtype, precision=precision)
    return lax.reshape(y, (*x.shape[:feature], groups * point.shape[2], *x.shape[feature + 1 :]))


@PRODUCTS.of("ragged_dot_general")
def _ragged_dot(walk, eqn, values):
    """Grouped experts: rows go through their expert's ``A`` and ``B`` as two grouped products."""
    x, w, sizes, *offset = values
    if not is_factored(x) and not w.parts:
        return product(eqn, [x, w.base, sizes, *offset])
    dims = eqn.params["ragged_dot_dimension_numbers"]
    ((x_sum,), (w_sum,)), batch = dims.dot_dimension_numbers[0], dims.dot_dimension_numbers[1]
    plain = x.ndim == 2 and tuple(dims.lhs_ragged_dimensions) == (1 - x_sum,) and not batch[0] and not offset
    if is_factored(x) or not plain or len(dims.rhs_group_dimensions) != 1 or w.ndim != 3:
        return NotImplemented
    # Of the three axes, one is that of the experts and one is contracted: the third holds the outputs.
    (expert,) = dims.rhs_group_dimensions
    out_axis = 3 - expert - w_sum
    # x meets the factor that has the contracted axis first: [rows, n] -> [rows, r] -> [rows, m].
    first = "a" if w.has("a", w_sum) else "b"
    second = "b" if first == "a" else "a"
    if "key" in w.parts:
        raise Refused("dropout of a ragged product is not defined.", w.paths)
    # A scale per expert has to go into a factor per expert: between two grouped products there is no place
    # for it.
    fa, fb = absorbed(w, x.dtype)
    factors = {"a": fa, "b": fb}
    column = w.parts.get("column")
    fits = set(factors[first].axes) | {expert} == {expert, w_sum, RANK}
    fits &= set(factors[second].axes) | {expert} == {expert, out_axis, RANK}
    fits &= expert in (*fa.axes, *fb.axes)  # only a grouped product zeroes rows beyond the last group
    if not fits or (column is not None and set(column.axes) != {expert, out_axis}):
        return NotImplemented
    # JAX also refuses a ragged product of which a vmap maps no operand, so x is mapped where the factors are.
    x = jx.mapped_with(x, [fa.array, fb.array])
    base = product(eqn, [x, w.base, sizes])[0]
    x = jx.mapped_with(x, [base])
    x = inputs_of_tap(x) if w.tap else x
    rows = x if x_sum == 1 else lax.transpose(x, (1, 0))
    # Rows are grouped by expert, so a factor per expert takes a grouped product; a factor that all experts
    # share (VeRA's A) takes a plain one.
    down, up = (fa, fb) if first == "a" else (fb, fa)
    precision = EXACT if w.tap else eqn.params["precision"]
    h = _grouped(rows, down, [expert, w_sum, RANK], sizes, precision=precision)
    h = echo(h) if w.tap else h
    wanted = {"precision": precision, "preferred_element_type": base.dtype}
    total = base + _grouped(h, up, [expert, RANK, out_axis], sizes, **wanted)
    if column is not None:  # each row times the column of its expert
        ones = jx.mapped_with(jnp.ones((rows.shape[0], 1), total.dtype), [total])
        by = align(column.array.astype(total.dtype), column.axes, [expert, RANK, out_axis])
        total = total * jx.ragged_dot((ones, by, sizes), precision=EXACT)
    return [total]


def _grouped(rows: Any, part: Part, axes: list[int], sizes: Any, **options: Any) -> Any:
    """``rows`` times a factor: that of the row's expert, or the one that all experts share."""
    # The factor is put into the order that ragged_dot wants, [experts, in, out]; a shared one has size 1
    # along experts.
    whole = align(part.array, part.axes, axes)
    if axes[0] in part.axes:
        return jx.ragged_dot((rows, whole, sizes), **options)
    return lax.dot_general(rows, whole[0], (((1,), (0,)), ((), ())), **options)


@PRODUCTS.of(prims.concatenate_p, "stack")
def _side_by_side(walk, eqn, values):
    stack = eqn.primitive.name == "stack"
    axis = eqn.params["axis"] if stack else eqn.params["dimension"]
    # The bases are joined by the program's own operation. The rest joins the factors so that every entry is
    # still W + a b.
    base = moved(eqn, [v.base if is_factored(v) else v for v in values])[0]
    if stack:
        values = [_expanded(v, axis) for v in values]
    paths = tuple(path for v in values if is_factored(v) for path in v.paths)
    weights = [v for v in values if is_factored(v) and v.parts]
    if not weights:
        return [Factored(base, {}, 1.0, 0.0, paths)]
    # A kind says for each axis whether a has it and whether b has it. Weights of two kinds, such as [n, m]
    # beside a transposed [m, n], have no factors that could be joined.
    kinds = {tuple((w.has("a", i), w.has("b", i)) for i in range(w.ndim)) for w in weights}
    if len(kinds) > 1 or any(set(w.parts) - {"a", "b", "scale", "column"} or w.lookup for w in weights):
        return NotImplemented
    # All weights have the joined axis in the same factors: in both (or in neither, which joins as a stack),
    # in a alone, or in b alone.
    in_a, in_b = next(iter(kinds))[axis]
    parts = {}
    if any("column" in w.parts for w in weights):
        if in_a and not in_b:
            return NotImplemented  # columns of two weights would differ along inputs
        parts["column"] = _columns(values, weights, axis)
    dtype = jnp.result_type(*(w.parts[name].array.dtype for w in weights for name in "ab"))
    factors = [
        _plain_factors(v, axis, in_a == in_b, dtype) if is_factored(v) and v.parts else None for v in values
    ]
    join = _stacked if in_a == in_b else _blocks
    a, b = join(factors, [v.shape[axis] for v in values], axis, "a" if in_a else "b")
    return [Factored(base, {"a": a, "b": b, **parts}, 1.0, 0.0, paths, tap=weights[0].tap)]


def _columns(values: list, weights: list[Factored], axis: int) -> Part:
    """The columns of DoRA, joined along the axis; values without a column get ones."""
    known = [w.parts["column"] for w in weights if "column" in w.parts]
    axes = tuple(sorted({axis, *(i for part in known for i in part.axes)}))
    dtype = jnp.result_type(*(part.array.dtype for part in known))
    arrays = []
    for v in values:
        shape = [v.shape[i] for i in axes]
        if is_factored(v) and "column" in v.parts:
            part = v.parts["column"]
            arrays.append(jnp.broadcast_to(align(part.array.astype(dtype), part.axes, axes), shape))
        else:
            arrays.append(jnp.ones(shape, dtype))
    return Part(lax.concatenate(arrays, axes.index(axis)), axes)


def _expanded(value: Any, axis: int) -> Any:
    """The value with a new axis of size 1, along which no part of a weight runs."""
    if not is_factored(value):
        return lax.expand_dims(value, [axis])
    # `stack` is a concatenation along a new axis, of size 1 in each operand.
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    base = jax.ShapeDtypeStruct(shape, value.dtype)  # the bases are joined already
    return value.with_parts(base, lambda part: part.renamed(lambda i: i + 1 if i >= axis else i))


def _plain_factors(w: Factored, axis: int, stacks: bool, dtype: Any) -> dict[str, Part]:
    """``a`` and ``b`` with axes in order, the rank last and no scale; both have ``axis`` if it stacks."""
    parts = {}
    for name, part in zip("ab", absorbed(w, dtype), strict=True):
        # a [*stack, *inputs, r] and b [*stack, *outputs, r]: the rank is last in both, so that both are
        # joined in the same way.
        axes = [i for i in range(w.ndim) if i in part.axes or (stacks and i == axis)] + [RANK]
        array = align(part.array, part.axes, axes)
        shape = [w.shape[axis] if i == axis else n for i, n in zip(axes, array.shape, strict=True)]
        parts[name] = Part(jnp.broadcast_to(array, shape), tuple(axes))
    return parts


def _stacked(factors: list, sizes: list[int], axis: int, side: str) -> list[Part]:
    """Along a stack axis each entry keeps its own factors; ranks are padded with zeros."""
    del side
    known = [f for f in factors if f is not None]
    rank = max(f["a"].array.shape[-1] for f in known)
    joined = []
    for name in "ab":
        # The first weight determines the order of the axes and the sizes along all but the joined one.
        like = known[0][name]
        where, arrays = like.axes.index(axis), []
        for f, size in zip(factors, sizes, strict=True):
            # An array among the weights has no change: its entries get factors of zeros.
            if f is None:
                shape = [size if i == where else n for i, n in enumerate(like.array.shape[:-1])]
                arrays.append(jnp.zeros((*shape, rank), like.array.dtype))
            else:
                arrays.append(_padded(f[name].array, -1, 0, rank))
        joined.append(Part(lax.concatenate(arrays, where), like.axes))
    return joined


def _blocks(factors: list, sizes: list[int], axis: int, side: str) -> list[Part]:
    """Along an input or output axis one factor becomes block-diagonal: exact, at the sum of the ranks."""
    known = [(sum(sizes[:i]), f) for i, f in enumerate(factors) if f is not None]
    joined = []
    for name in "ab":
        # For [n, m1 + m2] of ranks r1 and r2, a is [n, r1 + r2], and b is [r1 + r2, m1 + m2] with b1 and b2
        # as its diagonal blocks.
        axes, arrays = known[0][1][name].axes, []
        for start, f in known:
            array = f[name].array
            if name == side:
                array = _padded(array, axes.index(axis), start, sum(sizes))
            arrays.append(array)
        joined.append(Part(lax.concatenate(arrays, len(axes) - 1), axes))
    return joined


def _padded(array: Any, axis: int, before: int, total: int) -> Any:
    edges = [(0, 0, 0)] * array.ndim
    # Zeros before and after, so that the axis has `total` entries in the end.
    edges[axis] = (before, total - before - array.shape[axis], 0)
    return lax.pad(array, jnp.zeros((), array.dtype), edges)
