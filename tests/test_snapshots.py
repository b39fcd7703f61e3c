"""Checkpoints of `fit`: exact resume, damage, wrong bases and states, a full disk, SIGTERM, kill -9."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import fit_setup as run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fit_setup import PARAMS, STEP, assert_same, batches, by_hand, new_state

import lorax_fn as lx
from lorax_fn import checkpoint, storage
from lorax_fn.training import snapshots

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def fit(folder, steps, source=batches, state=None, params=PARAMS, **kwargs):
    kwargs = {"every": 2, "progress": False} | kwargs
    return lx.fit(STEP, state or new_state(), params, source, steps=steps, checkpoint_dir=folder, **kwargs)


class Counting:
    """An iterator with grain's protocol; its state is ``form`` of a number."""

    def __init__(self, form):
        self.at, self.form = 0, form

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return run.batch_at(self.at - 1)

    def get_state(self):
        return {"at": self.at} if self.form is dict else str(self.at).encode()

    def set_state(self, state):
        self.at = state["at"] if self.form is dict else int(state)


TEN = [run.batch_at(i) for i in range(10)]
SOURCES = {
    "callable": lambda: batches,
    "plain iterator": batches,
    "iterable": lambda: TEN,
    "iterator with a state": lambda: Counting(dict),
    "iterator with bytes": lambda: Counting(bytes),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_resuming_is_exact_whatever_gives_the_batches(tmp_path, kind):
    source = SOURCES[kind]
    fit(tmp_path, 5, source())
    if kind == "plain iterator":
        with pytest.raises(lx.LoraError, match=r"fewer batches(.|\n)*2 batches(.|\n)*5, and those"):
            fit(tmp_path, 9, iter(TEN[:2]))
    assert_same(fit(tmp_path, 9, source()), by_hand(9)[0])
    found = json.loads((tmp_path / "step-00000008" / "batches-0.json").read_text())
    assert found["taken"] == 8 and (found["state"] is not None) == ("with" in kind)


def test_a_second_epoch_is_resumed_and_the_metrics_file_is_that_of_one_run(tmp_path):
    three, file = TEN[:3], tmp_path / "m.jsonl"
    fit(tmp_path / "run", 8, three, metrics_file=file, max_to_keep=None)
    for later in ("06", "08"):
        (tmp_path / "run" / f"step-000000{later}").rename(tmp_path / later)
    file.write_text(file.read_text() + '{"step": 9, "lo')  # cut short by a crash
    state = fit(tmp_path / "run", 11, three, metrics_file=file)
    want, losses = by_hand(11, source=iter(three * 4))
    assert_same(state, want)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 12)) and [row["loss"] for row in rows] == losses


def test_the_same_program_may_call_fit_again(tmp_path):
    source = batches()
    state = fit(tmp_path, 4, source)
    state = fit(tmp_path, 7, source, state)  # goes on with the iterator where it is
    assert_same(state, by_hand(7)[0])
    with pytest.raises(
        lx.LoraError, match=r"ahead of the checkpoints(.|\n)*step 9, checkpoints up to step 7"
    ):
        fit(tmp_path, 9, source, by_hand(9)[0])


def test_no_weight_of_the_base_is_on_disk_and_the_newest_are_kept(tmp_path):
    fit(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (6, 8, 9)]
    facts = json.loads((tmp_path / "step-00000009" / "train.json").read_text())
    sizes = [np.prod(x["shape"]) for entry in facts["adapters"] for x in entry["arrays"].values()]
    assert sizes == [12, 8]
    assert {fact["path"].split("/")[0] for fact in facts["state"]} == {"opt_state", "step", "key"}
    stored = snapshots.read_snapshot(tmp_path / "step-00000009", facts)
    assert not any(np.array_equal(x, PARAMS["w"]) for x in stored.values())
    assert facts["base"] == snapshots.fingerprint(PARAMS)


def test_adapters_are_read_out_of_a_training_checkpoint_and_not_the_reverse(tmp_path):
    state = fit(tmp_path / "run", 4)
    for path in (tmp_path / "run", tmp_path / "run" / "step-00000004"):
        assert_same(checkpoint.load(path, params=PARAMS), state.lora)
    assert_same(checkpoint.load(tmp_path / "run" / "step-00000002"), by_hand(2)[0].lora)
    with pytest.raises(lx.LoraError, match=r"not the base(.|\n)*w: content"):
        checkpoint.load(tmp_path / "run", params={"w": PARAMS["w"] + 1})
    checkpoint.save(tmp_path / "adapters", state.lora)
    with pytest.raises(
        lx.LoraError, match=r"adapters alone(.|\n)*lx.checkpoint.load(.|\n)*another checkpoint"
    ):
        fit(tmp_path / "adapters", 4)
    with pytest.raises(lx.LoraError, match="not an adapter checkpoint"):
        checkpoint.save(tmp_path / "run", state.lora)


def damage(folder, how):
    file = folder / "train.json"
    if how == "data":
        file = max((f for f in folder.rglob("arrays/**/d/*")), key=lambda f: f.stat().st_size)
    elif how == "batches":
        file = folder / "batches-0.json"
    content = bytearray(file.read_bytes())
    if how == "missing":
        return file.unlink()
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "metadata", "data", "batches", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, how):
    fit(tmp_path, 6)
    damage(tmp_path / "step-00000006", how)
    with pytest.warns(lx.LoraCheckpointWarning, match=r"damaged(.|\n)*passed over"):
        assert_same(checkpoint.load(tmp_path), by_hand(4)[0].lora)
    rows = []
    with pytest.warns(lx.LoraCheckpointWarning, match=r"damaged(.|\n)*00000006(.|\n)*step-00000006.damaged"):
        state = fit(tmp_path, 8, callbacks=[rows.append])
    assert_same(state, by_hand(8)[0])
    assert rows[0]["step"] == 5 and (tmp_path / "step-00000006.damaged").is_dir()
    for name in ("step-00000006", "step-00000008", "step-00000004"):
        damage(tmp_path / name, how)
    with (
        pytest.warns(lx.LoraCheckpointWarning),
        pytest.raises(lx.LoraError, match="no checkpoint that is whole"),
    ):
        checkpoint.load(tmp_path)


def test_a_flipped_byte_anywhere_in_the_facts_is_found(tmp_path):
    fit(tmp_path, 2)
    file = tmp_path / "step-00000002" / "train.json"
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(storage.DamagedError):
            storage.read_facts(file, snapshots.FORMAT, snapshots.VERSION)
    file.write_bytes(content)
    assert storage.read_facts(file, snapshots.FORMAT, snapshots.VERSION)["step"] == 2


def test_what_a_crash_left_is_swept_up(tmp_path):
    fit(tmp_path, 4)
    (tmp_path / ".step-00000006" / "arrays").mkdir(parents=True)
    assert_same(fit(tmp_path, 6), by_hand(6)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (2, 4, 6)]


def test_another_base_or_state_is_refused_with_all_that_differs(tmp_path):
    fit(tmp_path, 2)
    other = {"w": PARAMS["w"] + 1, "more": jnp.zeros(1)}
    with pytest.raises(lx.LoraError, match=r"more: extra in params\n +w: content: other values"):
        fit(tmp_path, 4, params=other)
    text = r"not of the kind(.|\n)*w: arrays.a.shape: \[6, 2\] saved, \[6, 3\](.|\n)*w: static.rank: 2 saved"
    with pytest.raises(lx.LoraError, match=text + r"(.|\n)*opt_state\S*mu\S*: shape"):
        fit(tmp_path, 4, state=new_state(rank=3))
    sgd = lx.TrainState.create(lora=new_state().lora, tx=optax.sgd(0.1), key=jax.random.key(2))
    with pytest.raises(lx.LoraError, match=r"opt_state\S*mu\S*: not in the state"):
        fit(tmp_path, 4, state=sgd)
    with pytest.raises(lx.LoraError, match=r"key: key: fry saved, rbg in the state|key: shape"):
        rbg = jax.random.key(2, impl="rbg")
        fit(tmp_path, 4, state=lx.TrainState.create(lora=new_state().lora, tx=run.TX, key=rbg))
    fit(tmp_path / "b", 2, Counting(dict))
    with pytest.raises(lx.LoraError, match=r"can't be put back(.|\n)*without set_state"):
        fit(tmp_path / "b", 4, iter(TEN))


def test_positions_that_can_not_be_stored_are_refused(tmp_path):
    source = Counting(dict)
    source.get_state = lambda: {"at": np.zeros(3)}
    with pytest.raises(lx.LoraError, match=r"get_state\(\)(.|\n)*pickle"):
        fit(tmp_path, 4, source)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path):
    """The kernel refuses files above a limit, as it does on a full disk, in Orbax's own threads too.

    In a process of its own: these threads leave exceptions behind that nobody asks for.
    """
    script = """
        import pathlib, resource, sys
        import fit_setup as run
        import lorax_fn as lx

        def fit(steps):
            return lx.fit(run.STEP, run.new_state(), run.PARAMS, run.batches, steps=steps, every=2,
                          checkpoint_dir=sys.argv[1], progress=False)

        names = lambda: sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir())
        fit(4)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        try:
            fit(30)
        except lx.LoraError as failure:
            text = str(failure)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "could not be written" in text and "too large" in text, text
        assert "goes on from" in text and "step-00000004." in text, text
        assert names() == ["step-00000002", "step-00000004"], names()
        run.assert_same(fit(8), run.by_hand(8)[0])
        print("held")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize("moment", ["write_facts", "file_sums"])
def test_no_space_for_the_last_file(tmp_path, monkeypatch, moment):
    def full(*args):
        raise OSError(28, "No space left on device")

    fit(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, moment, full)
        with pytest.raises(lx.LoraError, match=r"No space left on device(.|\n)*make room"):
            fit(tmp_path, 6)
    assert_same(fit(tmp_path, 6), by_hand(6)[0])


def test_sigterm_saves_and_raises_system_exit(tmp_path):
    former = signal.getsignal(signal.SIGTERM)

    def stop(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as leaving:
        fit(tmp_path, 50, every=100, callbacks=[stop])
    assert leaving.value.code == 143 and signal.getsignal(signal.SIGTERM) is former
    (saved,) = tmp_path.iterdir()
    assert saved.name == "step-00000004"  # the step that ran when the signal came is finished
    assert_same(fit(tmp_path, 9), by_hand(9)[0])


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_sharded_and_replicated_states_come_back_where_they_were(tmp_path, kind):
    if kind == "pmap":
        step = jax.pmap(lx.make_train_step(run.loss_fn, run.TX, axis_name="d"), "d", donate_argnums=0)
        state, params = jax.pmap(lambda _: (new_state(), PARAMS))(jnp.arange(8))
        source = [jax.tree.map(lambda x: x.reshape(8, 1, -1), batch) for batch in TEN]
    else:
        mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rows, whole = jax.NamedSharding(mesh, jax.P("d")), jax.NamedSharding(mesh, jax.P())

        def put(x):
            return jax.device_put(x, rows if x.shape[:1] == (6,) else whole)

        state, params, step = jax.tree.map(put, new_state()), jax.device_put(PARAMS, whole), STEP
        source = [jax.device_put(batch, rows) for batch in TEN]

    def train(steps, folder, state):
        return lx.fit(
            step, state, params, source, steps=steps, every=4, checkpoint_dir=folder, progress=False
        )

    start = jax.tree.map(jnp.copy, state)
    want = train(9, None, state)
    train(6, tmp_path, start)
    seen = []
    restored = snapshots.Snapshots(tmp_path, params, 3, 1).restore(start, params)[0]
    for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(start), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        seen.append(x.sharding.device_set)
    assert all(len(devices) == 8 for devices in seen)
    got = train(9, tmp_path, start)
    assert_same(got, want)
    if kind == "pmap":  # stored once, so any number of devices can go on from it
        assert checkpoint.load(tmp_path)["w"].a.shape == (6, 2)
        assert_same(checkpoint.load(tmp_path)["w"].a, want.lora["w"].a[0])


def process(folder, steps, every, seconds):
    script = ROOT / "tests" / "fit_setup.py"
    run = [sys.executable, script, folder, str(steps), str(every), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(run, **pipes, text=True, env=ENVIRONMENT)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_it_had_never_been(tmp_path):
    """kill -9 at random moments: while it starts, trains, evaluates, writes a checkpoint or deletes one."""
    steps, kills, dice = 500, 20, random.Random(0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    with process(whole, steps, 3, 0) as child:
        assert "finished" in child.communicate()[0]
    begins, killed, finished = [], 0, False
    while not finished:
        with process(broken, steps, 3, 0.01) as child:
            lines = []
            # most moments after the first step: starting up takes seconds, in which there is nothing to break
            if killed < kills and dice.random() < 0.8:
                lines += [child.stdout.readline() for _ in range(dice.randint(1, 30))]
                time.sleep(dice.uniform(0, 0.05))
            elif killed < kills:
                time.sleep(dice.uniform(0, 4))
            if killed < kills:
                child.kill()
                killed += 1
            out, errors = child.communicate()
            lines += out.splitlines()
            assert "Traceback" not in errors and "damaged" not in errors, errors
            begins += [int(lines[0].split()[1])] if lines and lines[0].startswith("step") else []
            finished = "finished" in lines
    assert killed == kills and (np.diff(begins) >= 0).all() and begins[-1] > 1
    assert all(begin % 3 == 1 for begin in begins)  # the step after a checkpoint
    with np.load(whole / "final.npz") as want, np.load(broken / "final.npz") as got:
        assert len(want.files) == len(got.files) > 4
        for name in want.files:
            np.testing.assert_array_equal(got[name], want[name])

    def rows(folder):
        kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if "second" not in k} for row in kept]

    assert rows(broken) == rows(whole) and len(rows(whole)) == steps + steps // 3
    print(f"{kills} kills; the process began at steps {begins}")


@pytest.mark.slow
def test_sigterm_to_a_process(tmp_path):
    with process(tmp_path, 100_000, 1000, 0.01) as child:
        while child.stdout.readline() != "step 5\n":
            pass
        child.terminate()
        out, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and "finished" not in out, errors
    (saved,) = (tmp_path / "run").iterdir()
    last = int(saved.name.removeprefix("step-"))
    assert last >= 5 and not (tmp_path / "final.npz").exists()
    assert_same(checkpoint.load(saved, params=PARAMS), by_hand(last)[0].lora)
