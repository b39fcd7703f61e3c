"""One process of a sweep over all devices, for tests/test_processes.py; arguments as of process_worker.py."""

import pathlib
import sys

import jax
import numpy as np
import optax

import lorax_fn as lx
from lorax_fn.sweeps.programs import host


def main(processes, index, port, folder, result):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    from sweep_setup import KEY, batches, init, loss_fn  # which makes arrays

    data = batches()

    def swept(steps=4):
        return lx.sweep(
            loss_fn,
            init(),
            lx.grid(rank=[1, 2, 4], lr=[1e-3, 1e-2, 3e-2]),  # nine lanes on eight devices
            data,
            steps=steps,
            every=2,
            tx=lambda lane: optax.adam(lane["lr"]),
            key=KEY,
            eval_fn=lambda state, params: loss_fn(params, state.lora, data[0], None),
            mesh=jax.make_mesh((8,), ("lanes",)),
            file=pathlib.Path(folder) / "sweep.jsonl",
            progress=False,
        )

    first = swept()
    again = swept()  # every process reads what the first one saved
    assert again.records == first.records and first.finished
    leaves = [host(x) for x in jax.tree.leaves(first.lora(4))]
    for x, want in zip(jax.tree.leaves(again.lora(4)), leaves, strict=True):
        np.testing.assert_array_equal(host(x), want)
    scores = [record["loss"] for record in sorted(first.records, key=lambda r: (r["lane"], r["step"]))]
    if index == 0:
        np.savez(result, first.curves["loss"], scores, *map(np.asarray, leaves))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
