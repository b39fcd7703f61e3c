"""The best rate of LoRA against that of full fine-tuning, and against the batch size at 640 examples.

    python examples/ablation/batch_and_full.py

LoRA has rank 8 and the scale 2 on all weights of the layers. A batch of 4 takes 160
steps, one of 64 takes 10.
"""

import jax
import numpy as np
import study
import table

import lorax_fn as lx

NAME, BATCHES, EXAMPLES = "batch_and_full", (4, 16, 64), study.BATCH * study.STEPS


PARTS = [f"{way}-{batch}" for way in ("LoRA", "full") for batch in BATCHES]


def result(part: str):
    """The sweep of a way and a batch size, ``"LoRA-4"``."""
    way, batch = part.split("-")
    return table.result(way, int(batch), EXAMPLES // int(batch))


def run() -> None:
    rows = []
    for way in ("LoRA", "full"):
        for batch in BATCHES:
            rows += study.rows_of(result(f"{way}-{batch}"), way=way, batch=batch)
            jax.clear_caches()
            study.save(NAME, rows, f"python examples/ablation/{NAME}.py", examples=EXAMPLES)


def ratio(lora: lx.sweeps.Optimum, full: lx.sweeps.Optimum) -> tuple[float, float, float]:
    """Best rate of LoRA over that of full fine-tuning, with the interval of both bootstraps."""
    low, high = np.nanquantile(lora.samples / full.samples, [0.025, 0.975])
    return lora.x / full.x, float(low), float(high)


def show() -> None:
    found = study.grouped(study.load(NAME), "way", "batch")
    optima = {at: study.best(rows) for at, rows in found.items()}
    made, (left, right) = study.figure(2)
    lines = []
    for i, way in enumerate(("LoRA", "full")):
        for j, batch in enumerate(BATCHES):
            rates, scores = study.curve(found[way, batch])
            style = {"color": study.COLORS[i], "alpha": 0.35 + 0.3 * j, "marker": "o", "markersize": 3}
            left.plot(rates, scores.mean(0), label=f"{way}, batch {batch}", **style)
        some = [optima[way, batch] for batch in BATCHES]
        slope, low, high = lx.sweeps.slope(BATCHES, some)
        lines.append([way, *map(study.rate, some), f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]"])
        errors = [[one.x - one.low for one in some], [one.high - one.x for one in some]]
        x = np.asarray(BATCHES) * 1.05 ** (i - 0.5)
        label = f"{way}: slope {slope:.2f} [{low:.2f}, {high:.2f}]"
        style = {"color": study.COLORS[i], "marker": "o", "capsize": 3}
        right.errorbar(x, [one.x for one in some], np.maximum(errors, 0.0), label=label, **style)
    ratios = [ratio(optima["LoRA", batch], optima["full", batch]) for batch in BATCHES]
    lines.append(["LoRA / full", *(f"{x:.1f} [{low:.1f}, {high:.1f}]" for x, low, high in ratios), ""])
    lines += [
        [f"loss, {way}", *(f"{study.lowest(found[way, b]):.4f}" for b in BATCHES), ""]
        for way in ("LoRA", "full")
    ]
    lowest = min(np.nanmin(study.curve(rows)[1].mean(0)) for rows in found.values())
    left.set(
        xscale="log", xlabel="learning rate", ylabel="held-out loss", ylim=(lowest - 0.01, lowest + 0.15)
    )
    left.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="batch size, at 640 examples", ylabel="best learning rate")
    right.set_xticks(BATCHES, list(map(str, BATCHES)))
    right.minorticks_off()
    right.legend()
    study.draw(made, NAME)
    study.publish(NAME, ["best rate", *(f"batch {batch}" for batch in BATCHES), "slope"], lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, PARTS)
