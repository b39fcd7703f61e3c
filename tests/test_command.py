"""The command, run as a process: what it prints, what it writes, and its exit codes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

ROOT = pathlib.Path(__file__).parents[1]
PARAMS = {f"layers.{i}.up_proj.weight": jnp.arange(24.0).reshape(6, 4) / 24 for i in range(2)}


def command(*args, code=0):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    run = [sys.executable, "-W", "error::UserWarning", "-m", "lorax_fn", *map(str, args)]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def lora_of(seed, rank=2):
    _, lora = lx.split(PARAMS, rank)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed), x.shape), lora)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("command")
    for name, seed in (("one", 1), ("two", 2)):
        lx.peft.save(path / name, lora_of(seed), params=PARAMS)
    lx.huggingface.save(path / "base", PARAMS, config={"model_type": "x"})
    return path


def test_inspect_tells_ranks_and_singular_values(folder):
    (found,) = json.loads(command("inspect", folder / "one", "--json").stdout)
    assert found["kind"] == "peft" and found["config"]["r"] == 2
    (row, _) = found["adapters"]
    want = np.linalg.svd(lx.delta(lora_of(1))[row["path"]], compute_uv=False)
    np.testing.assert_allclose(row["values"], want[:2], rtol=1e-4)
    text = command("inspect", folder / "one", folder / "base").stdout
    assert "layers.0.up_proj.weight" in text and "target_modules" in text and "checkpoint" in text


def test_merge_writes_the_merged_checkpoint(folder, tmp_path):
    command("merge", folder / "base", folder / "one", folder / "two", "--out", tmp_path / "m")
    got = lx.huggingface.load(tmp_path / "m", PARAMS)
    want = lx.merge(lx.merge(PARAMS, lora_of(1)), lora_of(2))
    for path in PARAMS:
        np.testing.assert_allclose(got[path], want[path], atol=1e-5)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"model_type": "x"}


@pytest.mark.slow
def test_convert_goes_round_and_diff_sees_no_change(folder, tmp_path):
    command("convert", folder / "one", "--to", "orbax", "--out", tmp_path / "orbax")
    command("convert", tmp_path / "orbax", "--to", "kohya", "--out", tmp_path / "k.safetensors")
    command(
        "convert",
        tmp_path / "k.safetensors",
        "--to",
        "peft",
        "--base",
        folder / "base",
        "--out",
        tmp_path / "p",
    )
    done = command("diff", folder / "one", tmp_path / "p", "--json")
    assert json.loads(done.stdout)["differ"] is False
    rows = json.loads(command("diff", folder / "one", folder / "two", "--json", code=1).stdout)["adapters"]
    assert all(row["difference"] > 0.1 for row in rows)


def test_combine_is_the_exact_weighted_sum(folder, tmp_path):
    command("combine", f"{folder / 'one'}:0.5", f"{folder / 'two'}:-2", "--out", tmp_path / "c")
    got, one, two = (lx.delta(x) for x in (lx.peft.load(tmp_path / "c", PARAMS), lora_of(1), lora_of(2)))
    for path in PARAMS:
        np.testing.assert_allclose(got[path], 0.5 * one[path] - 2 * two[path], atol=1e-4)


def test_mistakes_are_one_message_and_exit_code_2(folder, tmp_path):
    assert "error: there is no adapter" in command("inspect", tmp_path / "none", code=2).stderr
    assert "exists already" in command("combine", folder / "one", "--out", folder, code=2).stderr
    assert (
        "Traceback"
        not in command("convert", folder / "one", "--to", "x", "--out", tmp_path / "y", code=2).stderr
    )
    assert "inspect" in command("--help").stdout and "weight" in command("combine", "--help").stdout


def conv1d():
    """An adapter of a square Conv1D of GPT-2, whose orientation only the config tells, and its base."""
    params = {"h.0.c_proj.weight": jnp.arange(36.0).reshape(6, 6), "h.0.k_proj.weight": jnp.ones((4, 6))}
    layout = {"c_proj": lx.Layout((), (0,), (1,))}
    _, lora = lx.split(params, 2, layout=layout)
    return params, jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), lora)


@pytest.mark.slow
def test_a_square_conv1d_keeps_its_orientation_on_the_way(tmp_path):
    params, lora = conv1d()
    lx.peft.save(tmp_path / "a", lora, params=params)
    assert lx.peft.config(tmp_path / "a")["fan_in_fan_out"]
    command("convert", tmp_path / "a", "--to", "orbax", "--out", tmp_path / "o")
    command("convert", tmp_path / "o", "--to", "peft", "--out", tmp_path / "b")
    for folder in ("a", "b"):
        got = lx.merge(params, lx.peft.load(tmp_path / folder, params))
        for path, want in lx.merge(params, lora).items():
            np.testing.assert_allclose(got[path], want, rtol=1e-5, err_msg=folder)


@pytest.mark.slow
def test_adapters_that_need_their_base_take_it(tmp_path):
    """Experts in one parameter: their file does not tell which axis is which."""
    params = {"mlp.experts.down_proj": jnp.ones((3, 6, 4))}
    _, lora = lx.split(params, 2, layout={"*": lx.Layout((0,), (2,), (1,))})
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    lx.peft.save(tmp_path / "a", lora)
    lx.huggingface.save(tmp_path / "base", params)
    assert "--base" in command("inspect", tmp_path / "a", code=2).stderr
    found = json.loads(command("inspect", tmp_path / "a", "--base", tmp_path / "base", "--json").stdout)
    assert found[0]["adapters"][0]["numbers"] == 3 * 2 * (6 + 4)
    command("combine", f"{tmp_path / 'a'}:2", "--base", tmp_path / "base", "--out", tmp_path / "c")
    (got,) = lx.delta(lx.peft.load(tmp_path / "c", params)).values()
    np.testing.assert_allclose(got, 2 * lora["mlp.experts.down_proj"].delta(), atol=1e-4)


@pytest.mark.slow
def test_a_single_file_of_weights_is_shown_and_a_missing_base_is_an_error(folder, tmp_path):
    file = folder / "base" / "model.safetensors"
    (found,) = json.loads(command("inspect", file, "--json").stdout)
    assert found["kind"] == "checkpoint" and found["tensors"]["layers.0.up_proj.weight"] == ["F32", 6, 4]
    done = command("merge", tmp_path / "none", folder / "one", "--out", tmp_path / "m", code=2)
    assert done.stderr.startswith("error: this file cannot be read.") and "Traceback" not in done.stderr
