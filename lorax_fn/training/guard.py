"""Finds the last good state of `fit` when numbers are no longer finite.

Copying the state at every step could cost more than the step itself. So a state is kept every few steps, with
the batches since then. When a step goes wrong, the steps before it are repeated, and give the same results,
bit for bit. If they do not (a batch was donated, or its buffer reused), the kept state is the last good one.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.trees import PyTree, is_float, named_leaves
from lorax_fn.training.metrics import scalars

EVERY = 8  # how many steps apart states are kept
WATCHED = ("loss", "grad_norm")


@dataclasses.dataclass
class Taken:
    """A step that was taken: its number, its batch, the position of that batch, and the step's metrics."""

    number: int
    batch: Any
    position: Any
    metrics: dict
    values: dict | None = None  # the scalars of `metrics`, once read


@dataclasses.dataclass
class _Kept:
    state: Any
    number: int
    good: Any  # whether every number in it is finite, as a bool on the device or None


class Guard:
    """Keeps a good state, and detects states that are not good."""

    def __init__(self, step: Callable, state: PyTree, params: PyTree, number: int):
        self.step, self.params = step, params
        self.floats = _finite_leaves(state)
        self.kept = _Kept(state, number, None)
        self.newer: _Kept | None = None
        self.steps: collections.deque[Taken] = collections.deque()  # taken since `kept`
        self.donates: bool | None = None  # not known before the first step

    def hand_out(self, state: PyTree, number: int) -> PyTree:
        """The argument of the next step: ``state``, or a copy of it if ``state`` itself is to be kept."""
        due = number == self.kept.number or number - (self.newer or self.kept).number >= EVERY
        if not due:
            return state
        given, good = _copy_and_check(state, self.floats) if self.donates is not False else (state, None)
        if number != self.kept.number:
            self.newer = _Kept(state, number, self.finite(state) if good is None else good)
        return given

    def took(self, given: PyTree, taken: Taken) -> None:
        """Records one step, and whether it consumed its arguments."""
        if self.donates is None:
            self.donates = any(x.is_deleted() for x in jax.tree.leaves(given) if isinstance(x, jax.Array))
        self.steps.append(taken)

    def finite(self, state: PyTree) -> Any:
        """Whether all leaves that were finite in the first state still are, as a bool on the device."""
        return _check(state, self.floats)

    def accepts(self, taken: Taken) -> bool:
        """Whether the metrics of a step are finite, and the state after it if that is to be kept."""
        if not finite_metrics(taken.values or {}):
            return False
        newer = self.newer
        if newer is not None and newer.number <= taken.number:
            if not bool(newer.good):
                return False
            self.kept, self.newer = newer, None
            while self.steps and self.steps[0].number <= newer.number:
                self.steps.popleft()
        return True

    def last_good(self) -> tuple[PyTree, int]:
        """The last finite state and its step, found by repeating the steps since `kept`."""
        state, number = self.kept.state, self.kept.number
        for taken in list(self.steps)[:-1]:  # The last step, or one before it, went wrong.
            if taken.values is None or not finite_metrics(taken.values) or not _alive(taken.batch):
                break
            new, metrics = self.step(_copy(state), self.params, taken.batch)
            again = scalars(metrics)
            if any(again.get(name) != taken.values.get(name) for name in WATCHED):
                return self.kept.state, self.kept.number
            if not bool(self.finite(new)):
                break
            state, number = new, taken.number
        return state, number

    def bad_leaves(self, state: PyTree) -> list[str]:
        """The paths of the leaves of ``state`` that are no longer finite."""
        watched = zip(named_leaves(state), self.floats, strict=True)
        return [path for (path, x), checked in watched if checked and not bool(jnp.isfinite(x).all())]


def finite_metrics(values: dict) -> bool:
    """Whether the loss and the gradient norm, if there are any, are finite."""
    return all(math.isfinite(values[name]) for name in WATCHED if name in values)


def _finite_leaves(state: PyTree) -> tuple[bool, ...]:
    """Which leaves are finite floats. Some optimizers, for instance, begin with an infinite best value."""
    leaves = jax.tree.leaves(state)
    finite = iter(np.asarray(_each_finite([x for x in leaves if is_float(x)])))
    return tuple(bool(is_float(x) and next(finite)) for x in leaves)


def _alive(batch: PyTree) -> bool:
    return not any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(batch))


@jax.jit
def _each_finite(leaves: list) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]) if leaves else jnp.zeros(0, bool)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _all_finite(tree: PyTree, floats: tuple[bool, ...]) -> jax.Array:
    checked = [x for x, check in zip(jax.tree.leaves(tree), floats, strict=True) if check]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in checked], jnp.bool_(True))


_check = jax.jit(_all_finite, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _copy_and_check(tree: PyTree, floats: tuple[bool, ...]) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.copy, tree), _all_finite(tree, floats)
