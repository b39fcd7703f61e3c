"""What ends `fit` early: SIGTERM at awkward moments, numbers that an update breaks, patience, arguments."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import pickle
import signal
import time

import fit_setup as run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fit_setup import PARAMS, STEP, assert_same, batches, by_hand, new_state

import lorax_fn as lx
from lorax_fn.training import loop


def fit(*args, **kwargs):
    return lx.fit(*args, **({"progress": False, "every": 2} | kwargs))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def names(folder):
    return sorted(path.name[-2:] for path in pathlib.Path(folder).glob("step-*"))


def test_sigterm_during_the_last_evaluation_or_save_is_no_end_of_training(tmp_path, monkeypatch):
    def evaluate(state, params):
        if int(state.step) == 4:
            terminate()
        return 1.0

    with pytest.raises(SystemExit, match="143"):
        fit(STEP, new_state(), PARAMS, batches, steps=4, eval_fn=evaluate, checkpoint_dir=tmp_path / "a")
    assert names(tmp_path / "a") == ["02", "04"]
    assert_same(
        fit(STEP, new_state(), PARAMS, batches, steps=4, checkpoint_dir=tmp_path / "a"), by_hand(4)[0]
    )

    real = loop.Snapshots.finish
    monkeypatch.setattr(loop.Snapshots, "finish", lambda self: (real(self), terminate())[0])
    with pytest.raises(SystemExit, match="143"):
        fit(STEP, new_state(), PARAMS, batches, steps=3, checkpoint_dir=tmp_path / "b")
    assert names(tmp_path / "b") == ["02", "03"]


@pytest.mark.parametrize("blocked", [0, 3])
def test_sigterm_breaks_off_the_wait_for_a_batch(tmp_path, blocked):
    def source(start):
        for i, batch in enumerate(batches(start), start):
            if i == blocked:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                time.sleep(60)
            yield batch

    former = signal.signal(signal.SIGALRM, lambda *_: terminate())
    begin = time.monotonic()
    try:
        with pytest.raises(SystemExit, match="143"):
            fit(STEP, new_state(), PARAMS, source, steps=9, every=100, checkpoint_dir=tmp_path)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - begin < 30
    assert names(tmp_path) == (["03"] if blocked else [])
    assert_same(fit(STEP, new_state(), PARAMS, batches, steps=6, checkpoint_dir=tmp_path), by_hand(6)[0])


def breaking(at, where):
    """A step whose update or extra is not finite at step ``at``, with a finite loss and gradient."""

    def poison(count, x):
        return jnp.where(count == at - 1, jnp.asarray(np.nan if where != "inf" else np.inf, x.dtype), x)

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: poison(state, u), updates), state + 1

    count = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    tx = run.TX if where == "extra" else optax.chain(run.TX, count)

    def loss_fn(params, lora, batch, key, extra):
        loss, aux = run.loss_fn(params, lora, batch, key)
        mean = poison(extra["n"], extra["mean"] + 1) if where == "extra" else extra["mean"]
        return loss, ({"mean": mean, "n": extra["n"] + 1}, aux)

    state = lx.TrainState.create(
        lora=new_state().lora,
        tx=tx,
        key=jax.random.key(2),
        extra={"mean": jnp.zeros(()), "n": jnp.zeros((), jnp.int32)},
    )
    return lx.make_train_step(loss_fn, tx), state


@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["nan", "inf", "extra"])
@pytest.mark.parametrize(("at", "donates"), [(1, True), (4, True), (13, True), (13, False), (20, True)])
def test_what_the_update_or_extra_breaks_is_never_kept(tmp_path, at, where, donates):
    """Step 4 is saved, 20 the last one, 13 neither: where it is found differs, what is kept does not."""
    step, state = breaking(at, where)
    step = jax.jit(step, donate_argnums=(0,) if donates else ())
    text = (
        rf"state after a step is not finite\.(.|\n)*{'extra/mean' if where == 'extra' else 'lora/w/b'}(.|\n)*"
    )
    with pytest.raises(lx.FitError, match=text + rf"step {at}: loss") as failure:
        fit(step, state, PARAMS, batches, steps=20, every=4, checkpoint_dir=tmp_path, max_to_keep=None)
    assert failure.value.step == at - 1
    np.testing.assert_array_equal(failure.value.batch["x"], run.batch_at(at - 1)["x"])
    healthy, start = breaking(99, where)
    want = fit(jax.jit(healthy), start, PARAMS, batches, steps=at - 1)
    assert_same(failure.value.state, want)
    assert names(tmp_path) == sorted({f"{i:02}" for i in (*range(4, at, 4), at - 1) if i})
    if at > 1:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(lx.checkpoint.load(tmp_path)))


def test_what_was_infinite_at_the_start_is_no_alarm():
    tx = optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau())  # its best value begins infinite
    state = lx.TrainState.create(lora=new_state().lora, tx=tx, key=jax.random.key(2))
    assert fit(jax.jit(lx.make_train_step(run.loss_fn, tx)), state, PARAMS, batches, steps=3).step == 3


def test_batches_whose_buffer_is_used_again_give_the_kept_state():
    """The steps since can not be taken again; no other state is passed off as the last good one."""
    buffer = {"x": np.zeros((8, 6), np.float32), "y": np.zeros((8, 4), np.float32)}

    def reused():
        for i, batch in enumerate(batches()):
            for name, array in buffer.items():
                array[:] = batch[name] if i < 5 else np.nan
            yield buffer

    with pytest.raises(lx.FitError) as failure:
        fit(STEP, new_state(), PARAMS, reused(), steps=9)
    assert failure.value.step == 0
    assert_same(failure.value.state, new_state())


def test_patience_ends_a_run_of_scores_that_are_not_finite():
    state = fit(STEP, new_state(), PARAMS, batches, steps=50, eval_fn=lambda *_: float("nan"), patience=3)
    assert state.step == 6


def test_fewer_steps_than_were_taken(tmp_path):
    fit(STEP, new_state(), PARAMS, batches, steps=6, checkpoint_dir=tmp_path)
    with pytest.raises(lx.LoraError, match=r"more steps were taken(.|\n)*step 6 in(.|\n)*steps=6 or more"):
        fit(STEP, new_state(), PARAMS, batches, steps=4, checkpoint_dir=tmp_path)
    with pytest.raises(lx.LoraError, match=r"more steps were taken(.|\n)*step 6\n"):
        fit(STEP, by_hand(6)[0], PARAMS, batches, steps=4)


@pytest.mark.parametrize(
    "source",
    [run.batch_at(0), np.zeros((3, 2)), jnp.zeros((3, 2)), "batches", b"x", lambda start: run.batch_at(0)],
    ids=["dict", "numpy", "jax", "str", "bytes", "a call that gives one"],
)
def test_one_batch_is_no_source_of_batches(source):
    with pytest.raises(lx.LoraError, match=r"not a source(.|\n)*at most one batch(.|\n)*\[batch\]"):
        fit(STEP, new_state(), PARAMS, source, steps=2)
    with pytest.raises(lx.LoraError, match=r"not a source(.|\n)*a NoneType"):
        fit(STEP, new_state(), PARAMS, lambda start: None, steps=2)


@pytest.mark.parametrize("score", [None, "good", {"loss": None}, [1.0]])
def test_an_evaluation_that_gives_no_number(score):
    with pytest.raises(lx.LoraError, match=r"eval_fn did not return scores(.|\n)*loss: a \w+\n"):
        fit(STEP, new_state(), PARAMS, batches, steps=2, eval_fn=lambda *_: score)


def test_a_step_that_returns_nothing_or_does_not_count():
    def not_counting(state, params, batch):
        new, metrics = run.KEEPING_STEP(state, params, batch)
        return dataclasses.replace(new, step=state.step), metrics

    for step, text in [
        (lambda *args: None, r"did not return \(state, metrics\)(.|\n)*a NoneType"),
        (lambda *args: run.KEEPING_STEP(*args)[0], r"did not return \(state, metrics\)(.|\n)*a TrainState"),
        (lambda *args: (*run.KEEPING_STEP(*args), 1), r"did not return \(state(.|\n)*a tuple of 3"),
        (not_counting, r"wrong step count(.|\n)*state.step 0 after step 1(.|\n)*apply_gradients"),
    ]:
        with pytest.raises(lx.LoraError, match=text):
            fit(step, new_state(), PARAMS, batches, steps=2)


def test_a_consumed_state_is_refused():
    state = new_state()
    STEP(state, PARAMS, run.batch_at(0))
    with pytest.raises(lx.LoraError, match=r"consumed this state(.|\n)*lora/w/a"):
        fit(STEP, state, PARAMS, batches, steps=2)


def test_a_callback_may_do_what_it_likes_with_its_row(tmp_path):
    seen = []

    def vandal(row):
        row.pop("loss", None)
        row.get("aux", {}).clear()

    file = tmp_path / "m.jsonl"
    fit(STEP, new_state(), PARAMS, batches, steps=2, callbacks=[vandal, seen.append], metrics_file=file)
    assert all("loss" in row and row["aux"] for row in seen)
    assert [json.loads(line) for line in file.read_text().splitlines()] == seen


def test_checkpoints_and_evaluations_have_intervals_of_their_own(tmp_path):
    scores = {3: 2.0, 6: 1.0, 9: 3.0, 10: 4.0}
    rows = []
    kwargs = dict(every=3, save_every=4, max_to_keep=None, callbacks=[rows.append])
    fit(STEP, new_state(), PARAMS, batches, steps=10, checkpoint_dir=tmp_path / "a", **kwargs)
    assert names(tmp_path / "a") == ["04", "08", "10"]
    kwargs |= dict(eval_fn=lambda state, params: scores[int(state.step)], checkpoint_dir=tmp_path / "b")
    fit(STEP, new_state(), PARAMS, batches, steps=10, **kwargs)
    assert [row["step"] for row in rows if "eval" in row] == [3, 6, 9, 10]
    assert names(tmp_path / "b") == ["03", "04", "06", "08", "10"]  # 3 and 6 were the best so far


def test_a_fit_error_survives_pickle_and_deepcopy():
    error = lx.FitError("why", state=new_state(), step=3, batch={"x": np.ones(2)})
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is lx.FitError and str(again) == "why" and again.step == 3
        assert_same(again.state, error.state)
        np.testing.assert_array_equal(again.batch["x"], np.ones(2))
    assert math.isclose(copy.copy(error).step, 3)
