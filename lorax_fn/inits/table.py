"""The inits by name: one row each."""

from lorax_fn.inits.base import Init
from lorax_fn.inits.loftq import loftq
from lorax_fn.inits.olora import olora
from lorax_fn.inits.pissa import pissa
from lorax_fn.inits.plain import gaussian, kaiming, orthogonal, zero_a

INITS = {init.name: init for init in (kaiming, gaussian, zero_a, orthogonal, pissa(), olora, loftq())}


def find_init(name: object) -> Init | None:
    """The init of a name such as ``"pissa"`` or ``"pissa:4"``, an init itself, or None for anything else."""
    if isinstance(name, Init):
        return name
    if not isinstance(name, str):
        return None
    base, colon, count = name.partition(":")
    init = INITS.get(base)
    if init is None or not colon:
        return init
    return init.with_count(int(count)) if count.isdecimal() else None
