"""Adapters on disk: bit-equal round trips, nothing half-written, every damage and every wrong base named."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_fn import checkpoint
from lorax_fn.checkpoint import adapters as saving
from lorax_fn.checkpoint import files, lock
from lorax_fn.checkpoint.storage import LoraCheckpointWarning
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.whole import Full
from lorax_fn.quantization.trees import quantize
from lorax_fn.training.step import TrainState, make_train_step

LAYOUT = Layout(inputs=(0,), outputs=(1,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seeded(Adapter):
    """A method defined outside the package, with a key that is not a dropout key."""

    value: Any
    seed: Any
    flag: bool = dataclasses.field(metadata={"static": True})

    def weight(self, w):
        return self.value.astype(w.dtype)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def lora_of(scale=1.0):
    stacked = Layout(stack=(0,), inputs=(1,), outputs=(2, 3))
    return {
        "layer/w": LoRA(normal(0, (4, 2)) * scale, normal(1, (2, 3)), 3.0, 2, "rslora", LAYOUT),
        "qkv": LoRA(
            normal(2, (2, 4, 3), jnp.bfloat16),
            normal(3, (2, 3, 2, 5), jnp.bfloat16),
            (1.5, 2.0),
            (0, 3),
            "lora",
            stacked,
        ),
        "bias": Full(normal(4, (3,), jnp.float16)),
    }


def params_of():
    return {
        "layer": {"w": normal(5, (4, 3))},
        "qkv": normal(6, (2, 4, 2, 5), jnp.bfloat16),
        "bias": jnp.zeros(3),
        "embed": normal(7, (300, 20)),
        "n": jnp.arange(3),
        "key": jax.random.key(5),
        "act": jnp.tanh,
        "np": np.ones(2, np.float32),
    }


def bits(tree):
    def raw(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return jax.tree.structure(tree), [raw(x) for x in jax.tree.leaves(tree)]


def edit(path, change):
    """Rewrites the facts, with sums that are right."""
    facts = json.loads((path / "adapter.json").read_text())
    change(facts)
    files.write_facts(path / "adapter.json", facts)
    files.write_seal(next(path.glob("arrays-*")), facts)


@pytest.mark.parametrize("with_params", [False, True])
def test_round_trip_is_bit_equal_and_static_facts_come_back(tmp_path, with_params):
    lora, params = lora_of(), params_of() if with_params else None
    checkpoint.save(tmp_path / "new" / "ck", lora, params=params)
    got = checkpoint.load(tmp_path / "new" / "ck", params=params)
    assert bits(got) == bits(lora)
    assert got["qkv"].layout == lora["qkv"].layout and got["qkv"].rank == (0, 3)
    assert got["qkv"].alpha == (1.5, 2.0) and got["layer/w"].scaling == "rslora"
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))
    np.testing.assert_array_equal(got["layer/w"].delta(), lora["layer/w"].delta())


def test_keys_empty_arrays_and_methods_of_others(tmp_path):
    lora = {
        "s": Seeded(jnp.zeros(()), jax.random.key(3, impl="rbg"), flag=True),
        "e": LoRA(jnp.zeros((4, 0)), jnp.zeros((0, 3)), 1.0, 0, "lora", LAYOUT),
    }
    checkpoint.save(tmp_path / "ck", lora)
    got = checkpoint.load(tmp_path / "ck")
    assert bits(got) == bits(lora) and got["s"].flag is True
    assert jax.random.key_impl(got["s"].seed) == "rbg"


def test_training_goes_on_identically_after_load(tmp_path):
    params, x, y = {"w": normal(5, (4, 3))}, normal(8, (8, 4)), normal(9, (8, 3))
    lora = {"w": LoRA(normal(0, (4, 2)), jnp.zeros((2, 3)), 4.0, 2, "lora", LAYOUT)}

    def loss_fn(params, lora, batch, key):
        down, up = lora["w"].a, lora["w"].b
        return jnp.mean((x @ params["w"] + lora["w"].scale * ((x @ down) @ up) - y) ** 2)

    tx = optax.adam(0.05)
    step = jax.jit(make_train_step(loss_fn, tx))

    def run(lora, n):
        state, losses = TrainState.create(lora=lora, tx=tx, key=jax.random.key(0)), []
        for _ in range(n):
            state, metrics = step(state, params, None)
            losses.append(float(metrics["loss"]))
        return state.lora, losses

    trained, _ = run(lora, 3)
    checkpoint.save(tmp_path / "ck", trained, params=params)
    loaded = checkpoint.load(tmp_path / "ck", params=params)
    assert bits(loaded) == bits(trained)
    (one, losses), (two, losses_loaded) = run(trained, 5), run(loaded, 5)
    assert losses == losses_loaded and bits(one) == bits(two) and losses[-1] < losses[0]
    assert step._cache_size() == 1  # a loaded adapter compiles nothing


def test_sharded_adapters_are_saved_whole(tmp_path):
    lora = {"b": Full(normal(0, (16,)))}
    mesh = jax.make_mesh((8,), ("d",))
    checkpoint.save(tmp_path / "ck", jax.device_put(lora, jax.NamedSharding(mesh, jax.P("d"))))
    assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora)


def test_another_base_is_refused_with_every_differing_path(tmp_path):
    params = params_of()
    checkpoint.save(tmp_path / "ck", lora_of(), params=params)
    other = params_of() | {
        "bias": jnp.zeros(4),
        "embed": params["embed"].at[0, 0].add(1.0),
        "n": params["n"].astype(jnp.float32),
        "key": jax.random.key(6),  # state: no content is compared
        "more": jnp.zeros(1),
    }
    del other["qkv"]
    with pytest.raises(LoraError) as failure:
        checkpoint.load(tmp_path / "ck", params=other)
    text = str(failure.value)
    for line in (
        "bias: shape: [3] saved, [4] in params",
        "embed: content: other values",
        "more: extra in params",
        "n: dtype: int32 saved, float32 in params",
        "qkv: missing in params",
        "5 leaves that differ",
    ):
        assert line in text
    assert "layer/w" not in text and "np:" not in text and "key:" not in text
    assert len(checkpoint.load(tmp_path / "ck")) == 3  # without params nothing is compared


def test_not_strict_leaves_out_what_does_not_fit_and_says_so(tmp_path):
    params, lora = params_of(), lora_of()
    checkpoint.save(tmp_path / "ck", lora, params=params)
    other = params | {"bias": jnp.zeros(4), "embed": params["embed"] + 1}
    del other["qkv"]
    with pytest.warns(LoraCheckpointWarning) as caught:
        got = checkpoint.load(tmp_path / "ck", params=other, strict=False)
    assert bits(got) == bits({"layer/w": lora["layer/w"]})
    text = str(caught.pop().message)
    assert not caught.list and text.splitlines()[0].endswith("2 of 3 adapters were skipped:")
    for line in (
        "  bias: skipped: a leaf of shape (4,)",
        "  qkv: skipped: no such array in params",
        "  bias: shape: [3] saved, [4] in params",
        "  embed: content: other values",
        "  qkv: missing in params",
    ):
        assert line in text.splitlines()
    # nothing differs: no warning; nothing to compare with: a warning
    assert bits(checkpoint.load(tmp_path / "ck", params=params, strict=False)) == bits(lora)
    checkpoint.save(tmp_path / "bare", lora)
    with pytest.warns(LoraCheckpointWarning, match="0 of 3(.|\n)*nothing was compared"):
        assert bits(checkpoint.load(tmp_path / "bare", params=params, strict=False)) == bits(lora)


def test_abstract_params_are_compared_by_shape_and_dtype(tmp_path):
    params = {"bias": jnp.zeros(3)}
    lora = {"bias": Full(jnp.ones(3))}
    abstract = {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    checkpoint.save(tmp_path / "ck", lora, params=params)
    checkpoint.load(tmp_path / "ck", params=abstract)
    checkpoint.save(tmp_path / "ck", lora, params=abstract)
    checkpoint.load(tmp_path / "ck", params=params)
    with pytest.raises(LoraError, match=r"bias: shape: \[3\] saved, \[2\] in params"):
        checkpoint.load(tmp_path / "ck", params={"bias": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_quantized_base_has_the_fingerprint_of_its_codes(tmp_path):
    float32 = {"kernel": normal(0, (64, 8))}
    params = quantize(float32, "nf4")
    lora = {"kernel": Full(float32["kernel"])}
    checkpoint.save(tmp_path / "a", lora, params=params)
    loaded = checkpoint.load(tmp_path / "a", params=jax.tree.map(lambda x: x + 0, params))
    np.testing.assert_array_equal(loaded["kernel"].value, float32["kernel"])
    abstract = quantize({"kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32)}, "nf4")
    checkpoint.load(tmp_path / "a", params=abstract)  # no codes to compare
    for other in (float32, quantize({"kernel": normal(1, (64, 8))}, "nf4")):
        with pytest.raises(LoraError, match="kernel"):
            checkpoint.load(tmp_path / "a", params=other)


def test_a_comparison_needs_a_fingerprint(tmp_path):
    checkpoint.save(tmp_path / "ck", lora_of())
    with pytest.raises(LoraError, match="saved without its base"):
        checkpoint.load(tmp_path / "ck", params=params_of())


def test_save_refuses_what_does_not_fit_or_can_not_be_stored(tmp_path):
    lora, key = lora_of(), jax.random.key(0)
    dropped = dataclasses.replace(lora["layer/w"], key=key, rate=0.5)
    odd = dataclasses.replace(lora["layer/w"], alpha=1j)
    for bad, text in [
        (lora | {"layer/w": dropped}, r"dropout(.|\n)*path: +layer/w"),
        (lora | {"layer/w": odd}, r"layer/w: alpha(.|\n)*complex"),
        (lora | {"u": jnp.ones(1)}, r"got: +u: \w+\n"),
        ([lora], "not a dict of adapters"),
    ]:
        with pytest.raises(LoraError, match=text):
            checkpoint.save(tmp_path / "ck", bad)
    wrong = params_of() | {"qkv": jnp.zeros((2, 4)), "bias": None}
    with pytest.raises(
        LoraError, match=r"does not fit(.|\n)*qkv(.|\n)*bias(.|\n)*no such(.|\n)*\(2, 4, 2, 5\)"
    ):
        checkpoint.save(tmp_path / "ck", lora, params=wrong)
    assert not list(tmp_path.iterdir())


def test_an_older_checkpoint_is_replaced_and_nothing_is_left_over(tmp_path):
    for scale in (1.0, 2.0):
        checkpoint.save(tmp_path / "ck", lora_of(scale))
        assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora_of(scale))
    names = sorted(p.name.split("-")[0] for p in (tmp_path / "ck").iterdir())
    assert names == ["adapter.json", "arrays"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("moment", ["_write_arrays", "write_facts", "_publish"])
def test_a_failure_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    checkpoint.save(tmp_path / "ck", lora_of())

    def disk_full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(saving, moment, disk_full)
    for name in ("ck", "first"):
        with pytest.raises(LoraError, match=r"could not be written(.|\n)*disk full(.|\n)*make room"):
            checkpoint.save(tmp_path / name, lora_of(2.0))
    assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora_of())
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_crash_before_the_last_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "ck", lora_of())
    real = os.replace

    def crash(source, target):
        if str(target).endswith("adapter.json"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "ck", lora_of(2.0))
    monkeypatch.undo()
    assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora_of())
    checkpoint.save(tmp_path / "ck", lora_of(3.0))  # and sweeps up what the crash left
    assert len(list((tmp_path / "ck").iterdir())) == 2


def test_other_peoples_files_are_not_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter.json").write_text("{}")
    for name in ("full", "file", "peft"):
        with pytest.raises(LoraError, match="not an adapter checkpoint"):
            checkpoint.save(tmp_path / name, lora_of())
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", lora_of())
    assert len(checkpoint.load(tmp_path / "empty")) == 3


def test_damage_is_found(tmp_path):
    path = tmp_path / "ck"

    def fresh():
        checkpoint.save(path, lora_of())
        return path / "adapter.json", next(path.glob("arrays-*"))

    with pytest.raises(LoraError, match="no adapter checkpoint here"):
        checkpoint.load(tmp_path / "nowhere")
    facts, _ = fresh()
    facts.write_text(facts.read_text()[:-40])
    with pytest.raises(LoraError, match=r"damaged(.|\n)*adapter.json"):
        checkpoint.load(path)
    facts, _ = fresh()  # a damaged one may be replaced
    facts.write_text(facts.read_text().replace('"alpha": 3.0', '"alpha": 4.0'))
    with pytest.raises(LoraError, match="does not match its own crc32"):
        checkpoint.load(path)
    _, arrays = fresh()
    files = [file for file in arrays.rglob("*") if file.is_file() and file.parent.name == "d"]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # The first of them by name, because of many damaged files the message names five.
    with pytest.raises(LoraError, match=rf"damaged(.|\n)*{min(files).name}"):
        checkpoint.load(path)
    _, arrays = fresh()
    file = next(file for file in arrays.rglob("*") if file.is_file() and file.parent.name == "d")
    file.write_bytes(file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 1]) + file.read_bytes()[-8:])
    with pytest.raises(LoraError, match=rf"damaged(.|\n)*path: +\S+{file.name}\n +got:"):
        checkpoint.load(path)
    _, arrays = fresh()
    arrays.rename(tmp_path / "elsewhere")
    with pytest.raises(LoraError, match=r"damaged(.|\n)*arrays-"):
        checkpoint.load(path)
    (tmp_path / "elsewhere").rename(arrays)
    assert bits(checkpoint.load(path)) == bits(lora_of())


def test_unknown_format_version_and_method(tmp_path):
    path = tmp_path / "ck"
    checkpoint.save(path, lora_of())
    edit(path, lambda facts: facts["adapters"][0].update(method="Whole"))
    with pytest.raises(
        LoraError, match=r"unknown method(.|\n)*bias(.|\n)*Whole\(value\)(.|\n)*DoRA(.|\n)*more"
    ):
        checkpoint.load(path)
    edit(path, lambda facts: facts["adapters"][0].update(method="LoRA"))
    with pytest.raises(LoraError, match=r"unknown fields(.|\n)*LoRA\(value\)"):
        checkpoint.load(path)
    edit(path, lambda facts: facts.update(version=3))
    with pytest.raises(LoraError, match="unknown checkpoint format(.|\n)*version 3(.|\n)*version 1 or 2"):
        checkpoint.load(path)


def test_import_does_not_load_orbax():
    code = "import sys, lorax_fn.checkpoint; print([m for m in ('orbax', 'flax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_array_alpha_and_adapters_side_by_side(tmp_path):
    lora = lora_of()
    live = {"layer/w": dataclasses.replace(lora["layer/w"], alpha=jnp.float32(6))}
    both = jax.tree.map(lambda x: jnp.stack([x, x]), live)
    for tree in (live, both):
        checkpoint.save(tmp_path / "ck", tree)
        assert bits(checkpoint.load(tmp_path / "ck")) == bits(tree)


def test_one_writer_and_what_a_killed_one_left(tmp_path):
    path = tmp_path / "ck"
    checkpoint.save(path, lora_of())
    held = lock.Lock(path)
    with pytest.raises(LoraError, match="one writer per directory"):
        checkpoint.save(path, lora_of(2.0))
    held.release()
    (path / ".new-0123456789ab" / "arrays-0123456789ab").mkdir(parents=True)
    (path / "arrays-0123456789ab").mkdir()
    for name in ("README.md", "arrays-mine", ".new-mine"):
        (path / name).write_text("mine")
    checkpoint.save(path, lora_of(2.0))
    assert bits(checkpoint.load(path)) == bits(lora_of(2.0))
    assert len(list(path.iterdir())) == 5  # two of ours, three of others
    (tmp_path / "first" / ".new-0123456789ab").mkdir(parents=True)  # killed at the first save
    checkpoint.save(tmp_path / "first", lora_of())
    assert len(list((tmp_path / "first").iterdir())) == 2
