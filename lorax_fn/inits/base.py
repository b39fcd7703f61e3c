"""What an init is, and what the rest of the package needs to know of one."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree
from lorax_fn.inits.loftq import LoftQ


def raise_unusable(what: str, init: Any, wrong: Mapping[str, str]) -> None:
    if wrong:
        raise error(
            f"the {what} of these weights cannot start them.",
            path=list(wrong),
            got=list(wrong.values()),
            want="finite numbers, and as many directions as the rank",
            do=f"more batches, a lower rank, or another init: init={{pattern: 'kaiming', '*': {init!r}}}.",
        )


def check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise error(f"unknown {name}.", got=repr(value), want=list(known), do=f"{name}={known[0]!r}.")


def widest(rank: Any) -> int:
    """The rank of the factors: of ranks along a stack, the largest."""
    return max(rank) if isinstance(rank, tuple) else rank


class FromData:
    """An init that looks at batches; `split` lets it look once, for all the weights that it is to start."""

    moves_weight: ClassVar[bool] = True  # takes a part of W into the factors

    def refuses(self, n: int, m: int, plan: Any) -> str | None:
        """What this init cannot do for ``n`` inputs, ``m`` outputs and a checked plan, or None."""
        raise TypeError(f"{type(self).__name__} must define refuses(n, m, plan)")

    def starts(self, params: PyTree, plans: Mapping[str, Any]) -> dict[str, Callable]:
        """The init of each weight of ``plans``, as the functions of this file are."""
        raise TypeError(f"{type(self).__name__} must define starts(params, plans)")


def refuses(shape: tuple[int, ...], plan: Any) -> str | None:
    """What an init needs that it has not got here, or None."""
    init, rank = plan.init, plan.rank
    if isinstance(init, FromData):
        _, n, m = plan.layout.shapes(shape)
        return init.refuses(math.prod(n), math.prod(m), plan)
    ranks = rank if isinstance(rank, tuple) else (rank,)
    if init == "orthogonal" and any(r % 2 for r in ranks):
        return f"an even rank for init='orthogonal', not {rank}: each factor uses half of it"
    divides = isinstance(init, LoftQ) or init.startswith(("pissa", "loftq"))
    return no_scale(plan) if divides else None


def no_scale(plan: Any) -> str | None:
    """What an init that divides by the scale says where there is none to divide by."""
    ranks = plan.rank if isinstance(plan.rank, tuple) else (plan.rank,)
    alphas = plan.alpha if isinstance(plan.alpha, tuple) else (plan.alpha,) * len(ranks)
    if any(a <= 0 for r, a in zip(ranks, alphas, strict=True) if r):
        return f"an alpha above 0 for init={plan.init!r}, not {plan.alpha}: it divides by the scale"
    return None


def refuses_stored(init: Any) -> str | None:
    """What an init that takes a part of W says of a weight whose values are rounded already, or None."""
    named = isinstance(init, str) and init.startswith(("pissa", "loftq", "olora"))
    if named or isinstance(init, LoftQ) or (isinstance(init, FromData) and init.moves_weight):
        return f"float weights for init={init!r}, which takes a part of W: split first, then lx.quantize"
    return None
