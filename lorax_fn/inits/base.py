"""`Init`, the base class of all inits: how A and B start, and what the rest of the package needs to know."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lorax_fn.core.adapters import is_number
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree


class Init:
    """How A and B of a weight start, as a frozen value for ``split(params, init=...)``.

    A subclass is a frozen dataclass of its options. It defines ``__call__``, which starts one weight. An init
    from data defines `starts` instead, which `split` calls once with all the weights to start. `split` takes
    the value itself, or its name in `lorax_fn.inits.table`.

    Example:
      >>> import lorax_fn as lx
      >>> lx.inits.pissa(iterations=4).moves_weight, lx.inits.kaiming.moves_weight
      (True, False)
    """

    name: ClassVar[str]  # the short form
    moves_weight: ClassVar[bool] = False  # moves a part of W into the factors, which changes params
    needs_data: ClassVar[bool] = False  # runs a function on batches
    splits_ranks: ClassVar[bool] = False  # has `ranks`, which divides a budget of ranks among weights
    divides_by_scale: ClassVar[bool] = False  # needs a scale above 0
    zero_a: ClassVar[bool] = False  # A starts at zero, so that B gets no gradient until A moves

    def __call__(
        self, key: Any, w: Any, layout: Any, rank: Any, scale: Any, dtype: Any
    ) -> tuple[Any, Any, Any]:
        """Starts one weight.

        Args:
          key: one PRNG key for the whole leaf; stack entries draw independent values.
          w: the weight; most inits read only its shape.
          layout: its axes.
          rank: ``r``; or one int per stack entry, in which case the factors have the largest of them.
          scale: the factor before ``A @ B``, or one per stack entry.
          dtype: dtype of A and B; values are computed in float32.

        Returns:
          The factors ``a [*s, *n, r]`` and ``b [*s, r, *m]``, and the weight to freeze.
        """
        raise TypeError(f"{type(self).__name__} must define __call__ or starts")

    def starts(self, params: PyTree, plans: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """For each weight of ``plans``, a function with the signature of ``__call__`` that starts it."""
        del params
        return dict.fromkeys(plans, self)

    def refuses(self, n: int, m: int, plan: Any) -> str | None:
        """What this init requires and ``n`` inputs, ``m`` outputs and a checked plan lack, or None."""
        del n, m
        return no_scale(plan) if self.divides_by_scale else None

    def with_count(self, count: int) -> "Init | None":
        """This init with ``count`` iterations, as in ``"pissa:4"``; None if it has no such option."""
        del count
        return None

    def __repr__(self) -> str:
        return f"lx.inits.{self.name}"


def no_scale(plan: Any) -> str | None:
    """What an init that divides by the scale requires if the scale of a plan is not above 0, or None."""
    if not is_number(plan.alpha):
        return None  # An array may be traced, so its value is unknown.
    ranks = plan.rank if isinstance(plan.rank, tuple) else (plan.rank,)
    alphas = plan.alpha if isinstance(plan.alpha, tuple) else (plan.alpha,) * len(ranks)
    if any(a <= 0 for r, a in zip(ranks, alphas, strict=True) if r):
        return f"an alpha above 0 for init={plan.init!r}, not {plan.alpha}: it divides by the scale"
    return None


def raise_unusable(what: str, init: Init, wrong: Mapping[str, str]) -> None:
    """Raises a `LoraError` if data cannot start some weights, given in ``wrong`` with the reasons."""
    if wrong:
        raise error(
            f"these weights cannot be started from their {what}.",
            path=list(wrong),
            got=list(wrong.values()),
            want="finite numbers, and as many directions as the rank",
            do=f"more batches, a lower rank, or another init: init={{pattern: 'kaiming', '*': {init!r}}}.",
        )


def check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise error(f"unknown {name}.", got=repr(value), want=list(known), do=f"{name}={known[0]!r}.")


def widest(rank: int | tuple[int, ...]) -> int:
    """The rank of the factors, which is the largest of the ranks along a stack."""
    return max(rank) if isinstance(rank, tuple) else rank
