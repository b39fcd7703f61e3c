"""One self-contained HTML page of a sweep: figures, sortable tables, settings, versions and machine."""

import base64
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lorax_fn.core.adapters import is_real
from lorax_fn.report.plots import _varying, plot_curves, plot_heatmap, plot_metric
from lorax_fn.sweeps.results import SweepResult

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d0d7de; --paper: #fff;
  --row: #f6f8fa; --mark: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --row: #151b23; --mark: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: .875rem; color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-height: 36rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; } th[scope=row] { width: 12rem; } td.text { white-space: normal; }
thead th { position: sticky; top: 0; background: var(--row); padding: 0; }
thead button { all: unset; box-sizing: border-box; cursor: pointer; padding: .4rem .75rem; display: block;
  width: 100%; }
thead button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after {
  content: " \\2193"; }
tbody tr:nth-child(even) { background: var(--row); } tr.best td { font-weight: 600; color: var(--mark); }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sorts')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    const key = row => { const text = row.cells[column].dataset.value, number = Number(text);
      return text === '' ? null : Number.isNaN(number) ? text : number; };
    const rows = [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      const numbers = typeof x === 'number' && typeof y === 'number';
      const order = numbers ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order; });
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    body.append(...rows);
  }));
}
"""


def page(
    result: SweepResult, path: str | os.PathLike[str], *, title: str = "Sweep", metric: str = "loss"
) -> None:
    """Writes a sweep as one self-contained HTML page, light or dark like the reader's system.

    Args:
      result: the result of `lorax_fn.sweep`.
      path: the file to write.
      title: the heading.
      metric: the score that figures show and that decides the best lane; with a leading ``"-"``, higher is
        better.

    Raises:
      LoraError: matplotlib is not installed, or no record has the score.

    Example:
      >>> import lorax_fn as lx
      >>> lx.report.page(result, "sweep.html")  # doctest: +SKIP
    """
    name = metric.removeprefix("-")
    best = result.best(metric)
    varying = _varying(result)
    figures = []
    if result.curves:  # a result that was read from its file has none
        figures.append(_figure("Training loss of each lane.", lambda theme: plot_curves(result, theme=theme)))
    numbers = [n for n in varying if all(is_real(r.get(n)) for r in result.final())]
    words = [n for n in varying if n not in numbers]
    for x in numbers[:2]:
        hue = next((n for n in [*words, *numbers] if n != x), None)
        drawn = _metric(result, metric, x, hue)
        figures.append(_figure(f"{name} against {x}: means over seeds, with standard errors.", drawn))
    if len(varying) > 1:
        x = "lr" if "lr" in varying else varying[-1]
        y = next(n for n in varying if n != x)

        def heatmap(theme):
            return plot_heatmap(result, metric=metric, x=x, y=y, theme=theme)

        figures.append(_figure(f"{name} over {x} and {y}; the best cell is framed.", heatmap))
    means = [
        {n: row[n] for n in row if n not in ("mean", "stderr", "n")}
        | {f"mean {name}": row["mean"], "standard error": _or_none(row["stderr"]), "lanes": row["n"]}
        for row in result.means(name)
    ]
    done = "" if result.finished else " It was interrupted; this is what was done."
    setting = {n: value for n, value in best.items() if n in varying}
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{len(result.lanes)} lanes, {result.config.get("steps", "?")} steps each.{done}
Best {html.escape(name)}: <strong>{_shown(best.get(name))}</strong> in lane {best["lane"]}
({html.escape(", ".join(f"{n} {_shown(v)}" for n, v in setting.items()) or "the only configuration")}).</p>
<p class="soft">{html.escape(_machine(result.config))}</p>
<h2>Figures</h2><div class="figures">{"".join(figures)}</div>
<h2>Configurations</h2>{_table(means, None)}
<h2>Lanes</h2>{_table(result.final(), best["lane"])}
<h2>What ran</h2>{_facts(result.config)}
<script>{SCRIPT}</script></body></html>
"""
    pathlib.Path(path).write_text(text, "utf-8")


def _metric(result: SweepResult, metric: str, x: str, hue: str | None) -> Callable[[str], Any]:
    return lambda theme: plot_metric(result, metric=metric, x=x, hue=hue, theme=theme)


def _figure(caption: str, draw: Callable[[str], Any]) -> str:
    """A picture for each theme, of which the browser shows the one that the reader's system prefers."""
    light, dark = (_data(draw(theme)) for theme in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(caption)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _table(rows: Sequence[dict], best: int | None) -> str:
    """A table that is sorted by clicking on a column; numbers are sorted by their unrounded values."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    textual = {n for n in names if any(isinstance(row.get(n), str) for row in rows)}

    def cell(name, value):
        raw = "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
        kind = ' class="text"' if name in textual else ""
        return f'<td{kind} data-value="{html.escape(raw)}">{html.escape(_shown(value))}</td>'

    head = "".join(
        f'<th scope="col"{" class=text" if n in textual else ""}><button>{html.escape(n)}</button></th>'
        for n in names
    )
    body = "".join(
        f"<tr{' class=best' if best is not None and row.get('lane') == best else ''}>"
        + "".join(cell(name, row.get(name)) for name in names)
        + "</tr>"
        for row in rows
    )
    table = f'<table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _facts(config: dict[str, Any]) -> str:
    """The configuration as a table, without the lists that are shown above or are only for programs."""
    kept = {name: value for name, value in config.items() if name not in ("lanes", "base", "sweep")}
    rows = "".join(
        f'<tr><th scope="row" class="text">{html.escape(name)}</th><td class="text">'
        f"{html.escape(_words(value))}</td></tr>"
        for name, value in kept.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items()) or "–"
    return value if isinstance(value, str) else json.dumps(value) if value not in ([], None) else "–"


def _or_none(x: float) -> float | None:
    """None for the standard error of one lane, which is not a number."""
    return x if math.isfinite(x) else None


def _machine(config: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
    return " · ".join(
        str(x) for x in (config.get("date"), config.get("machine"), config.get("device"), versions) if x
    )


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and not math.isfinite(value):
        return "diverged" if math.isnan(value) else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
