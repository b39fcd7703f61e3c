"""`sweep`: many configurations over one frozen base, as few programs as they need."""

import contextlib
import datetime
import importlib.metadata
import itertools
import math
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.checkpoint.fingerprint import fingerprint
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.keys import checked_key
from lorax_fn.core.trees import PyTree
from lorax_fn.sweeps import lanes as side_by_side
from lorax_fn.sweeps.files import FORMAT, Folder
from lorax_fn.sweeps.grid import check_lanes, label
from lorax_fn.sweeps.groups import Group, Member, group, members
from lorax_fn.sweeps.lanes import Chunk, own_lora, start, whole
from lorax_fn.sweeps.programs import Programs, cuts_padding, free_memory, host, memory_of
from lorax_fn.sweeps.progress import Bar
from lorax_fn.sweeps.results import SweepResult
from lorax_fn.training.feed import Feed


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
    file: str | os.PathLike | None = None,
    progress: bool | None = None,
    extra: PyTree = None,
    halving: Sequence[int] = (),
    best: str = "loss",
) -> SweepResult:
    """Trains one adapter for each configuration, side by side: ranks, alphas, learning rates, targets, seeds.

    The lanes of one program are one `jax.vmap` of the train step over one frozen base. A lane equals the
    separate run of its configuration,

        own = jax.random.fold_in(key, lane.get("seed", 0))
        lane_params, lora = lx.split(params, key=own, **{**split, **what the lane has of split's arguments})
        state = lx.TrainState.create(lora=lora, tx=tx(lane), key=own, extra=extra)
        step = lx.make_train_step(loss_fn, tx(lane))

    where, with ``lane["dropout"]``, ``loss_fn`` sees ``lx.dropout(lora, rate, fold_in(key, 0x5EED))``.
    Lower ranks are padded with zeros that stay zero, and a weight that a lane does not adapt has scale zero.
    On a CPU, products leave the padding out in sweeps of 50 steps and more, where that is worth its longer
    compilation; on a chip whose matrix unit takes 128 ranks at once it would gain nothing.

    What can't share a program runs one after the other: other methods, inits that take a part of W, and
    several ranks under an optimizer that looks at whole matrices (Muon, Adafactor), which is found out by
    trying it on padded factors. Entries of a lane that ``tx`` can't take as traced numbers (an optimizer's
    name, the peak of ``optax.warmup_cosine_decay_schedule``) stay in the program: each such optimizer then
    updates its own lanes.

    Args:
      loss_fn: as in `make_train_step`; ``aux`` is not kept.
      params: the frozen tree, arrays only.
      lanes: dicts, for instance of `grid`. Read here: ``seed`` (of the init, of dropout and of ``key`` in
        ``loss_fn``), ``dropout``, ``name``, and arguments of `split`. The rest is for ``tx``.
      batches: as in `fit`; every lane sees the same ones in the same order. Of an iterator that can't be run
        again, ``steps`` batches are kept.
      steps: how many steps each lane takes.
      tx: ``tx(lane)``, an optax transformation. Numbers that differ between lanes come as traced arrays.
      key: PRNG key of the sweep.
      eval_fn: ``eval_fn(state, params) -> score``, or a dict of scores, as in `fit`; it is mapped over lanes,
        and called lane by lane where it can't be traced. ``state.opt_state`` is empty in it.
      every: steps between evaluations, records and saved states; None is at the end only.
      split: arguments of `split` for all lanes.
      data: ``"shared"``, or ``"seed"``: ``batches(seed)`` gives those of the lanes with that seed.
      lanes_per_program: how many at most; ``"auto"`` is as many as the compiled program's memory analysis
        lets fit into the free memory.
      mesh: lanes are spread over its axis ``"lanes"``; the base lies on it as it is, or is copied to all.
      file: where records go, as JSON lines, while it runs. Beside it, in ``<file>.state``, are the states:
        the same sweep, run again after a kill, goes on from the last ones with equal results.
      progress: a bar by tqdm with the best lane so far; None shows one if tqdm is installed.
      extra: what the model rewrites, as in `TrainState.create`; each lane starts from it.
      halving: steps after which the worse half of each group's lanes is dropped. Nothing is compiled anew:
        what is left moves together into fewer programs of the same size, so it saves time where a group has
        more lanes than ``lanes_per_program``.
      best: the score that halving and the bar compare by, lower is better; ``"-accuracy"``: higher is.

    Returns:
      A `SweepResult`. After ctrl-C it holds what was done, ``finished=False``.

    Raises:
      LoraError: lanes, steps, ``tx`` or the file don't fit; an entry of a lane is read by nothing; or what
        `split` and `make_train_step` raise.

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
    _check_arguments(steps, every, data, lanes_per_program, halving, tx)
    checked_key(key)
    run = _Run(loss_fn, params, lanes, batches, steps, tx, key, eval_fn, every or steps, split, data)
    run.programs = Programs(loss_fn, tx, eval_fn, data == "seed", mesh)
    run.programs.extra = run.extra = extra
    run.programs.own_widths = cuts_padding(steps, mesh, halving)
    run.halving, run.best, run.limit = tuple(halving), best, lanes_per_program
    with contextlib.ExitStack() as stack:
        run.prepare(file)
        run.bar = Bar(run.total(), progress if jax.process_index() == 0 else False)
        stack.callback(run.bar.close)
        run.stopping = stack.enter_context(_interrupt())
        finished = all(run.group(i) for i in range(len(run.groups)))
        if not finished:
            run.bar.note("interrupted: what is done is kept" + (f" in {file}" if file else ""))
    return SweepResult(lanes, run.records, run.curves, run.head, finished, run.loras)


class _Run:
    """One call of `sweep`."""

    bar: Bar
    programs: Programs
    stopping: Callable[[], bool]
    extra: PyTree
    halving: tuple[int, ...]
    best: str
    limit: int | str

    def __init__(self, loss_fn, params, lanes, batches, steps, tx, key, eval_fn, every, split, data):
        self.params, self.lanes, self.steps, self.every, self.tx = params, lanes, steps, every, tx
        self.seeded, self.key, self.split, self.data = data == "seed", key, split, data
        self.batches = batches if self.seeded else _repeatable(batches, steps)
        self.records: list[dict] = []
        self.curves = {n: np.full((len(lanes), steps), np.nan, np.float32) for n in ("loss", "grad_norm")}
        self.loras: dict[int, Callable] = {}
        self.leader: tuple[float, int] | None = None
        self.groups: list[Group] = []
        self.sizes: list[int] = []
        self.folder: Folder | None = None

    def prepare(self, file: str | os.PathLike | None) -> None:
        """Splits, groups, and plans how many lanes a program has."""
        made = members(self.params, self.lanes, self.split, self.key)
        self.groups = group(self.params, made, self.tx)
        self.head = self._head()
        if file is not None:
            self.folder = Folder(file, self.head)
        plan = self.folder.plan(None) if self.folder else None
        self.sizes = plan or [self._size(one) for one in self.groups]
        if self.folder:
            self.folder.plan(self.sizes)
            self.records = list(self.folder.begin(self.folder.reached()))
            for record in self.records:
                self._lead(record)

    def _head(self) -> dict[str, Any]:
        told = [{name: label(value) for name, value in lane.items()} for lane in self.lanes]
        base = [[x["path"], x["shape"], x["dtype"], x["crc32"]] for x in fingerprint(self.params)]
        packages = ("lorax_fn", "jax", "optax", "numpy")
        return {
            "sweep": FORMAT,
            "steps": self.steps,
            "every": self.every,
            "data": self.data,
            "halving": list(self.halving),
            "best": self.best,
            "split": {name: label(value) for name, value in self.split.items()},
            "key": np.asarray(jax.random.key_data(self.key) if self.key.dtype != np.uint32 else self.key).tolist(),
            "lanes": told,
            "base": base,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in packages},
            "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} of them",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def total(self) -> int:
        """Steps of all programs together."""
        count = 0
        for one, size in zip(self.groups, self.sizes, strict=True):
            left = len(one.members)
            for begin, end in self._stages():
                count += -(-left // size) * (end - begin)
                left = -(-left // 2)
        return count

    def _stages(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *self.halving, self.steps]))

    def _size(self, one: Group) -> int:
        """How many lanes a program of this group has."""
        multiple, total = self.programs.multiple, len(one.members)
        if isinstance(self.limit, int):
            return len(side_by_side.chunks(one, self.limit, multiple)[0].slots)
        count = total
        while True:
            first = side_by_side.chunks(one, count, multiple)[0]
            size = len(first.slots)
            if total <= multiple:
                return size
            states = jax.eval_shape(lambda first=first: start(first, self.tx, self.extra))
            batch, which = next(self._feed(first, 0))
            used = memory_of(self.programs.step(first, states, one.params, batch, which))
            base = sum(x.nbytes for x in jax.tree.leaves(one.params))
            room = free_memory()
            each = max((used - base) / size, 1)
            fits = int(max(room - base, 0) // each)
            if used <= room or size <= multiple:
                return size
            count = max(min(fits, size - 1), 1)

    def _feed(self, chunk: Chunk, done: int) -> Iterator[tuple[PyTree, Any]]:
        """Batches from step ``done`` on, and whose seed each lane has."""
        if not self.seeded:
            feed = Feed(self.batches)
            feed.start({"taken": done, "state": None} if done else None, done, skip=True)
            while True:
                yield self.programs.place(_next(feed, self.steps), False), None
        seeds = [member.lane.get("seed", 0) for member in chunk.slots]
        known = sorted(set(seeds))
        feeds = []
        for seed in known:
            feeds.append(Feed(_repeatable(self.batches(seed), self.steps)))
            feeds[-1].start({"taken": done, "state": None} if done else None, done, skip=True)
        which = jnp.asarray([known.index(seed) for seed in seeds], jnp.int32)
        while True:
            batch = jax.tree.map(lambda *xs: np.stack(xs), *[_next(feed, self.steps) for feed in feeds])
            yield self.programs.place(batch, False), self.programs.place(which, True)

    def group(self, number: int) -> bool:
        """Trains the lanes of one group; False where it was interrupted."""
        one, size = self.groups[number], self.sizes[number]
        alive, former = one.members, {}
        for stage, (begin, end) in enumerate(self._stages()):
            if stage:
                alive = self._better_half(alive, begin)
            after: dict[int, Any] = {}
            pieces = [alive[i : i + size] for i in range(0, len(alive), size)]
            for i, some in enumerate(pieces):
                chunk = side_by_side.chunk(one, some, size)
                states = start(chunk, self.tx, self.extra) if not stage else moved(chunk, former)
                states, done = self.train(chunk, states, f"{number}-{stage}-{i}", begin, end)
                self._keep(chunk, states)
                if done < end:
                    return False
                if end < self.steps:
                    after |= {m.index: (chunk, states, slot) for slot, m in enumerate(chunk.slots[: chunk.real])}
            former = after
        return True

    def _better_half(self, alive: list[Member], step: int) -> list[Member]:
        name, sign = (self.best[1:], -1.0) if self.best.startswith("-") else (self.best, 1.0)
        found = {r["lane"]: r for r in self.records if r["step"] == step}

        def score(member):
            record = found[member.index]
            if name not in record:
                raise error(
                    "records have no score of this name.",
                    got=f"best={self.best!r}, scores {sorted(record)}",
                    do="best='loss', or a name that eval_fn returns, '-' before it where higher is better.",
                )
            value = sign * record[name]
            return value if record["diverged"] is None and math.isfinite(value) else math.inf

        kept = sorted(alive, key=score)[: -(-len(alive) // 2)]
        chosen = {member.index for member in kept}
        return [member for member in alive if member.index in chosen]

    def train(self, chunk: Chunk, states: Any, name: str, begin: int, end: int) -> tuple[Any, int]:
        """One chunk from step ``begin`` to ``end``, or from where a saved state left it."""
        params = self.programs.place(chunk.group.params, False)
        log = {n: np.full((chunk.real, end - begin), np.nan, np.float32) for n in self.curves}
        progress = {"step": np.int64(begin), "since": np.int64(begin), **log}
        saved = self.folder.load(name, (states, progress)) if self.folder else None
        if saved is not None:
            states, progress = saved
        log = {n: progress[n] for n in self.curves}
        done, since = int(progress["step"]), int(progress["since"])
        for n, values in log.items():
            self.curves[n][chunk.lanes, begin:end] = values
        self.bar.skip(done - begin)
        if done == end:
            return states, done
        states = self.programs.place(states, True)
        values = self.programs.place(chunk.values(), True)
        rates = self.programs.place(chunk.rates(), True)
        pending: Any = None

        def read():
            if pending is not None:
                for n in log:
                    log[n][:, pending[0] - begin] = host(pending[1][n])[: chunk.real]
                self.curves["loss"][chunk.lanes, pending[0]] = log["loss"][:, pending[0] - begin]
                self.curves["grad_norm"][chunk.lanes, pending[0]] = log["grad_norm"][:, pending[0] - begin]

        for batch, which in self._feed(chunk, done):
            step = self.programs.step(chunk, states, params, batch, which)
            states, metrics = step(states, params, batch, values, rates, which)
            read()
            pending = done, metrics
            done += 1
            stop = self.stopping()
            due = done % self.every == 0 or done == end
            if due or stop:
                read()
                pending = None
            if due:
                self._record(chunk, states, params, done, since)
                since = done
            if (due or stop) and self.folder:
                facts = {"step": np.int64(done), "since": np.int64(since), **log}
                local = jax.tree.map(lambda x: x if x.is_fully_addressable else host(x), states)
                if jax.process_index() == 0:
                    self.folder.save(name, (local, facts), chunk.lanes, done)
            self.bar.step(self._best_so_far())
            if stop or done == end:
                break
        return states, done

    def _record(self, chunk: Chunk, states: Any, params: PyTree, step: int, since: int) -> None:
        """One record per lane."""
        rows = []
        for member, scores in zip(chunk.slots, self.programs.scores(chunk, states, params), strict=False):
            lane = member.index
            curves = {n: self.curves[n][lane, :step] for n in self.curves}
            bad = ~(np.isfinite(curves["loss"]) & np.isfinite(curves["grad_norm"]))
            train = float(curves["loss"][since:].mean())
            row = {
                "lane": lane,
                "step": step,
                **{name: label(value) for name, value in member.lane.items()},
                "loss": train,
                "train_loss": train,
                **scores,
                "diverged": int(bad.argmax()) + 1 if bad.any() else None,
            }
            if row["diverged"] is not None and not any(r["lane"] == lane and r["diverged"] for r in self.records):
                self.bar.note(f"lane {lane} diverged at step {row['diverged']}: {member.lane}")
            rows.append(row)
            self._lead(row)
        self.records.extend(rows)
        if self.folder and jax.process_index() == 0:
            self.folder.add(rows)

    def _lead(self, row: dict) -> None:
        name, sign = (self.best[1:], -1.0) if self.best.startswith("-") else (self.best, 1.0)
        value = row.get(name)
        if isinstance(value, float) and math.isfinite(value) and row["diverged"] is None:
            if self.leader is None or sign * value < self.leader[0]:
                self.leader = sign * value, row["lane"]

    def _best_so_far(self) -> str:
        if self.leader is None:
            return ""
        name = self.best.removeprefix("-")
        score = -self.leader[0] if self.best.startswith("-") else self.leader[0]
        return f"best {name} {score:.4g} in lane {self.leader[1]}"

    def _keep(self, chunk: Chunk, states: Any) -> None:
        """What `SweepResult.lora` gives: cut out when it is asked for."""
        lora = whole(states).lora
        for slot, member in enumerate(chunk.slots[: chunk.real]):
            self.loras[member.index] = lambda member=member, slot=slot: own_lora(member, lora, slot)


def moved(chunk: Chunk, former: dict[int, Any]) -> Any:
    """States of a chunk, taken from where its lanes lay before."""
    made, at = [], 0
    for _, size in chunk.parts:
        some = []
        for member in chunk.slots[at : at + size]:
            old, states, slot = former[member.index]
            places = [i for i, (_, n) in enumerate(old.parts) for _ in range(n)]
            part = places[slot]
            inside = slot - side_by_side.offsets(old.parts)[part]
            some.append(jax.tree.map(lambda x, i=inside: x[i], states[part]))
        made.append(jax.tree.map(lambda *xs: jnp.stack(xs), *some))
        at += size
    return tuple(made)


def _repeatable(batches: Any, steps: int) -> Any:
    """Batches that each program can take from their beginning; those of a plain iterator are kept."""
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


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether ctrl-C came: the step is finished first. A second one ends at once."""
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


def _check_arguments(steps: Any, every: Any, data: Any, count: Any, halving: Any, tx: Any) -> None:
    def is_count(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    wrong: dict[str, str] = {}
    if not is_count(steps):
        wrong[f"steps={steps!r}"] = "an int of 1 or more"
    if every is not None and not is_count(every):
        wrong[f"every={every!r}"] = "an int of 1 or more, or None"
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
