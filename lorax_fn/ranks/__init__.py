"""The singular values of adapters, and changes of their rank."""

from lorax_fn.ranks.plain import to_plain as to_plain
from lorax_fn.ranks.reallocation import reallocate as reallocate
from lorax_fn.ranks.reallocation import sensitivity as sensitivity
from lorax_fn.ranks.resizing import resize as resize
from lorax_fn.ranks.resizing import truncate as truncate
from lorax_fn.ranks.spectra import Spectrum as Spectrum
from lorax_fn.ranks.spectra import effective_rank as effective_rank
