"""Checkpoints of `fit`: exact resume, damage, wrong bases and states, SIGTERM; see test_survival.py too."""

import json
import os
import signal

import fit_setup as run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fit_setup import PARAMS, STEP, assert_same, batches, by_hand, new_state

import lorax_fn as lx
from lorax_fn import checkpoint
from lorax_fn.checkpoint import files, restoring
from lorax_fn.checkpoint import runs as snapshots


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
        with pytest.raises(lx.LoraError, match=r"fewer batches(.|\n)*2 batches(.|\n)*5, and more"):
            fit(tmp_path, 9, iter(TEN[:2]))
    assert_same(fit(tmp_path, 9, source()), by_hand(9)[0])
    found = json.loads((tmp_path / "step-00000008" / "batches-0.json").read_text())
    assert found["taken"] == 8 and (found["state"] is not None) == ("with" in kind)


def test_a_state_of_every_kind_of_leaf_comes_back_and_compiles_nothing(tmp_path):
    """Python numbers, weak types, 16 bits, keys and an empty array in `extra`; a schedule's count."""

    def loss_fn(params, lora, batch, key, extra):
        loss, aux = run.loss_fn(params, lora, batch, key)
        half = extra["half"] * extra["weak"]  # bfloat16 only as long as `weak` is weak
        rng = jax.random.split(extra["rng"])[0]
        noise = jax.random.normal(rng)
        new = {"n": extra["n"] + 1, "weak": extra["weak"] * 1.01, "half": half, "rng": rng, "no": extra["no"]}
        return loss * extra["weak"] + noise + half.astype(jnp.float32), (new, aux)

    tx = optax.inject_hyperparams(optax.lion)(optax.linear_schedule(0.1, 0.01, 9))
    step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)

    def train(steps, folder=None):
        extra = {
            "n": 1,
            "weak": 1.5,
            "half": jnp.bfloat16(2),
            "rng": jax.random.key(3),
            "no": jnp.zeros((0, 2)),
        }
        state = lx.TrainState.create(lora=new_state().lora, tx=tx, key=jax.random.key(1), extra=extra)
        kwargs = dict(checkpoint_dir=folder, every=2, progress=False)
        with jax.numpy_dtype_promotion("standard"):  # optax's own schedule mixes int32 and float32
            return lx.fit(step, state, PARAMS, batches, steps=steps, **kwargs)

    want, compiled = train(7), step._cache_size()
    train(3, tmp_path)
    got = train(7, tmp_path)
    assert_same(got, want)
    assert got.extra["weak"].weak_type and got.extra["half"].dtype == jnp.bfloat16
    assert step._cache_size() == compiled


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


def test_a_state_that_is_donated_while_it_is_written_is_written_whole(tmp_path):
    fit(
        tmp_path, 6, every=1, max_to_keep=None, nan_guard=False
    )  # without the guard no copy is donated instead
    for steps in range(1, 7):
        want = by_hand(steps)[0].lora
        assert_same(checkpoint.load(tmp_path / f"step-{steps:08d}"), want)


def test_no_weight_of_the_base_is_on_disk_and_the_newest_are_kept(tmp_path):
    fit(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (6, 8, 9)]
    facts = json.loads((tmp_path / "step-00000009" / "train.json").read_text())
    sizes = [np.prod(x["shape"]) for entry in facts["adapters"] for x in entry["arrays"].values()]
    assert sizes == [12, 8]
    assert {fact["path"].split("/")[0] for fact in facts["state"]} == {"opt_state", "step", "key"}
    stored = restoring.read_snapshot(tmp_path / "step-00000009", facts)
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
        lx.LoraError, match=r"only adapters(.|\n)*lx.checkpoint.load(.|\n)*another checkpoint"
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
        with pytest.raises(files.DamagedError):
            files.read_facts(file, snapshots.FORMAT, (snapshots.VERSION,))
    file.write_bytes(content)
    assert files.read_facts(file, snapshots.FORMAT, (snapshots.VERSION,))["step"] == 2


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
    reader = snapshots.Snapshots(tmp_path, params, 3, 1)
    restored = reader.restore(start)[0]
    reader.close()
    for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(start), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        seen.append(x.sharding.device_set)
    assert all(len(devices) == 8 for devices in seen)
    got = train(9, tmp_path, start)
    assert_same(got, want)
    if kind == "pmap":  # stored once, so any number of devices can go on from it
        assert checkpoint.load(tmp_path)["w"].a.shape == (6, 2)
        assert_same(checkpoint.load(tmp_path)["w"].a, want.lora["w"].a[0])
