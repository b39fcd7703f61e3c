"""The oracle matrix: rules x transformations x dtypes, compared with the same function on merged weights.

``fallback="error"`` throughout: nothing here may build a weight. Everything of one row and dtype is one
compilation, in which each transformation has weights, adapters and inputs of its own, so that the
gradients tell the transformations apart.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rule_cases import IO, RULE_CASES, SIO, make_adapter, normal

import lorax_fn as lx


def zeros_of(fn, p, x):
    return jnp.zeros_like(jax.eval_shape(fn, p, x))


def two(x):
    """A batch of two that differ; what is compared is the second."""
    return jnp.stack([x[::-1] if x.ndim else x, x])


def in_scan(fn):
    return lambda p, x, on: lax.scan(lambda c, x: (c, fn(p, x)), 0, two(x))[1][1]


def in_cond(fn):
    # Not zeros in the other branch: next to it XLA's CPU compiler aborts on the layout of a batched product.
    return lambda p, x, on: lax.cond(on, fn, lambda p, x: 0 * fn(p, x), p, x)


def in_while(fn):
    def run(p, x, on):
        return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, fn(p, x)), (0, zeros_of(fn, p, x)))[1]

    return run


# What happens inside the adapted function; the whole is then jitted, differentiated and vmapped.
INSIDE = {
    "plain": lambda fn: lambda p, x, on: fn(p, x),
    "jit": lambda fn: lambda p, x, on: jax.jit(fn)(p, x),
    "vmap": lambda fn: lambda p, x, on: jax.vmap(fn, (None, 0))(p, two(x))[1],
    "scan": in_scan,
    "checkpoint": lambda fn: lambda p, x, on: jax.checkpoint(fn)(p, x),
    "cond": in_cond,
}
NESTED = {  # the same in fewer compilations
    "plain": INSIDE["plain"],
    "vmap": INSIDE["vmap"],
    "jit in scan": lambda fn: in_scan(jax.jit(fn)),
    "checkpoint in cond": lambda fn: in_cond(jax.checkpoint(fn)),
}
LEFT_OUT = {("ragged", "vmap")}  # JAX itself has no vmap of a ragged_dot


def close(got, want, tol, what):
    want = np.asarray(want, np.float32)
    largest = np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tol, atol=tol * largest, err_msg=what)


def cotangent(y):
    return normal(5, y.shape).astype(y.dtype)


def differentiable(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


@functools.cache
def oracle(name):
    """Value, gradient by the adapter and gradient by x (None for ids) of the merged function, in float32."""
    case = next(c for c in RULE_CASES if c.name == name)

    def loss(adapter, x):
        y = case.fn({"w": adapter.weight(case.weight)}, x)
        return jnp.sum(y.astype(jnp.float32) * cotangent(y).astype(jnp.float32)), y

    by = (0, 1) if differentiable(case.input) else 0
    (_, y), grads = jax.jit(jax.value_and_grad(loss, by, has_aux=True))(case.adapter, case.input)
    return (y, *grads) if differentiable(case.input) else (y, grads, None)


@pytest.mark.parametrize(
    ("dtype", "table"),
    [
        pytest.param(jnp.float32, NESTED, id="float32"),
        pytest.param(jnp.float32, INSIDE, id="float32, one by one", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, NESTED, id="bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda c: c.name)
def test_every_rule_under_every_transformation(case, dtype, table):
    modes = {m: wrap(case.fn) for m, wrap in table.items() if (case.name, m) not in LEFT_OUT}
    x = case.input.astype(dtype) if differentiable(case.input) else case.input
    params = {m: {"w": case.weight.astype(dtype)} for m in modes}
    lora = {f"{m}/w": case.adapter for m in modes}
    xs, on = {m: x for m in modes}, jnp.array(True)
    tol = max(case.tol, 1e-5 if dtype == jnp.float32 else 0.03)

    def everything(params, xs, on):
        return {m: run(params[m], xs[m], on) for m, run in modes.items()}

    adapted = lx.adapt(everything, fallback="error")
    in_a_while = lx.adapt(in_while(case.fn), fallback="error")
    plain = lx.adapt(case.fn, fallback="error")

    def loss(lora, xs):
        ys = adapted(params, lora, xs, on)
        return sum(jnp.sum((y * cotangent(y)).astype(jnp.float32)) for y in ys.values()), ys

    def run(lora, xs):
        _, pull, ys = jax.vjp(loss, lora, xs, has_aux=True)
        by_lora, by_x = pull(jnp.float32(1))
        one, batch = {"w": case.adapter}, {}
        if "vmap" in modes:
            batch = jax.vmap(lambda x: plain(params["plain"], one, x))(two(x))
        loop = in_a_while(params["plain"], one, x, on)
        return ys, by_lora, by_x, batch, loop

    ys, by_lora, by_x, batch, loop = jax.jit(run)(lora, xs)
    y, want_lora, want_x = oracle(case.name)
    for mode in modes:
        assert ys[mode].dtype == (jnp.bfloat16 if case.name == "cast down" else dtype)
        close(ys[mode], y, tol, f"value in {mode}")
        for part in ("a", "b"):
            got, want = getattr(by_lora[f"{mode}/w"], part), getattr(want_lora, part)
            assert got.dtype == jnp.float32
            close(got, want, 4 * tol, f"gradient by {part} in {mode}")
        if want_x is not None:
            close(by_x[mode], want_x, 4 * tol, f"gradient by x in {mode}")
    if "vmap" in modes:
        close(batch[1], y, tol, "value under vmap")
    close(loop, y, tol, "value in while")
    if dtype == jnp.float32:
        close(plain(params["plain"], {"w": case.adapter}, x), y, tol, "eager value")


HANDFUL = [
    c for c in RULE_CASES if c.name in ("dense", "attention out", "conv groups", "used twice", "ragged")
]
DENSE = RULE_CASES[0]
PARAMS, LORA = {"w": DENSE.weight}, {"w": DENSE.adapter}
MERGED = lx.merge(PARAMS, LORA)
SQUARE = normal(3, (8, 8), 0.3)
SQUARE_LORA = make_adapter((8, 8), IO)


def strict(fn, **options):
    return lx.adapt(fn, fallback="error", **options)


def square(fn, *args):
    """The adapted function and the merged one on an 8 x 8 weight."""
    want = fn({"w": SQUARE_LORA.weight(SQUARE)}, *args)
    return strict(fn)({"w": SQUARE}, {"w": SQUARE_LORA}, *args), want


@pytest.mark.parametrize("case", HANDFUL, ids=lambda c: c.name)
def test_jvp(case):
    params, lora, x = {"w": case.weight}, {"w": case.adapter}, case.input
    merged = functools.partial(case.fn, {"w": case.adapter.weight(case.weight)})
    got = jax.jvp(lambda x: strict(case.fn)(params, lora, x), (x,), (x + 1,))
    want = jax.jvp(merged, (x,), (x + 1,))
    close(got[0], want[0], 1e-5, "value")
    close(got[1], want[1], 1e-5, "tangent")
    by_lora = jax.jvp(lambda a: strict(case.fn)(params, {"w": a}, x), (case.adapter,), (case.adapter,))
    plain = jax.jvp(lambda a: case.fn({"w": a.weight(case.weight)}, x), (case.adapter,), (case.adapter,))
    close(by_lora[1], plain[1], 1e-5, "tangent by the adapter")


def test_hessian():
    def loss(apply):
        return lambda a: jnp.sum(jnp.sin(apply(a)))

    x = normal(1, (3, 8))
    got = jax.hessian(loss(lambda a: strict(DENSE.fn)(PARAMS, {"w": a}, x)))(LORA["w"])
    want = jax.hessian(loss(lambda a: DENSE.fn({"w": a.weight(PARAMS["w"])}, x)))(LORA["w"])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other, 1e-4, "second derivative")


def test_gradient_by_params_is_the_merged_functions():
    x = normal(1, (3, 8))
    got = jax.grad(lambda p: jnp.sum(jnp.sin(strict(DENSE.fn)(p, LORA, x))))(PARAMS)
    want = jax.grad(lambda p: jnp.sum(jnp.sin(DENSE.fn(p, x))))(MERGED)
    close(got["w"], want["w"], 1e-5, "gradient by the base")


def test_adapters_can_be_vmapped():
    x = normal(1, (3, 8))
    loras = [{"w": make_adapter((8, 6), IO, seed=seed)} for seed in (0, 10, 20)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loras)
    got = jax.vmap(strict(DENSE.fn), (None, 0, None))(PARAMS, stacked, x)
    want = jnp.stack([DENSE.fn(lx.merge(PARAMS, lora), x) for lora in loras])
    close(got, want, 1e-5, "one adapter a lane")


@pytest.mark.parametrize("spec", [(None, None), ("b", None), (None, "b"), ("b", "a")], ids=str)
def test_shard_map_shards_the_factors_as_the_weight(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = spec

    def fn(p, x):
        def inner(w, x):
            y = x @ w
            return lax.psum(y, rows) if rows else y

        specs = (P(rows, columns), P(None, rows))
        return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P(None, columns))(p["w"], x)

    got, want = square(fn, normal(1, (4, 8)))
    close(got, want, 1e-5, "value")
    x = normal(1, (4, 8))
    loss = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(strict(fn)({"w": SQUARE}, {"w": a}, x)))))
    plain = jax.grad(lambda a: jnp.sum(jnp.sin(x @ a.weight(SQUARE))))(SQUARE_LORA)
    close(loss(SQUARE_LORA).a, plain.a, 1e-4, "gradient by a")
    close(loss(SQUARE_LORA).b, plain.b, 1e-4, "gradient by b")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_15_sharded_base_gives_the_plain_models_sharding(kind):
    """W (16, 8, 10) over ('fsdp', 'tp', None), x over fsdp, rank 3, alpha 6."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    layout = lx.Layout((), (0,), (1, 2))
    adapter = make_adapter((16, 8, 10), layout, rank=3, alpha=6.0)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        w, x = put(normal(1, (16, 8, 10)), "fsdp", "tp", None), put(normal(2, (4, 5, 16)), "fsdp", None, None)
        sharded = dataclasses.replace(
            adapter, a=put(adapter.a, "fsdp", None), b=put(adapter.b, None, "tp", None)
        )
        fn = jax.jit(lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"], out_sharding=OUT[kind]))
        got = jax.jit(strict(fn))({"w": w}, {"w": sharded}, x)
        assert got.sharding.spec == P("fsdp", None, "tp", None) or kind is AxisType.Auto
        assert got.sharding.is_equivalent_to(fn({"w": w}, x).sharding, 4)
    want = jnp.einsum("btd,dnh->btnh", normal(2, (4, 5, 16)), adapter.weight(normal(1, (16, 8, 10))))
    close(got, want, 1e-5, "value")


OUT = {AxisType.Auto: None, AxisType.Explicit: P("fsdp", None, "tp", None)}


def test_adapt_of_adapt_adds_both():
    old, new = LORA, {"w": make_adapter((8, 6), IO, rank=3, alpha=1.0, seed=7)}
    x = normal(1, (3, 8))
    got = strict(strict(DENSE.fn))(PARAMS, new, old, x)
    close(got, DENSE.fn(lx.merge(lx.merge(PARAMS, old), new), x), 1e-5, "sum of both")


def test_adapt_of_adapt_under_jit_and_around_a_scan():
    """The inner adapters ride on a weight that is scanned, used twice and carried; gradients of both."""

    def fn(p, x):
        def body(carry, w):
            x, kept = carry
            return (jnp.tanh(jax.jit(jnp.matmul)(x, w)) @ w.T @ kept, kept), None

        return lax.scan(jax.checkpoint(body), (x, p["kept"]), p["layers"])[0][0]

    params = {"kept": SQUARE, "layers": normal(4, (3, 8, 8), 0.3)}
    old = {"kept": SQUARE_LORA, "layers": make_adapter((3, 8, 8), SIO)}
    new = {"layers": make_adapter((3, 8, 8), SIO, rank=3, alpha=1.0, seed=7)}

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda new, old: jnp.sum(jnp.sin(run(new, old))), (0, 1)))(new, old)

    x = normal(1, (2, 8))
    got = loss(lambda new, old: strict(strict(fn))(params, new, old, x))
    want = loss(lambda new, old: fn(lx.merge(lx.merge(params, old), new), x))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other, 1e-4, "value and gradients by both")


def nested_step(w, c):
    def loop(c):
        return lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ w), c)

    return lax.cond(c[0, 0] > 0, loop, jax.checkpoint(lambda c: c @ w.T), c)


LOOPS = {
    "invariant carry": lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[0],
    "scan carry": lambda p, x: lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), length=3)[0][0],
    "reverse": lambda p, x: lax.scan(
        lambda c, s: (jnp.tanh(c @ p["w"]) * s, c), x, jnp.arange(1.0, 4.0), reverse=True)[1],
    "unroll": lambda p, x: lax.scan(
        lambda c, s: (c @ p["w"] * s, c), x, jnp.arange(1.0, 6.0), unroll=2)[0],
    "nested": lambda p, x: lax.scan(
        lambda c, _: (nested_step(p["w"], c), None), x, length=3)[0],
    "switch": lambda p, x: lax.switch(
        jnp.int32(1), [lambda w: x, lambda w: x @ w, lambda w: x @ w.T], p["w"]),
    "checkpoint policy": lambda p, x: jax.checkpoint(
        lambda x: jnp.tanh(x @ p["w"]) @ p["w"], policy=jax.checkpoint_policies.dots_saveable)(x),
    "named policy": lambda p, x: jax.checkpoint(
        lambda x: checkpoint_name(x @ p["w"], "y") @ p["w"],
        policy=jax.checkpoint_policies.save_only_these_names("y"))(x),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_control_flow_holds_factors(name):
    got, want = square(LOOPS[name], normal(1, (3, 8)))
    close(got, want, 1e-5, name)
    if name != "invariant carry":
        x = normal(1, (3, 8))
        loss = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(strict(LOOPS[name])({"w": SQUARE}, {"w": a}, x)))))
        plain = jax.grad(lambda a: jnp.sum(jnp.sin(LOOPS[name]({"w": a.weight(SQUARE)}, x))))(SQUARE_LORA)
        close(loss(SQUARE_LORA).b, plain.b, 1e-4, f"gradient in {name}")


def test_a_weight_that_a_loop_changes_is_built_before_it():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, c: (c[0] @ c[1], c[1] * 0.5), (x, p["w"]))

    got = lx.adapt(fn, fallback="allow")({"w": SQUARE}, {"w": SQUARE_LORA}, normal(1, (3, 8)))
    for one, other in zip(got, fn({"w": SQUARE_LORA.weight(SQUARE)}, normal(1, (3, 8))), strict=True):
        close(one, other, 1e-5, "carried")


def test_static_arguments_keys_and_keywords():
    def fn(x, p, act, key, train=False, *, scale):
        y = {"tanh": jnp.tanh, "none": lambda y: y}[act](x @ p["w"]) * scale
        return y + jax.random.normal(key, y.shape) if train else y

    x, key = normal(1, (3, 8)), jax.random.key(3)
    for act, train in (("tanh", True), ("tanh", False), ("none", True)):
        got = strict(fn, argnum=1)(x, PARAMS, LORA, act, key, train, scale=2.0)
        close(got, fn(x, MERGED, act, key, train, scale=2.0), 1e-5, act)


def test_functions_that_close_over_tracers():
    x = normal(1, (3, 8))

    def loss(fn, *trees):
        return jax.jit(jax.grad(lambda s: jnp.sum(fn(s)(*trees, x))))(2.0)

    def scaled(s):
        return lambda p, x: jnp.sin(x * s) @ p["w"]

    close(
        loss(lambda s: strict(scaled(s)), PARAMS, LORA),
        loss(scaled, MERGED),
        1e-4,
        "gradient by a closed-over tracer",
    )


def test_another_adapter_does_not_retrace():
    traces = []
    step = jax.jit(lambda lora, x: (traces.append(1), strict(DENSE.fn)(PARAMS, lora, x))[1])
    for seed in range(3):
        step({"w": make_adapter((8, 6), IO, seed=seed)}, normal(1, (3, 8)))
    assert len(traces) == 1


def test_effects_are_kept_and_dead_equations_are_not():
    seen = []

    def fn(p, x):
        jnp.sin(p["w"])  # dead: would need the whole weight
        jax.debug.callback(lambda y: seen.append(float(y)), x.sum())
        return x @ p["w"]

    strict(fn)(PARAMS, LORA, jnp.ones((1, 8)))
    jax.effects_barrier()
    assert seen == [8.0]


def test_axes_that_vmap_writes_as_numpy_integers():
    """Rolled by a batched number, the copies of a DoRA weight have such axes, also in its column."""
    p = {"w": normal(0, (2, 1, 1, 4))}
    _, lora = lx.split(p, rank=1, method="dora", targets="*", layout={"w": lx.Layout((1,), (3, 2), (0,))})
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def fn(p, x, k):
        copies = jnp.roll(jnp.broadcast_to(p["w"], (3, 2, 1, 1, 4)), k, 1)
        return jax.grad(lambda x: jnp.tanh(jnp.tensordot(x, copies, 1)).sum())(x)

    def mapped(fn, p):
        return jax.vmap(lambda x, k: fn(p, x, k))(normal(1, (2, 3, 3)), jnp.array([1, 2]))

    got = mapped(lambda p, x, k: lx.adapt(fn, fallback="allow")(p, lora, x, k), p)
    close(got, mapped(fn, lx.merge(p, lora)), 1e-5, "rolled copies")
