"""Do the variants differ once each has its own learning rate? Nine of them, seven rates, three seeds.

    python examples/ablation/variants.py

All have rank 8 and the scale 2, but for rsLoRA (alpha / sqrt(rank)) and VeRA (rank 64, rates ten times
higher). LoRA-GA sees the gradient of 32 training sentences, EVA the inputs of as many.
"""

import functools

import jax
import numpy as np
import optax
import study
from models import minilm

import lorax_fn as lx

NAME, SEEDS = "variants", range(3)
HIGH = tuple(10 * rate for rate in study.RATES)


def few() -> list[study.Sentences]:
    train, _ = study.sentences(study.DOMAIN)
    return [{name: x[i : i + 16] for name, x in train.items()} for i in (0, 16)]


def eva():
    return lx.inits.eva(lambda params, batch: minilm.logits(params, batch["ids"], batch["mask"]), few())


def lora_ga():
    def loss(params, batch):
        return study.loss_of(minilm.logits(params, batch["ids"], batch["mask"]), batch)

    return lx.inits.lora_ga(loss, few())


VARIANTS = {
    "LoRA": dict,
    "rsLoRA": lambda: {"scaling": "rslora"},
    "DoRA": lambda: {"method": "dora"},
    "PiSSA": lambda: {"init": "pissa"},
    "OLoRA": lambda: {"init": "olora"},
    "EVA": lambda: {"init": eva()},
    "LoRA-GA": lambda: {"init": lora_ga()},
    "LoRA+": dict,
    "VeRA": lambda: {"method": "vera", "rank": 64},
}


@functools.cache
def rates(name: str) -> tuple[float, ...]:
    return HIGH if name == "VeRA" else study.RATES


def result(name: str):
    """The sweep of one variant."""
    lanes = [{"lr": rate, "seed": seed} for seed in SEEDS for rate in rates(name)]
    given = {"rank": 8, "alpha": 16.0, "targets": "layer_*", **VARIANTS[name]()}
    if name == "VeRA":  # which has no scale
        del given["alpha"]
    tx = (
        (lambda lane: lx.optim.loraplus(lane["lr"]))
        if name == "LoRA+"
        else (lambda lane: optax.adam(lane["lr"]))
    )
    label = name.lower().replace("+", "plus").replace("-", "_")
    return study.sweep(f"{NAME}-{label}", lanes, split=given, tx=tx, lanes_per_program=21)


def run() -> None:
    rows = []
    for name in VARIANTS:
        rows += study.rows_of(result(name), variant=name)
        jax.clear_caches()
        study.save(NAME, rows, f"python examples/ablation/{NAME}.py", batch=study.BATCH, steps=study.STEPS)


def show() -> None:
    found = {key[0]: rows for key, rows in study.grouped(study.load(NAME), "variant").items()}
    shared, lora = study.at_best(found["LoRA"])
    made, (left, right) = study.figure(2, height=3.2)
    lines = []
    for i, (name, rows) in enumerate(found.items()):
        same = sorted((row for row in rows if row["lr"] == shared), key=lambda row: row["seed"])
        rate, own = study.at_best(rows)
        fit = study.best(rows)
        cells = []
        for axes, some in ((left, same), (right, own)):
            mean, error = study.mean_and_error([row["loss"] for row in some])
            axes.errorbar([mean], [i], xerr=[2 * error], marker="o", color=study.COLORS[i], capsize=3)
            cells.append(study.spread(mean, error))
        difference = study.spread(*study.gap(own, lora)) if name != "LoRA" else "0"
        lines.append([name, cells[0], f"{rate:.1e}", cells[1], difference, study.rate(fit)])
    left.set_title(f"one rate for all, {shared:.0e}", fontsize=9)
    right.set_title("each at its best rate", fontsize=9)
    for axes in (left, right):
        axes.set_yticks(np.arange(len(found)), list(found))
        axes.margins(y=0.12)
        axes.invert_yaxis()
        axes.set_xlabel("held-out loss, two standard errors")
    study.draw(made, NAME)
    head = [
        "variant",
        f"loss at {shared:.1e}",
        "best rate tried",
        "loss there",
        "minus LoRA",
        "best rate, fitted",
    ]
    study.publish(NAME, head, lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, list(VARIANTS))
