"""What ends `fit` before its last step: SIGTERM, patience, or an error with the last good state."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lorax_fn.core.errors import LoraError


class FitError(LoraError):
    """`fit` can't continue; the error has the last good state.

    Args:
      message: the complete text.
      state: the last good state.
      step: how many steps led to that state.
      batch: the batch of the step that went wrong, or None.

    Example:
      >>> import lorax_fn as lx
      >>> lx.FitError("the loss is nan.", state=None, step=6, batch=None).step
      6
    """

    def __init__(self, message: str, *, state: Any, step: int, batch: Any = None):
        super().__init__(message)
        self.state, self.step, self.batch = state, step, batch

    def __reduce__(self):
        # By default, pickle and deepcopy would call the class with only the message.
        make = functools.partial(type(self), state=self.state, step=self.step, batch=self.batch)
        return make, self.args


@dataclasses.dataclass
class Best:
    """The evaluations so far: the best ones, and how many came since the best."""

    best: list  # [score, step] of the best evaluations, best first
    since: int = 0
    stopped: bool = False

    def add(self, score: float, step: int, keep: int, patience: int | None) -> None:
        """Counts one evaluation; a score that is not finite is never better than another."""
        better = math.isfinite(score) and (not self.best or score < self.best[0][0])
        self.since = 0 if better else self.since + 1
        if math.isfinite(score):
            self.best = sorted([*self.best, [score, step]])[: max(keep, 1)]
        self.stopped = patience is not None and self.since >= patience


class Terminated(BaseException):
    """SIGTERM came while `fit` waited for a batch; an `except Exception` in the source does not catch it."""


class Termination:
    """Records SIGTERM, instead of ending the process, so that `fit` can save first."""

    def __init__(self, several: bool = False):
        self.came = self.waiting = False
        self.several = several

    def __call__(self, step: int) -> bool:
        """Whether to stop after ``step``, with the same answer in all processes."""
        if self.several:  # JAX's own handler makes all processes agree on one step.
            self.came = self.came or multihost_utils.reached_preemption_sync_point(step)
        return self.came

    def handle(self, number: int, frame: Any) -> None:
        self.came = True
        if self.waiting:
            raise Terminated

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """A block that may wait for a long time, which SIGTERM interrupts."""
        self.waiting = True
        try:
            if self.came and not self.several:
                raise Terminated
            yield
        finally:
            self.waiting = False


@contextlib.contextmanager
def termination(wanted: bool) -> Iterator[Termination]:
    """Handles SIGTERM inside the block, and restores the previous handler after it."""
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield Termination()  # Only the main thread can handle signals.
        return
    if jax.process_count() > 1:
        yield Termination(several=True)
        return
    stopping = Termination()
    former = signal.signal(signal.SIGTERM, stopping.handle) or signal.SIG_DFL
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, former)
