"""`fit` against the same loop by hand: state, rows, evaluation, early stop, what is not finite; arguments."""

import builtins
import json
import math

import fit_setup as run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_setup import PARAMS, STEP, assert_same, batches, by_hand, new_state

import lorax_fn as lx
from lorax_fn.training.metrics import scalars


def fit(*args, **kwargs):
    return lx.fit(*args, **({"progress": False} | kwargs))


@pytest.mark.parametrize("step", [STEP, run.KEEPING_STEP], ids=["donates", "keeps"])
@pytest.mark.parametrize("nan_guard", [True, False])
def test_the_state_and_the_rows_are_those_of_a_loop_by_hand(step, nan_guard, tmp_path):
    want, losses = by_hand(7)
    rows, given = [], new_state()
    file = tmp_path / "new" / "metrics.jsonl"
    state = fit(
        step,
        given,
        PARAMS,
        batches(),
        steps=7,
        callbacks=[rows.append],
        metrics_file=file,
        nan_guard=nan_guard,
        count=lambda batch: batch["x"].size,
        unit="numbers",
    )
    assert_same(state, want)
    assert [row["step"] for row in rows] == list(range(1, 8)) and [row["loss"] for row in rows] == losses
    assert rows[0].keys() == {"step", "loss", "grad_norm", "aux", "seconds"}
    assert rows[0]["aux"].keys() == {"mean"}  # `out` has axes
    assert all(row["numbers_per_second"] > 0 for row in rows[1:])
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    consumed = step is STEP and not nan_guard
    assert any(x.is_deleted() for x in jax.tree.leaves(given)) == consumed


def test_metrics_are_read_one_step_late():
    events = []

    def step(state, params, batch):
        events.append(f"start {int(state.step) + 1}")
        return run.KEEPING_STEP(state, params, batch)

    fit(step, new_state(), PARAMS, batches(), steps=3, callbacks=[lambda row: events.append(row["step"])])
    assert events == ["start 1", "start 2", 1, "start 3", 2, 3]


def test_it_compiles_once_and_goes_on_from_a_state_of_its_own():
    STEP.clear_cache()
    source = batches()
    state = fit(STEP, new_state(), PARAMS, source, steps=3)
    state = fit(STEP, state, PARAMS, source, steps=7)
    assert_same(state, by_hand(7)[0])
    assert STEP._cache_size() == 1
    assert fit(STEP, state, PARAMS, source, steps=7) is state  # nothing to do


def test_an_iterable_is_run_again_and_an_iterator_that_ends_is_an_error():
    three = [run.batch_at(i) for i in range(3)]
    state = fit(STEP, new_state(), PARAMS, three, steps=7)
    assert_same(state, by_hand(7, source=iter(three * 3))[0])
    with pytest.raises(lx.FitError, match=r"batches ended(.|\n)*3 batches, step 3(.|\n)*step 7") as failure:
        fit(STEP, new_state(), PARAMS, iter(three), steps=7)
    assert_same(failure.value.state, by_hand(3)[0])
    assert failure.value.step == 3
    with pytest.raises(lx.FitError, match="0 batches, step 0"):
        fit(STEP, new_state(), PARAMS, [], steps=7)
    with pytest.raises(lx.LoraError, match=r"not a source of batches(.|\n)*a int"):
        fit(STEP, new_state(), PARAMS, 3, steps=7)


@pytest.mark.parametrize("step", [STEP, run.KEEPING_STEP], ids=["donates", "keeps"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, step, checkpoints):
    def poisoned(start):
        for i, batch in enumerate(batches(start), start + 1):
            yield batch | {"x": batch["x"] * np.float32(np.nan)} if i == 5 else batch

    folder, rows = tmp_path / "run" if checkpoints else None, []
    text = r"not finite\.(.|\n)*step 5: loss nan, grad_norm nan(.|\n)*number 5 (.|\n)*not finite in \['x'\]"
    with pytest.raises(lx.FitError, match=text) as failure:
        fit(step, new_state(), PARAMS, poisoned, steps=9, checkpoint_dir=folder, callbacks=[rows.append])
    assert failure.value.step == 4 and np.isnan(failure.value.batch["x"]).all()
    assert_same(failure.value.state, by_hand(4)[0])
    assert len(rows) == 5 and math.isnan(rows[-1]["loss"])
    if checkpoints:  # with the bad batch mended, the same call goes on as if nothing had been
        state = fit(step, new_state(), PARAMS, batches, steps=9, checkpoint_dir=folder)
        assert_same(state, by_hand(9)[0])


def test_without_the_guard_nothing_stops_and_json_stays_strict(tmp_path):
    bad = [run.batch_at(0) | {"x": np.full((8, 6), np.inf, np.float32)}]
    file = tmp_path / "m.jsonl"
    state = fit(STEP, new_state(), PARAMS, bad, steps=2, nan_guard=False, metrics_file=file)
    assert np.isnan(state.lora["w"].b).all()
    row = json.loads(file.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert row["loss"] == "nan"


def test_evaluation_early_stop_and_the_best_checkpoints(tmp_path):
    scores = {2: 5.0, 4: 3.0, 6: 4.0, 8: float("nan"), 10: 3.5, 12: 9.0}
    rows, folder = [], tmp_path / "run"

    def eval_fn(state, params):
        assert params is PARAMS
        return {"error": scores[int(state.step)], "other": jnp.float32(1)}

    kwargs = dict(every=2, eval_fn=eval_fn, checkpoint_dir=folder, max_to_keep=2, patience=3)
    state = fit(STEP, new_state(), PARAMS, batches, steps=20, best="error", callbacks=[rows.append], **kwargs)
    assert int(state.step) == 10
    assert_same(state, by_hand(10)[0])
    found = [row["eval"]["error"] for row in rows if "eval" in row]
    assert found[:3] == [5.0, 3.0, 4.0] and math.isnan(found[3]) and found[4:] == [3.5]
    assert rows[-1] == {"step": 10, "stopped": "no better error in 3 evaluations"}
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000008", "step-00000010"]
    # a run that stopped stays so
    again = fit(STEP, new_state(), PARAMS, batches, steps=20, best="error", **kwargs)
    assert_same(again, state)

    state = fit(
        STEP,
        new_state(),
        PARAMS,
        batches,
        steps=12,
        best="-error",
        **kwargs | {"checkpoint_dir": tmp_path / "up", "keep_best": 2, "max_to_keep": 1, "patience": None},
    )
    names = sorted(p.name[-2:] for p in (tmp_path / "up").iterdir())
    assert names == ["02", "12"]
    none = {"checkpoint_dir": tmp_path / "none", "keep_best": 0, "max_to_keep": 1}
    fit(STEP, new_state(), PARAMS, batches, steps=6, best="error", **kwargs | none)
    assert [p.name[-2:] for p in (tmp_path / "none").iterdir()] == ["06"]
    with pytest.raises(lx.LoraError, match=r"no score of this name(.|\n)*best='loss'(.|\n)*'error', 'other'"):
        fit(STEP, new_state(), PARAMS, batches, steps=2, every=2, eval_fn=eval_fn)
    with pytest.raises(lx.LoraError, match=r"eval_fn did not return scores(.|\n)*loss: shape \(2,\)"):
        fit(STEP, new_state(), PARAMS, batches, steps=2, eval_fn=lambda state, params: jnp.ones(2))


def test_the_bar_shows_loss_speed_and_the_rest(capsys):
    pytest.importorskip("tqdm")
    fit(STEP, new_state(), PARAMS, batches(), steps=30, every=10, eval_fn=lambda *_: 2.5, progress=True)
    text = capsys.readouterr().err
    assert "30/30" in text and "loss" in text and "examples/s" in text and "step 20: loss 2.5" in text
    assert "<00:00" in text  # what is left of the time


def test_without_tqdm_there_are_plain_lines_unless_a_bar_is_asked_for(capsys, monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    fit(STEP, new_state(), PARAMS, batches(), steps=4, every=2, eval_fn=lambda *_: 2.5, progress=None)
    assert capsys.readouterr().err == "step 2: loss 2.5\nstep 4: loss 2.5\n"
    with pytest.raises(lx.LoraError, match=r'needs tqdm(.|\n)*pip install "lorax_fn\[progress\]"'):
        fit(STEP, new_state(), PARAMS, batches(), steps=1, progress=True)


def test_arguments_that_are_no_counts():
    text = r"steps=-1\n +every=0\n +save_every=0\n +patience=0\n +want: +an int of 0"
    with pytest.raises(lx.LoraError, match=text):
        fit(STEP, new_state(), PARAMS, batches(), steps=-1, every=0, patience=0)
    with pytest.raises(lx.LoraError, match=r"max_to_keep=True"):
        fit(STEP, new_state(), PARAMS, batches(), steps=1, max_to_keep=True)


def test_scalars_of_metrics():
    with pytest.raises(lx.LoraError, match=r"have no loss(.|\n)*aux"):
        scalars({"aux": 1})
    mapped = jax.pmap(lambda x: {"loss": x, "aux": {"n": x + 1, "wide": jnp.ones(3)}})(jnp.arange(8.0))
    assert scalars(mapped) == {"loss": 0.0, "aux": {"n": 1.0}}
    odd = {"loss": jnp.float32(2), "aux": (jnp.int32(1), [None, np.float32(3)], jnp.ones(2))}
    assert scalars(odd) == {"loss": 2.0, "aux": {"0": 1, "1/1": 3.0}}
