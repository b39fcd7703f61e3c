"""Many configurations in one program: `sweep`, its lanes, its results, and the optimum of an axis."""

from lorax_fn.sweeps.optima import Optimum as Optimum
from lorax_fn.sweeps.optima import optimum as optimum
from lorax_fn.sweeps.optima import slope as slope
from lorax_fn.sweeps.results import SweepResult as SweepResult
from lorax_fn.sweeps.results import read as read
