"""Adapters and runs on disk: Orbax stores the arrays, JSON the facts."""

from lorax_fn.checkpoint.adapters import load as load
from lorax_fn.checkpoint.adapters import save as save
