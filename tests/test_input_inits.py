"""EVA and CorDA against the inputs of a model written out in numpy: subspaces, shares, ranks, residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx
from lorax_fn.calibration.passes import groups

PATHS = ["conv", "layers", "out", "query"]
X = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32) * np.linspace(
    0.3, 3, 8, dtype=np.float32
)


@functools.cache
def params_of():
    rng = np.random.default_rng(1)
    shapes = {"query": (8, 2, 4), "out": (2, 4, 8), "layers": (3, 8, 8), "conv": (3, 8, 6)}
    return {path: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def model(params, x):
    """A four-axis query and output, layers scanned under checkpoint, and a convolution."""
    x = x + jnp.einsum(
        "bthk,hkd->btd", jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["query"])), params["out"]
    )
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x = lax.scan(step, x, params["layers"])[0]
    return lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@functools.cache
def inputs_of():
    """What each stack entry of each weight contracts, in float64: {path: [[tokens, n], ...]}."""
    p = {path: np.asarray(w, np.float64) for path, w in params_of().items()}
    x = np.asarray(X, np.float64)
    heads = np.tanh(np.einsum("btd,dhk->bthk", x, p["query"]))
    found = {"query": [x.reshape(-1, 8)], "out": [heads.reshape(-1, 8)], "layers": []}
    x = x + np.einsum("bthk,hkd->btd", heads, p["out"])
    for w in p["layers"]:
        found["layers"].append(x.reshape(-1, 8))
        x = np.tanh(x @ w)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    found["conv"] = [np.stack([padded[b, t : t + 3].reshape(-1) for b in range(6) for t in range(7)])]
    return found


def split(init, rank=3, **options):
    params = params_of()
    return lx.split(
        params, rank, targets=PATHS, layout=lx.usage(model, params, X), init=init, alpha=6.0, **options
    )


def entries(adapter):
    """A as [s, n, r] and B as [s, r, m]."""
    s = len(adapter.layout.stack)
    stack = int(np.prod(adapter.a.shape[:s]))
    a = np.asarray(adapter.a, np.float64).reshape(stack, -1, adapter.a.shape[-1])
    return a, np.asarray(adapter.b, np.float64).reshape(stack, a.shape[-1], -1)


def projector(a):
    return a @ np.linalg.pinv(a)


@functools.cache
def exact():
    return split(lx.inits.eva(model, [X[:3], X[3:]]))


def test_eva_starts_in_the_span_of_the_right_singular_vectors():
    params, lora = exact()
    assert params is params_of() and sorted(lora) == PATHS
    for path, adapter in lora.items():
        assert not np.asarray(adapter.b).any()
        a, _ = entries(adapter)
        for got, x in zip(a, inputs_of()[path], strict=True):
            vt = np.linalg.svd(x)[2]
            np.testing.assert_allclose(np.abs(vt[:3] @ got), np.eye(3), atol=1e-4, err_msg=path)


def test_one_large_batch_is_several_and_gives_the_values_of_the_singular_vectors():
    layouts = {path: use.layout for path, use in lx.usage(model, params_of(), X).items()}
    spectra = lx.inits.eva(model, iter([X]))._spectra(params_of(), layouts, dict.fromkeys(PATHS, 3))
    for path, (values, vectors) in spectra:
        for i, x in enumerate(inputs_of()[path]):
            want = np.square(np.linalg.svd(x, compute_uv=False))
            np.testing.assert_allclose(values[i], want, atol=1e-5 * want.max())
            streamed = entries(exact()[1][path])[0][i]
            np.testing.assert_allclose(projector(vectors[i, :, :3]), projector(streamed), atol=1e-5)


def test_subspace_iterations_near_the_exact_directions():
    """[n, r + 8] is all of n but for the convolution's 24; there three passes find what is to be found."""
    with pytest.raises(lx.LoraError, match=r"(?s)more than once.*list_iterator.*iterations=2"):
        split(lx.inits.eva(model, iter([X]), iterations=2))
    lora = split(lx.inits.eva(model, [X[:3], X[3:]], iterations=3))[1]
    for path in PATHS:
        for a, b in zip(entries(exact()[1][path])[0], entries(lora[path])[0], strict=True):
            np.testing.assert_allclose(projector(a), projector(b), atol=1e-3, err_msg=path)
    with pytest.raises(lx.LoraError, match="whole covariance"):
        lx.inits.eva(model, [X], iterations=1).ranks(params_of())
    with pytest.raises(lx.LoraError, match=r"iterations= is not valid"):
        lx.inits.eva(model, [X], iterations=0)


def test_ranks_go_where_the_explained_variance_is():
    init, params, rank = lx.inits.eva(model, [X[:3], X[3:]]), params_of(), 3
    layout = lx.usage(model, params, X)
    ranks = init.ranks(params, rank, rho=2.0, targets=PATHS, layout=layout)
    shares = []  # (share, path, entry), by numpy from the inputs themselves
    for path, every in inputs_of().items():
        for i, x in enumerate(every):
            squares = np.square(np.linalg.svd(x, compute_uv=False))
            shares += [(share, path, i) for share in squares[:6] / squares.sum()]
    chosen = sorted(shares, reverse=True)[: rank * 6]
    want = {path: [sum(c[1:] == (path, i) for c in chosen) for i in range(len(inputs_of()[path]))]
            for path in PATHS}  # fmt: skip
    assert ranks == {p: tuple(r) if p == "layers" else r[0] for p, r in want.items() if any(r)}
    assert len(set(ranks["layers"])) > 1 and sum(map(sum, want.values())) == 18
    _, lora = split(init, ranks)
    for path, adapter in lora.items():
        assert adapter.rank == ranks[path]
        for i, (a, x) in enumerate(zip(entries(adapter)[0], inputs_of()[path], strict=True)):
            r = want[path][i]
            assert not a[:, r:].any()
            np.testing.assert_allclose(np.abs(np.linalg.svd(x)[2][:r] @ a[:, :r]), np.eye(r), atol=1e-4)


def test_ranks_leave_out_what_gets_none_and_ask_longer_paths_first():
    params = {"kernel": jnp.eye(4), "deep": {"kernel": jnp.eye(4)}, "none": {"kernel": jnp.eye(4)}}
    spread, thin = jnp.eye(4) * jnp.array([[4.0, 2.0, 1.0, 0.1]]), jnp.ones((4, 4))

    def fn(p, x):
        return x @ p["none"]["kernel"] + thin @ p["kernel"] + thin[:1] @ p["deep"]["kernel"]

    ranks = lx.inits.eva(fn, [spread]).ranks(params, 1, rho=4.0)
    assert ranks == {"deep/kernel": 1, "none/kernel": 1, "kernel": 1}
    ranks = lx.inits.eva(fn, [jnp.ones((4, 4)) + 0.5 * jnp.eye(4)]).ranks(
        params, 1, rho=0.5, targets=["deep", "none"]
    )
    assert list(ranks) == []


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_its_formula_in_float64(mode):
    w, ranks = np.asarray(params_of()["layers"], np.float64), (3, 1, 2)
    x = np.random.default_rng(5).normal(size=(3, 30, 8)).astype(np.float32) * np.arange(
        1, 9, dtype=np.float32
    )
    init = lx.inits.corda(lambda p, x: jnp.matmul(x, p["w"]), [x[:, :15], x[:, 15:]], mode=mode)
    before = {"w": params_of()["layers"]}
    layout = {"w": lx.Layout((0,), (1,), (2,))}
    params, lora = lx.split(before, ranks, alpha=6.0, init=init, layout=layout)
    a, b = entries(lora["w"])
    for i, r in enumerate(ranks):
        c = np.asarray(x[i], np.float64).T @ x[i]
        c = c / np.trace(c) * 8 + 0.01 * np.eye(8)
        u, s, vt = np.linalg.svd(c @ w[i])
        which = slice(0, r) if mode == "ipm" else slice(8 - r, None)
        scale = 6.0 / r
        want_a = np.linalg.inv(c) @ u[:, which] * np.sqrt(s[which] / scale)
        want = want_a @ (np.sqrt(s[which] / scale)[:, None] * vt[which])
        np.testing.assert_allclose(a[i] @ b[i], want, atol=1e-3 * np.abs(want).max())
        np.testing.assert_allclose(
            np.linalg.norm(a[i], axis=0)[:r], np.linalg.norm(want_a, axis=0), rtol=1e-3
        )
        assert not a[i][:, r:].any()
        np.testing.assert_allclose(params["w"][i], w[i] - scale * a[i] @ b[i], atol=1e-5)
    plain = lx.ranks.to_plain(before, params, lora)
    assert plain["w"].rank == (6, 2, 4) and np.abs(lx.delta(plain)["w"]).max() < 1e-5


def test_errors_name_the_weights():
    params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}

    def fn(p, x):
        return x @ p["a"]["kernel"] + lax.stop_gradient(x @ p["b"]["kernel"])

    def run(init, rank=2, given=params, **options):
        lx.split(given, rank, init=init, **options)

    x = jnp.eye(4)
    both = r"(?s)path: +a/kernel\n +b/kernel"
    for init in (lx.inits.eva(fn, [x]), lx.inits.corda(fn, [x])):
        with pytest.raises(lx.LoraError, match=r"(?s)path: +b/kernel\n +got: +zero: no batch"):
            run(init)
    straight = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]  # noqa: E731
    with pytest.raises(lx.LoraError, match=both + r"\n +got: +of rank 1, below 2"):
        run(lx.inits.eva(straight, [jnp.ones((4, 4))]))
    for init in (lx.inits.eva(straight, [x * jnp.nan]), lx.inits.corda(straight, [x * jnp.nan])):
        with pytest.raises(lx.LoraError, match=both + r"\n +got: +not finite"):
            run(init)
    abstract = jax.eval_shape(lambda: params)
    with pytest.raises(lx.LoraError, match=r"(?s)no numbers.*" + both[4:]):
        run(lx.inits.eva(straight, [x]), given=abstract)
    with pytest.raises(lx.LoraError, match=r"(?s)no numbers.*a/kernel"):
        jax.jit(lambda p: run(lx.inits.eva(straight, [x]), given=p))(params)
    with pytest.raises(lx.LoraError, match=r"(?s)a/kernel.*no init=.*lx.inits.eva\(<lambda>, batches\)"):
        run(lx.inits.eva(straight, [x]), method="vera")
    with pytest.raises(lx.LoraError, match=r"(?s)a/kernel.*alpha above 0 for init=lx.inits.corda"):
        run(lx.inits.corda(straight, [x]), alpha=0.0)
    with pytest.raises(lx.LoraError, match=r"(?s)unknown mode.*'ipm'"):
        lx.inits.corda(straight, [x], mode="top")
    with pytest.raises(lx.LoraError, match=r"(?s)more than once.*at_once=1 of 2"):
        run(lx.inits.eva(straight, iter([x]), at_once=1))
    with pytest.raises(lx.LoraError, match=r"at_once= is not valid"):
        lx.inits.eva(straight, [x], at_once=0)
    used_up = iter([x])
    list(used_up)
    with pytest.raises(lx.LoraError, match=r"(?s)no batches.*used up"):
        run(lx.inits.eva(straight, used_up))
    assert list(groups("abcde", [x], 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_an_entry_of_rank_0_needs_no_inputs():
    w = jnp.ones((2, 4, 4))
    init = lx.inits.eva(lambda p, x: x @ p["w"][1], [jnp.eye(4)])
    layout = {"w": lx.Layout((0,), (1,), (2,))}
    with pytest.raises(lx.LoraError, match=r"zero in stack entries \[0\]"):
        lx.split({"w": w}, 2, layout=layout, init=init)
    _, lora = lx.split({"w": w}, (0, 2), layout=layout, init=init)
    assert not np.asarray(lora["w"].a[0]).any() and np.asarray(lora["w"].a[1]).any()


def test_targets_with_another_init_stay_out_of_the_pass():
    params = {"a": {"kernel": jnp.eye(4)}, "b": {"kernel": jnp.eye(4)}}
    init = {"a": lx.inits.corda(lambda p, x: x @ p["a"]["kernel"], [jnp.eye(4)]), "*": "kaiming"}
    frozen, lora = lx.split(params, 2, init=init)
    plain = lx.split(params, 2)[1]["b/kernel"]
    np.testing.assert_array_equal(lora["b/kernel"].a, plain.a)
    assert (
        frozen["a"]["kernel"] is not params["a"]["kernel"] and frozen["b"]["kernel"] is params["b"]["kernel"]
    )


def test_eva_starts_from_the_inputs_of_a_quantized_base_and_corda_refuses_it():
    def fn(params, x):
        return jnp.tanh(x @ params["w1"]["kernel"]) @ params["w2"]["kernel"]

    rng = np.random.default_rng(0)
    plain = {"w1": {"kernel": rng.normal(size=(8, 6))}, "w2": {"kernel": rng.normal(size=(6, 4))}}
    stored = lx.quantize(jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), plain), "int8", block=2)
    batches = [jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)]
    (_, lora), (_, want) = (
        lx.split(p, 2, init=lx.inits.eva(fn, batches)) for p in (stored, lx.dequantize(stored))
    )
    for path, adapter in lora.items():
        np.testing.assert_allclose(np.abs(adapter.a), np.abs(want[path].a), atol=1e-5)
    for init in (lx.inits.corda(fn, batches), lx.inits.lora_ga(lambda p, x: fn(p, x).sum(), batches)):
        with pytest.raises(lx.LoraError, match="takes a part of W"):
            lx.split(stored, 2, init=init)
