"""`fit` fed by grain: each checkpoint holds the state of grain's iterator, so epochs and shuffles resume.

    pip install grain
    python examples/fit_grain.py

`counting.train_and_resume` calls `fit`: it cuts the run in two, as if it had been killed, and compares that
with one that was not cut.
"""

import counting
import grain

BATCH = 8


def dataset(packed):
    """Rows shuffled anew each epoch, eight at a time, without end."""
    rows = [{name: array[i] for name, array in packed.items()} for i in range(len(packed["inputs"]))]
    return grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(BATCH).to_iter_dataset()


def main():
    counting.train_and_resume(lambda: dataset(counting.rows()))


if __name__ == "__main__":
    main()
