"""Spectra, truncation and resizing against NumPy's SVD of the built dW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

STACKED = lx.Layout((1,), (0,), (3, 2))
PLAIN = lx.Layout((), (0,), (1,))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stacked(cls=lx.LoRA, rank=4, alpha=6.0, scaling="lora"):
    width = max(rank) if isinstance(rank, tuple) else rank
    ranks = rank if isinstance(rank, tuple) else (rank, rank)
    used = (np.arange(width)[None, :] < np.array(ranks)[:, None]).astype(np.float32)
    a, b = normal(0, 2, 7, width) * used[:, None, :], normal(1, 2, width, 4, 3) * used[:, :, None, None]
    return cls(a, b, alpha, rank, scaling, STACKED)


def matrices(adapter):
    """dW as [s, n, m] in float64."""
    dw = np.asarray(adapter.delta(), np.float64)
    return dw.transpose(1, 0, 3, 2).reshape(2, 7, 12) if dw.ndim == 4 else dw[None]


@pytest.mark.parametrize("rank", [4, (4, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_effective_rank_is_that_of_the_built_change(rank, scaling):
    adapter = stacked(rank=rank, scaling=scaling)
    got = lx.ranks.effective_rank({"w": adapter, "bias": lx.Full(jnp.ones(3))})
    assert list(got) == ["w"]
    width = adapter.a.shape[-1]
    for i, dw in enumerate(matrices(adapter)):
        values = np.linalg.svd(dw, compute_uv=False)[:width]
        top = max(values.max(), 1e-30)
        np.testing.assert_allclose(got["w"].values[i], values, atol=2e-6 * max(top, 1.0))
        share = values[values > 1e-9] / values.sum() if values.any() else np.array([])
        stable = np.square(values).sum() / top**2
        entropy = np.exp(-(share * np.log(share)).sum()) if share.size else 0.0
        np.testing.assert_allclose(got["w"].stable[i], stable, rtol=1e-4)
        np.testing.assert_allclose(got["w"].entropy[i], entropy, rtol=1e-4)


@pytest.mark.parametrize("method", ["vera", "loha", "lokr", "dora"])
def test_effective_rank_of_other_methods(method):
    _, lora = lx.split({"kernel": jnp.ones((6, 9))}, 3, method=method)
    lora = jax.tree.map(lambda x: normal(3, *x.shape), lora)
    spectrum = lx.ranks.effective_rank(lora)["kernel"]
    values = np.linalg.svd(np.asarray(lora["kernel"].delta(), np.float64), compute_uv=False)
    got = np.asarray(spectrum.values)
    np.testing.assert_allclose(got, values[: got.size], atol=3e-6 * values[0])


def test_nothing_of_the_size_of_the_weight_is_built():
    """20000 x 20000 would be 1.6 GB; a matrix of that size would show in the jaxpr."""
    shape = jax.ShapeDtypeStruct((20000, 4), jnp.float32), jax.ShapeDtypeStruct((4, 20000), jnp.float32)
    adapter = lx.LoRA(*shape, 8.0, 4, "lora", PLAIN)
    traced = str(
        jax.make_jaxpr(lambda lora: (lx.ranks.effective_rank(lora), lx.ranks.truncate(lora, 2)))(
            {"w": adapter}
        )
    )
    assert "20000,20000" not in traced and "20000,4" in traced


@pytest.mark.parametrize("cls", [lx.LoRA, lx.LoRAFA])
@pytest.mark.parametrize("rank", [4, (4, 2)], ids=str)
def test_truncate_is_the_best_of_its_rank(cls, rank):
    adapter = stacked(cls, rank)
    cut = lx.ranks.truncate({"w": adapter}, rank=3)["w"]
    assert type(cut) is cls and cut.rank == (3 if rank == 4 else (3, 2)) and cut.a.shape == (2, 7, 3)
    np.testing.assert_allclose(cut.scale, adapter.scale, rtol=1e-6)
    if rank != 4:  # pads are exact zeros in both factors
        assert not np.asarray(cut.a)[1, :, 2:].any() and not np.asarray(cut.b)[1, 2:].any()
    for before, after in zip(matrices(adapter), matrices(cut), strict=True):
        u, values, vt = np.linalg.svd(before)
        best = (u[:, :3] * values[:3]) @ vt[:3]
        np.testing.assert_allclose(after, best, atol=1e-5 * values[0])
        assert np.linalg.norm(before - after) == pytest.approx(
            np.sqrt(np.square(values[3:]).sum()), abs=1e-5 * values[0]
        )


def test_truncate_by_energy_keeps_the_smallest_rank_that_has_it():
    b = jnp.diag(jnp.array([8.0, 4.0, 2.0, 1.0]))
    lora = {"w": lx.LoRA(jnp.eye(4), b, 4.0, 4, "lora", PLAIN), "bias": lx.Full(jnp.ones(3))}
    total = 64 + 16 + 4 + 1
    for energy, rank in ((0.5, 1), (64 / total, 1), (65 / total, 2), (0.98, 3), (1.0, 4)):
        cut = lx.ranks.truncate(lora, energy=energy)
        assert cut["w"].rank == rank and cut["bias"] is lora["bias"]
    assert lx.ranks.truncate(lora, rank=9)["w"] is lora["w"]
    zero = {"w": lx.LoRA(jnp.eye(4), 0 * b, 4.0, 4, "lora", PLAIN)}
    assert lx.ranks.truncate(zero, energy=0.9)["w"].rank == 1


def test_resize_up_keeps_the_change_and_trains_what_is_new():
    adapter = stacked()
    larger = lx.ranks.resize({"w": adapter}, {"w": 6})["w"]
    assert larger.a.shape == (2, 7, 6) and larger.b.shape == (2, 6, 4, 3) and larger.rank == 6
    assert larger.scale == pytest.approx(adapter.scale)
    np.testing.assert_allclose(larger.delta(), adapter.delta(), rtol=1e-6, atol=1e-6)
    w = normal(5, 7, 2, 3, 4)

    def grads(adapter):
        return jax.grad(lambda adapter: jnp.sum(jnp.square(adapter.weight(w))))(adapter)

    np.testing.assert_allclose(grads(larger).a[..., :4], grads(adapter).a, rtol=1e-4, atol=1e-4)
    assert np.abs(grads(larger).b[:, 4:]).min() > 0.0
    back = lx.ranks.resize({"w": larger}, 4)["w"]
    np.testing.assert_allclose(back.delta(), adapter.delta(), atol=1e-5 * np.abs(adapter.delta()).max())


def test_messages():
    lora = {"w": stacked(rank=(4, 2)), "bias": lx.Full(jnp.ones(3))}
    with pytest.raises(lx.LoraError, match="truncate takes either"):
        lx.ranks.truncate(lora)
    with pytest.raises(lx.LoraError, match="energy is not a fraction"):
        lx.ranks.truncate(lora, energy=1.5)
    with pytest.raises(lx.LoraError, match=r"(?s)names paths without a LoRA.*path: +bias"):
        lx.ranks.truncate(lora, {"bias": 2})
    with pytest.raises(lx.LoraError, match=r"(?s)rank is not valid.*path: +w\n.*rank=0"):
        lx.ranks.resize(lora, 0)
    with pytest.raises(lx.LoraError, match=r"(?s)cannot be enlarged.*path: +w\n"):
        lx.ranks.resize(lora, 6)


# Reallocation -----------------------------------------------------------------------------------------


def test_sensitivity_is_its_equation():
    adapter, grads = stacked(), stacked(alpha=1.0)
    got = lx.ranks.sensitivity({"w": adapter, "bias": lx.Full(jnp.ones(3))}, {"w": grads})
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    want = np.abs(a * grads.a).mean(1) + np.abs(b * grads.b).mean((2, 3))
    assert list(got) == ["w"]
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_reallocate_keeps_the_best_ranks_bit_for_bit(scaling):
    lora = {
        "one": lx.LoRA(normal(5, 6, 3), normal(6, 3, 5), 6.0, 3, scaling, PLAIN),
        "stack": stacked(scaling=scaling),
        "bias": lx.Full(jnp.ones(3)),
    }
    scores = {
        "one": jnp.array([0.0, 9.0, 0.1]),
        "stack": jnp.array([[5.0, 1.0, 7.0, 0.5], [0.2, 0.3, 8.0, 0.4]]),
    }
    new = lx.ranks.reallocate(lora, scores, budget=4)  # 9, 8, 7 and 5
    assert new["one"].rank == 1 and new["stack"].rank == (2, 1) and new["bias"] is lora["bias"]
    np.testing.assert_array_equal(new["one"].a[:, 0], lora["one"].a[:, 1])
    np.testing.assert_array_equal(new["stack"].a[0], lora["stack"].a[0][:, np.array([0, 2])])
    np.testing.assert_array_equal(new["stack"].b[1, 0], lora["stack"].b[1, 2])
    assert not np.asarray(new["stack"].a)[1, :, 1].any() and not np.asarray(new["stack"].b)[1, 1].any()
    for path in scores:
        np.testing.assert_allclose(np.ravel(new[path].scale), lora[path].scale, rtol=1e-6)
    everything = lx.ranks.reallocate(lora, scores, budget=99)
    for path, dw in lx.delta(lora).items():
        np.testing.assert_allclose(lx.delta(everything)[path], dw, rtol=1e-6, atol=1e-6)
        assert everything[path].rank == lora[path].rank
    again = lx.ranks.reallocate(
        new, {"stack": jnp.array([[1.0, 2.0], [3.0, 99.0]])}, budget=1
    )  # 99 is a pad's
    assert again["stack"].rank == (0, 1)
    with pytest.raises(lx.LoraError, match="budget is too small"):
        lx.ranks.reallocate(lora, scores, budget=1)
    with pytest.raises(lx.LoraError, match=r"(?s)scores do not fit.*path: +bias\n +one\n.*shape \(3,\)"):
        lx.ranks.reallocate(lora, {"bias": jnp.ones(3), "one": jnp.ones(2)}, budget=2)


def test_new_columns_differ_by_path_and_key_and_train_after_zero_a():
    params = {"q": {"kernel": jnp.ones((8, 6))}, "k": {"kernel": jnp.ones((8, 6))}}
    _, lora = lx.split(params, rank=2, init="zero_a")
    wide = lx.ranks.resize(lora, 4)
    q, k = (wide[path].a[:, 2:] for path in ("q/kernel", "k/kernel"))
    assert float(jnp.abs(q).max()) > 0.05 and float(jnp.abs(wide["q/kernel"].b[2:]).max()) == 0.0
    cosine = jnp.vdot(q, k) / (jnp.linalg.norm(q) * jnp.linalg.norm(k))
    assert abs(float(cosine)) < 0.9
    other = lx.ranks.resize(lora, 4, key=jax.random.key(1))["q/kernel"].a[:, 2:]
    assert not jnp.allclose(q, other)


def test_methods_without_another_rank_and_missing_gradients_are_named():
    params = {"q": {"kernel": jnp.ones((8, 6))}, "k": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    _, lora = lx.split(params, rank=2, method={"q": "loha", "*": "lora"}, full="bias")
    for change in (lx.ranks.truncate, lx.ranks.resize):
        with pytest.raises(lx.LoraError, match=r"(?s)q/kernel.*LoHa"):
            change(lora, 1)
        assert change(lora, {"k/kernel": 1})["k/kernel"].rank == 1
    with pytest.raises(lx.LoraError, match=r"(?s)q/kernel.*LoHa"):
        lx.ranks.truncate(lora, energy=0.9)
    with pytest.raises(lx.LoraError, match=r"(?s)do not hold.*k/kernel"):
        lx.ranks.sensitivity(lora, {})
