"""One process of tests/test_processes.py: trains on a mesh over all devices, saves and restores half way.

Arguments: the number of processes, which of them this is, the coordinator's port, a folder for checkpoints,
and a file for what the first process saw.
"""

import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from many_devices import RULES, TX, make, mesh_of

import lorax_fn as lx

HALF = 3


def arrays_of(state):
    """The state without typed keys, which Orbax does not store."""
    return {
        "state": jax.tree.leaves((state.lora, state.opt_state, state.step)),
        "key": jax.random.key_data(state.key),
    }


def save_and_restore(folder, state):
    """The place of lorax_fn's own checkpoints of a run; until then, Orbax as it is."""
    saved = arrays_of(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "half", saved)
    # the target has shapes and shardings only: no value of the first half is left in it
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "half", target)
    treedef = jax.tree.structure((state.lora, state.opt_state, state.step))
    lora, opt_state, step = treedef.unflatten(restored["state"])
    key = jax.random.wrap_key_data(restored["key"])
    return lx.TrainState(lora=lora, opt_state=opt_state, step=step, key=key, extra=None)


def main(processes, index, port, folder, result):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    assert (jax.process_count(), jax.device_count()) == (processes, 8)

    loss_fn, state, params, batch = make(accumulate=1)
    step = lx.mesh_train_step(mesh_of((2, 2, 2), "auto"), RULES, loss_fn, TX)
    state, params = step.place(state, params)
    # each process has its own part of the batch
    size = len(batch["x"]) // processes
    batch = jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)

    losses = []
    for i in range(2 * HALF):
        if i == HALF:
            state = save_and_restore(pathlib.Path(folder), state)
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))

    assert len(step.programs) == 1
    leaves = [multihost_utils.process_allgather(x, tiled=True) for x in jax.tree.leaves(state.lora)]
    if index == 0:
        np.savez(result, np.asarray(losses), int(state.step), *map(np.asarray, leaves))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
