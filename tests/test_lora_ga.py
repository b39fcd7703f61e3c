"""LoRA-GA: its formula from the gradient, its first step, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx

LAYOUTS = {"layers": lx.Layout((0,), (1,), (2,)), "heads": lx.Layout((), (0,), (2, 1))}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"layers": 0.4 * normal(0, 2, 8, 8), "heads": normal(1, 8, 2, 3)}
BATCHES = [(normal(2, 12, 8), normal(3, 12, 2, 3)), (normal(4, 12, 8), normal(5, 12, 2, 3))]


def loss(params, batch):
    x, y = batch
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return jnp.mean(jnp.square(jnp.einsum("td,dhk->thk", x, params["heads"]) - y))


def gradients():
    found = [jax.grad(loss)(PARAMS, batch) for batch in BATCHES]
    return {path: (np.asarray(found[0][path], np.float64) + found[1][path]) / 2 for path in PARAMS}


def given(params, batch):
    """A loss of which the batch is the gradient."""
    return sum(jnp.sum(params[path] * batch[path]) for path in params)


def matrices(x, path):
    """A weight as [s, n, m]."""
    x = np.asarray(x, np.float64)
    return x if path == "layers" else x.transpose(0, 2, 1).reshape(1, 8, 6)


def split(rank=2, alpha=6.0, loss=loss, batches=BATCHES, **options):
    init = lx.inits.lora_ga(loss, batches, **options)
    return lx.split(PARAMS, rank, alpha=alpha, layout=LAYOUTS, targets=list(PARAMS), init=init)


def factors(adapter):
    r = adapter.a.shape[-1]
    return np.asarray(adapter.a, np.float64).reshape(-1, 8, r), np.asarray(adapter.b, np.float64).reshape(
        -1, r, 6 if adapter.a.ndim == 2 else 8
    )


@pytest.mark.parametrize(
    ("direction", "scale", "rank"),
    [
        ("ArB2r", "stable", 2),
        ("A2rBr", "unit", {"layers": (2, 1), "*": 2}),
        ("ArBr", "gd_scale", 2),
        ("ArB2r", "weight_svd", {"layers": (2, 1), "*": 2}),
    ],
)
def test_factors_are_the_authors_formula(direction, scale, rank):
    gradients = {path: normal(7, *w.shape) for path, w in PARAMS.items()}
    batches = [jax.tree.map(lambda g, i=i: i * g, gradients) for i in (0.5, 1.5)]
    params, lora = split(rank, loss=given, batches=batches, direction=direction, scale=scale, gamma=9.0)
    for path, g in gradients.items():
        a, b = factors(lora[path])
        for i, (matrix, w) in enumerate(zip(matrices(g, path), matrices(PARAMS[path], path), strict=True)):
            r = 2 if rank == 2 else rank.get(path, (2,))[i]
            s = 6.0 / r
            u, _, vt = np.linalg.svd(matrix)
            of_a, of_b = {
                "ArB2r": (slice(0, r), slice(r, 2 * r)),
                "A2rBr": (slice(r, 2 * r), slice(0, r)),
                "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
            }[direction]
            sizes = np.linalg.svd(w, compute_uv=False)[:r]
            gain = {"stable": w.shape[1] ** 0.25 / 3.0, "unit": 1.0, "gd_scale": 1 / s}.get(
                scale, np.sqrt(sizes / s).mean()
            )
            # singular vectors have no sign: what they span, and their sizes
            np.testing.assert_allclose(np.abs(u[:, of_a].T @ a[i][:, :r]), gain * np.eye(r), atol=1e-4)
            np.testing.assert_allclose(np.abs(vt[of_b] @ b[i][:r].T), gain * np.eye(r), atol=1e-4)
            assert not a[i][:, r:].any() and not b[i][r:].any()
            residual = matrices(params[path], path)[i]
            np.testing.assert_allclose(residual, w - s * a[i] @ b[i], atol=1e-5)


def test_the_first_step_is_the_best_of_rank_2r():
    """Theorem 3.1: s (dA B + A dB) = -lr s^2 c^2 (the gradient cut to its 2r largest singular values)."""
    params, lora = split(alpha=2.0)  # scale 1
    (x, y), (x2, y2) = BATCHES
    batch = (jnp.concatenate([x, x2]), jnp.concatenate([y, y2]))
    run = lx.adapt(loss, fallback="error")
    by_lora = jax.grad(lambda lora: run(params, lora, batch))(lora)
    for path, g in gradients().items():
        (a, b), (da, db) = factors(lora[path]), factors(by_lora[path])
        for i, matrix in enumerate(matrices(g, path)):
            u, sizes, vt = np.linalg.svd(matrix, full_matrices=False)
            best = (u[:, :4] * sizes[:4]) @ vt[:4]
            gain = np.sqrt(b.shape[-1]) / 16.0
            moved = da[i] @ b[i] + a[i] @ db[i]
            np.testing.assert_allclose(moved, gain * best, atol=2e-4 * np.abs(gain * best).max())
            left = np.linalg.norm(moved / gain - matrix)
            assert left == pytest.approx(np.sqrt(np.square(sizes[4:]).sum()), rel=1e-3)


def test_groups_of_weights_give_the_same():
    batches = [jax.tree.map(lambda w: jnp.cos(9 * w), PARAMS)]
    one, other = (split(loss=given, batches=batches, at_once=n)[1] for n in (None, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_embeddings_have_gradients_too():
    table, ids = {"embed": normal(6, 9, 6)}, jnp.array([1, 3, 3, 5, 0, 7])

    def loss(p, ids):
        return jnp.sum(jnp.sin(p["embed"][ids] @ p["embed"].T))

    layout = {"embed": lx.Layout((), (0,), (1,))}
    _, lora = lx.split(table, 2, targets="embed", layout=layout, init=lx.inits.lora_ga(loss, [ids]))
    u = np.linalg.svd(np.asarray(jax.grad(loss)(table, ids)["embed"], np.float64))[0][:, :2]
    a = np.asarray(lora["embed"].a) / np.linalg.norm(lora["embed"].a, axis=0)[None]
    np.testing.assert_allclose(np.abs(u.T @ a), np.eye(2), atol=1e-4)


def test_refusals():
    with pytest.raises(lx.LoraError, match=r"(?s)heads\n.*layers.*rank of at most 3.*rank of at most 4"):
        split(5)
    with pytest.raises(
        lx.LoraError, match=r"(?s)heads.*rank=4.*rank of at most 3 for lx.inits.lora_ga\(loss"
    ):
        split(4)
    with pytest.raises(lx.LoraError, match="alpha above 0"):
        split(alpha=0.0, scale="gd_scale")
    batches = [jax.tree.map(lambda w: jnp.cos(9 * w), PARAMS)]
    assert split(alpha=0.0, loss=given, batches=batches)[1]["heads"].scale == 0.0
    with pytest.raises(lx.LoraError, match=r"(?s)unknown direction.*'ArB2r'"):
        lx.inits.lora_ga(loss, BATCHES, direction="random")
    with pytest.raises(lx.LoraError, match=r"(?s)unknown scale.*weight_svd"):
        lx.inits.lora_ga(loss, BATCHES, scale="gd")

    def start(loss, batches=BATCHES):
        lx.split(PARAMS, 2, layout=LAYOUTS, targets=list(PARAMS), init=lx.inits.lora_ga(loss, batches))

    with pytest.raises(lx.LoraError, match=r"(?s)gradient.*path: +heads\n +layers\n +got: +not finite"):
        start(lambda p, batch: loss(p, batch) * jnp.nan)
    with pytest.raises(
        lx.LoraError, match=r"(?s)gradient.*path: +layers\n +got: +zero in stack entries \[0, 1\]"
    ):
        start(lambda p, batch: loss(p | {"layers": lax.stop_gradient(p["layers"])}, batch))
    with pytest.raises(lx.LoraError, match="needs a loss"):
        start(lambda p, batch: p["heads"])
