"""Behaviors that users of other LoRA libraries rely on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rule_cases import HWIO, IO, NHWC, OI, SIO, make_adapter, normal

import lorax_fn as lx

L = lx.Layout
FUNCTIONS = {  # function, shapes of w and x, layout, tolerance
    "right": (lambda p, x: x @ p["w"], (11, 7), (10, 11), IO, 1e-4),
    "einsum": (lambda p, x: jnp.einsum("ij,jk->ik", x, p["w"]), (10, 7), (19, 10), IO, 1e-4),
    "transpose": (jax.jit(lambda p, x: x.T @ p["w"].T), (7, 11), (11, 10), OI, 1e-6),
    "remat": (jax.jit(jax.checkpoint(lambda p, x: p["w"] @ x + 1)), (11, 7), (7, 10), OI, 1e-4),
    "half": (lambda p, x: x.astype(jnp.float16) @ p["w"].astype(jnp.float16), (11, 7), (10, 11), IO, 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_4_products_of_lorax(name):
    """Right product, einsum, transposes under jit, remat, float16; nothing is built."""
    fn, w, x, layout, tolerance = FUNCTIONS[name]
    w, x, adapter = normal(1, w, 0.3), normal(2, x, 0.3), make_adapter(w, layout, rank=3)
    got = lx.adapt(fn, fallback="error")({"w": w}, {"w": adapter}, x)
    want = fn({"w": adapter.weight(w)}, x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=tolerance, atol=tolerance)


EINSUMS = ["BTD,DNH->BTNH", " BTD , DNH -> BTNH ", "bjir,bnmjr->bimn", "...ij,jk->...ik", "bijk,...jk->bi..."]


@pytest.mark.parametrize("spec", EINSUMS)
def test_12_26_any_valid_einsum_needs_no_factorized_string(spec):
    """White space, any letter (r, D), an ellipsis on either side; `usage` reads it."""
    sizes = dict(zip("BTDNHbjirnmk", (2, 3, 4, 5, 2, 2, 3, 2, 4, 3, 2, 4), strict=True))
    x, w = (part.strip() for part in spec.split("->")[0].split(","))
    shapes = [(*((5,) if "..." in part else ()), *(sizes[c] for c in part if c.isalpha())) for part in (x, w)]

    def fn(p, x):
        return jnp.einsum(spec, x, p["w"])

    params, x = {"w": normal(1, shapes[1])}, normal(2, shapes[0])
    use = lx.usage(fn, params, x)
    assert use["w"].served
    lora = {"w": make_adapter(shapes[1], use["w"].layout)}
    got = lx.adapt(fn, fallback="error")(params, lora, x)
    np.testing.assert_allclose(got, fn(lx.merge(params, lora), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["ij,jk->kl", "ij,jk->ik->ki", "ij->ij", "ij,jkl->ik", "ij,jk,kl->il"])
def test_12_26_an_invalid_einsum_raises_what_jax_raises(spec):
    """Not swallowed, not changed: the message is that of the plain function."""
    params, lora, x = {"w": normal(1, (3, 4))}, {"w": make_adapter((3, 4), IO)}, normal(2, (2, 3))

    def fn(p, x):
        return jnp.einsum(spec, x, p["w"])

    with pytest.raises((ValueError, TypeError)) as plain:
        fn(params, x)
    for run in (lambda: lx.adapt(fn)(params, lora, x), lambda: lx.usage(fn, params, x)):
        with pytest.raises(plain.type) as raised:
            run()
        assert str(raised.value).splitlines()[0] == str(plain.value).splitlines()[0]


def test_26_three_operands_are_products_of_two():
    """Gemma refuses three operands; here JAX makes them two products, the weight in one."""

    def fn(p, x):
        return jnp.einsum("bi,ij,bj->b", x, p["w"], 2 * x[:, :1] + jnp.ones((2, 4)))

    params, lora, x = {"w": normal(1, (3, 4))}, {"w": make_adapter((3, 4), IO)}, normal(2, (2, 3))
    got = lx.adapt(fn, fallback="error")(params, lora, x)
    np.testing.assert_allclose(got, fn(lx.merge(params, lora), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_18_sharded_convolution(kind):
    """3x3, 16 to 32, rank 3; A (3, 3, 16, 3) sharded over 'in', B (3, 32) over 'out'."""
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(kind,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def fn(p, x):  # explicit axes ask for the result's sharding
        out = P(None, None, None, "out") if kind is AxisType.Explicit else None
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC, out_sharding=out)

    w, x = normal(1, (3, 3, 16, 32)), normal(2, (1, 5, 5, 16))
    adapter = make_adapter(w.shape, HWIO, rank=3)
    assert adapter.a.shape == (3, 3, 16, 3) and adapter.b.shape == (3, 32)
    sharded = lx.LoRA(
        put(adapter.a, None, None, "in", None), put(adapter.b, None, "out"), 4.0, 3, "lora", HWIO
    )
    with jax.set_mesh(mesh):
        base = {"w": put(w, None, None, "in", "out")}
        run = lx.adapt(fn, fallback="error")
        got, pull = jax.vjp(jax.jit(lambda lora: run(base, lora, put(x))), {"w": sharded})
        assert got.sharding.is_equivalent_to(jax.jit(fn)(base, put(x)).sharding, 4)
        (grad,) = pull(got)
        want, pull = jax.vjp(lambda lora: fn(lx.merge({"w": put(w)}, lora), put(x)), {"w": adapter})
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grad["w"].a, pull(want)[0]["w"].a, rtol=1e-3, atol=0.05)


def test_20_a_pattern_without_a_match_raises_and_a_plain_function_will_do():
    """Qwix and MaxText go on in silence."""
    params = {"encoder": {"kernel": normal(1, (3, 4))}}
    with pytest.raises(
        lx.LoraError, match=r"(?s)matches nothing.*decoder.*encoder/kernel|decoder.*encoder/kernel"
    ):
        lx.split(params, rank=2, targets="decoder")
    _, lora = lx.split(params, rank=2, targets="encoder")
    run = lx.adapt(lambda p, x: x @ p["encoder"]["kernel"], fallback="error")
    assert run(params, lora, jnp.ones((2, 3))).shape == (2, 4)


def test_27_merge_of_split_is_the_tree_that_came_in():
    """Every bit at the start, in every order, with empty branches and ones without weights."""
    params = {
        "b": {"kernel": normal(1, (3, 4)), "empty": {}, "none": None},
        "a": {"inner": {"kernel": normal(2, (4, 3)), "bias": normal(3, (3,))}, "ids": np.arange(3)},
        "empty": {"deep": {}},
    }
    kept, lora = lx.split(params, rank=2)
    turned = dict(reversed(lora.items()))
    for merged in (lx.merge(kept, lora), lx.merge(dict(reversed(kept.items())), turned), lx.merge(kept, {})):
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        assert merged["empty"] == {"deep": {}} and merged["b"]["empty"] == {} and merged["b"]["none"] is None
        assert all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(params)))
        assert merged["a"]["ids"] is params["a"]["ids"]
    moved = lora | {"b/kernel": make_adapter((3, 4), IO)}
    one, other = lx.merge(kept, moved), lx.merge(kept, dict(reversed(moved.items())))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    assert not np.array_equal(one["b"]["kernel"], params["b"]["kernel"])


FUSED = {  # shape, layout, and delta on W's own axes
    "dense": ((8, 6), IO, "nr,rm->nm"),
    "q": ((4, 8, 5), L((), (1,), (0, 2)), "dr,rnh->ndh"),
    "kv": ((2, 3, 8, 5), L((0,), (2,), (1, 3)), "cdr,crkh->ckdh"),
    "o": ((4, 5, 8), L((), (0, 1), (2,)), "nhr,rd->nhd"),
    "gating": ((2, 12, 8), L((0,), (2,), (1,)), "cdr,crh->chd"),
    "square": ((8, 8, 8), L((), (2,), (0, 1)), "dr,rnh->nhd"),
}


@pytest.mark.parametrize("name", FUSED)
def test_29_merge_adds_the_product_on_the_recorded_axes(name):
    """Base + delta exactly, also where axes are equal and shapes alone could not tell."""
    shape, layout, spec = FUSED[name]
    w, adapter = normal(1, shape), make_adapter(shape, layout)
    merged = lx.merge({"w": w, "v": w}, {"w": adapter})
    change = adapter.scale * jnp.einsum(spec, adapter.a, adapter.b, precision="highest")
    np.testing.assert_allclose(merged["w"], w + change, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lx.delta({"w": adapter})["w"], change, rtol=1e-6, atol=1e-6)
    assert merged["v"] is w
    with pytest.raises(lx.LoraError, match="elsewhere"):
        lx.merge({"w": w}, {"w": adapter, "elsewhere": adapter})


def transformer(layers):
    block = {name: {"w": normal(1, (4, 4))} for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")}
    return {f"layer_{i}": {"attn": block, "mlp": {"linear": {"w": normal(2, (4, 4))}}} for i in range(layers)}


TARGETING = {  # targets, and how many of the 12 * 4 weights they name
    "everything": (None, 48),
    "a name": ("q_einsum", 12),
    "a bare name is one pattern": ("attn", 36),
    "the scope above": ("mlp", 12),
    "a full path": (re.compile(r"layer_3/attn/q_einsum/w"), 1),
    "alternation": (re.compile(r".*/(q|kv)_einsum/w"), 24),
    "a range of layers": (["layer_[01]"], 8),
    "a range as a regex": (re.compile(r"layer_[01]/.*"), 8),
}


@pytest.mark.parametrize("name", TARGETING)
def test_30_targeting(name):
    """Layer_[01] is not layer_10; one string is one pattern, never its letters."""
    targets, count = TARGETING[name]
    _, lora = lx.split(transformer(12), rank=2, targets=targets)
    assert len(lora) == count
    assert "range" not in name or {path.split("/")[0] for path in lora} == {"layer_0", "layer_1"}
    with pytest.raises(lx.LoraError, match="q_einsu"):
        lx.split(transformer(2), rank=2, targets="q_einsu")


def test_32_the_base_may_be_swapped_under_an_adapter():
    """X@W + x@A@B, whichever W; with B = 0 it is that base's own output."""
    x, adapter = normal(1, (2, 3)), make_adapter((3, 4), IO)
    run = lx.adapt(lambda p, x: x @ p["w"], fallback="error")
    for seed in (2, 3):
        w = normal(seed, (3, 4))
        np.testing.assert_allclose(
            run({"w": w}, {"w": adapter}, x), x @ w + adapter.scale * (x @ adapter.a) @ adapter.b, rtol=1e-5
        )
        _, start = lx.split({"w": w}, rank=2)
        assert np.array_equal(run({"w": w}, start, x), x @ w)


@pytest.mark.parametrize("left", [True, False], ids=["weight left", "weight right"])
@pytest.mark.parametrize("contract", [0, 1])
@pytest.mark.parametrize("x_contract, x_ndim", [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
def test_5_dot_general_grid(left, contract, x_contract, x_ndim):
    """Every side and contracted axis of the weight and the input."""
    w, adapter = normal(1, (11, 11), 0.3), make_adapter((11, 11), IO, rank=7)
    x = jnp.moveaxis(normal(2, (11, 23, 29)[:x_ndim]), 0, x_contract)
    dims = ((contract,), (x_contract,)) if left else ((x_contract,), (contract,))

    def fn(p, x):
        return lax.dot_general(*((p["w"], x) if left else (x, p["w"])), (dims, ((), ())))

    got, want = lx.adapt(fn, fallback="error")({"w": w}, {"w": adapter}, x), fn({"w": adapter.weight(w)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


PRODUCTS = [
    # 3: x (5, 7, 11), W (11, 13), r 2.  6: 1-D convolution.  7: embedding.  48, 49: quax and openpi products.
    ("3", "btn,nm->btm", (5, 7, 11), (11, 13), lx.Layout((), (0,), (1,)), 2),
    ("12", "BTD,DNH->BTNH", (16, 4, 12), (12, 10, 8), lx.Layout((), (0,), (1, 2)), 3),
    ("12 26", "bjir,bnmjr->bimn", (2, 3, 5, 4), (2, 6, 7, 3, 4), lx.Layout((0,), (3, 4), (1, 2)), 3),
    ("14", "btd,dnh->btnh", (2, 4, 12), (12, 8, 10), lx.Layout((), (0,), (1, 2)), 3),
    ("16", "bti,bio->bto", (2, 4, 8), (2, 8, 16), SIO, 3),
    ("16 several outputs", "bti,bioq->btoq", (2, 4, 8), (2, 8, 4, 4), lx.Layout((0,), (1,), (2, 3)), 3),
    ("26", "...ij,jk->...ik", (5, 2, 3), (3, 4), IO, 2),
    ("26 29", "bijk,bnmjk->bimn", (1, 5, 3, 4), (1, 6, 3, 3, 4), lx.Layout((0,), (3, 4), (1, 2)), 7),
    ("49", "BSD,3KDH->3BSKH".replace("3", "c"), (8, 64, 32), (3, 8, 32, 4), lx.Layout((0, 1), (2,), (3,)), 2),
]  # fmt: skip


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("number, spec, x, w, layout, rank", PRODUCTS, ids=[a[0] for a in PRODUCTS])
def test_products_of_other_libraries(number, spec, x, w, layout, rank, scaling):
    """Peers' einsums, B = 0 first, and rsLoRA's scale on every one."""
    w = normal(1, w)
    params, zero = lx.split({"w": w}, rank=rank, scaling=scaling, layout={"w": layout})

    def fn(p, x):
        return jnp.einsum(spec, x, p["w"])

    x = normal(2, x)
    run = lx.adapt(fn, fallback="error")
    np.testing.assert_allclose(run(params, zero, x), fn(params, x), rtol=1e-6, atol=1e-5)
    moved = {"w": dataclasses.replace(zero["w"], b=10 * normal(3, zero["w"].b.shape))}
    want = fn(lx.merge(params, moved), x)
    np.testing.assert_allclose(run(params, moved, x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert zero["w"].scale == pytest.approx(32 / rank if scaling == "lora" else 32 / rank**0.5)


OPENPI = {
    "D and H": (L((0, 1), (2,), (3,)), (3, 8, 32, 2), (3, 8, 2, 4)),
    "K and D": (L((0, 3), (1,), (2,)), (3, 4, 8, 2), (3, 4, 2, 32)),
}


@pytest.mark.parametrize("layout, a, b", OPENPI.values(), ids=OPENPI)
def test_49_openpi_einsum_on_either_pair_of_axes(layout, a, b):
    """BSD,3KDH->3BSKH with the factors over (D, H) or over (K, D)."""
    w, adapter = normal(1, (3, 8, 32, 4), 0.1), make_adapter((3, 8, 32, 4), layout)
    assert adapter.a.shape == a and adapter.b.shape == b

    def fn(p, x):
        return jnp.einsum("BSD,cKDH->cBSKH", x, p["w"])

    x = normal(2, (2, 4, 32))
    got = lx.adapt(fn, fallback="error")({"w": w}, {"w": adapter}, x)
    np.testing.assert_allclose(got, fn({"w": adapter.weight(w)}, x), rtol=1e-4, atol=1e-4)
