"""Continuous batching: a fixed number of rows, each in a request of its own, one program for all."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lx
from serve.decoding import make_step, new_cache

BASE = "base"


class Refused(Exception):
    """A request that cannot be served, and the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass
class Request:
    """What a client asks for; ``told(token)`` is called for each new token, and with None at the end.

    A request that failed ends with a `Refused` instead of None.
    """

    adapter: str
    prompt: list[int]
    new: int
    temperature: float
    told: Callable[[Any], None]
    stop: int | None = None
    cancelled: bool = False
    slot: int = -1
    done: int = 0  # tokens that went through the model
    made: int = 0
    last: int = 0


class Adapters:
    """Which adapter sits in which slot of the bank; the least recently used makes room for a new one."""

    def __init__(self, bank: Any, load: Callable[[str], dict]):
        self.bank, self.load = bank, load
        self.slots: collections.OrderedDict[str, int] = collections.OrderedDict()
        self.swaps = 0

    def slot(self, name: str, busy: set[int]) -> int | None:
        """The slot of an adapter, which is loaded if need be; None where all slots are busy."""
        if name == BASE:
            return -1
        if name in self.slots:
            self.slots.move_to_end(name)
            return self.slots[name]
        unused = set(range(len(self.bank))) - set(self.slots.values())
        idle = next((other for other, i in self.slots.items() if i not in busy), None)
        if not unused and idle is None:
            return None
        lora = self.load(name)
        slot = unused.pop() if unused else self.slots[idle]
        # All that may fail comes before anything is evicted; a bank that refuses an adapter stays as it is.
        self.bank = self.bank.set(slot, lora, donate=True)
        if idle is not None and self.slots[idle] == slot:
            del self.slots[idle]
        self.slots[name] = slot
        self.swaps += 1
        return slot


class Engine:
    """Decodes for all rows in a thread of its own; requests come and go between steps."""

    def __init__(self, config, params, bank, load, *, rows=8, length=128, queue=64):
        self.params, self.length, self.limit = params, length, queue
        self.adapters = Adapters(bank, load)
        self.rows: list[Request | None] = [None] * rows
        self.waiting: collections.deque[Request] = collections.deque()
        self.lock, self.wake, self.closed = threading.Lock(), threading.Event(), False
        self.step, self.cache = make_step(config), new_cache(config, rows, length)
        self.key, self.steps, self.tokens = jax.random.key(0), 0, 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request, or raises `Refused`."""
        if not request.prompt or len(request.prompt) + request.new > self.length:
            raise Refused(400, f"prompt and max_tokens together must be 1 to {self.length} tokens")
        with self.lock:
            if self.closed:
                raise Refused(503, "the engine stopped")
            if any(one.cancelled for one in self.waiting):  # clients that hung up take no place in the queue
                self.waiting = collections.deque(one for one in self.waiting if not one.cancelled)
            if len(self.waiting) >= self.limit:
                raise Refused(429, "the queue is full")
            self.waiting.append(request)
        self.wake.set()

    def close(self) -> None:
        self.closed = True
        self.wake.set()
        self.thread.join()

    def _run(self) -> None:
        try:
            while not self.closed:
                self._admit()
                if any(self.rows):
                    self._decode()
                else:
                    self.wake.wait(timeout=0.1)
                    self.wake.clear()
        except Exception as failure:  # of the device, say: nobody should wait for answers that never come
            logging.getLogger(__name__).exception("the engine stopped")
            with self.lock:
                self.closed = True
                for request in [*filter(None, self.rows), *self.waiting]:
                    request.told(Refused(500, f"the engine stopped: {failure}"))

    def _admit(self) -> None:
        """Fills free rows from the queue; a request whose adapter fails to load hurts nobody else."""
        for i, held in enumerate(self.rows):
            if held is not None and held.cancelled:
                self.rows[i] = None
            while self.rows[i] is None:
                with self.lock:
                    request = self.waiting.popleft() if self.waiting else None
                if request is None:
                    return
                if request.cancelled:
                    continue
                busy = {row.slot for row in self.rows if row is not None}
                try:
                    slot = self.adapters.slot(request.adapter, busy)
                except Exception as failure:  # whatever a file holds: the client is told, the loop goes on
                    request.told(Refused(400, f"adapter {request.adapter!r} cannot be loaded: {failure}"))
                    continue
                if slot is None:
                    with self.lock:
                        self.waiting.appendleft(request)
                    return
                request.slot, request.last = slot, request.prompt[0]
                self.rows[i] = request

    def _decode(self) -> None:
        """One token of every row: the next one of its prompt, or the one that it made last."""
        live = [row or Request(BASE, [0], 1, 0.0, lambda token: None) for row in self.rows]
        self.key, key = jax.random.split(self.key)
        made, self.cache = self.step(
            self.params,
            self.adapters.bank,
            self.cache,
            jnp.array(np.array([row.slot for row in live], np.int32)),
            jnp.array(np.array([row.last for row in live], np.int32)),
            jnp.array(np.array([row.done for row in live], np.int32)),
            jnp.array(np.array([row.temperature for row in live], np.float32)),
            key,
        )
        self.steps += 1
        for i, (row, token) in enumerate(zip(self.rows, np.asarray(made).tolist(), strict=True)):
            if row is None:
                continue
            row.done += 1
            if row.done < len(row.prompt):
                row.last = row.prompt[row.done]
                continue
            row.last, row.made = token, row.made + 1
            self.tokens += 1
            row.told(token)
            if row.made == row.new or token == row.stop:
                row.told(None)
                self.rows[i] = None


def empty_bank(params: Any, layout: Any, *, slots: int, rank: int) -> Any:
    """A bank that fits adapters of all linear weights up to ``rank``, with nothing in it."""
    _, lora = lx.split(params, rank, layout=layout)
    return lx.bank([lora], capacity=slots).clear(0)
