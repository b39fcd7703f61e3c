"""Adapters put together: sums by their dW, trimming methods by formulas in NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn.many import combining

PARAMS = {"up": jax.random.normal(jax.random.key(0), (8, 6)), "layers": jnp.ones((2, 6, 5))}
LAYOUTS = {"up": lx.Layout((), (0,), (1,)), "layers": lx.Layout((0,), (1,), (2,))}


def drawn(rank, seed, **options):
    _, lora = lx.split(PARAMS, rank, layout=LAYOUTS, **options)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), lora)


def close(got, want, tol=1e-5):
    assert set(got) == set(want)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=tol * np.abs(want[path]).max())


def summed(pairs):
    deltas = [(w, lx.delta(lora)) for w, lora in pairs]
    return {p: sum(w * d[p] for w, d in deltas if p in d) for p in {q for _, d in deltas for q in d}}


def test_cat_and_linear_are_the_sum_for_any_ranks_methods_and_targets():
    part = {"up": drawn(3, 1, scaling="rslora")["up"]}
    pairs = [
        (0.5, drawn(2, 2)),
        (-2.0, part),
        (1.5, drawn(2, 3, method="loha")),
        (0.3, drawn(2, 4, method="vera")),
    ]
    want = summed(pairs)
    cat, linear = lx.combine(pairs), lx.combine(pairs, "linear")
    close(lx.delta(cat), want)
    close(lx.delta(linear), want)
    assert cat["up"].rank == 2 + 3 + 4 + 2 and linear["up"].rank == 6 and cat["layers"].scale == 1
    uneven = drawn({"layers": (0, 2), "*": 1}, 5)
    uneven["layers"] = lx.split(PARAMS, {"layers": (0, 2), "*": 1}, layout=LAYOUTS, init="gaussian")[1][
        "layers"
    ]
    close(
        lx.delta(lx.combine([(3.0, uneven), (1.0, drawn(2, 6))])), summed([(3.0, uneven), (1.0, drawn(2, 6))])
    )


def test_svd_is_the_best_of_its_rank():
    pairs = [(1.0, drawn(2, 1)), (-0.7, drawn(3, 2))]
    want = summed(pairs)
    for rank in (1, 2, 4):
        got = lx.delta(lx.combine(pairs, "svd", rank=rank))
        for path, dw in want.items():
            for mine, whole in zip(entries(got[path]), entries(dw), strict=True):
                values = np.linalg.svd(whole, compute_uv=False)
                left = np.linalg.norm(whole - mine)
                np.testing.assert_allclose(left, np.sqrt((values[rank:] ** 2).sum()), atol=1e-5 * values[0])
    assert lx.combine(pairs, "svd")["up"].rank == 3


def of_entries(f, *arrays):
    """``f`` of each stack entry of arrays ``[s, ., .]``."""
    return np.stack([f(*entry) for entry in zip(*arrays, strict=False)])


def trimmed(x, density):
    kept = np.zeros_like(x).reshape(-1)
    largest = np.argsort(-np.abs(x).reshape(-1))[: int(density * x.size)]
    kept[largest] = x.reshape(-1)[largest]
    return kept.reshape(x.shape)


def merged(arrays, weights, method, density, sign):
    if not method.startswith("dare") and method != "linear":
        arrays = [of_entries(lambda x: trimmed(x, density), x) for x in arrays]
    weighted = [w * x for w, x in zip(weights, arrays, strict=False)]
    if not method.endswith("ties"):
        return sum(weighted)
    votes = sum(arrays) if sign == "total" else sum(map(np.sign, arrays))
    agree = [np.sign(x) == np.where(votes >= 0, 1, -1) for x in arrays]
    return sum(x * y for x, y in zip(weighted, agree, strict=False)) / np.maximum(sum(agree), 1)


def entries(x):
    return np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])


TRIMMED = [
    ("ties", 0.6, "total"),
    ("ties", 0.4, "frequency"),
    ("magnitude_prune", 0.5, "total"),
    ("dare_ties", 1.0, "total"),
    ("dare_linear", 1.0, "total"),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "method, density, sign, svd",
    [("peft_linear", None, "total", ""), *((*x, y) for x in TRIMMED for y in ("", "_svd"))],
)
def test_trimming_methods_follow_their_formulas(method, density, sign, svd):
    loras, weights = [drawn(3, seed, alpha=2.0) for seed in (1, 2, 3)], [0.5, -1.0, 2.0]
    got = lx.combine(list(zip(weights, loras, strict=False)), method + svd, density=density, sign=sign)
    name = method.removeprefix("peft_")
    for path in loras[0]:
        if svd:
            deltas = [entries(lx.delta(lora)[path]) for lora in loras]
            want = merged(deltas, weights, name, density, sign)
            u, size, vt = np.linalg.svd(want, full_matrices=False)
            want = (u[:, :, :3] * size[:, None, :3]) @ vt[:, :3]
        else:
            f = [np.sqrt(abs(w * lora[path].scale)) for w, lora in zip(weights, loras, strict=False)]
            signed = [np.sign(w) * x for w, x in zip(weights, f, strict=False)]
            a = merged([entries(lora[path].a) for lora in loras], signed, name, density, sign)
            b = merged([entries(lora[path].b) for lora in loras], f, name, density, sign)
            want = a @ b
        np.testing.assert_allclose(entries(lx.delta(got)[path]), want, atol=2e-5 * np.abs(want).max())


def test_a_large_trimmed_dw_gets_a_randomized_svd(monkeypatch):
    params = {"kernel": jnp.ones((90, 70))}
    lora = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.shape[0]), x.shape), lx.split(params, 4)[1]
    )
    monkeypatch.setattr(combining, "EXACT_UP_TO", 64)
    combining._combined.clear_cache()
    try:
        got = lx.delta(lx.combine([(1.0, lora), (0.5, lora)], "magnitude_prune_svd", density=0.3))["kernel"]
    finally:
        combining._combined.clear_cache()
    want = 1.5 * trimmed(np.asarray(lx.delta(lora)["kernel"]), 0.3)
    size = np.linalg.svd(want, compute_uv=False)
    best, left = np.sqrt((size[4:] ** 2).sum()), np.linalg.norm(want - np.asarray(got))
    assert 0.999 * best < left < 1.01 * best


def test_trimming_keeps_the_first_of_equal_entries():
    one = jax.tree.map(jnp.ones_like, lx.split({"kernel": jnp.ones((4, 3))}, 2)[1])
    kept = lx.combine([(1.0, one)], "magnitude_prune", density=0.4)["kernel"]
    assert int((kept.a != 0).sum()) == 3 and int((kept.b != 0).sum()) == 2
    assert (kept.a.reshape(-1)[:3] != 0).all()


def test_dare_drops_at_random_keeps_the_mean_and_follows_its_key():
    params = {"kernel": jnp.ones((64, 32))}
    lora = jax.tree.map(jnp.ones_like, lx.split(params, 32, alpha=32.0)[1])
    one, again, other = (
        lx.combine([(1.0, lora)], "dare_linear", density=0.25, key=jax.random.key(k))["kernel"].a
        for k in (1, 1, 2)
    )
    assert set(np.unique(one)) == {0.0, 4.0} and abs(one.mean() - 1) < 0.15
    assert (one == again).all() and (one != other).any()


def test_subtract_scale_interpolate_and_unmerge():
    one, two = drawn(2, 1), drawn(3, 2)
    close(lx.delta(lx.subtract(one, two)), summed([(1, one), (-1, two)]))
    close(lx.delta(lx.subtract({}, two)), summed([(-1, two)]))
    close(lx.delta(lx.interpolate(one, two, 0.25)), summed([(0.75, one), (0.25, two)]))
    for lora in (one, drawn(2, 3, method="vera"), drawn(2, 3, method="loha")):
        close(lx.delta(lx.scale(lora, -3.0)), summed([(-3.0, lora)]))
    assert lx.scale(one, 2.0)["up"].rank == 2
    grad = jax.grad(lambda t: lx.delta(lx.scale(one, t))["up"].sum())(jnp.float32(2.0))
    np.testing.assert_allclose(grad, lx.delta(one)["up"].sum(), rtol=1e-5)
    for dtype, digits in ((jnp.float32, 24), (jnp.bfloat16, 8)):
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), PARAMS)
        back = lx.merge(lx.merge(params, one), lx.scale(one, -1.0))
        largest = max(
            float(jnp.abs(x.astype(jnp.float32)).max()) for x in jax.tree.leaves(lx.merge(params, one))
        )
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
            error = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()
            assert error <= largest * 2.0**-digits * 2


def test_shapes_alone_can_be_combined():
    shapes = jax.eval_shape(lambda: drawn(2, 1))
    assert lx.combine([(1.0, shapes), (2.0, shapes)], "svd", rank=3)["layers"].a.shape == (2, 6, 3)


def test_svd_needs_no_array_of_a_large_weight():
    """Its memory grows with the rank, not with the weight, here of 4096^2."""
    layout = lx.Layout((), (0,), (1,))
    a, b = jnp.ones((4096, 4)), jnp.ones((4, 4096))
    lora = {"w": lx.LoRA(a, b, 1.0, 4, "lora", layout)}
    program = (
        jax.jit(lambda lora: lx.combine([(1.0, lora), (2.0, lora)], "svd", rank=4)).lower(lora).compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(method="sum"), "unknown method"),
        (dict(method="ties"), "density= is missing"),
        (dict(density=0.5), "density= does not fit"),
        (dict(method="ties", density=1.5), "density= does not fit"),
        (dict(rank=4), "rank= does not fit"),
        (dict(sign="frequency"), "sign= does not fit"),
        (dict(key=jax.random.key(0)), "draws nothing"),
    ],
)
def test_options_without_effect_raise(options, match):
    with pytest.raises(lx.LoraError, match=match):
        lx.combine([(1.0, drawn(2, 1))], **options)


def test_what_cannot_be_added_up_raises():
    with pytest.raises(lx.LoraError, match="no adapters"):
        lx.combine([])
    with pytest.raises(lx.LoraError, match="depends on the weight itself"):
        lx.combine([(1.0, drawn(2, 1, method="dora")), (1.0, drawn(2, 1))])
    with pytest.raises(lx.LoraError, match="their ranks differ"):
        lx.combine([(1.0, drawn(2, 1)), (1.0, drawn(3, 1))], "ties", density=0.5)
    turned = {"up": lx.split({"up": PARAMS["up"]}, 2, layout={"*": lx.Layout((), (1,), (0,))})[1]["up"]}
    with pytest.raises(lx.LoraError, match="different weights"):
        lx.combine([(1.0, drawn(2, 1)), (1.0, turned)])
