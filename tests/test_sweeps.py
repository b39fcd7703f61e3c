"""A lane of a sweep is the separate run of its configuration, along every axis of the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_setup import KEY, STEPS, adam, assert_lanes_are_runs, batches, constant, init, loss_fn

import lorax_fn as lx
from lorax_fn.sweeps import groups, programs
from lorax_fn.sweeps import lanes as side


@pytest.fixture
def compiled(monkeypatch):
    """The programs that a sweep compiles, one entry each."""
    made = []
    real = programs.make_step

    def make_step(*args, **kwargs):
        made.append(args[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "make_step", make_step)
    return made


AXES = {
    "rank": ([{"rank": r} for r in (1, 3, 8)], constant),
    "alpha": (lx.grid(rank=2, alpha=[1.0, 32.0, lambda rank: 2 * rank]), constant),
    "scaling": (lx.grid(rank=[1, 4], scaling=["lora", "rslora"]), constant),
    "lr": (lx.grid(rank=2, lr=[1e-3, 1e-2, 3e-2]), adam),
    "seed": (lx.grid(rank=2, seed=range(3)), constant),
    "targets": (
        [{"rank": 2}, {"rank": 2, "targets": "layer_0"}, {"rank": 4, "targets": "layer_1"}],
        constant,
    ),
    "dropout": (lx.grid(rank=2, dropout=[0.0, 0.3, 0.6]), constant),
    "adamw": (
        lx.grid(rank=[1, 4], wd=[0.1, 1.0]),
        lambda lane: optax.adamw(1e-2, weight_decay=lane["wd"]),
    ),
    "clipping": (
        lx.grid(rank=[1, 4], clip=[1e-2, 1e-1]),
        lambda lane: optax.chain(optax.clip_by_global_norm(lane["clip"]), optax.sgd(0.3)),
    ),
    "schedule": (
        lx.grid(rank=[1, 4], lr=[1e-2, 3e-2]),
        lambda lane: optax.adam(optax.linear_schedule(lane["lr"], 0.0, STEPS)),
    ),
    "full": (lx.grid(rank=[1, 4], full=["bias"]), constant),
    "init": (lx.grid(rank=[2, 4], init=["gaussian", "zero_a", "orthogonal"]), constant),
    "rank by pattern": ([{"rank": {"layer_0": 1, "*": 4}}, {"rank": {"layer_0": 4, "*": 2}}], constant),
}


SLOW = ("full", "init", "rank by pattern", "scaling")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in AXES]
)
def test_a_lane_equals_the_separate_run(name, compiled):
    lanes, tx = AXES[name]
    assert_lanes_are_runs(lanes, tx)
    assert len(compiled) == 1  # all lanes in one program


def test_optimizers_that_cannot_be_traced_share_the_program(compiled):
    """optax's warm-up asks in Python whether the peak is zero; another entry is the optimizer's name."""

    def tx(lane):
        peak = optax.warmup_cosine_decay_schedule(0.0, lane["lr"], 3, STEPS)
        return getattr(optax, lane["optimizer"])(peak)

    lanes = lx.grid(rank=[1, 4], optimizer=["adam", "sgd"], lr=[1e-2, 3e-2])
    assert_lanes_are_runs(lanes, tx)
    ((parts),) = compiled
    assert [size for _, size in parts] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.contrib.muon, id="muon", marks=pytest.mark.slow),
        pytest.param(optax.adafactor, id="adafactor"),
    ],
)
def test_optimizers_of_whole_matrices_are_grouped_by_rank(tx, compiled):
    lanes = lx.grid(rank=[2, 4], lr=[1e-2, 3e-2])
    assert_lanes_are_runs(lanes, lambda lane: tx(lane["lr"]))
    assert [[size for _, size in parts] for parts in compiled] == [[2], [2]]


def test_methods_and_moving_inits_are_grouped(compiled):
    lanes = [
        {"rank": 2, "lr": 1e-2},
        {"rank": 4, "lr": 1e-2, "method": "dora"},
        {"rank": 2, "lr": 1e-2, "init": "pissa"},
        {"rank": 2, "lr": 3e-2, "init": "pissa"},
        {"rank": 2, "lr": 1e-2, "method": "lora_fa"},
        {"rank": 4, "lr": 2e-2, "method": "vera"},
        {"rank": 2, "lr": 2e-2, "method": "dora"},
    ]
    assert_lanes_are_runs(lanes, adam)
    assert sorted(sum(size for _, size in parts) for parts in compiled) == [1, 1, 1, 2, 2]


def test_extra_belongs_to_each_lane():
    def loss(params, lora, batch, key, extra):
        value = loss_fn(params, lora, batch, key)
        return value, (
            {"mean": 0.9 * extra["mean"] + 0.1 * value, "count": extra["count"] + 1},
            {"seen": value},
        )

    extra = {"mean": jnp.float32(0.0), "count": jnp.int32(0)}
    seen = []

    def eval_fn(state, params):
        return {"mean": state.extra["mean"], "count": state.extra["count"].astype(jnp.float32)}

    result = assert_lanes_are_runs(
        lx.grid(rank=[1, 4], lr=[1e-2, 3e-2]), adam, loss=loss, extra=extra, eval_fn=eval_fn
    )
    seen = [record["mean"] for record in result.records]
    assert len(set(seen)) == 4 and {record["count"] for record in result.records} == {float(STEPS)}


@pytest.mark.parametrize("fmt", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_quantized_bases(fmt):
    params = lx.quantize(init(width=64), fmt)
    assert any(
        isinstance(x, lx.Quantized)
        for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, lx.Quantized))
    )
    assert_lanes_are_runs(lx.grid(rank=[1, 4], lr=[1e-3, 1e-2]), adam, params=params, data=batches(width=64))


def test_data_may_follow_the_seed():
    lanes = lx.grid(rank=[1, 2], seed=[0, 3])
    result = lx.sweep(
        loss_fn, init(), lanes, batches, data="seed", steps=STEPS, tx=constant, key=KEY, progress=False
    )
    from sweep_setup import assert_lane_is, separate

    for i, lane in enumerate(lanes):
        assert_lane_is(result, i, *separate(lane, constant, data=batches(lane["seed"])))


def test_a_lane_inside_padding_is_itself_alone():
    """Bit for bit or within 1e-6: what a lane computes does not depend on its neighbors."""
    many = lx.sweep(
        loss_fn, init(), lx.grid(rank=[2, 8, 5]), batches(), steps=STEPS, tx=constant, key=KEY, progress=False
    )
    one = lx.sweep(
        loss_fn, init(), [{"rank": 2}], batches(), steps=STEPS, tx=constant, key=KEY, progress=False
    )
    np.testing.assert_allclose(many.curves["loss"][0], one.curves["loss"][0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(many.lora(0)), jax.tree.leaves(one.lora(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def products(jaxpr):
    """Every dot_general of a program, those of inner programs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_the_base_is_read_once_for_all_lanes():
    """x @ W of all lanes is one product in which W has no axis of lanes, forward and backward."""
    params, lanes = init(width=16), lx.grid(rank=[1, 2, 4])
    (one,) = groups.group(params, groups.members(params, lanes, {}, KEY), constant)
    (chunk,) = side.chunks(one, 3)
    states, batch = side.start(chunk, constant, None), batches(width=16)[0]
    step = side.make_step(loss_fn, constant, chunk.parts, seeded=False)
    program = jax.make_jaxpr(step)(states, params, batch, chunk.values(), None, None)
    shapes = [[v.aval.shape for v in eqn.invars] for eqn in products(program.jaxpr)]
    base = [pair for pair in shapes if (16, 16) in pair]
    other = sorted(next(shape for shape in pair if shape != (16, 16)) for pair in base)
    # The first layer's x is the same in all lanes; the second's is not, nor is its gradient.
    assert other == [(3, 6, 16), (3, 6, 16), (6, 16)]


def test_errors_say_what_to_do():
    params, data = init(), batches()

    def run(lanes, tx=adam, **options):
        return lx.sweep(
            loss_fn, params, lanes, data, **{"steps": 2, "tx": tx, "key": KEY, "progress": False} | options
        )

    for lanes, options, match in [
        ([], {}, "not configurations"),
        (lx.grid(rank=2, lr=1e-2, leraning_rate=[1.0]), {}, "nothing reads"),
        ([{"rank": 2}], {}, "does not have"),
        ([{"rank": 2, "lr": 0.1, "dropout": 1.5}], {}, "not a fraction below one"),
        ([{"rank": 2, "lr": 0.1, "seed": 0.5}], {}, "seed is not a nonnegative int"),
        ([{"rank": 2, "lr": 0.1, "step": 3}], {}, "reserved for records"),
        ([{"rank": 2, "lr": 0.1}], {"split": {"key": KEY}}, "arguments of lx.split"),
        ([{"rank": 2, "lr": 0.1}], {"steps": 0}, "don't fit"),
        ([{"rank": 2, "lr": 0.1}], {"halving": [5]}, "don't fit"),
        ([{"rank": 2, "lr": 0.1}], {"tx": lambda lane: (lane["lr"], optax.sgd)}, "not an optimizer"),
        ([{"rank": 2, "lr": 0.1}], {"eval_fn": lambda state, params: jnp.ones(2)}, "eval_fn returned"),
    ]:
        with pytest.raises(lx.LoraError, match=match):
            run(lanes, **options)
    with pytest.raises(lx.LoraError, match="loss is not a float scalar"):
        lx.sweep(
            lambda *args: jnp.ones(3),
            params,
            [{"rank": 1}],
            data,
            steps=2,
            tx=constant,
            key=KEY,
            progress=False,
        )
    with pytest.raises(lx.LoraError, match="batches ended"):
        lx.sweep(loss_fn, params, [{"rank": 1}], iter(data), steps=9, tx=constant, key=KEY, progress=False)


def test_grid():
    lanes = lx.grid(rank=np.array([1, 2]), targets=[["a", "b"], None], init="pissa", lr=0.1)
    assert lanes[1] == {"rank": 1, "targets": None, "init": "pissa", "lr": 0.1} and len(lanes) == 4
    with pytest.raises(lx.LoraError, match="no values"):
        lx.grid(rank=[])


def test_bases_of_one_shape_share_a_program(compiled):
    """PiSSA gives each seed a base of its own: the step is compiled once for all of them."""
    result = lx.sweep(
        loss_fn,
        init(),
        lx.grid(rank=2, init="pissa", seed=range(3)),
        batches(),
        steps=2,
        tx=constant,
        key=KEY,
        progress=False,
    )
    assert len(compiled) == 1 and len(result.final()) == 3
