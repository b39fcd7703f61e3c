"""Adapters side by side: lanes under vmap equal each adapter alone; alpha and rank as arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn.sweeps.lanes import LaneLoRA
from lorax_fn.transform.lanes import Lanes

PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (8, 6))},
    "layers": {"kernel": jax.random.normal(jax.random.key(1), (2, 6, 6)) / 2},
}
LAYOUTS = {"up": lx.Layout((), (0,), (1,)), "layers": lx.Layout((0,), (1,), (2,))}
X = jax.random.normal(jax.random.key(2), (3, 8))


def model(params, x):
    x = jnp.tanh(x @ params["up"]["kernel"])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]


def trained(rank, seed=0, **options):
    _, lora = lx.split(PARAMS, rank, layout=LAYOUTS, **options)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    moved = jax.tree.map(
        lambda x, t: x + 0.3 * jax.random.normal(next(keys), x.shape) if t else x, lora, lx.mask(lora)
    )
    if isinstance(rank, dict):  # pads of uneven stacks stay zero
        _, start = lx.split(PARAMS, rank, layout=LAYOUTS, init="gaussian")
        used = jax.tree.map(lambda x: jnp.broadcast_to((x != 0).any(-2, keepdims=True), x.shape), start)
        a = used["layers/kernel"].a.astype(jnp.float32)
        layers, b = moved["layers/kernel"], jnp.swapaxes(a[:, :1], -1, -2)
        moved["layers/kernel"] = dataclasses.replace(layers, a=layers.a * a, b=layers.b * b)
    return moved


CASES = {
    "ranks": [dict(rank=1), dict(rank=4, alpha=8.0), dict(rank=6)],
    "scalings": [dict(rank=2), dict(rank=3, scaling="rslora")],
    "a rank per layer": [dict(rank={"layers": (1, 3), "*": 2}), dict(rank=4)],
    "dora": [dict(rank=2, method="dora"), dict(rank=5, method="dora", alpha=3.0)],
    "lora_fa": [dict(rank=2, method="lora_fa"), dict(rank=5, method="lora_fa")],
    "loha": [dict(rank=2, method="loha"), dict(rank=2, method="loha", alpha=3.0)],
    "vera": [dict(rank=4, method="vera"), dict(rank=4, method="vera", key=jax.random.key(7))],
}


SLOW = ("lora_fa", "dora", "loha", "scalings")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_each_lane_equals_its_adapter_alone(name):
    loras = [trained(seed=i, **case) for i, case in enumerate(CASES[name])]
    apply = lx.adapt(model, fallback="error")

    @jax.jit
    def lanes(lora):
        return jax.vmap(lambda lora: jax.value_and_grad(lambda x: apply(PARAMS, lora, x).sum())(X))(lora)

    values, grads = lanes(lx.stack(loras))
    for i, lora in enumerate(loras):
        value, grad = jax.value_and_grad(lambda x, lora=lora: apply(PARAMS, lora, x).sum())(X)
        np.testing.assert_allclose(values[i], value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-4, atol=1e-5)
    for back, lora in zip(lx.unstack(lx.stack(loras)), loras, strict=True):
        for path, adapter in lora.items():
            np.testing.assert_allclose(
                back[path].weight(jnp.zeros(adapter.shape)),
                adapter.weight(jnp.zeros(adapter.shape)),
                atol=1e-5,
            )
            for field in adapter.trained():
                assert np.shape(getattr(back[path], field)) == np.shape(getattr(adapter, field))
            if name != "scalings" and "alpha" in adapter.numbers():
                assert back[path].alpha == adapter.alpha and back[path].rank == adapter.rank


def test_padding_stays_zero_and_lanes_train_alike():
    import optax

    loras = [lx.split(PARAMS, r, layout=LAYOUTS)[1] for r in (1, 4)]
    apply, tx = lx.adapt(model), lx.train_only(optax.adamw(0.01, weight_decay=0.1))

    def step(lora, state):
        grads = jax.grad(lambda lora: jnp.square(apply(PARAMS, lora, X) - 1.0).mean())(lora)
        updates, state = tx.update(grads, state, lora)
        return jax.tree.map(lambda w, u, t: w + u if t else w, lora, updates, lx.mask(lora)), state

    lanes = lx.stack(loras)
    states = jax.vmap(tx.init)(lanes)
    many = jax.jit(jax.vmap(step))
    one = jax.jit(step)
    for _ in range(3):
        lanes, states = many(lanes, states)
    assert float(jnp.abs(lanes["up/kernel"].a[0, :, 1:]).max()) == 0.0
    assert float(jnp.abs(lanes["up/kernel"].b[0, 1:]).max()) == 0.0
    for lora, lane in zip(loras, lx.unstack(lanes), strict=True):
        state = tx.init(lora)
        for _ in range(3):
            lora, state = one(lora, state)
        for path in lora:
            np.testing.assert_allclose(lane[path].b, lora[path].b, rtol=1e-4, atol=1e-6)


def test_alpha_as_an_array_compiles_once_and_is_differentiable():
    apply = lx.adapt(model)
    lora = trained(2, alpha=jnp.float32(4.0))
    assert jax.tree.leaves(lx.mask(lora)) == [True, True, False] * 2
    traces = []

    @jax.jit
    def loss(lora):
        traces.append(1)
        return apply(PARAMS, lora, X).sum()

    def at(alpha):
        return {path: dataclasses.replace(adapter, alpha=alpha) for path, adapter in lora.items()}

    for alpha in (1.0, 2.0, 4.0):
        static = apply(PARAMS, at(alpha), X).sum()
        np.testing.assert_allclose(loss(at(jnp.float32(alpha))), static, rtol=1e-5)
        merged = model(lx.merge(PARAMS, at(jnp.float32(alpha))), X).sum()
        np.testing.assert_allclose(merged, static, rtol=1e-5)
    assert len(traces) == 1
    by_vmap = jax.vmap(lambda alpha: apply(PARAMS, at(alpha), X).sum())(jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(by_vmap[1], apply(PARAMS, at(2.0), X).sum(), rtol=1e-5)
    slope = jax.grad(lambda alpha: apply(PARAMS, at(alpha), X).sum())(jnp.float32(2.0))
    difference = [apply(PARAMS, at(2.0 + d), X).sum() for d in (-0.05, 0.05)]
    np.testing.assert_allclose(slope, (difference[1] - difference[0]) / 0.1, rtol=1e-2)


def test_split_under_jit_takes_a_traced_alpha():
    @jax.jit
    def scales(alpha):
        _, lora = lx.split(PARAMS, 4, alpha=alpha, layout=LAYOUTS, init="pissa")
        return lora["up/kernel"].scale, lora["up/kernel"].a

    scale, a = scales(jnp.float32(8.0))
    assert float(scale) == 2.0
    np.testing.assert_allclose(
        a, lx.split(PARAMS, 4, alpha=8.0, layout=LAYOUTS, init="pissa")[1]["up/kernel"].a, rtol=1e-5
    )


def test_verbs_recognize_stacked_adapters():
    lanes = lx.stack([trained(2), trained(3)])
    uses = [
        lambda: lx.adapt(model)(PARAMS, lanes, X),
        lambda: lx.merge(PARAMS, lanes),
        lambda: lx.delta(lanes),
        lambda: lx.summary(PARAMS, lanes),
        lambda: lx.ranks.effective_rank(lanes),
        lambda: lx.ranks.truncate(lanes, 1),
        lambda: lx.ranks.resize(lanes, 8),
        lambda: lx.ranks.sensitivity(lanes, lanes),
    ]
    for use in uses:
        with pytest.raises(lx.LoraError, match="vmap"):
            use()


def test_what_does_not_go_side_by_side_is_named():
    with pytest.raises(lx.LoraError, match="no adapters"):
        lx.stack([])
    with pytest.raises(lx.LoraError, match="paths"):
        lx.stack([trained(2), {"up/kernel": trained(2)["up/kernel"]}])
    with pytest.raises(lx.LoraError, match="methods"):
        lx.stack([trained(2), trained(2, method="dora")])
    with pytest.raises(lx.LoraError, match="ranks or other facts"):
        lx.stack([trained(2, method="loha"), trained(3, method="loha")])
    with pytest.raises(lx.LoraError, match=r"rank=3, or lx.ranks.truncate"):
        lx.stack([trained(2), trained(3)], rank=2)
    with pytest.raises(lx.LoraError, match="not stacked alike"):
        lx.unstack(trained(2))


def test_a_convolution_of_lanes_is_not_built_in_full():
    """With alpha and rank as arrays, the scale of each lane is one number that is not static."""
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 6)), "bias": jnp.zeros(6)}}
    layout = {"conv/kernel": lx.Layout(inputs=(0, 1), outputs=(2,))}
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))

    def conv(params, x):
        w, names = params["conv"]["kernel"], ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=names)

    loras = [
        lx.split(params, rank, targets="conv", layout=layout, key=jax.random.key(rank))[1] for rank in (1, 3)
    ]
    loras = [jax.tree.map(lambda leaf: leaf + 0.1, lora) for lora in loras]
    apply = lx.adapt(conv, fallback="error")
    made = jax.vmap(apply, (None, 0, None))(params, lx.stack(loras), x)
    for lane, lora in zip(made, loras, strict=True):
        np.testing.assert_allclose(lane, conv(lx.merge(params, lora), x), rtol=1e-5, atol=1e-5)


MODELS = {
    "layers": model,
    "turned and doubled": lambda params, x: x @ (2 * params["up"]["kernel"]) @ params["up"]["kernel"].T,
}


@pytest.mark.parametrize("broken", [None, "a", pytest.param("b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_lanes_side_by_side_are_each_its_own(name, broken):
    """Also when a factor of one of them is not finite: then that one is NaN, and no other."""
    loras, own = [trained(rank, seed=rank) for rank in (2, 3, 5)], Lanes(((1, 2), (1, 3), (1, 5)), True)
    if broken:
        bad = {path: dataclasses.replace(x, **{broken: x.a * jnp.nan if broken == "a" else x.b * jnp.nan})
               for path, x in loras[1].items()}  # fmt: skip
        loras[1] = bad
    apply = lx.adapt(MODELS[name], fallback="error")
    fields = [field.name for field in dataclasses.fields(lx.LoRA)]

    def loss(lora, x):
        lora = {p: LaneLoRA(**{n: getattr(y, n) for n in fields}, lanes=own) for p, y in lora.items()}
        return jnp.sum(jnp.sin(apply(PARAMS, lora, x) / 50))

    xs = jnp.stack([X, X[::-1], X + 1])
    stacked = lx.stack(loras)
    got = jax.jit(jax.grad(lambda lora: jax.vmap(loss)(lora, xs).sum(), allow_int=True))(stacked)
    values = jax.vmap(loss)(stacked, xs)
    for lane, (lora, x) in enumerate(zip(loras, xs, strict=True)):
        value, want = jax.value_and_grad(lambda a, x=x: jnp.sum(jnp.sin(apply(PARAMS, a, x) / 50)))(lora)
        np.testing.assert_allclose(values[lane], value, rtol=2e-5)
        assert np.isfinite(value) == (lane != 1 or broken is None)
        if np.isfinite(value):
            for path, grads in want.items():
                rank = grads.a.shape[-1]
                a, b = got[path].a[lane][..., :rank], got[path].b[lane][..., :rank, :]
                np.testing.assert_allclose(a, grads.a, rtol=2e-5, atol=1e-5)
                np.testing.assert_allclose(b, grads.b, rtol=2e-5, atol=1e-5)
