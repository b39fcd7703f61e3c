"""Models of other people's layers, in tiny random configurations, and what `usage` must find in each.

One row a model: how to make ``(fn, params, args)``, the layout of every weight that is adapted, and what
conventions alone (`split` without ``layout=``) make of it. Only wiring is written here; layers are the
frameworks' own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lorax_fn.core.layouts import Layout

SAME = "the same weights in the same layouts"
MODELS: dict[str, "Model"] = {}
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Model:
    """One row.

    Args:
      make: gives ``(fn, params, args)``, where array leaves of params may be abstract.
      layouts: layout of each weight that must be adapted, by path.
      targets: patterns, where the default leaves the weights in question out.
      plain: what `split` without a layout must do: find `SAME`, or only these paths, or raise a message that
        matches this text.
    """

    make: Callable[[], tuple[Callable, Any, tuple]]
    layouts: Mapping[str, Layout]
    targets: tuple[str, ...] | None = None
    plain: str | set[str] = SAME


def model(layouts: Mapping[str, str], **facts: Any) -> Callable:
    """Puts a maker in the table under its own name; layouts as words: ``"s i o"`` is stack, input, output."""

    def register(make: Callable) -> Callable:
        MODELS[make.__name__] = Model(make, {p: layout(word) for p, word in layouts.items()}, **facts)
        return make

    return register


def layout(word: str) -> Layout:
    """``"sioo"`` is axis 0 stack, 1 input, 2 and 3 outputs."""
    return Layout(*(tuple(i for i, letter in enumerate(word) if letter == role) for role in "sio"))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prefixed(prefix: str, layouts: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}" if prefix else path: word for path, word in layouts.items()}


def linen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
    params = jax.eval_shape(partial(module.init, **kwargs), KEY, *args)
    return lambda params, *args: module.apply(params, *args, **kwargs), params, args
