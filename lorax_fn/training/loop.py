"""The training loop: `fit` runs a step until the end, and resumes after interruptions.

Metrics are read one step late, while the next step runs, so that the device never waits for the host. A loss
that is not finite is detected at that time, and `guard` then finds the last good state.
"""

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lorax_fn.checkpoint.runs import Snapshots
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_alive
from lorax_fn.core.trees import PyTree, is_float, named_leaves
from lorax_fn.training.feed import Feed
from lorax_fn.training.guard import WATCHED, Guard, Taken, finite_metrics
from lorax_fn.training.metrics import Log, scalars, scores
from lorax_fn.training.state import TrainState
from lorax_fn.training.stopping import Best, FitError, Terminated, Termination, termination


def fit(
    step: Callable[..., Any],
    state: TrainState,
    params: PyTree,
    batches: Any,
    *,
    steps: int,
    eval_fn: Callable[..., Any] | None = None,
    every: int = 100,
    save_every: int | None = None,
    best: str = "loss",
    keep_best: int = 1,
    patience: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    max_to_keep: int | None = 3,
    metrics_file: str | os.PathLike[str] | None = None,
    callbacks: Iterable[Callable[[dict[str, Any]], None]] = (),
    progress: bool | None = None,
    count: Callable[[Any], int] | None = None,
    unit: str = "examples",
    nan_guard: bool = True,
) -> TrainState:
    """Trains until ``state.step == steps``, with metrics, evaluation, checkpoints and exact resume.

    If ``checkpoint_dir`` contains checkpoints, training continues from the newest intact one. Running the
    same program again gives the same adapters, bit for bit, as an uninterrupted run.

    On SIGTERM (in the main thread, with a ``checkpoint_dir``), it finishes the step, saves, and raises
    ``SystemExit(143)``, so that the rest of the program does not run as if training were complete. This also
    holds if the signal comes during the last evaluation or save. Waiting for a batch is interrupted. The
    previous signal handler is restored afterwards. With several processes, JAX notifies all of them.

    Args:
      step: ``step(state, params, batch) -> (state, metrics)``, jitted, from `make_train_step`,
        `mesh_train_step` or `pmap_train_step`.
      state: the initial `TrainState`, which also determines the structure and shardings of a restored one. It
        is not consumed, unless ``nan_guard=False`` and ``step`` donates.
      params: the frozen tree. Checkpoints contain its fingerprint, not its weights.
      batches: ``batches(start)``, which returns an iterator from batch ``start`` on; or an iterator with
        ``get_state`` and ``set_state`` (grain), whose state is stored; or an iterable (list, grain dataset),
        run again when it ends; or a plain iterator. To resume the latter two, the batches taken before are
        read and dropped, so they must come in the same order, and a plain iterator must be at its beginning
        (unless ``state`` is the one in the checkpoint).
      steps: the step count at the end, including steps before a restart.
      eval_fn: ``eval_fn(state, params)`` returns a score or a dict of scores. It is called every ``every``
        steps and at the end; a single score is called ``loss``.
      every: how many steps apart evaluations are.
      save_every: how many steps apart checkpoints are; None means ``every``. One is also written at the end,
        and at each evaluation that is among the ``keep_best`` best.
      best: the score by which evaluations are compared. Lower is better; with a minus sign, as in
        ``"-accuracy"``, higher is better.
      keep_best: how many checkpoints of the best evaluations to keep in addition to ``max_to_keep``.
      patience: stop after this many evaluations in a row without a new best; None never stops. A score that
        is not finite is never a new best.
      checkpoint_dir: directory for checkpoints of adapters, optimizer state, step, key, ``extra`` and data
        position, which are written while training continues. None writes none.
      max_to_keep: how many of the newest checkpoints to keep; None keeps all.
      metrics_file: a file of JSON lines, one per step and one per evaluation. Lines of steps after the
        initial or restored state are removed. NaN is written as a string; leaves of ``aux`` that are not
        scalars are left out.
      callbacks: each is called with a copy of every such row, a dict, one step late.
      progress: True shows a tqdm bar, False nothing. None shows a bar if tqdm is installed, else plain lines.
      count: ``count(batch)`` is how many ``unit`` a batch contains; None takes axis 0 of its first leaf.
      unit: what is counted, for example ``"tokens"``.
      nan_guard: stop if ``loss``, ``grad_norm`` or a number in the state is not finite (but was at the
        start). This keeps a state every few steps, which takes memory for a copy of adapters and optimizer
        state, and the batches since then; the last good state is found by repeating these steps.

    Returns:
      The last state. After an early stop, this is not the best one, which is in its checkpoint.

    Raises:
      FitError: a loss, a gradient or the state after a step is not finite, or the batches ended. The error
        has the last good state, which is also saved as a checkpoint.
      LoraError: an argument is wrong; the state was consumed by a step, or is past ``steps``; ``step`` does
        not return a state that counts its steps; a checkpoint can't be written, belongs to another base or
        state, or contains only adapters; or no checkpoint is intact.

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
    save_every = every if save_every is None else save_every
    _check_counts(
        steps=steps,
        every=every,
        save_every=save_every,
        keep_best=keep_best,
        max_to_keep=max_to_keep,
        patience=patience,
    )
    check_alive(state, "state")
    run = _Run(step, state, params, Feed(batches), count)
    with contextlib.ExitStack() as stack:
        if checkpoint_dir is not None:
            run.snapshots = Snapshots(checkpoint_dir, params, max_to_keep, keep_best)
            stack.callback(run.snapshots.close)
        notes = run.resume(steps)
        run.guard = Guard(step, run.state, params, run.done) if nan_guard else None
        run.log = Log(run.done, steps, metrics_file, callbacks, progress, unit)
        stack.callback(run.log.close)
        for note in notes:
            run.log.note(note)
        stopping = stack.enter_context(termination(checkpoint_dir is not None))
        while not stopping(run.done) and run.done < steps and not run.tracker.stopped:
            if not run.advance(steps, stopping):
                continue  # SIGTERM came while waiting for a batch.
            last = run.done == steps
            if eval_fn is not None and (last or run.done % every == 0):
                run.settle()
                run.judge(scores(eval_fn(run.state, params)), best, keep_best, patience)
            if last or run.done % save_every == 0 or run.tracker.stopped or run.is_best(keep_best):
                run.save()
        run.settle()
        run.save()
        run.finish()
        if stopping.came:
            run.log.note(f"SIGTERM: saved step {run.done} in {checkpoint_dir}")
    if stopping.came:  # Check after the previous handler is back, as the signal may come until then.
        raise SystemExit(128 + signal.SIGTERM)
    return run.state


class _Run:
    """One call of `fit`: the state, its progress, and the pending step, whose metrics are not read yet."""

    log: Log
    guard: Guard | None = None
    snapshots: Snapshots | None = None

    def __init__(self, step, state, params, feed: Feed, count: Callable | None):
        self.step, self.state, self.params, self.feed, self.count = step, state, params, feed, count
        self.done = self.saved = self.begun = _number(state.step)
        self.tracker = Best([])
        self.pending: Taken | None = None
        self.position: Any = None  # the position of the batches, if waiting for one was interrupted

    def resume(self, steps: int) -> list[str]:
        """Restores the newest checkpoint if there is one; returns notes about it to show."""
        given, position, notes = self.done, None, []
        found = self.snapshots and self.snapshots.restore(self.state)
        if self.snapshots and found:
            self.state, loop, position = found
            self.done = self.saved = self.begun = _number(self.state.step)
            self.tracker = Best(**loop)
            if given > self.done:
                raise error(
                    "the state is ahead of the checkpoints.",
                    path=self.snapshots.folder,
                    got=f"a state at step {given}, checkpoints up to step {self.done}",
                    want="a state at step 0, or the one that was saved last",
                    do="pass another checkpoint_dir to continue from this state.",
                )
            notes.append(f"resumed at step {self.done} from {self.snapshots.folder}")
        if self.done > steps:
            raise error(
                "more steps were taken than steps= allows.",
                got=f"step {self.done}" + (f" in {self.snapshots.folder}" if self.snapshots else ""),
                want=f"at most steps={steps}, which counts from step 0",
                do=f"steps={self.done} or more; or start from a new state"
                + (", with another checkpoint_dir." if self.snapshots else "."),
            )
        skipped = self.feed.start(position, self.done, skip=given != self.done)
        return notes + ([f"read and dropped the {skipped} batches of those steps"] if skipped else [])

    def advance(self, steps: int, stopping: Termination) -> bool:
        """Starts one step, and reads the previous step's metrics while it runs; False if no batch came."""
        place = self.feed.position() if self.snapshots is not None else None
        try:
            with stopping.breakable():
                batch = next(self.feed)
        except StopIteration:
            self.settle()
            self.save()
            self.finish()
            raise _ended(self, steps) from None
        except Terminated:
            self.position = place
            return False
        given = self.state if self.guard is None else self.guard.hand_out(self.state, self.done)
        self.state, metrics = _checked(self.step(given, self.params, batch))
        self.done += 1
        taken = Taken(self.done, batch, place, metrics)
        if self.guard is not None:
            self.guard.took(given, taken)
        if self.done == self.begun + 1:
            self.check_count()
        self.settle()
        self.pending = taken
        if self.snapshots is not None:
            self.snapshots.check()
        return True

    def settle(self) -> None:
        """Waits for the metrics of the pending step and reports them; raises if they are not finite."""
        last, self.pending = self.pending, None
        if last is None:
            return
        last.values = scalars(last.metrics)
        self.log.step(last.number, last.values, _amount(last, self.count))
        if self.guard is not None and not self.guard.accepts(last):
            self.go_back()

    def judge(self, found: dict, best: str, keep: int, patience: int | None) -> None:
        """Compares one evaluation with the previous ones."""
        name, sign = (best[1:], -1.0) if best.startswith("-") else (best, 1.0)
        if name not in found:
            raise error(
                "eval_fn returned no score of this name.",
                got=f"best={best!r}, scores {sorted(found)}",
                do=f"best={sorted(found)[0]!r}, or with '-' before the name if higher is better.",
            )
        self.tracker.add(sign * found[name], self.done, keep, patience)
        self.log.row({"step": self.done, "eval": found})
        self.log.note(f"step {self.done}: " + ", ".join(f"{key} {x:.4g}" for key, x in found.items()))
        if self.tracker.stopped:
            why = f"no better {name} in {patience} evaluations"
            self.log.row({"step": self.done, "stopped": why})
            self.log.note(f"stopped at step {self.done}: {why}")
        self.log.clock.clear()  # The speed that is shown is that of training, without evaluation.

    def is_best(self, keep: int) -> bool:
        """Whether this step is one of the ``keep`` best."""
        return any(step == self.done for _, step in self.tracker.best[:keep])

    def check_count(self) -> None:
        """Raises a `LoraError` if ``state.step`` is not the number of steps that were taken."""
        if _number(self.state.step) != self.done:
            raise error(
                "the step returned a state with a wrong step count.",
                got=f"state.step {_number(self.state.step)} after step {self.done}",
                want=f"state.step {self.done}",
                do="return dataclasses.replace(state, step=state.step + 1, ...), "
                "or what lx.apply_gradients returns.",
            )

    def save(self) -> None:
        """Checks the state and begins to save it, unless this step has been saved already."""
        if self.done in (self.saved, self.begun):
            return
        self.settle()
        if self.guard is not None and not bool(self.guard.finite(self.state)):
            self.go_back()
        self.check_count()
        self._write(self.feed.position() if self.position is None else self.position)

    def finish(self) -> None:
        """Waits until the last checkpoint is on disk; errors of the writing thread are raised here."""
        if self.snapshots is not None:
            self.snapshots.finish()

    def go_back(self) -> None:
        """Saves the last good state and raises a `FitError` that holds it."""
        assert self.guard is not None
        after = self.state
        self.state, self.done = self.guard.last_good()
        bad = next(taken for taken in self.guard.steps if taken.number == self.done + 1)
        if self.done > self.saved:
            self._write(bad.position)
        self.finish()
        raise _not_finite(bad, after, self)

    def _write(self, position: Any) -> None:
        self.log.flush()  # The metrics up to a checkpoint must be in the file.
        if self.snapshots is not None:
            self.snapshots.save(self.state, self.done, dataclasses.asdict(self.tracker), position)
        self.saved = self.done


def _checked(out: Any) -> tuple[Any, Any]:
    """The state and metrics that a step returned, after a check."""
    if isinstance(out, tuple) and len(out) == 2 and hasattr(out[0], "step"):
        return out
    raise error(
        "the step did not return (state, metrics).",
        got=f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}",
        want='(state, {"loss": loss, ...}), as the steps of make_train_step return',
        do='return state, {"loss": loss}.',
    )


def _number(count: Any) -> int:
    """The step count of a state, from its first device under pmap."""
    local = count.addressable_shards[0].data if isinstance(count, jax.Array) else count
    return int(np.asarray(local).reshape(-1)[0])


def _amount(last: Taken, count: Callable | None) -> int:
    """The size of one batch: ``count(batch)``, or axis 0 of its first leaf (axes 0 and 1 under pmap)."""
    if count is not None:
        return count(last.batch)
    shape = next((np.shape(x) for x in jax.tree.leaves(last.batch)), ())
    return math.prod(shape[: 1 + np.ndim(last.metrics["loss"])])


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


def _not_finite(bad: Taken, after: Any, run: _Run) -> FitError:
    assert run.guard is not None
    batch = [
        path
        for path, x in named_leaves(bad.batch, "batch")
        if is_float(x) and getattr(x, "is_fully_addressable", True) and not np.isfinite(np.asarray(x)).all()
    ]
    saved = f", and in {run.snapshots.folder}" if run.snapshots else ""
    values = bad.values or {}
    told = ", ".join(f"{name} {values[name]}" for name in WATCHED if name in values)
    by_update = finite_metrics(values)
    state = {"path": run.guard.bad_leaves(after)} if by_update else {}
    text = error(
        "the state after a step is not finite." if by_update else "a step's metrics are not finite.",
        **state,
        got=f"step {bad.number}: {told}",
        batch=f"number {bad.number} (counted from 1), "
        + (f"itself not finite in {batch}" if batch else "itself finite")
        + "; it is in this error's .batch",
        want="finite numbers in the state" if by_update else "finite loss and grad_norm",
        do=("look at the optimizer's settings and at extra; " if by_update else "look at the batch, ")
        + "lower the learning rate or clip gradients; "
        f"the state before that step is in this error's .state{saved}.",
    )
    return FitError(str(text), state=run.state, step=run.done, batch=bad.batch)
