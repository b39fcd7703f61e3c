"""The source of batches for `fit`, and how it returns to its position after a restart."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from lorax_fn.core.errors import error
from lorax_fn.core.trees import is_array


class Feed:
    """An iterator over batches that starts over where possible, and knows its position.

    A callable ``batches(start)`` returns an iterator from batch number ``start`` on. An iterator with
    ``get_state`` and ``set_state`` (grain's protocol), or an iterable of such, is restored to its own state.
    Any other iterable is run again whenever it ends. For these, and for plain iterators, a restart reads and
    drops the batches that were taken before.
    """

    def __init__(self, batches: Any):
        _check_source(batches, called=callable(batches))
        self.batches: Any = batches
        self.taken = 0
        self.fresh = True  # whether no batch has been taken from the current pass yet
        self.calls = callable(batches) and not hasattr(batches, "__iter__")
        self.iterator: Any = None

    def start(self, position: dict | None, done: int, *, skip: bool) -> int:
        """Goes to a stored position, or to the beginning.

        Args:
          position: the result of `position`, or None.
          done: how many steps have been taken so far, which is where a callable starts.
          skip: whether a plain iterator is at its beginning, so that batches taken before must be dropped.

        Returns:
          How many batches were read and dropped.

        Raises:
          LoraError: the batches can't be put back to the position.
        """
        if self.calls:
            self.taken = done if position is None else position["taken"]
            found = self.batches(self.taken)
            _check_source(found, called=False)
            self.iterator = iter(found)
            return 0
        self.iterator = iter(self.batches)
        if position is None:
            return 0
        if position["state"] is not None:
            if not hasattr(self.iterator, "set_state"):
                raise error(
                    "these batches can't be put back to where the checkpoint was.",
                    got=f"a {type(self.iterator).__name__} without set_state",
                    want="an iterator with get_state and set_state, as when it was saved",
                    do="pass the same kind of batches.",
                )
            self.iterator.set_state(_decode(position["state"]))
            self.taken, self.fresh = position["taken"], position["taken"] == 0
            return 0
        if self.iterator is self.batches and not skip:
            self.taken = position["taken"]
            return 0
        try:
            for _ in range(position["taken"]):
                next(self)
        except StopIteration:
            raise error(
                "there are fewer batches than were trained on before the checkpoint.",
                got=f"{self.taken} batches",
                want=f"{position['taken']}, and more to continue with",
                do="pass the same batches as when it was saved; a plain iterator must be at its beginning.",
            ) from None
        return self.taken

    def __next__(self) -> Any:
        try:
            batch = next(self.iterator)
        except StopIteration:
            again = not self.calls and iter(self.batches) is not self.batches and not self.fresh
            if not again:
                raise
            self.iterator, self.fresh = iter(self.batches), True
            batch = next(self.iterator)
        self.taken, self.fresh = self.taken + 1, False
        return batch

    def position(self) -> dict:
        """The position of the next batch, as JSON."""
        get: Callable | None = getattr(self.iterator, "get_state", None)
        return {"taken": self.taken, "state": None if get is None else _encode(get())}


def _check_source(batches: Any, *, called: bool) -> None:
    """Raises a `LoraError` if ``batches`` can't be iterated over, or are a single batch."""
    one = isinstance(batches, Mapping | str | bytes) or is_array(batches)
    if one or not (called or hasattr(batches, "__iter__") or hasattr(batches, "__next__")):
        raise error(
            "batches are not a source of batches.",
            got=f"a {type(batches).__name__}" + (", which is at most one batch" if one else ""),
            want="an iterable, an iterator, or batches(start) -> iterator",
            do="fit(step, state, params, [batch], steps=10).",
        )


def _encode(state: Any) -> Any:
    """The state as JSON; bytes are encoded in base64."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        if json.loads(json.dumps(state)) == state:
            return {"json": state}
    except TypeError:
        pass
    raise error(
        "get_state() of the batches returned something that a checkpoint can't store.",
        got=f"a {type(state).__name__}",
        want="bytes, or JSON (dicts with string keys, lists, numbers, strings, bools, None)",
        do="return JSON from get_state, or pickle it to bytes.",
    )


def _decode(state: dict) -> Any:
    return base64.b64decode(state["bytes"]) if "bytes" in state else state["json"]
