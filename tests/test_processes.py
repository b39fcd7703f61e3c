"""Two processes of four devices each, under jax.distributed, against one process of eight."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
WORKER = ROOT / "tests" / "process_worker.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(processes, folder, worker=WORKER):
    """Starts the processes, waits for all, and gives what the first of them wrote."""
    folder.mkdir()
    port, result = free_port(), folder / "result.npz"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = []
    for index in range(processes):
        command = [sys.executable, worker, processes, index, port, folder, result]
        with (folder / f"log{index}").open("w") as log:
            started.append(subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(folder / f"log{index}").read_text() for index in range(processes)]
    assert codes == [0] * processes, "\n".join(logs)
    with np.load(result) as found:
        return [found[name] for name in found.files]


@pytest.mark.slow
def test_two_processes_train_save_and_restore_as_one(tmp_path):
    losses, step, *leaves = run(2, tmp_path / "two")
    want_losses, want_step, *want = run(1, tmp_path / "one")
    assert step == want_step == 6 and losses[-1] < losses[0]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert len(leaves) == len(want) == 7
    for got, leaf in zip(leaves, want, strict=True):
        assert np.linalg.norm(got - leaf) <= 1e-5 * np.linalg.norm(leaf)


@pytest.mark.slow
def test_two_processes_sweep_as_one(tmp_path):
    worker = ROOT / "tests" / "sweep_worker.py"
    got, want = run(2, tmp_path / "two", worker), run(1, tmp_path / "one", worker)
    assert len(got) == len(want) == 6 and got[0].shape == (9, 4)  # curves, scores, two adapters
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    records = [(tmp_path / name / "sweep.jsonl").read_text().count("\n") for name in ("two", "one")]
    assert records == [1 + 18] * 2
