"""One process of tests/test_processes.py: trains on a mesh over all devices, saves and restores half way.

Arguments: the number of processes, which of them this is, the coordinator's port, a folder for checkpoints,
and a file for what the first process saw.
"""

import itertools
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from many_devices import RULES, TX, make, mesh_of

import lorax_fn as lx

HALF = 3


def main(processes, index, port, folder, result):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    assert (jax.process_count(), jax.device_count()) == (processes, 8)
    step, losses = None, []

    def train(steps):
        """From the checkpoint, if there is one; nothing of an earlier call is left in the state."""
        nonlocal step
        loss_fn, state, params, batch = make(accumulate=1)
        step = step or lx.mesh_train_step(loss_fn, TX, mesh=mesh_of((2, 2, 2), "auto"), rules=RULES)
        state, params = step.place(state, params)
        # each process has its own part of the batch
        size = len(batch["x"]) // processes
        batch = jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)
        return lx.fit(
            step,
            state,
            params,
            lambda start: itertools.repeat(batch),
            steps=steps,
            checkpoint_dir=pathlib.Path(folder) / "run",
            callbacks=[lambda row: losses.append(row["loss"])],
            progress=False,
        )

    train(HALF)
    state = train(2 * HALF)
    assert len(step.programs) == 1
    assert len(losses) == (0 if index else 2 * HALF)  # the first process alone reports
    leaves = [multihost_utils.process_allgather(x, tiled=True) for x in jax.tree.leaves(state.lora)]
    # All processes save; the first one writes what none of them holds whole, and all read it.
    adapters = pathlib.Path(folder) / "adapters"
    for _ in range(2):
        lx.checkpoint.save(adapters, state.lora, extra={"step": state.step})
    for x, want in zip(jax.tree.leaves(lx.checkpoint.load(adapters)), leaves, strict=True):
        np.testing.assert_array_equal(x, want)
    assert int(lx.checkpoint.load_extra(adapters)["step"]) == 2 * HALF
    said = ""
    try:
        lx.checkpoint.save(pathlib.Path(folder) / "log0", state.lora)  # a file
    except lx.LoraError as failure:
        said = str(failure)
    assert ("the first process could not save" if index else "not an adapter checkpoint") in said, said
    if index == 0:
        np.savez(result, np.asarray(losses), int(state.step), *map(np.asarray, leaves))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
