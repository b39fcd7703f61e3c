"""`sweep` trains many configurations over one frozen base, in as few programs as they need."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lorax_fn.core.errors import error
from lorax_fn.core.keys import checked_key
from lorax_fn.core.trees import PyTree
from lorax_fn.sweeps.grid import check_lanes
from lorax_fn.sweeps.programs import Programs, cuts_padding
from lorax_fn.sweeps.progress import Bar
from lorax_fn.sweeps.results import SweepResult
from lorax_fn.sweeps.runs import Run, Settings
from lorax_fn.sweeps.sources import Source


def sweep(
    loss_fn: Callable[..., Any],
    params: PyTree,
    lanes: Sequence[Mapping[str, Any]],
    batches: Any,
    *,
    steps: int,
    tx: Callable[[Mapping[str, Any]], Any],
    key: jax.Array,
    eval_fn: Callable[..., Any] | None = None,
    every: int | None = None,
    split: Mapping[str, Any] = {},  # noqa: B006  # never changed
    data: str = "shared",
    lanes_per_program: int | str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    extra: PyTree = None,
    halving: Sequence[int] = (),
    best: str = "loss",
) -> SweepResult:
    """Trains one adapter for each configuration, side by side: ranks, alphas, learning rates, targets, seeds.

    The lanes of one program are one `jax.vmap` of the train step over one frozen base. A lane equals the
    separate run of its configuration,

        own = jax.random.fold_in(key, lane.get("seed", 0))
        lane_params, lora = lx.split(params, key=own, **{**split, **the arguments of split in the lane})
        state = lx.TrainState.create(lora=lora, tx=tx(lane), key=own, extra=extra)
        step = lx.make_train_step(loss_fn, tx(lane))

    where, with ``lane["dropout"]``, ``loss_fn`` sees ``lx.dropout(lora, rate, fold_in(key, 0x5EED))``.
    Lower ranks are padded with zeros that stay zero, and a weight that a lane does not adapt has scale zero.
    On a CPU or a TPU, products leave the padding out in sweeps of 50 steps or more, where this is worth the
    longer compilation: neighbors of similar rank are multiplied together. On a TPU, factors whose ranks sum
    to no more than 256 lie side by side instead, so that it reads and writes less.

    Lanes that can't share a program run one program after the other. They have different methods, inits that
    move a part of W, or different ranks under an optimizer that looks at whole matrices (Muon, Adafactor);
    whether an optimizer does so is found by trying it on padded factors. Entries of a lane that ``tx`` can't
    take as traced numbers (an optimizer's name, the peak of ``optax.warmup_cosine_decay_schedule``) are
    constants of the program, in which each such optimizer updates its own lanes.

    Args:
      loss_fn: as in `make_train_step`; ``aux`` is not kept.
      params: the frozen tree, arrays only.
      lanes: dicts, such as those from `grid`. The sweep reads ``seed`` (for the init, dropout and the ``key``
        of ``loss_fn``), ``dropout``, ``name``, and arguments of `split`. All other entries are for ``tx``.
      batches: as in `fit`; every lane sees the same ones in the same order. If they come from an iterator
        that can't be restarted, ``steps`` of them are kept in memory.
      steps: how many steps each lane takes.
      tx: ``tx(lane)`` returns an optax transformation. Numbers that differ between lanes are traced arrays.
      key: PRNG key of the sweep.
      eval_fn: ``eval_fn(state, params) -> score``, or a dict of scores, as in `fit`. It is mapped over lanes,
        or called lane by lane if it can't be traced. The ``state.opt_state`` that it gets is empty.
      every: steps between evaluations, records and saved states; None is at the end only.
      split: arguments of `split` for all lanes.
      data: ``"shared"``; or ``"seed"``, where ``batches(seed)`` gives the batches of lanes with that seed.
      lanes_per_program: the largest number of lanes in one program; ``"auto"`` is as many as fit into the
        free memory, according to the compiled program's memory analysis.
      mesh: lanes are spread over its axis ``"lanes"``. A base that is already on this mesh stays as it is;
        any other is copied to all its devices.
      file: where records are written, as JSON lines, while the sweep runs. States are saved beside it, in
        ``<file>.state``: run again after a kill, the same sweep resumes from them, with equal results.
      progress: whether to show a tqdm bar with the best lane so far; None shows one if tqdm is installed.
      extra: state that the model updates, as in `TrainState.create`; each lane starts from it.
      halving: steps after which the worse half of each group's lanes is dropped. Nothing is recompiled: the
        lanes that remain move into fewer chunks of the same size, so it saves time only if a group has more
        lanes than ``lanes_per_program``.
      best: the score by which halving and the bar compare lanes, where lower is better; with a leading ``-``,
        as in ``"-accuracy"``, higher is better.

    Returns:
      A `SweepResult`. After ctrl-C it holds what was done, and ``finished`` is False.

    Raises:
      LoraError: lanes, steps, ``tx`` or the file don't fit; nothing reads an entry of a lane; or what `split`
        and `make_train_step` raise.

    Warns:
      LoraFallbackWarning: products cannot leave the padding of lower ranks out, as with a gradient inside of
        ``loss_fn``; or what `adapt` warns of.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx, optax
      >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> def loss_fn(params, lora, batch, key):
      ...     return jnp.mean((apply(params, lora, batch) - 2 * batch) ** 2)
      >>> result = lx.sweep(
      ...     loss_fn, params, lx.grid(rank=[1, 2, 4], lr=[1e-3, 1e-2]), [x], steps=10,
      ...     tx=lambda lane: optax.adam(lane["lr"]), key=jax.random.key(0), progress=False)
      >>> len(result.records), result.best("loss")["lr"]
      (6, 0.01)
    """
    lanes = check_lanes(lanes, split)
    _check_arguments(steps, every, data, lanes_per_program, halving, tx, batches)
    checked_key(key)
    own = cuts_padding(steps, mesh, halving)
    asked = Settings(
        lanes,
        steps,
        every or steps,
        tx,
        key,
        split,
        data,
        lanes_per_program,
        tuple(halving),
        best,
        extra,
        own,
    )
    programs = Programs(loss_fn, tx, eval_fn, extra, data == "seed", mesh)
    run = Run(params, asked, programs, Source(batches, steps, data == "seed", programs.place))
    with contextlib.ExitStack() as stack:
        run.prepare(file)
        run.bar = Bar(run.total(), progress if jax.process_index() == 0 else False)
        stack.callback(run.bar.close)
        run.stopping = stack.enter_context(_interrupt())
        finished = all(run.group(i) for i in range(len(run.groups)))
        if not finished:
            run.bar.note("interrupted: what is done is kept" + (f" in {file}" if file else ""))
    return SweepResult(lanes, run.records, run.curves, run.head, finished, run.loras)


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether ctrl-C was pressed. A second ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    former = signal.getsignal(signal.SIGINT)

    def handle(number, frame):
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, former)


def _check_arguments(
    steps: Any, every: Any, data: Any, count: Any, halving: Any, tx: Any, batches: Any
) -> None:
    def is_count(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    wrong: dict[str, str] = {}
    if not is_count(steps):
        wrong[f"steps={steps!r}"] = "an int of 1 or more"
    if every is not None and not is_count(every):
        wrong[f"every={every!r}"] = "an int of 1 or more, or None"
    if data == "seed" and not callable(batches):
        wrong[f"batches of a {type(batches).__name__}"] = "batches(seed), with data='seed'"
    if data not in ("shared", "seed"):
        wrong[f"data={data!r}"] = "'shared' or 'seed'"
    if count != "auto" and not is_count(count):
        wrong[f"lanes_per_program={count!r}"] = "'auto', or an int of 1 or more"
    if not callable(tx):
        wrong[f"tx={type(tx).__name__}"] = "tx(lane) -> optimizer"
    if is_count(steps):
        rungs = list(halving)
        if not all(map(is_count, rungs)) or rungs != sorted(set(rungs)) or (rungs and rungs[-1] >= steps):
            wrong[f"halving={halving!r}"] = f"steps in order, below {steps}"
    if wrong:
        raise error(
            "these arguments of a sweep don't fit.",
            got=list(wrong),
            want=list(wrong.values()),
            do="lx.sweep(loss_fn, params, lx.grid(rank=[4, 16], lr=[1e-3]), batches, steps=100, "
            "tx=lambda lane: optax.adamw(lane['lr']), key=jax.random.key(0)).",
        )
