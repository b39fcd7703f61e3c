"""The inits by name."""

import functools
from typing import Any

from lorax_fn.inits.base import FromData
from lorax_fn.inits.loftq import LoftQ, loftq
from lorax_fn.inits.olora import olora
from lorax_fn.inits.pissa import pissa
from lorax_fn.inits.plain import gaussian, kaiming, orthogonal, zero_a

INITS = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "zero_a": zero_a,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}


def find_init(name: object) -> Any:
    """The init of a name such as ``"pissa:4"``, or `loftq`'s own or one from data itself; else None."""
    if isinstance(name, LoftQ | FromData):
        return name
    if not isinstance(name, str):
        return None
    base, colon, count = name.partition(":")
    if base == "pissa" and colon and count.isdecimal():
        return functools.partial(pissa, iterations=int(count))
    if base == "loftq" and (not colon or (count.isdecimal() and int(count))):
        return loftq(iterations=int(count or 5))
    return INITS.get(name)
