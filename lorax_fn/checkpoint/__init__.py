"""Adapters and runs on disk: Orbax stores the arrays, JSON the facts.

What other tools write: pickle, copies and `flax.serialization` keep every fact of an adapter. Equinox's
``tree_serialise_leaves`` writes leaves alone, so that alpha, rank and scaling are afterwards those of the
tree that it is read into, right or wrong: use `save` and `load`.
"""

from lorax_fn.checkpoint.adapters import load as load
from lorax_fn.checkpoint.adapters import load_extra as load_extra
from lorax_fn.checkpoint.adapters import save as save
