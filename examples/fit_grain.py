"""`fit` fed by grain: each checkpoint holds the state of grain's iterator, so epochs and shuffles resume.

    pip install grain
    python examples/fit_grain.py

The run is cut in two here, as if it had been killed, and compared with one that was not.
"""

import tempfile

import counting
import grain
import jax
import numpy as np

import lorax_fn as lx

BATCH, STEPS = 8, 60


def dataset(packed):
    """Rows shuffled anew each epoch, eight at a time, without end."""
    rows = [{name: array[i] for name, array in packed.items()} for i in range(len(packed["inputs"]))]
    return grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(BATCH).to_iter_dataset()


def train(steps, folder=None, rows=None):
    return lx.fit(
        counting.STEP,
        counting.new_state(),
        counting.PARAMS,
        dataset(counting.rows()),
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
        resumed = train(STEPS, folder)  # a new state and a new iterator, which the checkpoint fills
    first, last = rows[0]["loss"], rows[-1]["loss"]
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.lora, resumed.lora)))
    print(f"loss {first:.2f} -> {last:.2f}; the resumed run ends with the same bits: {same}")
    assert same and last < first / 4


if __name__ == "__main__":
    main()
