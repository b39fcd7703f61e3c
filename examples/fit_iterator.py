"""`fit` with a plain function of the step, the simplest source of batches that resumes at no cost.

    python examples/fit_iterator.py

``batches(start)`` returns an iterator from batch number ``start`` on, so a restart reads no batch twice.
`counting.train_and_resume` calls `fit`. It cuts a run in two, as if it had been killed, and compares it with
an uninterrupted run.
"""

import counting
import numpy as np

BATCH = 8
PACKED = counting.rows()


def batches(start):
    """Batch ``start``, ``start + 1``, ..., each drawn by a generator seeded with its number."""
    while True:
        chosen = np.random.default_rng(start).integers(0, len(PACKED["inputs"]), BATCH)
        yield {name: array[chosen] for name, array in PACKED.items()}
        start += 1


def main():
    counting.train_and_resume(lambda: batches)


if __name__ == "__main__":
    main()
