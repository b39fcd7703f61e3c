"""The training loop: `fit` runs a step until it is done, and survives what stops it.

Metrics are read one step late, while the next step runs, so that the device never waits for the host. That is
also when a loss that is not finite is found; the state before that step is still there, because a step that
donates its state is given a copy.
"""

import contextlib
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lorax_fn.checkpoint.runs import Snapshots
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.trees import PyTree, is_float, named_leaves
from lorax_fn.training.feed import Feed
from lorax_fn.training.metrics import Log, scalars
from lorax_fn.training.step import TrainState


class FitError(LoraError):
    """`fit` can't go on; what it had is kept here.

    Args:
      message: the whole text.
      state: the last good state.
      step: steps taken up to that state.
      batch: the batch of the step that went wrong, or None.

    Example:
      >>> import lorax_fn as lx
      >>> lx.FitError("the loss is nan.", state=None, step=6, batch=None).step
      6
    """

    def __init__(self, message: str, *, state: Any, step: int, batch: Any = None):
        super().__init__(message)
        self.state, self.step, self.batch = state, step, batch


@dataclasses.dataclass
class _Pending:
    """A step that runs, or ran, and whose metrics nobody has read."""

    number: int
    batch: Any
    before: Any  # the state that it started from
    position: Any  # of the batch
    metrics: dict


@dataclasses.dataclass
class _Best:
    """Evaluations so far: which were the best, and how many came since."""

    best: list  # [score, step] of the best ones, the best first
    since: int = 0
    stopped: bool = False

    def add(self, score: float, step: int, keep: int, patience: int | None) -> None:
        better = not self.best or score < self.best[0][0]
        self.since = 0 if better else self.since + 1
        if math.isfinite(score):
            self.best = sorted([*self.best, [score, step]])[: max(keep, 1)]
        self.stopped = patience is not None and self.since >= patience


def fit(
    step: Callable,
    state: TrainState,
    params: PyTree,
    batches: Any,
    *,
    steps: int,
    eval_fn: Callable | None = None,
    every: int = 100,
    best: str = "loss",
    keep_best: int = 1,
    patience: int | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    max_to_keep: int | None = 3,
    metrics_file: str | os.PathLike | None = None,
    callbacks: Iterable[Callable[[dict], None]] = (),
    progress: bool | None = None,
    count: Callable[[Any], int] | None = None,
    unit: str = "examples",
    nan_guard: bool = True,
) -> TrainState:
    """Trains until ``state.step == steps``: progress, metrics, evaluation, checkpoints, exact resume.

    With a ``checkpoint_dir`` that holds checkpoints, it goes on from the newest one that is whole: the same
    program, run again, ends with the same adapters, bit for bit, as if it had never been interrupted.

    On SIGTERM (in the main thread, with a ``checkpoint_dir``) it finishes the step, saves, and raises
    ``SystemExit(143)``: what follows in the program does not run as if training were done. The handler that
    was there before comes back afterwards. Where several processes run, JAX tells all of them.

    Args:
      step: ``step(state, params, batch) -> (state, metrics)``, jitted, of `make_train_step` and its like.
      state: `TrainState` to begin with; it fixes structure and shardings of what is restored. It is not
        consumed, unless ``nan_guard=False`` and ``step`` donates.
      params: the frozen tree. Checkpoints hold its fingerprint, no weights.
      batches: ``batches(start)``, which gives an iterator from batch ``start`` on; or an iterator with
        ``get_state`` and ``set_state`` (grain), whose state is stored; or an iterable (list, grain dataset),
        run again at its end; or a plain iterator. To resume the latter two, the batches taken before are read
        and dropped: they must come in the same order, and a plain iterator must be at its beginning (unless
        ``state`` is the one that the checkpoint holds).
      steps: the step count to end at, those before a restart included.
      eval_fn: ``eval_fn(state, params) -> score`` or a dict of scores, called every ``every`` steps and at
        the end; a lone score is called ``loss``.
      every: steps between evaluations, and between checkpoints.
      best: the score by which evaluations are compared, lower is better; ``"-accuracy"``: higher is.
      keep_best: how many checkpoints of the best evaluations are kept, whatever ``max_to_keep`` is.
      patience: stop after so many evaluations in a row without a new best; None never does.
      checkpoint_dir: where checkpoints go: adapters, optimizer state, step, key, ``extra`` and the position
        in the batches, written while training goes on. None writes none.
      max_to_keep: how many of the newest are kept; None keeps all.
      metrics_file: a file of JSON lines, one a step and one an evaluation. Lines of later steps than the
        state's (after a restart: the checkpoint's) are cut off. NaN is written as a string; leaves of ``aux``
        that have axes are not written.
      callbacks: each is called with each of these rows, a dict, as soon as it is known, one step late.
      progress: a bar by tqdm; None shows one if tqdm is installed, and plain lines if not.
      count: ``count(batch)``, how many ``unit`` a batch holds; None takes axis 0 of its first leaf.
      unit: what is counted, for example ``"tokens"``.
      nan_guard: stop where ``loss`` or ``grad_norm`` is not finite. For that the state before a step is kept
        until its metrics are read: two spare copies of adapters and optimizer state.

    Returns:
      The last state; after an early stop the one that it stopped at (the best is in its checkpoint).

    Raises:
      FitError: a loss or gradient is not finite, or the batches ended; it holds the last good state, which is
        saved as a checkpoint too.
      LoraError: an argument is wrong; a checkpoint can't be written, belongs to another base or state, holds
        adapters alone, or none is whole.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> def loss_fn(params, lora, batch, key):
      ...     return jnp.mean((batch - lora["b"].weight(params["b"])) ** 2)
      >>> tx, lora = optax.sgd(0.5), {"b": lx.Full(jnp.zeros(2))}
      >>> step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)
      >>> state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
      >>> params, batch, rows = {"b": jnp.zeros(2)}, jnp.array([3.0, 4.0]), []
      >>> state = lx.fit(step, state, params, [batch], steps=3, callbacks=[rows.append], progress=False)
      >>> state.lora["b"].value, [row["loss"] for row in rows]
      (Array([2.625, 3.5  ], dtype=float32), [12.5, 3.125, 0.78125])
    """
    _check_counts(steps=steps, every=every, keep_best=keep_best, max_to_keep=max_to_keep, patience=patience)
    run = _Run(step, state, params, Feed(batches), _number(state.step), copies=nan_guard, count=count)
    with contextlib.ExitStack() as stack:
        if checkpoint_dir is not None:
            run.snapshots = Snapshots(checkpoint_dir, params, max_to_keep, keep_best)
            stack.callback(run.snapshots.close)
        notes = run.resume()
        run.log = Log(run.done, steps, metrics_file, callbacks, progress, unit)
        stack.callback(run.log.close)
        for note in notes:
            run.log.note(note)
        stopping = stack.enter_context(_termination(checkpoint_dir is not None))
        while run.done < steps and not run.tracker.stopped:
            run.advance(steps)
            stop, due = stopping(run.done), run.done % every == 0 or run.done == steps
            if stop or due:
                run.settle()
            if due and eval_fn is not None:
                scores = _scores(eval_fn(run.state, params))
                run.judge(scores, best, keep_best, patience)
            if stop or due or run.tracker.stopped:
                run.save(wait=stop)
            if stop:
                run.log.note(f"SIGTERM: saved step {run.done} in {checkpoint_dir}")
                raise SystemExit(128 + signal.SIGTERM)
        run.save(wait=True)
    return run.state


class _Run:
    """One call of `fit`: the state, how far it is, and the step whose metrics nobody has read yet."""

    log: Log

    def __init__(self, step, state, params, feed, done, *, copies: bool, count: Callable | None):
        self.step, self.state, self.params, self.feed, self.count = step, state, params, feed, count
        self.done = self.saved = done
        self.snapshots: Snapshots | None = None
        self.tracker = _Best([])
        self.pending: _Pending | None = None
        self.guards = self.copies = copies
        self.copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def resume(self) -> list[str]:
        """Goes to the newest checkpoint, if there is one; returns what there is to say about it."""
        given, position, notes = self.done, None, []
        found = self.snapshots and self.snapshots.restore(self.state)
        if self.snapshots and found:
            self.state, loop, position = found
            self.done = self.saved = _number(self.state.step)
            self.tracker = _Best(**loop)
            if given > self.done:
                raise error(
                    "the state is ahead of the checkpoints.",
                    path=self.snapshots.folder,
                    got=f"a state at step {given}, checkpoints up to step {self.done}",
                    want="a state at step 0, or the one that was saved last",
                    do="give another checkpoint_dir to go on from this state.",
                )
            notes.append(f"resumed at step {self.done} from {self.snapshots.folder}")
        skipped = self.feed.start(position, self.done, skip=given != self.done)
        return notes + ([f"read and dropped the {skipped} batches of those steps"] if skipped else [])

    def advance(self, steps: int) -> None:
        """Starts one step, and reads the metrics of the one before while it runs."""
        keeps_place = self.guards and self.snapshots is not None
        place = self.feed.position() if keeps_place else None
        try:
            batch = next(self.feed)
        except StopIteration:
            self.settle()
            self.save(wait=True)
            raise _ended(self, steps) from None
        before = self.state
        given = self.copy(before) if self.copies else before
        self.state, metrics = self.step(given, self.params, batch)
        if self.copies:  # once is enough to see whether the step donates what it is given
            self.copies = any(x.is_deleted() for x in jax.tree.leaves(given))
        self.done += 1
        self.settle()
        self.pending = _Pending(self.done, batch, before if self.guards else None, place, metrics)
        if self.snapshots is not None:
            self.snapshots.check()

    def settle(self) -> None:
        """Waits for the metrics of the pending step, tells them, and stops where they are not finite."""
        last, self.pending = self.pending, None
        if last is None:
            return
        values = scalars(last.metrics)
        self.log.step(last.number, values, _amount(last, self.count))
        bad = {name: values[name] for name in ("loss", "grad_norm") if name in values}
        if self.guards and not all(map(math.isfinite, bad.values())):
            self.state, self.done = last.before, last.number - 1
            self.save(wait=True, position=last.position)
            raise _not_finite(last, bad, self)

    def judge(self, scores: dict, best: str, keep: int, patience: int | None) -> None:
        """Compares one evaluation with those before."""
        name, sign = (best[1:], -1.0) if best.startswith("-") else (best, 1.0)
        if name not in scores:
            raise error(
                "eval_fn gives no score of this name.",
                got=f"best={best!r}, scores {sorted(scores)}",
                do=f"best={sorted(scores)[0]!r}, or '-' before it where higher is better.",
            )
        self.tracker.add(sign * scores[name], self.done, keep, patience)
        self.log.row({"step": self.done, "eval": scores})
        self.log.note(f"step {self.done}: " + ", ".join(f"{key} {x:.4g}" for key, x in scores.items()))
        if self.tracker.stopped:
            why = f"no better {name} in {patience} evaluations"
            self.log.row({"step": self.done, "stopped": why})
            self.log.note(f"stopped at step {self.done}: {why}")
        self.log.clock.clear()  # the speed is that of training

    def save(self, *, wait: bool, position: Any = None) -> None:
        """Saves the state, unless that step is saved; failures of the thread that writes come out here."""
        if self.snapshots is None:
            return
        if self.saved != self.done:
            place = self.feed.position() if position is None else position
            self.snapshots.save(self.state, self.done, dataclasses.asdict(self.tracker), place)
            self.saved = self.done
        if wait:
            self.snapshots.finish()


@contextlib.contextmanager
def _termination(wanted: bool) -> Iterator[Callable[[int], bool]]:
    """Gives ``stopping(step)``: whether SIGTERM came, which does not end the process meanwhile."""
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals
        return
    if jax.process_count() > 1:  # JAX's own handler; it agrees with all processes on one step
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    former = signal.signal(signal.SIGTERM, lambda number, frame: came.set()) or signal.SIG_DFL
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, former)


def _number(count: Any) -> int:
    """The step count of a state, of its first device where it was made for pmap."""
    local = count.addressable_shards[0].data if isinstance(count, jax.Array) else count
    return int(np.asarray(local).reshape(-1)[0])


def _amount(last: _Pending, count: Callable | None) -> int:
    """How much one batch holds: ``count``, or axis 0 of its first leaf (two axes under pmap)."""
    if count is not None:
        return count(last.batch)
    shape = next((np.shape(x) for x in jax.tree.leaves(last.batch)), ())
    return math.prod(shape[: 1 + np.ndim(last.metrics["loss"])])


def _scores(found: Any) -> dict[str, float]:
    scores = found if isinstance(found, dict) else {"loss": found}
    strange = [f"{name}: shape {np.shape(x)}" for name, x in scores.items() if np.shape(x) != ()]
    if strange or not scores:
        raise error(
            "eval_fn returned something else.",
            got=strange or "an empty dict",
            want="a scalar, or a dict of scalars",
            do="return jnp.mean(...) of it.",
        )
    return {str(name): float(x) for name, x in scores.items()}


def _check_counts(**counts: int | None) -> None:
    least = {"steps": 0, "keep_best": 0}
    optional = ("max_to_keep", "patience")
    wrong = {
        name: value
        for name, value in counts.items()
        if not (value is None and name in optional)
        and (isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1))
    }
    if wrong:
        raise error(
            "these arguments of fit are not counts.",
            got=[f"{name}={value!r}" for name, value in wrong.items()],
            want=[f"an int of {least.get(name, 1)} or more" for name in wrong],
            do="fit(step, state, params, batches, steps=1000, every=100).",
        )


def _ended(run: _Run, steps: int) -> FitError:
    text = error(
        "the batches ended before the steps did.",
        got=f"{run.feed.taken} batches, step {run.done}",
        want=f"step {steps}",
        do="pass an iterable that can be run again (a list, a dataset), batches(start), or fewer steps; "
        "the state is in this error's .state.",
    )
    return FitError(str(text), state=run.state, step=run.done)


def _not_finite(last: _Pending, bad: dict, run: _Run) -> FitError:
    broken = [
        path
        for path, x in named_leaves(last.batch, "batch")
        if is_float(x) and getattr(x, "is_fully_addressable", True) and not np.isfinite(np.asarray(x)).all()
    ]
    saved = f", and in {run.snapshots.folder}" if run.snapshots else ""
    text = error(
        "a step's metrics are not finite.",
        got=f"step {last.number}: " + ", ".join(f"{name} {value}" for name, value in bad.items()),
        batch=f"number {last.number} (counted from 1), "
        + (f"itself not finite in {broken}" if broken else "itself finite")
        + "; it is in this error's .batch",
        want="finite loss and grad_norm",
        do="look at the batch, lower the learning rate or clip gradients; "
        f"the state before that step is in this error's .state{saved}.",
    )
    return FitError(str(text), state=last.before, step=run.done, batch=last.batch)
