"""Plots of sweeps and adapters by matplotlib, which is imported when a plot is drawn."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lorax_fn.core.adapters import Adapter, is_real
from lorax_fn.core.errors import error
from lorax_fn.ranks.spectra import effective_rank
from lorax_fn.sweeps.results import SweepResult, check_metric

# Color-blind readers can distinguish these on white and on black (Okabe and Ito, without their yellow).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#999999")
MARKERS = "osD^vPX*"
THEMES = {
    "light": {"ink": "#1f2328", "faint": "#d0d7de", "paper": "#ffffff", "from": 0.05, "to": 0.85},
    "dark": {"ink": "#e6edf3", "faint": "#3d444d", "paper": "#0d1117", "from": 0.25, "to": 1.0},
}


def plot_curves(
    result: SweepResult, *, metric: str = "loss", hue: str | None = None, theme: str = "light"
) -> Any:
    """Draws the training curve of each lane.

    Args:
      result: the result of `lorax_fn.sweep`.
      metric: ``"loss"`` or ``"grad_norm"``.
      hue: the entry that gives each curve its color; None is the first that differs between lanes.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A `matplotlib.figure.Figure`: ``.savefig("curves.svg")``.

    Raises:
      LoraError: matplotlib is not installed, or there is no such curve, entry or theme.

    Example:
      >>> import lorax_fn as lx
      >>> figure = lx.report.plot_curves(result, hue="lr")  # doctest: +SKIP
    """
    if metric not in result.curves:
        raise _unknown("curve", metric, result.curves)
    hue = _varying(result)[0] if hue is None and _varying(result) else hue
    _check_entries(result, hue)
    labels = [record.get(hue) if hue else None for record in _by_lane(result)]
    names = _ordered(labels)
    with _figure(theme) as (figure, axes):
        colors = _colors(names, theme)
        for curve, label in zip(result.curves[metric], labels, strict=True):
            steps = np.arange(1, len(curve) + 1)
            axes.plot(steps, curve, color=colors[names.index(label)], linewidth=1.2, alpha=0.8)
        _log_if_wide(axes, "y", result.curves[metric])
        axes.set(xlabel="step", ylabel=_words(metric))
        _legend(axes, hue, names, colors, markers=False)
    return figure


def plot_metric(
    result: SweepResult,
    *,
    metric: str = "loss",
    x: str = "rank",
    hue: str | None = None,
    theme: str = "light",
) -> Any:
    """Draws the final score against one entry: means over seeds with standard errors.

    If lanes differ in more than ``x``, ``hue`` and the seed, each point is the best over the other entries.

    Args:
      result: the result of `lorax_fn.sweep`.
      metric: the name of a score; with a leading ``"-"``, higher is better.
      x: the entry along the axis; numbers that span a factor of eight or more are on a log axis.
      hue: the entry that gives each line its color.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      LoraError: matplotlib is not installed, or there is no such score, entry or theme.

    Example:
      >>> import lorax_fn as lx
      >>> figure = lx.report.plot_metric(result, x="rank", hue="scaling")  # doctest: +SKIP
    """
    _check_entries(result, x, hue)
    cells, others = best_cells(result, metric, (x, hue) if hue else (x,))
    names = _ordered([at[1] if hue else None for at in cells])
    with _figure(theme) as (figure, axes):
        colors = _colors(names, theme)
        ticks = _ordered([at[0] for at in cells])
        numeric = all(map(is_real, ticks))
        for i, name in enumerate(names):
            own = [(at[0], cell) for at, cell in cells.items() if not hue or at[1] == name]
            own.sort(key=lambda pair: ticks.index(pair[0]))
            places = [place if numeric else ticks.index(place) for place, _ in own]
            axes.errorbar(
                places,
                [cell["mean"] for _, cell in own],
                [0.0 if math.isnan(cell["stderr"]) else cell["stderr"] for _, cell in own],
                color=colors[i],
                marker=MARKERS[i % len(MARKERS)],
                capsize=3,
                linewidth=1.4,
                markersize=5,
            )
        if numeric:
            _log_if_wide(axes, "x", np.asarray(ticks, float), ticks)
        else:
            axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axes.set(xlabel=_words(x), ylabel=_words(metric.removeprefix("-")))
        _note(axes, _best_of(others))
        _legend(axes, hue, names, colors, markers=True)
    return figure


def plot_heatmap(
    result: SweepResult, *, metric: str = "loss", x: str = "lr", y: str = "rank", theme: str = "light"
) -> Any:
    """Draws the final score over two entries: means over seeds, with the best cell framed.

    Args:
      result: the result of `lorax_fn.sweep`.
      metric: the name of a score; with a leading ``"-"``, higher is better.
      x: the entry along the columns.
      y: the entry along the rows.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A `matplotlib.figure.Figure`. Cells whose lanes diverged are hatched; cells without lanes are empty.

    Raises:
      LoraError: matplotlib is not installed, or there is no such score, entry or theme.

    Example:
      >>> import lorax_fn as lx
      >>> figure = lx.report.plot_heatmap(result, x="lr", y="rank")  # doctest: +SKIP
    """
    _check_entries(result, x, y)
    cells, others = best_cells(result, metric, (x, y))
    columns, rows = (_ordered([at[i] for at in cells]) for i in (0, 1))
    grid = np.full((len(rows), len(columns)), np.nan)
    for (column, row), cell in cells.items():
        grid[rows.index(row), columns.index(column)] = cell["mean"]
    sign = -1.0 if metric.startswith("-") else 1.0
    with _figure(theme) as (figure, axes):
        from matplotlib.patches import Rectangle

        shown = axes.imshow(grid, aspect="auto", origin="lower", cmap="viridis" if sign < 0 else "viridis_r")
        middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)]) if np.isfinite(grid).any() else 0.0
        for i, j in np.ndindex(*grid.shape):
            value = grid[i, j]
            if math.isfinite(value):
                light = (value < middle) == (sign > 0)  # both maps are yellow at the better end
                axes.text(
                    j,
                    i,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    color="#000" if light else "#fff",
                    fontsize=8,
                )
            elif (columns[j], rows[i]) in cells:
                frame = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
                frame.set_edgecolor(THEMES[theme]["faint"])
                axes.add_patch(frame)
        if np.isfinite(grid).any():
            i, j = np.unravel_index(np.nanargmin(sign * grid), grid.shape)
            axes.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, linewidth=2.5, edgecolor=COLORS[1])
            )
        axes.set_xticks(range(len(columns)), [_short(value) for value in columns])
        axes.set_yticks(range(len(rows)), [_short(value) for value in rows])
        axes.grid(False)
        axes.set(xlabel=_words(x), ylabel=_words(y))
        _note(axes, _best_of(others))
        bar = figure.colorbar(shown, ax=axes)
        bar.set_label(_words(metric.removeprefix("-")))
    return figure


def plot_spectra(lora: Mapping[str, Adapter], *, theme: str = "light") -> Any:
    """Draws the singular values of each ``dW``, largest first, with its entropy rank.

    Args:
      lora: adapters by path, such as ``result.lora(3)``. Each stack entry gets its own line.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A `matplotlib.figure.Figure`: left the singular values, right the effective rank of each weight.

    Raises:
      LoraError: matplotlib is not installed, or no adapter has a low-rank dW.

    Example:
      >>> import lorax_fn as lx
      >>> figure = lx.report.plot_spectra(lora)  # doctest: +SKIP
    """
    spectra = effective_rank(dict(lora))
    if not spectra:
        raise error(
            "no adapter has singular values to draw.",
            got=f"{len(lora)} adapters",
            want="adapters with a low-rank dW",
            do="plot_spectra(result.lora(0)).",
        )
    names = list(spectra)
    with _figure(theme, columns=2, width=9.6, height=max(4.0, 1.2 + 0.22 * len(names))) as (
        figure,
        (left, right),
    ):
        colors = _colors(list(range(len(names))), theme)
        for name, color in zip(names, colors, strict=True):
            values = np.asarray(spectra[name].values)
            for line in values.reshape(-1, values.shape[-1]):
                if (line > 0).any():
                    kept = line[line > 1e-7 * line.max()]
                    left.plot(np.arange(1, len(kept) + 1), kept, color=color, marker=".", linewidth=1.0)
        left.set(xlabel="index", ylabel="singular value of dW", yscale="log")
        left.xaxis.get_major_locator().set_params(integer=True)
        means = [float(np.mean(np.asarray(spectra[name].entropy))) for name in names]
        right.barh(range(len(names)), means, color=colors)
        right.set_yticks(range(len(names)), _shortened(names), fontsize=7)
        right.invert_yaxis()
        right.grid(False, axis="y")
        right.set(xlabel="effective rank (entropy)")
    return figure


def best_cells(
    result: SweepResult, metric: str, names: Sequence[str]
) -> tuple[dict[tuple, dict[str, Any]], list[str]]:
    """The best mean over seeds for each combination of some entries, and the other entries that vary."""
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    check_metric(result.final(), name)
    others = [n for n in _varying(result) if n not in (*names, "seed", "name")]
    cells: dict[tuple, dict[str, Any]] = {}
    for row in result.means(name, by=[*names, *others]):
        at = tuple(row[n] for n in names)
        if at not in cells or not sign * cells[at]["mean"] <= sign * row["mean"]:
            if at not in cells or not math.isnan(row["mean"]):
                cells[at] = row
    return cells, others


def _best_of(others: Sequence[str]) -> str:
    return f"each at its best {' and '.join(map(_words, others))}" if others else ""


def _varying(result: SweepResult) -> list[str]:
    rows = result.final()
    return [n for n in result.entries(skip=("seed", "name")) if len({str(r.get(n)) for r in rows}) > 1]


def _by_lane(result: SweepResult) -> list[dict]:
    last = {record["lane"]: record for record in result.final()}
    return [last.get(i, {}) for i in range(len(result.lanes))]


def _ordered(values: Sequence[Any]) -> list:
    """The distinct values, sorted if all of them are numbers."""
    seen = list(dict.fromkeys(values))
    return sorted(seen) if all(map(is_real, seen)) else seen


def _check_entries(result: SweepResult, *names: str | None) -> None:
    for name in names:
        if name is not None and name not in result.entries():
            raise _unknown("entry of the lanes", name, result.entries())


def _unknown(what: str, got: str, known: Any) -> Exception:
    return error(f"there is no such {what}.", got=repr(got), want=f"one of {list(known)}", do="choose one.")


@contextlib.contextmanager
def _figure(
    theme: str, columns: int = 1, width: float = 6.4, height: float = 4.0
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in one of the themes, without a window or global state of pyplot."""
    if theme not in THEMES:
        raise _unknown("theme", theme, THEMES)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise error(
            "pictures need matplotlib.", got="no module matplotlib", do='pip install "lorax_fn[plot]".'
        ) from None
    look = THEMES[theme]
    settings: dict[Any, Any] = {
        name: look["ink"] for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    }
    settings |= {
        "axes.edgecolor": look["faint"],
        "grid.color": look["faint"],
        "figure.facecolor": look["paper"],
        "axes.facecolor": look["paper"],
        "savefig.facecolor": look["paper"],
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.6,
        "font.size": 10,
        "svg.hashsalt": "lorax_fn",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, columns)


def _colors(names: Sequence[Any], theme: str) -> list:
    """Distinct colors, but ordered shades for numbers or for more names than there are distinct colors."""
    if len(names) > 1 and (all(map(is_real, names)) or len(names) > len(COLORS)):
        import matplotlib

        look = THEMES[theme]
        return list(matplotlib.colormaps["viridis"](np.linspace(look["from"], look["to"], len(names))))
    return [COLORS[i % len(COLORS)] for i in range(len(names))]


def _legend(
    axes: Any, hue: str | None, names: Sequence[Any], colors: Sequence[Any], *, markers: bool
) -> None:
    if hue is None:
        return
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=color, marker=MARKERS[i % len(MARKERS)] if markers else None)
        for i, color in enumerate(colors)
    ]
    axes.legend(
        lines,
        [_short(name) for name in names],
        title=_words(hue),
        fontsize=8,
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )


def _log_if_wide(axes: Any, which: str, values: Any, ticks: Sequence[Any] | None = None) -> None:
    """Uses a log axis for positive numbers that span a factor of eight, and up to ten ``ticks`` on it."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not finite.size or finite.min() <= 0 or finite.max() < 8 * finite.min():
        return
    getattr(axes, f"set_{which}scale")("log")
    if ticks is not None and len(ticks) <= 10:
        axis = getattr(axes, f"{which}axis")
        axis.set_ticks(ticks, [_short(tick) for tick in ticks])
        axis.set_ticks([], minor=True)


def _note(axes: Any, text: str) -> None:
    if text:
        axes.set_title(text, fontsize=9, loc="left")


def _words(name: str) -> str:
    return {"lr": "learning rate", "grad_norm": "gradient norm"}.get(name, name.replace("_", " "))


def _short(value: Any) -> str:
    return f"{value:.3g}" if is_real(value) else str(value)


def _shortened(names: Sequence[str]) -> list[str]:
    """The paths without the components with which all of them begin."""
    first = [name.split("/") for name in names]
    same = 0
    while len(names) > 1 and all(len(p) > same + 1 and p[same] == first[0][same] for p in first):
        same += 1
    return ["/".join(parts[same:]) for parts in first]
