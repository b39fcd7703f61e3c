"""Many configurations in one program: `sweep`, its lanes, its results, and the optimum of an axis."""

from lorax_fn.sweeps.results import SweepResult as SweepResult
