"""Real processes that train and are killed, terminated, or run out of disk."""

import json
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from fit_setup import PARAMS, assert_same, by_hand

from lorax_fn import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


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


def test_a_full_disk_while_saving_names_the_cure_and_leaves_the_old_one(tmp_path):
    """In a process of its own: Orbax leaves threads behind whose writes failed."""
    script = """
        import pathlib, resource, sys
        import jax.numpy as jnp, lorax_fn as lx
        path = pathlib.Path(sys.argv[1]) / "ck"
        lx.checkpoint.save(path, {"w": lx.Full(jnp.ones(2))})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            lx.checkpoint.save(path, {"w": lx.Full(jnp.zeros(2))})
        except lx.LoraError as failure:
            text = str(failure)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "could not be written" in text and "make room" in text, text
        assert (lx.checkpoint.load(path)["w"].value == 1).all()
        assert len(list(path.iterdir())) == 2
        print("held")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


def process(folder, steps, every, seconds):
    script = ROOT / "tests" / "fit_setup.py"
    run = [sys.executable, script, folder, str(steps), str(every), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(run, **pipes, text=True, env=ENVIRONMENT)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_it_had_never_been(tmp_path):
    """kill -9 at random moments: while it starts, trains, evaluates, writes a checkpoint or deletes one."""
    steps, kills, dice = 510, 20, random.Random(0)
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
