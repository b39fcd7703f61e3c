"""Inits by their own laws: what they take from W, what their factors are, and the way back to plain LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

import lorax_fn as lx
from lorax_fn.inits.plain import drawn
from lorax_fn.inits.table import find_init

STACKED = lx.Layout((1,), (0,), (3, 2))  # stack in the middle, two output axes turned round
RESIDUAL = ["pissa", "pissa:4", "olora"]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def matrices(x):
    """A STACKED weight as [s, n, m]."""
    x = np.asarray(x, np.float64)
    return x.transpose(1, 0, 3, 2).reshape(x.shape[1], x.shape[0], -1)


def split(w, init, rank=4, **options):
    layout = {"w": STACKED} if w.ndim == 4 else {"w": lx.Layout((), (0,), (1,))}
    params, lora = lx.split({"w": w}, rank, alpha=6.0, init=init, layout=layout, **options)
    return params["w"], lora["w"]


def entry(adapter, i):
    a, b = np.asarray(adapter.a, np.float64)[i], np.asarray(adapter.b, np.float64)[i]
    return a, b.reshape(b.shape[0], -1)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa"])
@pytest.mark.parametrize("init", ["orthogonal", *RESIDUAL])
def test_step_zero_is_the_base_model(init, method, scaling):
    """To 1e-5 of the largest weight, on a stacked weight of four axes."""
    w = normal(0, 7, 2, 3, 4)
    frozen, adapter = split(w, init, method=method, scaling=scaling)
    assert (frozen is w) == (init == "orthogonal")
    assert frozen.dtype == w.dtype and frozen.shape == w.shape and adapter.shape == w.shape
    np.testing.assert_allclose(adapter.weight(frozen), w, atol=1e-5 * np.abs(w).max())
    if method == "dora":  # the magnitude is that of the original W, not of what remains of it
        np.testing.assert_allclose(adapter.magnitude, np.linalg.norm(w, axis=0).transpose(0, 2, 1), rtol=1e-6)
    assert np.abs(adapter.a).max() > 0.01 and np.abs(adapter.b).max() > 0.01


@pytest.mark.parametrize("init", ["pissa", "pissa:4"])
def test_pissa_takes_the_largest_singular_values(init):
    w = normal(1, 7, 2, 3, 4)
    frozen, adapter = split(w, init)
    for i, (before, after) in enumerate(zip(matrices(w), matrices(frozen), strict=True)):
        values = np.linalg.svd(before, compute_uv=False)
        assert np.linalg.norm(after, 2) == pytest.approx(values[4], rel=1e-4)
        a, b = entry(adapter, i)
        np.testing.assert_allclose(np.square(a).sum(0), values[:4] / adapter.scale, rtol=1e-4)
        np.testing.assert_allclose(np.square(b).sum(1), values[:4] / adapter.scale, rtol=1e-4)


def test_randomized_pissa_of_a_large_weight_nears_the_exact_one():
    """200 x 150 with values 1 / k: after four iterations the residual norm is sigma_9 to one percent."""
    u, v = np.linalg.qr(normal(2, 200, 150))[0], np.linalg.qr(normal(3, 150, 150))[0]
    w = jnp.asarray((u / np.arange(1, 151)) @ v.T, jnp.float32)
    exact = float(jnp.linalg.norm(split(w, "pissa", 8)[0], 2))
    assert exact == pytest.approx(1 / 9, rel=1e-4)
    assert float(jnp.linalg.norm(split(w, "pissa:4", 8)[0], 2)) == pytest.approx(exact, rel=0.01)
    assert float(jnp.linalg.norm(split(w, "pissa:0", 8)[0], 2)) > 1.01 * exact


def test_olora_has_orthonormal_rows_in_b():
    frozen, adapter = split(normal(4, 7, 2, 3, 4), "olora")
    for i in range(2):
        a, b = entry(adapter, i)
        np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-6)
        # (out, in) of the paper: W = Q R, and A^T is the top of R, so upper triangular
        np.testing.assert_allclose(np.tril(a.T, -1), 0.0, atol=1e-6)
    assert np.abs(frozen).max() > 0.1


def test_orthogonal_factors_cancel():
    _, adapter = split(normal(5, 7, 2, 3, 4), "orthogonal")
    for i in range(2):
        a, b = entry(adapter, i)
        assert np.abs(a @ b).max() < 1e-6 and np.linalg.matrix_rank(a, 1e-5) == 2
    assert not np.array_equal(adapter.a[0], adapter.a[1])


@pytest.mark.parametrize("init", ["orthogonal", *RESIDUAL])
def test_ranks_that_differ_along_a_stack_keep_their_pads_at_zero(init):
    w = normal(6, 7, 2, 3, 4)
    frozen, adapter = split(w, init, rank=(4, 2))
    assert not np.asarray(adapter.a)[1, ..., 2:].any() and not np.asarray(adapter.b)[1, 2:].any()
    np.testing.assert_allclose(adapter.weight(frozen), w, atol=1e-5)
    if init == "pissa":
        values = np.linalg.svd(matrices(w)[1], compute_uv=False)
        assert np.linalg.norm(matrices(frozen)[1], 2) == pytest.approx(values[2], rel=1e-4)
    frozen, adapter = split(w, init, rank=(0, 2))
    np.testing.assert_array_equal(frozen[:, 0], w[:, 0])
    assert not np.asarray(adapter.a)[0].any() and np.isfinite(adapter.a).all()


@pytest.mark.parametrize("init", ["orthogonal", *RESIDUAL])
def test_abstract_and_traced_splits_have_the_same_structure(init):
    shape = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16)
    frozen, abstract = split(shape, init)
    assert frozen is shape
    _, eager = split(normal(7, 8, 6, dtype=jnp.bfloat16), init)
    _, traced = jax.eval_shape(lambda w: split(w, init), shape)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager) == jax.tree.structure(traced)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(eager)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(abstract)
    ]


def test_residuals_of_bfloat16_weights_and_factors_hold_what_rounding_took():
    w = normal(8, 16, 12, dtype=jnp.bfloat16)
    frozen, adapter = split(w, "pissa", dtype=jnp.bfloat16)
    assert frozen.dtype == adapter.a.dtype == jnp.bfloat16
    got, want = np.asarray(adapter.weight(frozen), np.float32), np.asarray(w, np.float32)
    np.testing.assert_allclose(got, want, atol=2.0**-7 * np.abs(want).max())


def test_refusals_name_the_path_at_split():
    params = {"q": {"kernel": jnp.ones((8, 6))}, "k": {"kernel": jnp.ones((8, 6))}}
    with pytest.raises(lx.LoraError, match=r"(?s)path: +q/kernel\n  got.*rank=3.*even rank"):
        lx.split(params, {"q": 3, "*": 4}, init="orthogonal")
    with pytest.raises(lx.LoraError, match=r"(?s)k/kernel\n +q/kernel.*alpha above 0"):
        lx.split(params, 2, alpha=0.0, init="pissa:2")
    with pytest.raises(lx.LoraError, match=r"(?s)k/kernel\n +q/kernel.*no init=.*olora"):
        lx.split(params, 2, method="vera", init="olora")
    for name in ("pissa:", "pissa:x", "pissa:-1", "olora:2", 3):
        assert find_init(name) is None
        with pytest.raises(lx.LoraError, match=r"unknown init"):
            lx.split(params, 2, init=name)


# Back to plain LoRA -----------------------------------------------------------------------------------


def train(adapter):
    """Factors moved from where they started, pads untouched."""
    used = (np.asarray(adapter.a) != 0).astype(np.float32), (np.asarray(adapter.b) != 0).astype(np.float32)
    moved = adapter.a + 0.3 * used[0] * normal(20, *adapter.a.shape), adapter.b - 0.2 * used[1]
    return type(adapter)(*moved, adapter.alpha, adapter.rank, adapter.scaling, adapter.layout)


@pytest.mark.parametrize("rank", [4, (4, 2)], ids=str)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("init", RESIDUAL)
def test_to_plain_is_exact_and_of_rank_2r(init, scaling, rank):
    w = normal(9, 7, 2, 3, 4)
    frozen, adapter = split(w, init, rank=rank, scaling=scaling)
    adapter = train(adapter)
    (plain,) = lx.ranks.to_plain({"w": w}, {"w": frozen}, {"w": adapter}).values()
    assert plain.rank == (8 if rank == 4 else (8, 4)) and plain.a.shape == (2, 7, 8)
    np.testing.assert_allclose(plain.scale, adapter.scale, rtol=1e-6)
    want = np.asarray(adapter.weight(frozen), np.float64) - np.asarray(w, np.float64)
    np.testing.assert_allclose(lx.delta({"w": plain})["w"], want, atol=5e-6 * np.abs(want).max())
    if rank != 4:
        assert not np.asarray(plain.a)[1, :, 4:].any() and not np.asarray(plain.b)[1, 4:].any()


def test_to_plain_of_dora_keeps_direction_and_magnitude():
    w = normal(10, 8, 6)
    frozen, adapter = split(w, "pissa", method="dora")
    plain = lx.ranks.to_plain({"w": w}, {"w": frozen}, {"w": adapter})["w"]
    assert isinstance(plain, lx.DoRA)
    np.testing.assert_allclose(plain.weight(w), adapter.weight(frozen), atol=1e-5)


def test_to_plain_leaves_the_rest_alone_and_refuses_other_params():
    params0 = {"q": {"kernel": normal(11, 8, 6)}, "k": {"kernel": normal(12, 8, 6), "bias": jnp.ones(6)}}
    params, lora = lx.split(params0, 2, init={"q": "pissa", "*": "kaiming"}, full="bias")
    plain = lx.ranks.to_plain(params0, params, lora)
    assert plain["k/kernel"] is lora["k/kernel"] and plain["k/bias"] is lora["k/bias"]
    assert plain["q/kernel"].rank == 4
    other = jax.tree.map(lambda x: x + normal(13, *x.shape), params0)
    with pytest.raises(lx.LoraError, match=r"(?s)params0 and params differ.*k/kernel\n +q/kernel"):
        lx.ranks.to_plain(other, params, lora)
    _, vera = lx.split(params0, 2, method="vera")
    with pytest.raises(lx.LoraError, match=r"(?s)takes no part of W.*q/kernel.*VeRA"):
        lx.ranks.to_plain(other, params0, vera)
    traced = jax.jit(lambda *args: lx.ranks.to_plain(*args))(params0, params, {"q/kernel": lora["q/kernel"]})
    np.testing.assert_allclose(
        lx.delta(traced)["q/kernel"], lx.delta({"q/kernel": plain["q/kernel"]})["q/kernel"], atol=1e-5
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 4), (300, 250)])
def test_numbers_are_those_of_jax_random(shape, impl):
    """Bit for bit, eager and jitted: a shape is the start of a longer row, for a key that allows it."""
    key = jax.random.key(3, impl=impl)
    want = jax.random.normal(key, shape, jnp.float32)
    for got in (
        drawn(jax.random.normal, key, shape),
        jax.jit(lambda k: drawn(jax.random.normal, k, shape))(key),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_new_ranks_compile_nothing():
    """A sweep over ranks splits once per rank."""
    w, names = normal(0, 12, 9), []
    split(w, "kaiming", rank=2)
    with compiled(names):
        for rank in (3, 5, 7):
            split(w, "kaiming", rank=rank)
    assert names == []
