"""The batches that lanes are trained on: the same ones for all, or those of each lane's seed."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.trees import PyTree
from lorax_fn.sweeps.lanes import Chunk
from lorax_fn.training.feed import Feed


class Source:
    """The batches of a sweep, which each program reads from the beginning."""

    def __init__(self, batches: Any, steps: int, seeded: bool, place: Callable[[PyTree, bool], PyTree]):
        self.batches = batches if seeded else _repeatable(batches, steps)
        self.steps, self.seeded, self.place = steps, seeded, place

    def batches_of(self, chunk: Chunk, done: int) -> Iterator[tuple[PyTree, Any]]:
        """Yields ``(batch, which)`` from step ``done`` on.

        With seeds, a batch has a leading axis of seeds, and ``which [lanes]`` has the index of each lane's
        seed. Otherwise all lanes see the same batch, and ``which`` is None.
        """
        if not self.seeded:
            feed = self._feed(self.batches, done)
            while True:
                yield self.place(_next(feed, self.steps), False), None
        seeds = [member.lane.get("seed", 0) for member in chunk.slots]
        known = sorted(set(seeds))
        feeds = [self._feed(_repeatable(self.batches(seed), self.steps), done) for seed in known]
        which = self.place(jnp.asarray([known.index(seed) for seed in seeds], jnp.int32), True)
        while True:
            batch = jax.tree.map(lambda *xs: np.stack(xs), *[_next(feed, self.steps) for feed in feeds])
            yield self.place(batch, False), which

    def _feed(self, batches: Any, done: int) -> Feed:
        feed = Feed(batches)
        feed.start({"taken": done, "state": None} if done else None, done, skip=True)
        return feed


def _repeatable(batches: Any, steps: int) -> Any:
    """Batches that each program can read from the beginning. Those of a plain iterator are kept in a list."""
    if not (hasattr(batches, "__next__") and iter(batches) is batches):
        return batches
    kept = list(itertools.islice(batches, steps))
    if len(kept) < steps:
        raise _ended(len(kept), steps)
    return kept


def _next(feed: Feed, steps: int) -> PyTree:
    try:
        return next(feed)
    except StopIteration:
        raise _ended(feed.taken, steps) from None


def _ended(taken: int, steps: int) -> LoraError:
    return error(
        "the batches ended before the steps did.",
        got=f"{taken} batches",
        want=f"{steps}",
        do="pass an iterable that can be run again (a list, a dataset), batches(start), or fewer steps.",
    )
