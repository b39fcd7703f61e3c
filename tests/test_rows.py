"""Rows of tables: replaced whatever they were, along the axis that holds the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn import checkpoint

V, D = 20, 6
IDS = jnp.array([18, 19, 1])


def table(seed, *shape):
    return jnp.asarray(0.02 * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lookup(params, ids):
    return params["embed"]["embedding"][ids]


def tied(params, ids):
    return params["embed"]["embedding"][ids] @ params["embed"]["embedding"].T


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("old", [np.nan, np.inf, 1e6, 100.0, 1.0])
@pytest.mark.parametrize("fn", [lookup, tied])
def test_rows_are_replaced_whatever_they_were(fn, old, dtype):
    w = table(0, V, D).at[jnp.array([18, 19])].set(old).astype(dtype)
    params, lora = lx.split({"embed": {"embedding": w}}, targets=(), rows={"embed": [18, 19]})
    lora = {"embed/embedding": lx.Rows(table(1, 2, D), (18, 19))}
    got, want = lx.adapt(fn, fallback="error")(params, lora, IDS), fn(lx.merge(params, lora), IDS)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32),
        rtol=2e-2 if dtype != jnp.float32 else 1e-5,
        atol=2e-5 if dtype != jnp.float32 else 1e-8,
    )  # fmt: skip

    def loss(lora, params):
        return jnp.sum(jnp.sin(lx.adapt(fn)(params, lora, IDS).astype(jnp.float32)))

    def merged(lora, params):
        return jnp.sum(jnp.sin(fn(lx.merge(params, lora), IDS).astype(jnp.float32)))

    got, want = (jax.grad(f)(lora, params)["embed/embedding"].values for f in (loss, merged))
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-2 if dtype != jnp.float32 else 1e-6)


def test_rows_of_a_head_are_its_tokens(tmp_path):
    def fn(params, x):
        return x @ params["lm_head"]["kernel"]

    kernel, x = table(0, D, V), jnp.asarray(np.random.default_rng(3).normal(size=(4, D)), jnp.float32)
    params, lora = lx.split({"lm_head": {"kernel": kernel}}, targets=(), rows={"lm_head": [3, 7]})
    rows = lora["lm_head/kernel"]
    assert rows.axis == 1 and rows.ids == (3, 7)
    np.testing.assert_array_equal(rows.values, kernel[:, np.array([3, 7])].T)
    lora = {"lm_head/kernel": lx.Rows(rows.values + 1.0, rows.ids, rows.axis)}
    merged = lx.merge(params, lora)
    got, want = lx.adapt(fn, fallback="error")(params, lora, x), fn(merged, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    changed = np.abs(np.asarray(got - fn(params, x))).max(0) > 1e-3
    assert np.flatnonzero(changed).tolist() == [3, 7]
    checkpoint.save(tmp_path / "a", lora, params=params)
    assert checkpoint.load(tmp_path / "a", params=params)["lm_head/kernel"].axis == 1
    torch = {"lm_head.weight": kernel.T}
    assert lx.split(torch, targets=(), rows={"lm_head": [3]})[1]["lm_head.weight"].axis == 0
    with pytest.raises(lx.LoraError, match=r"(?s)ids from 0 to 19, not \[20\]: axis 1 holds the rows"):
        lx.split(params, targets=(), rows={"lm_head": [20]})
    stacked = {"lm_head": {"kernel": jnp.ones((2, D, V)), "bias": jnp.ones((2, V))}}
    with pytest.raises(lx.LoraError, match=r"(?s)a table with one axis of rows, given by layout="):
        lx.split(stacked, targets=(), rows={"lm_head/kernel": [1]})


def test_a_vocabulary_that_grew_is_told_to_pad_the_table_first():
    old = {"embed": {"embedding": table(0, V, D)}}
    weights = jnp.concatenate([old["embed"]["embedding"], jnp.full((2, D), jnp.nan)])
    new = {"embed": {"embedding": weights}}
    base, lora = lx.split(new, targets=(), rows={"embed": [V, V + 1]})
    lora = {"embed/embedding": lx.Rows(table(1, 2, D), (V, V + 1))}
    got = lx.adapt(lookup)(base, lora, jnp.array([V, 0]))
    np.testing.assert_array_equal(got, jnp.stack([lora["embed/embedding"].values[0], weights[0]]))
    with pytest.raises(lx.LoraError, match=r"(?s)at least 22 rows along axis 0: pad the table first"):
        lx.adapt(lookup)(old, lora, IDS)


def test_on_explicit_mesh_axes_the_table_keeps_its_sharding():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec
        w = jax.device_put(table(0, V, D), spec("a", "b"))
        params, lora = {"embed": {"embedding": w}}, {"embed/embedding": lx.Rows(table(1, 1, D), (3,))}
        x = jnp.ones((4, D))

        def logits(params, x):
            return jnp.einsum("bd,vd->bv", x, params["embed"]["embedding"], out_sharding=spec(None, "a"))

        got = jax.jit(lx.adapt(logits))(params, lora, x)
        params, taken = lx.split(params, targets=[], rows={"embed": [3, 0]})
        merged = lx.merge(params, jax.tree.map(lambda x: x + 1, taken))["embed"]["embedding"]
    want = np.asarray(w).copy()
    want[3] = lora["embed/embedding"].values[0]
    np.testing.assert_allclose(got, np.asarray(x) @ want.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(taken["embed/embedding"].values, np.asarray(w)[[3, 0]])
    np.testing.assert_array_equal(merged, np.asarray(w).copy() + np.isin(np.arange(V), [0, 3])[:, None])
    assert merged.sharding.spec == w.sharding.spec


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_are_relative_to_the_table_that_they_are_given(axis):
    """So that ``W' = W + A @ B`` holds for the weight itself as well as for its `base`."""
    w = table(0, V, D) if axis == 0 else table(0, V, D).T
    adapter = lx.Rows(table(1, 2, D), (3, 1), axis)
    for given in (w, adapter.base(w)):
        factors = adapter.factors(given)
        change = jnp.einsum("vk,kd->vd", factors.a, factors.b.reshape(factors.b.shape))
        np.testing.assert_allclose(given + change, adapter.weight(w), rtol=1e-6, atol=1e-6)
