"""The contract of every method: a table of rows, and every law of each row on one model of all layouts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lorax_fn as lx
from lorax_fn.methods.table import METHODS

# name -> options of split; every method of split must be here
ROWS = {name: {"method": name} for name in METHODS} | {
    "full": {"targets": (), "full": ["embed", "conv", "layers", "out"]},
    "rows": {"targets": ["conv", "layers", "out"], "rows": {"embed": [8, 3, 1]}},
}
ADDITIVE = [name for name in METHODS if METHODS[name].adds]
EXACT_AT_INIT = [name for name in ROWS if name != "dora"]  # their change is exactly zero
LAYOUTS = {
    "embed": lx.Layout((), (0,), (1,)),
    "conv": lx.Layout((), (0, 1), (2,)),
    "layers": lx.Layout((0,), (1,), (2,)),
    "out": lx.Layout((), (0,), (1, 2)),
}
IDS = np.array([[0, 3, 3, 8], [5, 1, 2, 8]])


def params_of(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"embed": (9, 6), "conv": (3, 6, 6), "layers": (2, 6, 6), "out": (6, 2, 3)}
    return {path: jnp.asarray(0.5 * rng.normal(size=shape), dtype) for path, shape in shapes.items()}


def model(params, ids):
    """A lookup, a convolution, layers scanned over a stack, and a product with two output axes."""
    x = params["embed"][ids]
    x = lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return jnp.einsum("btd,dhk->bthk", x, params["out"])


def split(name, params=None, **options):
    params = params_of() if params is None else params
    options = {"rank": 2, "alpha": 6.0, "targets": list(LAYOUTS), "layout": LAYOUTS} | ROWS[name] | options
    if name == "vera":  # it has no scale, and says so where one is asked for
        options = {key: value for key, value in options.items() if key not in ("alpha", "scaling")}
    return lx.split(params, **options)


def moved(lora, seed=1):
    """Every float array of the adapters far from where it started."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), lora)


def close(got, want, tol, what=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max(), err_msg=what)


def test_the_table_is_complete_and_every_row_adapts_all_layouts():
    for name in ROWS:
        _, lora = split(name)
        assert list(lora) == sorted(LAYOUTS), name
    assert set(METHODS) < set(ROWS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("name", ROWS)
def test_merged_weights_at_init_are_the_base(name, scaling):
    params, lora = split(name, scaling=scaling)
    for path, w in lx.merge(params, lora).items():
        assert w.dtype == params[path].dtype and w.shape == params[path].shape
        if name in EXACT_AT_INIT:
            np.testing.assert_array_equal(w, params[path])
        else:
            close(w, params[path], 1e-6, path)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_the_scale_is_alpha_over_rank_or_its_root(name, scaling):
    _, lora = split(name, scaling=scaling)
    change = lx.delta(moved(lora))
    _, unit = split(name, scaling="lora", alpha=2.0)  # rank 2: scale 1
    ratio = 1.0 if name == "vera" else 6.0 / (2.0 if scaling == "lora" else math.sqrt(2.0))
    for path, dw in lx.delta(moved(unit)).items():
        close(change[path], ratio * np.asarray(dw, np.float64), 2e-6, path)


@functools.cache
def everything():
    """The adapted model at init, and adapted and merged after training, under every transformation."""
    adapted = lx.adapt(model, fallback="error")
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 2, 3)), jnp.float32)

    def grads(forward, lora):
        return jax.value_and_grad(
            lambda lora: (lambda y: ((y * weights).sum(), y))(forward(lora)), has_aux=True
        )(lora)

    @jax.jit
    def run(params, start, lora):
        def apply(lora):
            return adapted(params, lora, IDS)

        (_, y), by_adapt = grads(apply, lora)
        (_, merged), by_merge = grads(lambda lora: model(lx.merge(params, lora), IDS), lora)
        (_, again), by_checkpoint = grads(jax.checkpoint(apply), lora)
        mapped = jax.vmap(lambda ids: adapted(params, lora, ids[None])[0])(jnp.asarray(IDS))
        return {
            "base": model(params, IDS),
            "start": apply(start),
            "values": (y, merged),
            "gradients": (by_adapt, by_merge),
            "checkpoint": ((again, by_checkpoint), (y, by_adapt)),
            "vmap": (mapped, y),
        }

    return run


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ROWS)
def test_adapt_equals_merge_in_values_and_gradients_under_transformations(name):
    params, start = split(name)
    lora = moved(start)
    got = everything()(params, start, lora)
    close(got["start"], got["base"], 4 * 2.0**-23 if name in EXACT_AT_INIT else 1e-5)
    assert np.abs(np.asarray(got["values"][0]) - np.asarray(got["base"])).max() > 0.01
    for law in ("values", "gradients", "checkpoint", "vmap"):
        one, other = (dict(jax.tree_util.tree_leaves_with_path(side)) for side in got[law])
        assert one.keys() == other.keys()
        for path, leaf in one.items():
            close(leaf, other[path], 3e-5, f"{law} {jax.tree_util.keystr(path)}")
    eager = lx.adapt(model, fallback="error")(params, lora, IDS)
    close(eager, got["values"][0], 1e-5, "eager")
    for flag, gradient in zip(
        jax.tree.leaves(lx.mask(lora)), jax.tree.leaves(got["gradients"][0]), strict=True
    ):
        assert bool(np.asarray(gradient).any()) == flag  # a frozen field: exactly zero; every other: some


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ROWS)
def test_dtypes_are_kept_and_abstract_splits_agree(name):
    params = params_of(jnp.bfloat16)
    _, lora = split(name, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in lx.merge(params, moved(lora)).values()} == {jnp.dtype(jnp.bfloat16)}
    out = jax.eval_shape(lx.adapt(model, fallback="error"), params, lora, IDS)
    assert out.dtype == jnp.bfloat16
    shapes = jax.eval_shape(lambda: params)
    frozen, abstract = split(name, shapes)
    assert frozen == shapes and jax.tree.structure(abstract) == jax.tree.structure(lora)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(lora)
    ]
    assert {p: x.shape for p, x in lx.merge(shapes, abstract).items()} == {
        p: x.shape for p, x in params.items()
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ROWS)
def test_training_moves_no_frozen_bit_and_goes_on_alike_after_save_and_load(name, tmp_path):
    params, lora = split(name)
    adapted, tx = lx.adapt(model, fallback="error"), optax.adamw(0.05, weight_decay=0.1)

    def loss_fn(params, lora, ids, key):
        return jnp.mean(jnp.square(adapted(params, lora, ids) - 1.0))

    step = jax.jit(lx.make_train_step(loss_fn, tx))
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    losses = []
    for _ in range(5):
        state, metrics = step(state, params, IDS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for flag, old, new in zip(*map(jax.tree.leaves, (lx.mask(lora), lora, state.lora)), strict=True):
        assert np.array_equal(old, new) != flag
    lx.checkpoint.save(tmp_path / "adapter", state.lora, params=params)
    loaded = lx.checkpoint.load(tmp_path / "adapter", params=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(state.lora)
    want, _ = step(state, params, IDS)
    got, _ = step(dataclasses.replace(state, lora=loaded), params, IDS)
    jax.tree.map(np.testing.assert_array_equal, got.lora, want.lora)


# What each method says of itself ----------------------------------------------------------------------


def test_loha_reaches_rank_r_squared():
    _, lora = split("loha", targets=["layers"])
    values = np.asarray(lx.ranks.effective_rank(moved(lora))["layers"].values)
    assert values.shape == (2, 4)
    ranks = [np.linalg.matrix_rank(dw) for dw in np.asarray(lx.delta(moved(lora))["layers"])]
    assert ranks == [4, 4]


def test_lora_xs_moves_w_between_its_own_singular_vectors():
    params, lora = split("lora_xs")
    core = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 2)), jnp.float32)
    adapter = dataclasses.replace(lora["layers"], core=core)
    for i, w in enumerate(np.asarray(params["layers"], np.float64)):
        u, sizes, vt = np.linalg.svd(w)
        np.testing.assert_allclose(
            np.abs(u[:, :2].T @ adapter.a[i]), np.diag(sizes[:2]), atol=1e-5 * sizes[0]
        )
        np.testing.assert_allclose(np.abs(vt[:2] @ adapter.b[i].T), np.eye(2), atol=1e-5)
        a, b = np.asarray(adapter.a[i], np.float64), np.asarray(adapter.b[i], np.float64)
        close(adapter.delta()[i], 3.0 * a @ np.asarray(core[i], np.float64) @ b, 1e-6)
    trained = sum(np.size(x) for x, flag in zip(
        jax.tree.leaves(adapter), jax.tree.leaves(lx.mask(adapter)), strict=True) if flag)  # fmt: skip
    assert trained == 2 * 2 * 2


def test_lokr_is_the_kronecker_product():
    for shape in ((12, 6), (6, 20)):
        _, lora = lx.split({"kernel": jnp.ones(shape)}, 2, alpha=6.0, method="lokr")
        adapter = moved(lora)["kernel"]
        w1, w2 = np.asarray(adapter.w1), np.asarray(adapter.a) @ np.asarray(adapter.b)
        close(adapter.delta(), 3.0 * np.kron(w1, w2), 1e-6)
        ranks = [np.linalg.matrix_rank(x, 1e-4) for x in (adapter.delta(), w1, w2)]
        assert ranks[0] == ranks[1] * ranks[2]


def test_dora_norms_are_its_magnitude_and_a_zero_column_stays():
    params = params_of()
    params["out"] = params["out"].at[:, 1, 2].set(0.0)
    params, lora = split("dora", params)
    np.testing.assert_array_equal(lx.merge(params, lora)["out"][:, 1, 2], np.zeros(6))
    grads = jax.grad(lambda lora: jnp.sum(lx.adapt(model)(params, lora, IDS)))(lora)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    trained = moved(lora)
    for path, w in lx.merge(params, trained).items():
        norms = np.sqrt(np.square(np.asarray(w, np.float64)).sum(LAYOUTS[path].inputs))
        close(norms, np.abs(trained[path].magnitude), 1e-5, path)


def test_rows_are_replaced_exactly_and_no_other_row_moves():
    table = params_of()["embed"]
    params, lora = lx.split({"embed": table, "n": jnp.ones(3)}, targets=(), rows={"embed": np.array([8, 3])})
    assert list(lora) == ["embed"] and lora["embed"].ids == (8, 3) and lx.mask(lora)["embed"].values is True
    new = moved(lora)
    want = np.array(table)
    want[[8, 3]] = new["embed"].values
    np.testing.assert_array_equal(lx.merge(params, new)["embed"], want)

    def tied(params, ids):
        return jnp.tanh(params["embed"][ids]) @ params["embed"].T

    adapted = lx.adapt(tied, fallback="error")
    close(adapted(params, new, IDS), tied({"embed": want}, IDS), 1e-6)
    by_table = jax.grad(lambda p: jnp.sum(jnp.square(adapted(p, new, IDS))))(params)["embed"]
    np.testing.assert_allclose(by_table[np.array([8, 3])], 0.0, atol=1e-5)  # those rows are not read
    text = str(lx.summary(params, new))
    assert "Rows" in text and " 12 " in text
    with pytest.raises(lx.LoraError, match=r"(?s)does not fit.*embed"):
        lx.merge({"embed": table[:8]}, new)


def test_vera_shares_its_random_factors():
    _, lora = split("vera")
    wide, narrow = np.asarray(lora["embed"].a), np.asarray(lora["out"].a)
    np.testing.assert_allclose(wide[:6] * math.sqrt(9 / 6), narrow, rtol=1e-6)


@pytest.mark.parametrize("alpha", [4.0, 32.0])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_first_adam_step_scales_as_alpha_over_r_on_the_data_and_its_root_elsewhere(scaling, alpha):
    """From B = 0 a sign step e moves outputs by 0.4607 s e r on the data and 0.4607 s e sqrt(r) off it."""
    n, m, eta = 512, 256, 1e-3
    rng = np.random.default_rng(0)
    for r in (16, 64):
        _, lora = lx.split({"kernel": jnp.zeros((n, m))}, r, alpha=alpha, scaling=scaling)
        adapter = lora["kernel"]
        on, off = [], []
        for _ in range(40):
            x, other = rng.normal(size=n), rng.normal(size=n)
            # the gradient by B is (x A)^T dy: its signs are the outer product of theirs
            b = eta * np.sign(x @ np.asarray(adapter.a))[:, None] * np.sign(rng.normal(size=m))[None]
            on.append(np.abs(adapter.scale * (x @ np.asarray(adapter.a)) @ b).mean())
            off.append(np.abs(adapter.scale * (other @ np.asarray(adapter.a)) @ b).mean())
        s = alpha / r if scaling == "lora" else alpha / math.sqrt(r)
        assert np.mean(on) == pytest.approx(0.4607 * s * eta * r, rel=0.06)
        assert np.mean(off) == pytest.approx(0.4607 * s * eta * math.sqrt(r), rel=0.35)


# Cost -------------------------------------------------------------------------------------------------

D, H, TOKENS = 512, 8, (4, 256)
BLOCK = {name: lx.Layout((), (0,), (1, 2)) for name in "qkv"} | {
    "o": lx.Layout((), (0, 1), (2,)),
    "up": lx.Layout((), (0,), (1,)),
    "down": lx.Layout((), (0,), (1,)),
}


def block(params, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 8.0, -1)
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), params["o"])
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


@functools.cache
def step_cost(method):
    """FLOPs and bytes of temporaries of one compiled training step on a transformer block."""
    shapes = {name: (D, H, D // H) for name in "qkv"} | {
        "o": (H, D // H, D),
        "up": (D, 4 * D),
        "down": (4 * D, D),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    _, lora = lx.split(params, 16, method=method, targets=list(shapes), layout=BLOCK)
    run, tx = lx.adapt(block, fallback="error"), optax.adam(1e-3)
    step = lx.make_train_step(lambda p, lora, x, key: jnp.mean(jnp.square(run(p, lora, x))), tx)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda lora: lx.TrainState.create(lora=lora, tx=tx, key=key), lora)
    x = jax.ShapeDtypeStruct((*TOKENS, D), jnp.float32)
    compiled = jax.jit(step).lower(state, params, x).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def test_dora_costs_at_most_a_tenth_more_flops_and_one_output_a_weight():
    """On a larger model (benchmarks/methods.py): 1.018 of LoRA's FLOPs, 0.97 of that allowance."""
    (flops, temp), (base_flops, base_temp) = step_cost("dora"), step_cost("lora")
    outputs = math.prod(TOKENS) * (5 * D + 4 * D) * 4  # q, k, v, o and down; up
    assert flops <= 1.03 * base_flops, flops / base_flops
    assert temp <= base_temp + outputs, temp / base_temp


def test_lora_fa_keeps_less_than_lora():
    """Measured: 0.957 of LoRA's temporaries; x @ A is kept where LoRA keeps x."""
    (flops, temp), (base_flops, base_temp) = step_cost("lora_fa"), step_cost("lora")
    assert flops < base_flops and temp < 0.98 * base_temp, (flops / base_flops, temp / base_temp)
