"""Where a curve over a logarithmic axis is lowest: a parabola through the points near the minimum."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_fn.core.errors import error


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Where a score is best along an axis.

    Args:
      x: the position of the minimum, on the axis itself rather than on its logarithm.
      low, high: the interval that holds ``level`` of the bootstrap samples' minima.
      score: the fitted score at ``x``.
      inside: whether the best measured point is in the interior of the axis. If it is an end of the axis, the
        optimum may lie beyond it, and ``x`` is that end.
      samples: the minima of all bootstrap samples, from which slopes and differences get their own intervals.

    Example:
      >>> import lorax_fn as lx
      >>> rates = [1e-4, 1e-3, 1e-2]
      >>> found = lx.sweeps.optimum(rates, [[1.0, 0.5, 1.0], [1.1, 0.6, 1.1]])
      >>> round(found.x, 6), found.inside
      (0.001, True)
    """

    x: float
    low: float
    high: float
    score: float
    inside: bool
    samples: np.ndarray = dataclasses.field(repr=False, compare=False)


def optimum(
    x: Sequence[float],
    scores: Any,
    *,
    points: int = 5,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Optimum:
    """Fits a parabola in ``log x`` to the mean scores around the best point, and bootstraps it over seeds.

    Args:
      x: ``[k]`` positions on the axis, positive and distinct, such as learning rates.
      scores: ``[seeds, k]``, lower is better. A score that is not finite (a diverged run) counts as worse
        than any other.
      points: how many points around the best one are fitted, at least three.
      level: the fraction of the bootstrap samples that the interval holds.
      samples: the number of bootstrap samples; each draws as many seeds as there are, with replacement.
      seed: the seed of these draws.

    Returns:
      The `Optimum`. With a single seed there is nothing to draw from, and the interval is NaN. The minimum is
      clipped to the range of the fitted points.

    Raises:
      LoraError: shapes don't fit, ``x`` is not positive or repeats a value, or no score is finite.

    Example:
      >>> import numpy as np, lorax_fn as lx
      >>> rates = 10.0 ** np.arange(-5, -1)
      >>> scores = (np.log10(rates) + 3.5) ** 2 + np.array([[0.0], [0.1], [0.2]])
      >>> found = lx.sweeps.optimum(rates, scores)
      >>> round(float(np.log10(found.x)), 3), round(float(np.log10(found.high)), 3)
      (-3.5, -3.5)
    """
    places, values = np.asarray(x, np.float64), np.atleast_2d(np.asarray(scores, np.float64))
    fits = places.ndim == 1 and values.shape[1:] == places.shape and len(places) >= 3
    if not fits or (places <= 0).any() or len(set(places.tolist())) != len(places) or points < 3:
        raise error(
            "an optimum needs scores along an axis.",
            got=f"x of shape {places.shape}, scores of shape {values.shape}, points={points}",
            want="x [k] positive and distinct, k >= 3; scores [seeds, k]; points >= 3",
            do="optimum([1e-4, 1e-3, 1e-2], [[1.0, 0.5, 1.0]]).",
        )
    order = np.argsort(places)
    logs, values = np.log(places[order]), values[:, order]
    if not np.isfinite(values).any(0).any():
        raise error("no score is finite.", got=str(values.tolist())[:80], do="look at lower rates.")
    place, score, inside = _minimum(logs, _mean(values), points)
    rng, n = np.random.default_rng(seed), len(values)
    drawn = np.full(samples, np.nan)
    if n > 1:
        for i in range(samples):
            drawn[i] = _minimum(logs, _mean(values[rng.integers(n, size=n)]), points)[0]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail]) if n > 1 else (math.nan, math.nan)
    return Optimum(
        float(np.exp(place)), float(np.exp(low)), float(np.exp(high)), float(score), inside, np.exp(drawn)
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over seeds; infinite where one of them is not finite."""
    return np.where(np.isfinite(values).all(0), np.where(np.isfinite(values), values, 0.0).mean(0), np.inf)


def _minimum(logs: np.ndarray, mean: np.ndarray, points: int) -> tuple[float, float, bool]:
    """The position and height of the minimum, and whether the best point has neighbors on both sides."""
    best = int(np.argmin(mean))
    if not np.isfinite(mean[best]):
        return math.nan, math.nan, False
    inside = 0 < best < len(logs) - 1
    first = min(max(best - points // 2, 0), max(len(logs) - points, 0))
    near = np.arange(first, min(first + points, len(logs)))
    near = near[np.isfinite(mean[near])]
    if not inside or len(near) < 3:
        return float(logs[best]), float(mean[best]), inside
    center = logs[best]
    curve, slope, height = np.polyfit(logs[near] - center, mean[near], 2)
    if curve <= 0:  # the parabola has no minimum, so the best point itself is returned
        return float(center), float(mean[best]), inside
    at = float(np.clip(-slope / (2 * curve), logs[near].min() - center, logs[near].max() - center))
    return center + at, float(height + slope * at + curve * at**2), inside


def slope(
    x: Sequence[float], optima: Sequence[Optimum], *, level: float = 0.95
) -> tuple[float, float, float]:
    """The slope of the optimum's logarithm against ``log x``, with a bootstrap interval.

    If the optima are learning rates and ``x`` are ranks, a slope of 0 says that the best learning rate does
    not depend on the rank, and -1/2 that it falls as ``1/sqrt(rank)``.

    Args:
      x: ``[k]`` positions on another axis, such as ranks.
      optima: the result of `optimum` at each of them.
      level: the fraction of the bootstrap samples that the interval holds.

    Returns:
      The least-squares slope, and the low and high end of its interval. Optima at the end of their axis
      (``inside`` False) are left out; with fewer than two left all three are NaN.

    Example:
      >>> import numpy as np, lorax_fn as lx
      >>> rates = 10.0 ** np.arange(-5, 0)
      >>> found = [lx.sweeps.optimum(rates, [(np.log10(rates) + 3 + p) ** 2] * 2) for p in (0.0, 0.5)]
      >>> [round(s, 3) for s in lx.sweeps.slope([1, 10], found)]
      [-0.5, -0.5, -0.5]
    """
    kept = [(place, one) for place, one in zip(x, optima, strict=True) if one.inside]
    if len({place for place, _ in kept}) < 2:
        return math.nan, math.nan, math.nan
    logs = np.log([place for place, _ in kept])

    def fitted(minima):
        return float(np.polyfit(logs, np.log(minima), 1)[0])

    drawn = np.stack([one.samples for _, one in kept], 1)
    slopes = [fitted(row) for row in drawn if np.isfinite(row).all()]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(slopes, [tail, 1.0 - tail]) if slopes else (math.nan, math.nan)
    return fitted([one.x for _, one in kept]), float(low), float(high)
