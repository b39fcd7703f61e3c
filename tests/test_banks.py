"""Banks: a row of a mixed batch is that of its adapter alone, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bank_model import LAYOUT, PARAMS, TOKENS, apply, drawn, model, near
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from rule_cases import RULE_CASES, make_adapter, normal

import lorax_fn as lx

# One row of each kind of rule runs always, the whole matrix with -m slow.
ALWAYS = {"dense", "attention out", "left", "layers by iteration", "ragged", "lookup", "conv"}
CASES = [case if case.name in ALWAYS else pytest.param(case, marks=pytest.mark.slow) for case in RULE_CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_of_every_rule_equal_each_adapter_alone(case):
    kinds = ((1, 2.0, 10), (3, 1.5, 20), (2, -1.0, 30))
    loras = [{"w": make_adapter(case.shape, case.layout, *kind)} for kind in kinds]
    bank = lx.bank(loras, capacity=4)
    apply, params = lx.adapt(case.fn, fallback="allow"), {"w": case.weight}
    xs = normal(3, (4, *case.x)) if isinstance(case.x, tuple) else jnp.stack([case.input] * 4)
    ids, weights = [2, -1, 0, 1], normal(5, (4,))

    @jax.jit
    def run(params, bank):
        def one(i, x):
            return apply(params, bank[i], x)

        rows = jax.vmap(one)(jnp.array(ids), xs)
        alone = [
            case.fn(lx.merge(params, loras[i] if i >= 0 else {}), x) for i, x in zip(ids, xs, strict=True)
        ]
        delta = sum(w * lx.delta(lora)["w"] for w, lora in zip(weights, loras, strict=False))
        return (
            rows,
            jnp.stack(alone),
            apply(params, bank[weights], xs[0]),
            case.fn({"w": params["w"] + delta}, xs[0]),
        )

    rows, alone, mixed, want = run(params, bank)
    scale = 1 + np.abs(alone).max()
    np.testing.assert_allclose(rows, alone, rtol=0, atol=case.tol * scale)
    np.testing.assert_allclose(mixed, want, rtol=0, atol=case.tol * scale)


IDS = jnp.array([1, -1, 0, 2, 1])
METHODS = {
    "lora": [dict(rank=1), dict(rank=3, alpha=2.0), dict(rank=2, scaling="rslora")],
    "dora": [dict(rank=2, method="dora"), dict(rank=3), dict(rank=1, method="dora", alpha=3.0)],
    "others": [dict(rank=2, method="vera"), dict(rank=2, method="lora_fa"), dict(rank=2, method="loha")],
    "cores": [
        dict(rank=2, method={"experts": "lokr", "*": "lora_xs"}),
        dict(rank=2, method="lora_xs"),
        dict(rank=3),
    ],
}


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "others", "cores"))]
)
def test_rows_of_a_model_equal_single_runs_and_so_do_gradients(name):
    loras = [drawn(seed=i, **options) for i, options in enumerate(METHODS[name])]
    bank = lx.bank(loras)
    scored = normal(6, (5, 4, 11))

    @jax.jit
    def mixed(bank):
        rows = jax.vmap(lambda i, x: apply(PARAMS, bank[i], x))(IDS, TOKENS)
        return (rows * scored).sum(), rows

    @jax.jit
    def alone(lora, x, score):
        logits = apply(PARAMS, lora, x)
        return (logits * score).sum(), logits

    (_, rows), grads = jax.value_and_grad(mixed, has_aux=True)(bank)
    want = [jax.tree.map(jnp.zeros_like, lora) for lora in loras]
    for row, i in enumerate(IDS):
        lora = loras[i] if i >= 0 else {}
        (_, logits), grad = jax.value_and_grad(alone, has_aux=True)(lora, TOKENS[row], scored[row])
        near(rows[row], logits)
        if i >= 0:
            want[i] = jax.tree.map(jnp.add, want[i], grad)
    got = lx.Bank(grads.slots)
    for i in range(3):
        for path, adapter in bank.get(i).items():
            if type(adapter) is not type(loras[i][path]):
                continue  # kept as the LoRA of its factors
            s = len(adapter.layout.stack)
            for field in adapter.trained():
                if (value := getattr(want[i][path], field)) is None:
                    continue
                held = getattr(got.slots[path], field) if field in "ab" else got.slots[path].extras[field]
                held = jnp.moveaxis(held, s, 0)[i]
                inside = tuple(slice(n) for n in value.shape)
                near(held[inside], value, 5e-5)
                assert np.abs(held).sum() == pytest.approx(np.abs(held[inside]).sum())  # pads get nothing
            for field in adapter.frozen:
                assert not jnp.moveaxis(getattr(got.slots[path], field), s, 0)[i].any()


def test_unused_slots_scales_and_other_rows_leave_a_gradient_alone():
    bank = lx.bank([drawn(2, i) for i in range(3)], capacity=4)

    def grad(ids, tokens):
        loss = lambda bank: jax.vmap(lambda i, x: apply(PARAMS, bank[i], x))(ids, tokens).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(bank).slots

    one = grad(jnp.array([1]), TOKENS[:1])
    many = grad(jnp.array([1, 0, 0, -1]), TOKENS[:4])
    for path, slots in many.items():
        s = len(slots.layout.stack)
        for field in "ab":
            each = jnp.moveaxis(getattr(slots, field), s, 0)
            assert each[0].any() and not each[2:].any()
            near(each[1], jnp.moveaxis(getattr(one[path], field), s, 0)[1])
        assert not slots.scale.any() and not slots.alpha.any()
    trains = lx.mask(bank).slots["table"]
    assert trains.a and trains.b and not (trains.scale or trains.alpha or trains.ranks or trains.kind)


def test_a_row_looks_up_its_own_entries_and_not_a_factor():
    """A factor is [4096, 4]; eight rows of three tokens need 24 rows of it, also for the gradient."""
    rows, vocabulary = 8, 4096
    params = {"table": normal(0, (vocabulary, 6))}
    layout = {"table": lx.Layout((), (0,), (1,))}
    loras = [lx.split(params, 4, targets=["table"], layout=layout)[1] for _ in range(3)]
    look_up = lx.adapt(lambda params, tokens: params["table"][tokens])

    def loss(bank, ids, tokens):
        return jax.vmap(lambda i, t: look_up(params, bank[i], t))(ids, tokens).sum()

    bank, ids = lx.bank(loras), jnp.arange(rows) % 3
    program = jax.jit(jax.grad(loss)).lower(bank, ids, jnp.zeros((rows, 3), jnp.int32)).compile()
    slots = sum(x.nbytes for x in jax.tree.leaves(bank))
    assert program.memory_analysis().temp_size_in_bytes < 2 * slots < rows * vocabulary * 4 * 4


def test_a_slot_that_holds_nan_hurts_no_other_row():
    loras = [drawn(2, i) for i in range(2)]
    loras[0] = jax.tree.map(lambda x: x * jnp.nan, loras[0])
    rows = jax.vmap(lambda i, x: apply(PARAMS, lx.bank(loras)[i], x))(jnp.array([-1, 1, 0]), TOKENS[:3])
    near(rows[0], model(PARAMS, TOKENS[0]))
    assert np.isfinite(rows[1]).all() and np.isnan(rows[2]).all()


def test_training_all_slots_is_training_each():
    loras = [drawn(r, i) for i, r in enumerate((1, 3))]
    tx = lx.train_only(optax.adam(0.05))
    ids = jnp.array([0, 1, 1])

    def step(tree, loss, state):
        grads = jax.grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    def of_bank(bank):
        each = jax.vmap(lambda i, x: jnp.square(apply(PARAMS, bank[i], x)).sum())(ids, TOKENS[:3])
        return each.sum()

    bank = lx.bank(loras)
    state, run = tx.init(bank), jax.jit(lambda bank, state: step(bank, of_bank, state))
    for _ in range(3):
        bank, state = run(bank, state)
    for i, lora in enumerate(loras):
        mine = TOKENS[:3][ids == i]
        loss = lambda lora, mine=mine: sum(jnp.square(apply(PARAMS, lora, x)).sum() for x in mine)  # noqa: E731
        state, run = tx.init(lora), jax.jit(lambda lora, state, loss=loss: step(lora, loss, state))
        for _ in range(3):
            lora, state = run(lora, state)
        for path, adapter in bank.get(i).items():
            near(adapter.a, lora[path].a)
            near(adapter.b, lora[path].b)


def test_ids_and_weights_per_token_under_scan_and_in_decode():
    loras = [drawn(2, i) for i in range(2)]
    bank, x = lx.bank(loras), normal(8, (3, 4, 6))
    dense = lx.adapt(lambda params, x: jnp.tanh(x @ params["table"].T), fallback="error")
    ids = jnp.array([[0, 0, 1, 1], [-1, 1, -1, 0], [1, 1, 1, 1]])  # the first prompt switches half-way
    got = jax.vmap(jax.vmap(lambda i, x: dense(PARAMS, bank[i], x)))(ids, x)
    weights = normal(9, (3, 4, 2))
    mixed = jax.vmap(jax.vmap(lambda w, x: dense(PARAMS, bank[w], x)))(weights, x)
    delta = jnp.stack([lx.delta(lora)["table"] for lora in loras])
    for b in range(3):
        for t in range(4):
            w = PARAMS["table"] + (delta[ids[b, t]] if ids[b, t] >= 0 else 0.0)
            near(got[b, t], jnp.tanh(x[b, t] @ w.T))
            w = PARAMS["table"] + (weights[b, t, :, None, None] * delta).sum(0)
            near(mixed[b, t], jnp.tanh(x[b, t] @ w.T))

    # A loop of decoding: the adapter of each row and step is data, and the cache is of other in_axes.
    def decode(ids, first):
        def step(carry, i):
            x, cache = carry
            x = dense(PARAMS, bank[i], x + cache)[:6]
            return (x, cache + x), x

        return lax.scan(step, (first, jnp.zeros(6)), ids)[1]

    steps = jax.jit(jax.vmap(decode, in_axes=(0, 1)))(ids, x[:, 0].T)
    for b in range(3):
        out, cache = x[b, 0], jnp.zeros(6)
        for t in range(4):
            w = PARAMS["table"] + (delta[ids[b, t]] if ids[b, t] >= 0 else 0.0)
            out = jnp.tanh((out + cache) @ w.T)[:6]
            cache = cache + out
            near(steps[b, t], out)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_mixtures_are_exact_and_one_hot_is_one_adapter(method):
    loras = [drawn(2, i, method=method) for i in range(3)]
    bank, weights = lx.bank(loras), jnp.array([0.5, -0.25, 1.5])
    changes = [jax.tree.map(jnp.subtract, lx.merge(PARAMS, lora), PARAMS) for lora in loras]
    mixed = jax.tree.map(
        lambda w, *d: w + sum(x * y for x, y in zip(weights, d, strict=True)), PARAMS, *changes
    )
    got = jax.jit(lambda w: apply(PARAMS, bank[w], TOKENS[0]))(weights)
    near(got, model(mixed, TOKENS[0]), 2e-5)
    for path, leaf in lx.merge(PARAMS, bank[weights])["layers"].items():
        near(leaf, mixed["layers"][path])
    one = apply(PARAMS, bank[jnp.array([0.0, 1.0, 0.0])], TOKENS[0])
    near(one, model(lx.merge(PARAMS, loras[1]), TOKENS[0]))
    np.testing.assert_allclose(
        lx.merge(PARAMS, bank[1])["table"], lx.merge(PARAMS, loras[1])["table"], atol=1e-6
    )


def test_quantized_bases_dropout_and_two_banks():
    params = lx.quantize(PARAMS, "int8", targets=["gate", "experts"], block=2, layout=LAYOUT)
    loras = [drawn(2, i) for i in range(2)]
    bank = lx.bank(loras)
    rows = jax.vmap(lambda i, x: apply(params, bank[i], x))(IDS[:3], TOKENS[:3])
    for row, i in enumerate([1, -1, 0]):
        want = model(lx.merge(params, {} if i < 0 else loras[i]), TOKENS[row])
        near(rows[row], want, 2e-5)
    twice = lx.adapt(apply, fallback="error")
    both = jax.vmap(lambda i, j, x: twice(PARAMS, bank[i], bank[j], x))(
        IDS[:2], jnp.array([0, 1]), TOKENS[:2]
    )
    for row, (i, j) in enumerate([(1, 0), (-1, 1)]):
        pair = ([(1.0, loras[i])] if i >= 0 else []) + [(1.0, loras[j])]
        near(both[row], apply(PARAMS, lx.combine(pair), TOKENS[row]), 2e-5)
    x, key = normal(7, (4, 11)), jax.random.key(3)
    dense = lx.adapt(lambda params, x: x @ params["table"], fallback="error")
    dropped = jax.vmap(lambda i: dense(PARAMS, lx.dropout(bank[i], 0.5, key), x))(jnp.array([0, -1]))
    assert (dropped[0] != dense(PARAMS, loras[0], x)).any()
    near(dropped[1], x @ PARAMS["table"])


def test_rows_sharded_over_a_mesh():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    bank = lx.bank([drawn(2, i) for i in range(3)])
    ids, tokens = jnp.arange(8) % 4 - 1, jnp.tile(TOKENS[:4], (2, 1))
    run = jax.jit(jax.vmap(lambda bank, i, x: apply(PARAMS, bank[i], x), in_axes=(None, 0, 0)))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    got = run(bank, jax.device_put(ids, rows), jax.device_put(tokens, rows))
    assert got.sharding.spec[0] == "data"
    near(got, run(bank, ids, tokens))


def test_cost_of_a_mixed_batch_is_that_of_one_adapter():
    """FLOPs, one base product over the whole batch, and temp bytes without a copy of all layers' adapters."""
    params = {f"layer_{i}": {"kernel": normal(i, (64, 64), 0.1)} for i in range(8)}

    def deep(params, x):
        for name in params:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    loras = [lx.split(params, 8, init="gaussian", key=jax.random.key(i))[1] for i in range(16)]
    bank, run = lx.bank(loras), lx.adapt(deep)
    x, ids = jnp.ones((16, 32, 64)), jnp.arange(16)
    one = jax.jit(lambda params, lora, x: run(params, lora, x)).lower(params, loras[0], x).compile()
    many = jax.jit(lambda params, bank, ids, x: jax.vmap(lambda i, x: run(params, bank[i], x))(ids, x))
    many = many.lower(params, bank, ids, x).compile()
    flops = [c.cost_analysis()["flops"] for c in (one, many)]
    assert flops[1] < 1.02 * flops[0]
    picked = 16 * 8 * (64 * 8 + 8 * 64) * 4  # rows, layers, A and B, bytes
    grown = many.memory_analysis().temp_size_in_bytes - one.memory_analysis().temp_size_in_bytes
    assert grown < picked / 2
    assert many.as_text().count("f32[512,64]{1,0} dot(") == 8
