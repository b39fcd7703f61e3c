"""`fit` with grain: each checkpoint has the state of grain's iterator, so epochs and shuffles resume.

    pip install grain
    python examples/fit_grain.py

`counting.train_and_resume` calls `fit`. It cuts a run in two, as if it had been killed, and compares it with
an uninterrupted run.
"""

import counting
import grain

BATCH = 8


def dataset(packed):
    """Endless batches of eight rows, shuffled anew in each epoch."""
    rows = [{name: array[i] for name, array in packed.items()} for i in range(len(packed["inputs"]))]
    return grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(BATCH).to_iter_dataset()


def main():
    counting.train_and_resume(lambda: dataset(counting.rows()))


if __name__ == "__main__":
    main()
