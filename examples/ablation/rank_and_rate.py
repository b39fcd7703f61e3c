"""Does the best learning rate depend on the rank? Ranks x scalings x learning rates x seeds, one frozen base.

    python examples/ablation/rank_and_rate.py            # then --draw: the figure again, from the records
    python examples/ablation/rank_and_rate.py --model smollm2
    python examples/ablation/rank_and_rate.py --model vit

Of each scaling and rank, the held-out loss after the last step against the learning rate is fitted by a
parabola in its logarithm, with a bootstrap over seeds; the slope of the optima against the rank comes with an
interval too. All scalings have the scale 2 at rank 16, where they are one and the same run.
"""

import images
import next_token
import numpy as np
import study

import lorax_fn as lx

NAME = "rank_and_rate"
RANKS, SHARED, SEEDS = (1, 4, 16, 64), 16, range(3)
SCALINGS = {
    "alpha / r": lambda r: {"scaling": "lora", "alpha": 2.0 * SHARED},
    "alpha / sqrt(r)": lambda r: {"scaling": "rslora", "alpha": 2.0 * SHARED**0.5},
    "constant": lambda r: {"scaling": "lora", "alpha": 2.0 * r},
}
MODELS = ("minilm", "smollm2", "vit")
RATES = {  # half a decade apart
    model: [float(f"{10**x:.3g}") for x in lowest + np.arange(0, 3.1, 0.5)]
    for model, lowest in zip(MODELS, (-5, -4, -4.5), strict=True)
}
SWEEPS = {"minilm": study.sweep, "smollm2": next_token.sweep, "vit": images.sweep}
FACTS = {"minilm": lambda: {"batch": study.BATCH}, "smollm2": next_token.facts, "vit": images.facts}


def result(rank: int, model: str = MODELS[0]):
    """The sweep of one rank."""
    schemes = list(SCALINGS)[:1] if rank == SHARED else SCALINGS
    lanes = [
        {"name": scheme, "rank": rank, **SCALINGS[scheme](rank), "lr": rate, "seed": seed}
        for scheme in schemes
        for rate in RATES[model]
        for seed in SEEDS
    ]
    return SWEEPS[model](f"{study.named(NAME, model)}-{rank}", lanes, lanes_per_program=21)


def run(model: str) -> None:
    rows = [row for rank in RANKS for row in study.rows_of(result(rank, model), "name", "rank", "alpha")]
    command = study.command(NAME, model)
    study.save(study.named(NAME, model), rows, command, steps=study.STEPS, **FACTS[model]())


def optima(model: str) -> dict[str, list[tuple[lx.sweeps.Optimum, float]]]:
    """Of each scaling, the best learning rate at each rank, and the loss at the best one that was tried."""
    found = study.grouped(study.load(study.named(NAME, model)), "name", "rank")
    shared = found[next(iter(SCALINGS)), SHARED]
    chosen = {scheme: [shared if r == SHARED else found[scheme, r] for r in RANKS] for scheme in SCALINGS}
    return {
        scheme: [(study.best(some), study.lowest(some)) for some in rows] for scheme, rows in chosen.items()
    }


def show(model: str) -> None:
    from matplotlib import ticker

    made, (left, right) = study.figure(2)
    rows = []
    for i, (scheme, pairs) in enumerate(optima(model).items()):
        found, losses = [one for one, _ in pairs], [loss for _, loss in pairs]
        slope, low, high = lx.sweeps.slope(RANKS, found)
        cells = [f"{study.rate(one)}<br>{loss:.4f}" for one, loss in pairs]
        rows.append([scheme, *cells, f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]"])
        x = np.asarray(RANKS) * 1.05 ** (i - 1)
        errors = [[one.x - one.low for one in found], [one.high - one.x for one in found]]
        label = f"{scheme}: slope {slope:.2f} [{low:.2f}, {high:.2f}]"
        style = {"marker": "o", "color": study.COLORS[i]}
        left.errorbar(x, [one.x for one in found], np.maximum(errors, 0.0), capsize=3, label=label, **style)
        right.plot(x, losses, label=scheme, **style)
    left.set(yscale="log", ylabel="best learning rate")
    right.set(ylabel="held-out loss at the best rate")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="rank")
        axes.set_xticks(RANKS, list(map(str, RANKS)))
        axes.minorticks_off()
    left.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:.0e}"))
    left.legend()
    study.draw(made, study.named(NAME, model))
    study.publish(study.named(NAME, model), ["scale", *(f"rank {rank}" for rank in RANKS), "slope"], rows)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, RANKS, MODELS)
