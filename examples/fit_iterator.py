"""`fit` fed by a plain function of the step: the simplest source of batches that resumes for nothing.

    python examples/fit_iterator.py

``batches(start)`` gives an iterator from batch number ``start`` on: a restart reads no batch twice. The run
is cut in two here, as if it had been killed, and compared with one that was not.
"""

import tempfile

import counting
import jax
import numpy as np

import lorax_fn as lx

BATCH, STEPS = 8, 60
PACKED = counting.rows()


def batches(start):
    """Batch ``start``, ``start + 1``, ...: each is drawn by a generator of its own number."""
    while True:
        chosen = np.random.default_rng(start).integers(0, len(PACKED["inputs"]), BATCH)
        yield {name: array[chosen] for name, array in PACKED.items()}
        start += 1


def train(steps, folder=None, rows=None):
    return lx.fit(
        counting.STEP,
        counting.new_state(),
        counting.PARAMS,
        batches,
        steps=steps,
        every=20,
        checkpoint_dir=folder,
        callbacks=[] if rows is None else [rows.append],
        count=lambda batch: int(batch["mask"].sum()),
        unit="tokens",
    )


def main():
    rows = []
    whole = train(STEPS, rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        train(STEPS // 2, folder)
        resumed = train(STEPS, folder)  # a new state, which the checkpoint fills
    first, last = rows[0]["loss"], rows[-1]["loss"]
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.lora, resumed.lora)))
    print(f"loss {first:.2f} -> {last:.2f}; the resumed run ends with the same bits: {same}")
    assert same and last < first / 4


if __name__ == "__main__":
    main()
