"""Quantized bases in the transform: the oracle is the same program on the dequantized tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rule_cases import RULE_CASES, normal

import lorax_fn as lx

# What changes the numbers of a weight, or lays unlike ones side by side, needs it unpacked, and is reported.
BUILT = {
    "stack",
    "sum over inputs",
    "sum over outputs",
    "sum over a stack",
    "stack merged with inputs",
    "stack merged with outputs",
    "added to an array",
    "two of them added",
    "rows overwritten",
    "written into rows",
    "inputs masked",
    "outputs masked",
    "a mask picks of two",
    "layers masked",
    "a number picks of two",
    "a number picks per example",
    "branches return it",
    "a branch returns an array",
    "branches return layers",
}
CASES = [c for c in RULE_CASES if c.layout.inputs and c.layout.outputs]
OPTIONS = {"int8": {"block": 2, "double": False}, "nf4": {"block": 4, "double": True}}
CHUNKS = 3


def quantized(case, format):
    return lx.quantize({"w": case.weight}, format, layout={"w": case.layout}, targets="w", **OPTIONS[format])


def cotangent(y):
    return normal(5, y.shape).astype(y.dtype)


def outcome(cases, params, adapters):
    """Values of all cases, and gradients by the adapters and by x, in one program."""

    def loss(adapters, xs):
        ys = {}
        for c in cases:
            lora = {"w": adapters[c.name]} if adapters else {}
            run = lx.adapt(c.fn, fallback="allow" if c.name in BUILT else "error")
            ys[c.name] = run(params[c.name], lora, xs[c.name])
        return sum(jnp.sum((y * cotangent(y)).astype(jnp.float32)) for y in ys.values()), ys

    grad = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)
    (_, ys), by = jax.jit(grad)(adapters, {c.name: c.input for c in cases})
    return ys, by


def compare(cases, format, adapters):
    stored = {c.name: quantized(c, format) for c in cases}
    got = outcome(cases, stored, adapters)
    want = outcome(cases, lx.dequantize(stored), adapters)
    for (path, one), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, want)), strict=True):
        if one.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("chunk", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_every_rule_on_a_quantized_weight(chunk):
    cases = CASES[chunk::3]
    compare(cases, "int8", {c.name: c.adapter for c in cases})


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(3))
@pytest.mark.parametrize("adapted", [True, False])
def test_every_rule_on_a_weight_of_four_bits(chunk, adapted):
    cases = CASES[chunk::3]
    compare(cases, "nf4", {c.name: c.adapter for c in cases} if adapted else {})


# Memory: layers D x D, B tokens. What a gradient keeps is counted in weights of D * D float32.

D, B, LAYERS = 512, 64, 6
UNROLLED_HOLDS = tuple(map(int, jax.__version__.split(".")[:3])) >= (0, 11, 1)


def stack_of_layers(scan, checkpoint):
    def layer(x, w):
        return x + jnp.tanh(x @ w)

    layer = jax.checkpoint(layer) if checkpoint else layer

    def model(params, x):
        if scan:
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]
        for i in range(LAYERS):
            x = layer(x, params[f"w{i}"])
        return x

    shape = (LAYERS, D, D) if scan else (D, D)
    names = ["w"] if scan else [f"w{i}" for i in range(LAYERS)]
    return model, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}


def temp(model, params, lora):
    run = lx.adapt(model, fallback="error")

    def grad(lora, params, x):
        return jax.grad(lambda lora: jnp.sum(run(params, lora, x) ** 2))(lora)

    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    compiled = jax.jit(grad).lower(lora, params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * D * D)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_no_unpacked_weight_is_kept_for_the_gradient(scan, checkpoint, format):
    """Scanned: 3 % over the float base's, and one weight. Unrolled, from JAX 0.11.1 on: 1.5 weights more.

    The CPU compiler of JAX up to 0.11.0 drops the barriers of an unrolled program: it keeps every layer's
    weight, 7 to 12 weights in all where the float base keeps 1.6.
    """
    model, params = stack_of_layers(scan, checkpoint)
    layout = lx.usage(model, params, jax.ShapeDtypeStruct((B, D), jnp.float32))
    _, lora = lx.split(params, rank=8, layout=layout)
    base = temp(model, params, lora)
    got = temp(model, lx.quantize(params, format, layout=layout), lora)
    print(f"float {base:.2f}, {format} {got:.2f} weights")
    if scan:
        assert got <= 1.03 * base + 1
    elif UNROLLED_HOLDS:
        assert got <= base + 1.5
    else:
        assert got > base + 1.5  # if this fails, the limit above holds here too


def test_bfloat16_and_derivatives_of_derivatives():
    params = {"w": normal(1, (8, 6), 0.3).astype(jnp.bfloat16)}
    params, lora = lx.split(lx.quantize(params, "int8", layout=IO_LAYOUT), rank=2, layout=IO_LAYOUT)
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def loss(apply, params):
        return lambda lora, x: jnp.sum(jnp.sin(apply(params, lora, x)))

    def fn(params, x):
        return jnp.tanh(x @ params["w"]) ** 2

    x = normal(2, (3, 8)).astype(jnp.bfloat16)
    run = lx.adapt(fn, fallback="error")
    assert run(params, lora, x).dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), lx.dequantize(params))
    stored = lx.quantize(wide, "int8", layout=IO_LAYOUT)  # the same values: codes of codes
    x = x.astype(jnp.float32)
    got = jax.hessian(loss(run, stored), 1)(lora, x)
    want = jax.hessian(loss(run, lx.dequantize(stored)), 1)(lora, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got = jax.jvp(lambda x: run(stored, lora, x), (x,), (x,))
    want = jax.jvp(lambda x: run(lx.dequantize(stored), lora, x), (x,), (x,))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


IO_LAYOUT = {"w": lx.Layout((), (0,), (1,))}
WEIGHT = {"w": normal(1, (8, 6), 0.3)}


def test_usage_reads_a_quantized_tree_as_its_float_one():
    x = normal(2, (3, 8))
    stored = lx.quantize(WEIGHT, layout=IO_LAYOUT)
    use, plain = (lx.usage(lambda p, x: x @ p["w"], p, x)["w"] for p in (stored, WEIGHT))
    assert use == plain and use.served


def test_a_use_that_is_no_product_is_reported():
    stored = lx.quantize(WEIGHT, layout=IO_LAYOUT)
    with pytest.raises(lx.LoraError, match="unpacked in full.*\n.*path: +w"):
        lx.adapt(lambda p: jnp.sin(p["w"]), fallback="error")(stored, {})
    got = lx.adapt(lambda p: jnp.sin(p["w"]), fallback="allow")(stored, {})
    np.testing.assert_allclose(got, jnp.sin(lx.dequantize(stored)["w"]), rtol=1e-6)


MESH_W = lx.Layout((), (0,), (1, 2))


@pytest.mark.parametrize("shape, layout, scales", [
    ((4, 2), lx.Layout((), (0,), (1,)), (1, 2)),
    ((4, 2, 3), lx.Layout((), (0, 1), (2,)), (1, 2, 3)),
], ids=["dense", "einsum"])  # fmt: skip
def test_31_int4_kernels(shape, layout, scales):
    """Dense (4, 2), scales (1, 2). Einsum (4, 2, 3): blocks along one input axis, not both."""
    w = normal(1, shape)
    q = lx.quantize({"w": w}, "int4", block=4, double=False, targets="w", layout={"w": layout})["w"]
    assert q.scales.shape == scales
    top = np.abs(np.asarray(w)).max(0, keepdims=True)
    np.testing.assert_allclose(q.scales, top / 7, rtol=1e-6)
    assert (np.abs(q.dense() - w) <= top / 14 * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind, format", [
    (AxisType.Auto, "nf4"), (AxisType.Explicit, "nf4"), (AxisType.Explicit, "int4"),
], ids=["auto", "explicit", "explicit int4"])  # fmt: skip
def test_15_a_sharded_quantized_base_gives_the_plain_models_sharding(kind, format):
    """W (16, 8, 10) over ('fsdp', 'tp', None); codes and scales as the weight."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    w, x = normal(1, (16, 8, 10)), normal(2, (4, 5, 16))
    params, lora = lx.split(
        lx.quantize({"w": w}, format, block=4, double=False, layout={"w": MESH_W}), 3, layout={"w": MESH_W}
    )
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def put(tree, *spec):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))), tree)

    def fn(p, x):
        out = P("fsdp", None, "tp", None) if kind is AxisType.Explicit else None
        return jnp.einsum("btd,dnh->btnh", x, p["w"], out_sharding=out)

    def loss(params, lora, x):
        return jnp.sum(jnp.sin(lx.adapt(fn, fallback="error")(params, lora, x)))

    want, want_grad = oracle(params, lora, x)
    with jax.set_mesh(mesh):
        sharded = put(params, "fsdp", "tp", None)
        assert sharded["w"].codes.shape == (8, 8, 10) and sharded["w"].scales.shape == (4, 8, 10)
        adapter = dataclasses.replace(
            lora["w"], a=put(lora["w"].a, "fsdp", None), b=put(lora["w"].b, None, "tp", None)
        )
        x = put(x, "fsdp", None, None)
        got, grad = jax.jit(jax.value_and_grad(loss, 1))(sharded, {"w": adapter}, x)
        y = jax.jit(lx.adapt(fn))(sharded, {"w": adapter}, x)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", None, "tp", None)), 4)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(grad["w"].a, want_grad["w"].a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad["w"].b, want_grad["w"].b, rtol=1e-4, atol=1e-5)


def oracle(params, lora, x):
    def loss(lora):
        w = lx.merge(lx.dequantize(params), lora)["w"]
        return jnp.sum(jnp.sin(jnp.einsum("btd,dnh->btnh", x, w)))

    return jax.value_and_grad(loss)(lora)


@pytest.mark.parametrize("spec", [("b", None), (None, "b"), ("b", "a")], ids=str)
def test_shard_map_shards_codes_as_the_weight(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = spec

    def fn(p, x):
        def inner(w, x):
            y = x @ w
            return jax.lax.psum(y, rows) if rows else y

        specs = (P(rows, columns), P(None, rows))
        return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P(None, columns))(p["w"], x)

    layout = {"w": lx.Layout((), (0,), (1,))}
    params = lx.quantize({"w": normal(1, (16, 8))}, "nf4", block=4, layout=layout)
    _, lora = lx.split(params, 2, layout=layout)
    lora, x = jax.tree.map(lambda x: x + 0.1, lora), normal(2, (4, 16))
    run = lx.adapt(fn, fallback="error")

    def loss(params, lora):
        return jnp.sum(jnp.sin(run(params, lora, x)))

    got = jax.jit(jax.value_and_grad(loss, 1))(params, lora)
    want = jax.value_and_grad(lambda lora: jnp.sum(jnp.sin(x @ lx.merge(lx.dequantize(params), lora)["w"])))(
        lora
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_scaled_copies_that_vmap_writes_are_scanned():
    """``W [1, n, m] * s [L, 1, 1]``: one stored entry, broadcast along the loop."""
    q = lx.quantize({"w": normal(0, (4, 4))}, "nf4", block=4, double=False, targets="*")
    _, lora = lx.split({"w": normal(0, (4, 4))}, rank=2, targets="*")
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    scales, x = jnp.float32([1.0, -2.0]), normal(1, (3, 4))

    def fn(p, x):
        copies = jax.vmap(lambda s: p["w"] * s)(scales)
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, copies)[0]

    want = fn(lx.merge(lx.dequantize(q), lora), x)
    np.testing.assert_allclose(lx.adapt(fn, fallback="allow")(q, lora, x), want, rtol=1e-5, atol=1e-6)
