"""Adapters and runs on disk: Orbax stores the arrays, JSON the static fields.

Pickle, copies and `flax.serialization` keep every static field of an adapter too. Equinox's
``tree_serialise_leaves`` writes leaves only, so after reading, alpha, rank and scaling are those of the tree
it was read into, right or wrong. Use `save` and `load` instead.
"""

from lorax_fn.checkpoint.adapters import load as load
from lorax_fn.checkpoint.adapters import load_extra as load_extra
from lorax_fn.checkpoint.adapters import save as save
