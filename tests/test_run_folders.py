"""The directory of a run: one writer, odd names, links, files of others, keys, metrics, older versions."""

import dataclasses
import json
import os
import socket
import subprocess

import fit_setup as run
import jax
import jax.numpy as jnp
import pytest
from fit_setup import PARAMS, STEP, assert_same, batches, by_hand, new_state

import lorax_fn as lx
from lorax_fn import checkpoint
from lorax_fn.checkpoint import files, lock
from lorax_fn.checkpoint import runs as snapshots
from lorax_fn.training import metrics


def fit(folder, steps, source=batches, state=None, params=PARAMS, **kwargs):
    kwargs = {"every": 2, "progress": False} | kwargs
    return lx.fit(STEP, state or new_state(), params, source, steps=steps, checkpoint_dir=folder, **kwargs)


def test_two_writers_of_one_directory_and_what_a_killed_one_left(tmp_path):
    def second(row):
        if row["step"] == 2:
            with pytest.raises(
                lx.LoraError, match=rf"another run(.|\n)*process {os.getpid()} on (.|\n)*checkpoint_dir"
            ):
                fit(tmp_path, 4)

    fit(tmp_path, 4, callbacks=[second])
    assert not (tmp_path / lock.NAME).exists()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for text in (
        json.dumps({"host": socket.gethostname(), "pid": gone.pid}),
        "{",
        '{"host": 1, "pid": null}',
        "",
    ):
        (tmp_path / lock.NAME).write_text(text)  # of a process that was killed: the kernel let go of its lock
        assert_same(fit(tmp_path, 6), by_hand(6)[0])
    with pytest.MonkeyPatch.context() as patch:  # a file system without locks: the process decides
        patch.setattr(lock, "fcntl", None)
        (tmp_path / lock.NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
        with pytest.raises(lx.LoraError, match=rf"process {os.getppid()} on"):
            fit(tmp_path, 6)
        (tmp_path / lock.NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
        fit(tmp_path, 6)


def test_another_key_is_another_run(tmp_path):
    fit(tmp_path, 4)
    other = dataclasses.replace(new_state(), key=jax.random.key(7))
    with pytest.raises(
        lx.LoraError, match=r"another key(.|\n)*\[0, 7\](.|\n)*\[0, 2\](.|\n)*checkpoint_dir"
    ) as failure:
        fit(tmp_path, 6, state=other)
    code = str(failure.value).splitlines()[-1].strip()
    state = dataclasses.replace(new_state(), key=eval(code))  # what the message says to write
    assert_same(fit(tmp_path, 6, state=state), by_hand(6)[0])


def test_a_step_that_moves_its_key_is_resumed_from_the_first_state_and_from_the_last(tmp_path):
    @jax.jit
    def step(state, params, batch):
        new, metrics = run.KEEPING_STEP(state, params, batch)
        return dataclasses.replace(new, key=jax.random.split(state.key)[0]), metrics

    def train(steps, state, folder=None):
        return lx.fit(
            step, state, PARAMS, batches, steps=steps, every=2, checkpoint_dir=folder, progress=False
        )

    want = train(6, new_state())
    last = train(4, new_state(), tmp_path)
    assert_same(train(5, last, tmp_path), train(5, new_state()))
    assert_same(train(6, new_state(), tmp_path), want)


def test_files_of_others_are_neither_read_nor_deleted(tmp_path):
    mine = {"step-final": None, "notes.txt": "x", ".step-notes": None, "step-00000004": None, "step-1": None}
    for name, text in mine.items():
        if text is None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.txt").write_text(name)
        else:
            (tmp_path / name).write_text(text)
    with pytest.warns(lx.LoraCheckpointWarning, match=r"step-00000004 is not a checkpoint(.|\n)*moved"):
        fit(tmp_path, 4, max_to_keep=None)
    (tmp_path / "step-00000002" / "thesis.txt").write_text("step-00000002")
    assert_same(fit(tmp_path, 10, max_to_keep=1), by_hand(10)[0])
    kept = {file.read_text() for file in tmp_path.rglob("thesis.txt")}
    assert kept == {*(name for name, text in mine.items() if text is None), "step-00000002"}
    assert [path.name for path in (tmp_path / "step-00000002").iterdir()] == ["thesis.txt"]
    assert_same(checkpoint.load(tmp_path), by_hand(10)[0].lora)


@pytest.mark.parametrize("name", ["step-12345678", "n" * 245, "a b#", "s3:"])
def test_directories_of_odd_names(tmp_path, name):
    folder = tmp_path / name
    fit(folder, 2, metrics_file=tmp_path / f"{name}.metrics"[-250:])
    assert_same(fit(folder, 4), by_hand(4)[0])
    assert_same(checkpoint.load(folder), by_hand(4)[0].lora)
    checkpoint.save(tmp_path / "adapters" / name, by_hand(4)[0].lora)
    assert_same(checkpoint.load(tmp_path / "adapters" / name), by_hand(4)[0].lora)


@pytest.mark.parametrize("name", ["star*[a]", "back\\slash", "gs:", "what?"])
def test_names_that_orbax_takes_for_patterns_or_addresses_are_refused(tmp_path, name):
    for write in (lambda path: fit(path, 2), lambda path: checkpoint.save(path, by_hand(0)[0].lora)):
        with pytest.raises(lx.LoraError, match="Orbax can't write below"):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for address in ("gs://bucket/x", "s3://bucket/x"):
        for use in (checkpoint.load, lambda path: fit(path, 2)):
            with pytest.raises(lx.LoraError, match="remote store"):
                use(address)


def test_links_and_directories_that_can_not_be_written(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "other" / "place")
    fit(tmp_path / "dangling", 2)
    assert (tmp_path / "other" / "place" / "step-00000002").is_dir()
    checkpoint.save(tmp_path / "dangling" / "adapters", by_hand(2)[0].lora)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    rows = []
    for folder in ("loop", "file", "file/below"):
        with pytest.raises(lx.LoraError, match=r"could not be written(.|\n)*no step was taken"):
            fit(tmp_path / folder, 2, callbacks=[rows.append])
        with pytest.raises(lx.LoraError, match="could not be written|not an adapter checkpoint"):
            checkpoint.save(tmp_path / folder, by_hand(2)[0].lora)
    assert not rows


def test_garbage_in_the_metrics_file(tmp_path):
    file = tmp_path / "m.jsonl"
    row = json.dumps({"step": 1, "loss": 1.0})
    for text in (
        "my notes",
        "my notes\n",
        row + "\n[1]\n",
        row + '\n{"loss": 1}\n',
        row + "\n\0\0",
        "{" * 9**5 + "\n",
    ):
        file.write_text(text)
        with pytest.raises(
            lx.LoraError, match=r"metrics_file contains something other(.|\n)*line [12]:(.|\n)*move it away"
        ):
            fit(tmp_path / "run", 2, metrics_file=file)
        assert file.read_text() == text
    file.write_bytes(b"\xff\n")
    with pytest.raises(lx.LoraError, match="UnicodeDecodeError"):
        fit(tmp_path / "run", 2, metrics_file=file)
    for bad in (tmp_path, "/dev/full"):
        with pytest.raises(lx.LoraError, match="not a file"):
            fit(tmp_path / "run", 2, metrics_file=bad)


def test_a_full_disk_for_metrics(tmp_path):
    log = metrics.Log(0, 4, tmp_path / "m.jsonl", [], False, "examples")
    log.file.close()
    log.file = open("/dev/full", "w")
    with pytest.raises(
        lx.LoraError, match=r"metrics_file can't be written(.|\n)*No space left(.|\n)*make room"
    ):
        log.row({"step": 1})
    log.close()


def test_the_extra_of_a_run_is_read_by_itself(tmp_path):
    def loss_fn(params, lora, batch, key, extra):
        loss, _ = run.loss_fn(params, lora, batch, key)
        return loss, ({"bn": [extra["bn"][0] + 1, extra["bn"][1]], "none": None}, {})

    step = jax.jit(lx.make_train_step(loss_fn, run.TX))
    extra = {"bn": [jnp.zeros(2), (jnp.bfloat16(2),)], "none": None}
    state = lx.TrainState.create(lora=new_state().lora, tx=run.TX, key=jax.random.key(2), extra=extra)
    want = lx.fit(step, state, PARAMS, batches, steps=3, checkpoint_dir=tmp_path, progress=False)
    assert_same(checkpoint.load_extra(tmp_path), want.extra)
    assert_same(checkpoint.load_extra(tmp_path / "step-00000003", like=extra), want.extra)
    assert float(want.extra["bn"][0][0]) == 3.0


def test_checkpoints_of_version_1_are_gone_on_from(tmp_path, monkeypatch):
    """Made of one of today: no sizes, extra, key and seal, each array alone, the old fingerprint."""
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_packs", lambda: False)
        fit(tmp_path, 4)
    for folder in tmp_path.iterdir():
        facts = json.loads((folder / "train.json").read_text())
        del facts["extra"], facts["key"], facts["packed"]
        facts |= {"version": 1, "base": snapshots.fingerprint(PARAMS, 1)}
        facts["files"] = {name: file["crc32"] for name, file in facts["files"].items()}
        files.write_facts(folder / "train.json", facts)
        with pytest.raises(lx.LoraError, match="damaged(.|\n)*version 1 beside arrays of a later one"):
            checkpoint.load(folder)
        (folder / "arrays" / files.SEAL).unlink()
    assert_same(checkpoint.load(tmp_path, params=PARAMS), by_hand(4)[0].lora)
    with pytest.raises(lx.LoraError, match="another key"):
        fit(tmp_path, 6, state=dataclasses.replace(new_state(), key=jax.random.key(7)))
    assert_same(fit(tmp_path, 6), by_hand(6)[0])
