"""Draws `results/*.json` as pictures, and writes them as tables into docs/benchmarks.md.

    python benchmarks/draw.py             # needs matplotlib
    python benchmarks/draw.py --tables    # the tables alone

A table stands in the page between ``<!-- name -->`` and ``<!-- end -->``; what stands there is replaced.
"""

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import results
from peers import compiling_table, counting_table, replay_table
from step import spread, table, with_quartiles
from tricks import added_table

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "pictures"
HAND, ADAPT = "by hand", "lx.adapt"
OWN, OTHER, GRAY = "#3f51b5", "#90a4ae", "#455a64"
PEERS = {
    "a": ["peers_a_plain", "peers_a_libraries"],
    "b": ["peers_b"],
    "c": ["peers_c"],
    "d": ["peers_d"],
    "e": ["peers_e"],
}
GPU = {"gpu_a": ["gpu_peers_a_tf32"], "gpu_a_bfloat16": ["gpu_peers_a_more_bfloat16_batch64"]}
TITLES = {
    "a": "4 layers, 8 x 128 tokens: one AdamW step",
    "b": "12 layers, scanned and checkpointed: one AdamW step",
    "c": "MiniLM, real weights, 32 x 64 tokens: one AdamW step",
    "d": "SmolLM2-135M, real weights, 4 x 128 tokens: one AdamW step",
    "e": "Decoding one token through 4 layers",
}


def runs(block: str) -> list[dict]:
    """The committed runs of a block of `peers.py`."""
    return [results.load(name) for name in {**PEERS, **GPU}[block]]


def peer_rows(block: str) -> list[dict]:
    """Each way once, with its ratios to the references of its own run."""
    rows: dict[str, dict] = {}
    for run in runs(block):
        by_name = {row["name"]: row for row in run["rows"]}
        for name, row in by_name.items():
            relative = {of: np.divide(row["seconds"], by_name[of]["seconds"]) for of in (HAND, ADAPT)}
            build = [sum(statistics.median(r[part]) for part in ("trace", "compile")) if r["trace"] else None
                     for r in (row, by_name[HAND])]  # fmt: skip
            counts = {
                of: row[of] / by_name[HAND][of]
                for of in ("flops", "temp bytes")
                if of in row and by_name[HAND].get(of)
            }
            rows.setdefault(name, {**row, "relative": relative, "build": build, "counts": counts})
    return sorted(rows.values(), key=lambda row: float(np.median(row["relative"][HAND])))


def milliseconds(seconds: list[float]) -> str:
    middle = 1e3 * statistics.median(seconds)
    return f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}" if middle >= 5 else f"{middle:.2f}"


def shown(name: str) -> str:
    """The name of a way, in bold if it is ours."""
    return f"**{name}**" if name.startswith(ADAPT) else name


def peers_table(block: str) -> str:
    lines = [["", "ms", "time / by hand", "time / lx.adapt", "FLOPs / by hand", "MB accessed", "temp MB",
              "temp / by hand", "trace + compile, s", "trained"]]  # fmt: skip
    for row in peer_rows(block):
        ours = row["build"][0]
        lines.append([
            shown(row["name"]),
            milliseconds(row["seconds"]),
            spread(row["relative"][HAND]), spread(row["relative"][ADAPT]),
            f"{row['counts']['flops']:.4f}" if "flops" in row["counts"] else "-",
            f"{row['bytes accessed'] / 1e6:.0f}" if "bytes accessed" in row else "-",
            f"{row['temp bytes'] / 1e6:.1f}" if "temp bytes" in row else "-",
            f"{row['counts']['temp bytes']:.3f}" if "temp bytes" in row["counts"] else "-",
            f"{ours:.2f}" if ours else "-",
            f"{row['trainable']:,}" if row["trainable"] else "-",
        ])  # fmt: skip
    failed = {name: why for run in runs(block) for name, why in run["not timed"].items()}
    text = table(lines)
    if failed:
        text += "\n\nNot timed, with the error as found:\n\n"
        text += "\n".join(f"- {name}: `{why.replace('`', chr(39))}`" for name, why in sorted(failed.items()))
    return text


def machine_line(run: dict) -> str:
    versions = sorted((name, version) for name, version in run["versions"].items() if name != "jaxlib")
    line = f"{run['date']}, {run['machine']}; {', '.join(map(' '.join, versions))}."
    if products := run.get("products of float32"):  # said where they may be in TF32
        line += f" Products of float32 in {products}."
    return line + (" Freed memory kept." if run.get("freed memory") else "")


def memory_table() -> str:
    """Steps of block a in memory that is kept, and in memory that comes from the system anew."""
    kept, fresh = (
        {row["name"]: row["seconds"] for row in results.load(f"peers_a_plain{which}")["rows"]}
        for which in ("", "_fresh")
    )
    lines = [["", "kept, ms", "fresh, ms", "kept: time / by hand", "fresh: time / by hand"]]
    for name in sorted(kept, key=lambda name: statistics.median(kept[name])):
        of_hand = [spread(np.divide(run[name], run[HAND])) for run in (kept, fresh)]
        lines.append([shown(name), milliseconds(kept[name]), milliseconds(fresh[name]), *of_hand])
    return table(lines)


def figures_table(name: str) -> str:
    figures = results.load(name)["figures"]
    return table([["", "measured"], *([what, f"{value:.4g}"] for what, value in figures.items())])


def scaling_table() -> str:
    texts = []
    for what, rows in results.load("scaling")["figures"].items():
        lines = [[what, "time", "FLOPs", "on paper"]]
        for row in rows:
            low, high = row["quartiles"]
            paper = f"{row['on paper']:.3f}" if "on paper" in row else "-"
            time = with_quartiles(low, row["time"], high)
            lines.append([str(row["at"]), time, f"{row['flops']:.3f}", paper])
        texts.append(table(lines))
    return "\n\n".join(texts)


def qlora_table() -> str:
    run = results.load("qlora")
    by_name = {row["name"]: row for row in run["rows"]}
    lines = [
        [
            "weights",
            "ms / step",
            "/ float32 of the same library",
            "weights, MB",
            "temp MB",
            "to unpack, ns per weight",
        ]
    ]
    for name, row in by_name.items():
        base = by_name["torch float32" if name.startswith("torch") else "float32"]
        lines.append([
            name, f"{1e3 * statistics.median(row['seconds']):.1f}",
            spread(np.divide(row["seconds"], base["seconds"])), f"{row['weight bytes'] / 1e6:.1f}",
            f"{row['temp bytes'] / 1e6:.1f}" if "temp bytes" in row else "-",
            f"{row['ns per weight']:.3f}" if row.get("ns per weight") else "-",
        ])  # fmt: skip
    return table(lines)


def tpu_table(name: str) -> str:
    """A table of `tpu_peers.py`, in the order of bytes accessed."""
    rows = results.load("tpu_peers")["tables"][name]
    lines = [["", "GFLOP", "/ by hand", "MB accessed", "/ by hand", "temp MB", "/ by hand"]]
    for row in sorted(rows.values(), key=lambda row: row["bytes accessed"]):
        cells = [f"**{row['name']}**" if row["name"] == ADAPT else row["name"]]
        for of, unit in (("flops", 1e9), ("bytes accessed", 1e6), ("temp bytes", 1e6)):
            cells += [f"{row[of] / unit:.1f}", f"{row[of] / rows[HAND][of]:.3f}"]
        lines.append(cells)
    return table(lines)


def barrier_table() -> str:
    lines = [["on a GPU", "", "ms", "time / by hand", "copies", "MB accessed", "temp MB"]]
    for program, rows in results.load("gpu_barrier")["programs"].items():
        for row in rows:
            name = f"**{ADAPT}**" if row["name"] == ADAPT else row["name"]
            counts = [f"{row[of]:,}" for of in ("copies", "MB accessed", "temp MB")]
            time = with_quartiles(*row["time / by hand"])
            lines.append([program, name, f"{row['ms']:.2f}", time, *counts])
    return table(lines)


def tricks_table() -> str:
    lines = [["block", "", "time / h kept", "FLOPs / h kept", "temp / h kept"]]
    for block, rows in results.load("tricks")["blocks"].items():
        kept = rows[0]
        for row in rows[1:]:
            counts = [f"{row[of] / kept[of]:.4f}" for of in ("flops", "temp bytes")]
            lines.append([block, row["name"], spread(np.divide(row["seconds"], kept["seconds"])), *counts])
    return table(lines)


def guards_table() -> str:
    committed = results.load("guards")
    version = max(committed)
    lines = [["program", "FLOPs", "bytes accessed", "temp bytes", "lines lowered"]]
    for name, row in committed[version].items():
        if "flops" in row:
            lines.append(
                [name, *(f"{row[of]:,.0f}" for of in ("flops", "bytes accessed", "temp bytes", "lines"))]
            )
    return table(lines)


TABLES = {
    **{f"peers_{block}": lambda block=block: peers_table(block) for block in PEERS},
    **{f"{name}_run": lambda name=name: machine_line(results.load(name)) for name in
       ("peers_a_plain", "peers_a_libraries", "peers_b", "peers_c", "peers_d", "peers_e",
        "startup", "scaling", "qlora")},
    **{f"peers_{name}": lambda name=name: peers_table(name) for name in GPU},
    "gpu_run": lambda: machine_line(results.load("gpu_peers_a_tf32")),
    "gpu_bfloat16_run": lambda: machine_line(results.load("gpu_peers_a_more_bfloat16_batch64")),
    "gpu_barrier": barrier_table,
    "gpu_barrier_run": lambda: machine_line(results.load("gpu_barrier")),
    "memory": memory_table,
    "startup": lambda: figures_table("startup"),
    "scaling": scaling_table,
    "qlora": qlora_table,
    "guards": guards_table,
    "tricks": tricks_table,
    "tricks_alone": lambda: added_table(results.load("tricks_alone")["seconds"]),
    "tricks_alone_d": lambda: added_table(results.load("tricks_alone_d")["seconds"]),
    "compiling": lambda: compiling_table(results.load("peers_compiling")),
    "replayed": lambda: replay_table(results.load("peers_compiling")["e"]["seconds"]),
    "counting": lambda: counting_table(results.load("peers_counting")),
    "tpu_a": lambda: tpu_table("a, bfloat16"),
    "tpu_b": lambda: tpu_table("b, bfloat16"),
}  # fmt: skip


def filled(page: str) -> str:
    """The page with the table of each marker whose results are committed."""

    def put(match: re.Match) -> str:
        try:
            return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
        except FileNotFoundError:  # not run yet: what stands there stays
            return match[0]

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


# Pictures ---------------------------------------------------------------------------------------------


def saved(figure: Any, name: str) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = name  # the same figures give the same file
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def draw_peers(block: str) -> None:
    """Bars of time relative to LoRA by hand, with quartiles; shorter is faster."""
    import matplotlib.pyplot as plt

    rows = peer_rows(block)
    figure, axis = plt.subplots(figsize=(7.5, 0.27 * len(rows) + 0.9))
    ratios = [np.percentile(row["relative"][HAND], [25, 50, 75]) for row in rows]
    middle = [r[1] for r in ratios]
    errors = [[r[1] - r[0] for r in ratios], [r[2] - r[1] for r in ratios]]
    colors = [OWN if row["name"].startswith(ADAPT) else OTHER for row in rows]
    bars = {"color": colors, "height": 0.7, "error_kw": {"ecolor": GRAY, "elinewidth": 1}}
    axis.barh(range(len(rows)), middle, xerr=errors, **bars)
    for at, ratio in enumerate(ratios):
        place = ratio[2] + 0.012 * max(middle)
        axis.text(place, at, f"{ratio[1]:.2f}", va="center", fontsize=8, color=GRAY)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color=GRAY, linewidth=0.8, linestyle=":")
    axis.set_title(TITLES[block], fontsize=9, loc="left")
    axis.set_xlim(0, 1.12 * max(r[2] for r in ratios))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("time / LoRA by hand", fontsize=8)
    figure.tight_layout()
    saved(figure, f"peers_{block}")


def draw_scaling() -> None:
    import matplotlib.pyplot as plt

    figures = results.load("scaling")["figures"]
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8))
    against = {"rank": "rank", "tokens": "tokens", "layers": "layers"}
    for axis, (what, label) in zip(axes, against.items(), strict=False):
        rows = figures[what]
        at = [row["at"] for row in rows]
        spreads = np.array([row["quartiles"] for row in rows])
        middle = np.array([row["time"] for row in rows])
        axis.plot(at, [row["on paper"] for row in rows], color=GRAY, linewidth=1, label="on paper")
        axis.plot(at, [row["flops"] for row in rows], "x", color=GRAY, label="FLOPs")
        axis.errorbar(
            at, middle, yerr=np.abs(spreads.T - middle), fmt="o", color=OWN, markersize=4, label="time"
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(x) for x in at])
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylim(0, 1.45)
    axes[0].set_ylabel("LoRA / full fine-tuning", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    for what, color, label in (
        ("adapters in a batch", OWN, "adapters in a batch"),
        ("lanes", OTHER, "lanes, per lane"),
    ):
        rows = figures[what]
        spreads = np.array([row["quartiles"] for row in rows])
        middle = np.array([row["time"] for row in rows])
        style = {"fmt": "o-", "color": color, "markersize": 4, "linewidth": 1, "label": label}
        axes[3].errorbar([row["at"] for row in rows], middle, yerr=np.abs(spreads.T - middle), **style)
    axes[3].set_xscale("log", base=2)
    at = [row["at"] for row in figures["adapters in a batch"]]
    axes[3].set_xticks(at, [str(x) for x in at])
    axes[3].set_ylabel("time / one adapter", fontsize=8)
    axes[3].set_xlabel("how many", fontsize=8)
    axes[3].set_ylim(0, 1.45)
    axes[3].legend(fontsize=7, frameon=False)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    saved(figure, "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only the tables")
    args = parser.parse_args()
    if not args.tables:
        import matplotlib

        matplotlib.use("svg")
        for block in PEERS:
            draw_peers(block)
        draw_scaling()
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
