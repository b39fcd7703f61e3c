"""A sweep survives: kills, ctrl-C, lanes that diverge, too little memory, a mesh; and halving drops lanes."""

import json
import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_setup import (
    KEY,
    STEPS,
    adam,
    assert_lane_is,
    assert_lanes_are_runs,
    batches,
    constant,
    init,
    loss_fn,
    separate,
)

import lorax_fn as lx
from lorax_fn.sweeps import groups, programs
from lorax_fn.sweeps import lanes as sweep_lanes

pytestmark = pytest.mark.slow
LANES = lx.grid(rank=[1, 4], lr=[1e-3, 3e-2])


def score(state, params):
    return loss_fn(params, state.lora, batches()[0], None)


def run(lanes=LANES, tx=adam, data=None, **options):
    options = {"steps": STEPS, "every": 5, "eval_fn": score, "progress": False} | options
    return lx.sweep(loss_fn, init(), lanes, batches() if data is None else data, tx=tx, key=KEY, **options)


def assert_same(one, other, exact=False):
    assert [r["step"] for r in one.records] == [r["step"] for r in other.records]
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4}
    for a, b in zip(one.records, other.records, strict=True):
        assert a.keys() == b.keys() and a["lane"] == b["lane"]
        for name in ("loss", "train_loss"):
            np.testing.assert_allclose(a[name], b[name], **tolerance)
    np.testing.assert_allclose(one.curves["loss"], other.curves["loss"], **tolerance)
    for i in range(len(one.lanes)):
        for a, b in zip(jax.tree.leaves(one.lora(i)), jax.tree.leaves(other.lora(i)), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance["rtol"], atol=0 if exact else 1e-5)


class Killed(BaseException):
    """What a kill leaves behind is what this leaves behind: nobody catches it."""


@pytest.mark.parametrize("kind", ["in the second program", "between records and state"])
def test_killed_and_run_again_it_goes_on_with_equal_results(tmp_path, monkeypatch, kind):
    whole = run(lanes_per_program=2, every=4)
    file = tmp_path / "sweep.jsonl"
    calls = []

    def dying(start):
        for i in range(start, STEPS):
            calls.append(i)
            if kind == "in the second program" and len(calls) == STEPS + 11:
                raise Killed
            yield batches()[i % 5]

    from lorax_fn.sweeps.files import Folder

    real = Folder.save

    def save(self, *args):
        if kind == "between records and state" and args[-1] == 12:
            raise Killed
        real(self, *args)

    monkeypatch.setattr(Folder, "save", save)
    with pytest.raises(Killed):
        run(data=dying, lanes_per_program=2, every=4, file=file)
    monkeypatch.setattr(Folder, "save", real)
    file.write_text(file.read_text() + '{"lane": 3, "st')  # a line that the kill cut short
    seen = []

    def again(start):
        for i in range(start, STEPS):
            seen.append(i)
            yield batches()[i % 5]

    result = run(data=again, lanes_per_program=2, every=4, file=file)
    expected = STEPS - 8 if kind == "in the second program" else 2 * STEPS - 8
    assert len(seen) <= expected + 1 and seen[0] == 8
    assert_same(result, whole, exact=True)
    first, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["lanes"] == LANES and len(rows) == len(whole.records)
    # A finished one is read, not run: no batch is asked for.
    assert_same(run(data=lambda start: iter([]), lanes_per_program=2, every=4, file=file), whole, exact=True)
    with pytest.raises(lx.LoraError, match="holds another sweep"):
        run(lanes=LANES[:2], file=file)


def test_ctrl_c_keeps_what_is_done(tmp_path):
    def interrupted(start):
        for i in range(start, STEPS):
            if i == 12:
                os.kill(os.getpid(), signal.SIGINT)
            yield batches()[i % 5]

    file = tmp_path / "sweep.jsonl"
    former = signal.getsignal(signal.SIGINT)
    result = run(data=interrupted, file=file)
    assert not result.finished and signal.getsignal(signal.SIGINT) is former
    assert {r["step"] for r in result.records} == {5, 10}
    assert np.isfinite(result.curves["loss"][:, :13]).all() and np.isnan(result.curves["loss"][:, 14:]).all()
    assert result.lora(3)["layer_0/kernel"].rank == 4
    assert_same(run(file=file), run(), exact=True)


def test_a_lane_that_diverges_is_reported_and_touches_no_other():
    lanes = [{"rank": 2, "lr": 1e-2}, {"rank": 2, "lr": float("nan")}, {"rank": 4, "lr": 1e-2}]
    result = run(lanes, lambda lane: optax.sgd(lane["lr"]))
    assert result.final()[1]["diverged"] is not None and np.isnan(result.final()[1]["train_loss"])
    assert [r["diverged"] for r in result.final()][::2] == [None, None]
    alone = run(lanes[::2], lambda lane: optax.sgd(lane["lr"]))
    np.testing.assert_allclose(result.curves["loss"][::2], alone.curves["loss"], rtol=1e-5)
    assert result.best("loss")["lane"] != 1
    assert np.isnan(result.means("loss", by="lr")[1]["mean"])


def test_lanes_of_a_program_by_memory(monkeypatch):
    used = []
    real = programs.memory_of

    def memory_of(compiled):
        used.append(real(compiled))
        return used[-1]

    from lorax_fn.sweeps import runs as module

    monkeypatch.setattr(module, "memory_of", memory_of)
    whole = run()
    assert len(used) == 1
    monkeypatch.setattr(module, "free_memory", lambda: used[0] - 1)
    split = run()
    assert len(used) == 3 and used[2] < used[0]
    monkeypatch.setattr(module, "free_memory", lambda: used[0])
    monkeypatch.setattr(programs, "free_memory", lambda: 0)  # no room to evaluate lanes together
    np.testing.assert_allclose(
        [r["loss"] for r in run().records], [r["loss"] for r in whole.records], rtol=1e-4
    )
    by_lane = sorted(split.records, key=lambda r: (r["step"], r["lane"]))
    for a, b in zip(by_lane, sorted(whole.records, key=lambda r: (r["step"], r["lane"])), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_lanes_over_a_mesh(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("lanes",), axis_types=(kind,))
    lanes = lx.grid(rank=[1, 2, 4], lr=[1e-3, 1e-2, 3e-2])  # nine lanes on eight devices
    result = run(lanes, mesh=mesh)
    plain = run(lanes)
    np.testing.assert_allclose(result.curves["loss"], plain.curves["loss"], rtol=1e-4)
    by = {(r["lane"], r["step"]): r["loss"] for r in plain.records}
    for record in result.records:
        np.testing.assert_allclose(record["loss"], by[record["lane"], record["step"]], rtol=1e-4)
    for mine, other in zip(*(jax.tree.leaves(x.lora(7)) for x in (result, plain)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(lx.LoraError, match="no axis for the lanes"):
        run(lanes, mesh=jax.make_mesh((8,), ("data",), axis_types=(kind,)))


def test_lanes_over_one_axis_of_a_mesh_and_the_base_over_the_other():
    mesh = jax.make_mesh((2, 4), ("lanes", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    columns = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
    params = jax.tree.map(lambda w: jax.device_put(w, columns) if w.ndim == 2 else w, init())
    options = {"steps": 4, "tx": adam, "key": KEY, "progress": False}
    sharded = lx.sweep(loss_fn, params, LANES, batches(), mesh=mesh, **options)
    plain = lx.sweep(loss_fn, init(), LANES, batches(), **options)
    np.testing.assert_allclose(sharded.curves["loss"], plain.curves["loss"], rtol=1e-4)


def test_halving_drops_lanes_and_compiles_nothing_anew(monkeypatch):
    compiled = []
    real = programs.make_step
    monkeypatch.setattr(programs, "make_step", lambda *a, **k: compiled.append(a) or real(*a, **k))
    lanes = lx.grid(rank=[1, 4], lr=[1e-4, 1e-3, 1e-2, 3e-2])
    result = run(lanes, lanes_per_program=4, halving=[5, 10])
    assert len(compiled) == 1
    ends = {r["lane"]: r["step"] for r in result.records}
    assert sorted(ends.values()) == [5] * 4 + [10] * 2 + [STEPS] * 2
    whole = run(lanes, lanes_per_program=4)
    first = sorted((r["loss"], r["lane"]) for r in whole.records if r["step"] == 5)
    assert {lane for _, lane in first[:4]} == {lane for lane, end in ends.items() if end > 5}
    by = {(r["lane"], r["step"]): r["loss"] for r in whole.records}
    for record in result.records:
        np.testing.assert_allclose(record["loss"], by[record["lane"], record["step"]], rtol=1e-5)
    assert result.lora(0)["layer_0/kernel"].rank == 1


def test_an_eval_fn_that_cannot_be_traced_is_called_lane_by_lane():
    ranks = []

    def eval_fn(state, params):
        ranks.append(state.lora["layer_0/kernel"].rank)
        return {"loss": float(score(state, params)), "accuracy": 0.5}

    result = run(eval_fn=eval_fn, every=None)
    assert ranks[-4:] == [1, 1, 4, 4]
    np.testing.assert_allclose(
        [r["loss"] for r in result.records], [r["loss"] for r in run(every=None).records], rtol=1e-5
    )


@pytest.mark.parametrize("side_by_side", [False, True])
def test_products_at_own_ranks(monkeypatch, side_by_side):
    """What a long sweep does on a CPU or TPU: the padding is left out, and a lane stays its separate run."""
    monkeypatch.setattr(programs, "MANY", STEPS)
    monkeypatch.setattr(programs, "own_widths", partial(programs.own_widths, side_by_side=side_by_side))
    seen = []
    real = programs.make_step
    monkeypatch.setattr(programs, "make_step", lambda *a, **k: seen.append(k["widths"]) or real(*a, **k))
    lanes = [
        {"rank": 2, "dropout": 0.3},
        {"rank": 20},
        {"rank": 3, "targets": "layer_1"},
        {"rank": {"layer_0": 24, "*": 9}, "scaling": "rslora"},
    ]
    assert_lanes_are_runs(lanes, constant, params=init(width=32), data=batches(width=32))
    runs = {"layer_0/kernel": ((2, 2), (2, 24)), "layer_1/kernel": ((2, 3), (1, 20), (1, 9))}
    assert seen == [{path: (some, side_by_side) for path, some in runs.items()}]


def test_few_columns_lie_side_by_side_on_a_tpu(monkeypatch):
    params = init(width=32)
    lanes = [{"rank": 8, "seed": i} for i in range(15)] + [{"rank": 16, "seed": i} for i in range(9)]

    def forms(some):
        (group,) = groups.group(params, groups.members(params, some, {}, KEY), constant)
        chunk = sweep_lanes.chunk(group, group.members, len(some), own=True)
        return {found.side_by_side for found in sweep_lanes.own_widths(chunk).values()}

    assert forms(lanes[7:]) == {False}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert forms(lanes[7:]) == {True} and forms(lanes) == {False}


@pytest.mark.parametrize("rate", [float("nan"), 1e12], ids=["factors", "results"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_lane_that_diverges_touches_no_other_at_own_ranks(monkeypatch, side_by_side, rate):
    """Neither its factors, which are NaN, nor finite factors whose results overflow reach other lanes."""
    monkeypatch.setattr(programs, "MANY", STEPS)
    monkeypatch.setattr(programs, "own_widths", partial(programs.own_widths, side_by_side=side_by_side))
    linear = lx.adapt(lambda params, x: x @ params["layer_0"]["kernel"] @ params["layer_1"]["kernel"])

    def loss(params, lora, batch, key):
        return jnp.mean((linear(params, lora, batch["x"]) - batch["y"]) ** 2)

    def sgd(lane):
        return optax.sgd(lane["lr"])

    lanes = [{"rank": 2, "lr": 1e-3}, {"rank": 20, "lr": rate}, {"rank": 9, "lr": 1e-3}]
    given = {"params": init(width=32), "data": batches(width=32)}
    options = {"steps": STEPS, "tx": sgd, "key": KEY, "progress": False}
    result = lx.sweep(loss, given["params"], lanes, given["data"], **options)
    assert [r["diverged"] for r in result.records] == [None, None, 2]  # sorted by rank
    assert np.isnan(result.curves["loss"][1, 3:]).all()
    for i in (0, 2):
        assert_lane_is(result, i, *separate(lanes[i], sgd, loss=loss, **given))


@pytest.mark.parametrize(
    "tx", [constant, lambda lane: (optax.sgd if lane["rank"] == 9 else optax.adam)(1e-2)]
)
def test_a_rank_per_stack_entry_beside_a_single_one(monkeypatch, tx):
    monkeypatch.setattr(programs, "MANY", STEPS)
    params = {"experts": {"kernel": jnp.stack([layer["kernel"] for layer in init(width=32).values()])}}
    layout = {"experts/kernel": lx.Layout(stack=(0,), inputs=(1,), outputs=(2,))}
    model = lx.adapt(lambda params, x: jnp.einsum("bn,enm->ebm", x, params["experts"]["kernel"]).sum(0))

    def loss(params, lora, batch, key):
        return jnp.mean((model(params, lora, batch["x"]) - batch["y"]) ** 2)

    given = {"params": params, "data": batches(width=32), "split": {"layout": layout}}
    assert_lanes_are_runs([{"rank": (2, 20)}, {"rank": 9, "scaling": "rslora"}], tx, loss=loss, **given)


def test_a_gradient_inside_of_the_loss(monkeypatch):
    """Products at own ranks can't be differentiated before they are mapped: a warning says so."""
    monkeypatch.setattr(programs, "MANY", STEPS)

    def penalized(params, lora, batch, key):
        inner = jax.grad(lambda x: loss_fn(params, lora, {**batch, "x": x}, key))(batch["x"])
        return loss_fn(params, lora, batch, key) + jnp.sum(inner**2)

    wide = {"params": init(width=32), "data": batches(width=32)}
    with pytest.warns(lx.LoraFallbackWarning, match="instead of 20 for all") as seen:
        assert_lanes_are_runs([{"rank": 2}, {"rank": 20}], constant, loss=penalized, **wide)
    assert len(seen) == 1 and "do:" in str(seen[0].message)
