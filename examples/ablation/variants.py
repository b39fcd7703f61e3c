"""Do the variants differ once each has its own learning rate? Nine of them, seven rates or more, three seeds.

    python examples/ablation/variants.py
    python examples/ablation/variants.py --model vit

All have rank 8 and the scale 2, but for rsLoRA (alpha / sqrt(rank)) and VeRA (rank 64, rates ten times
higher). LoRA-GA sees the gradient of 32 training sentences or images, EVA the inputs of as many.
"""

import itertools
from collections.abc import Callable
from typing import Any

import images
import jax
import numpy as np
import optax
import study
from models import minilm

import lorax_fn as lx

NAME, SEEDS = "variants", range(3)
MODELS = ("minilm", "vit")
RATES = {"minilm": study.RATES, "vit": tuple(float(f"{10**x:.3g}") for x in np.arange(-5, -1.9, 0.25))}
SWEEPS = {"minilm": study.sweep, "vit": images.sweep}
FACTS = {"minilm": lambda: {"batch": study.BATCH}, "vit": images.facts}
FORWARDS = {"minilm": lambda params, x: minilm.logits(params, x["ids"], x["mask"]), "vit": images.logits}
LOSSES = {"minilm": study.loss_of, "vit": images.loss_of}


def few(model: str) -> list[dict[str, np.ndarray]]:
    """Two batches, for the starts that look at data."""
    if model == "vit":
        return list(itertools.islice(images.batches(len(SEEDS)), 2))  # of a seed that no run has
    train, _ = study.sentences(study.DOMAIN)
    return [{name: x[i : i + 16] for name, x in train.items()} for i in (0, 16)]


def eva(model: str):
    return lx.inits.eva(FORWARDS[model], few(model))


def lora_ga(model: str):
    def loss(params, batch):
        return LOSSES[model](FORWARDS[model](params, batch), batch)

    return lx.inits.lora_ga(loss, few(model))


VARIANTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "LoRA": lambda model: {},
    "rsLoRA": lambda model: {"scaling": "rslora"},
    "DoRA": lambda model: {"method": "dora"},
    "PiSSA": lambda model: {"init": "pissa"},
    "OLoRA": lambda model: {"init": "olora"},
    "EVA": lambda model: {"init": eva(model)},
    "LoRA-GA": lambda model: {"init": lora_ga(model)},
    "LoRA+": lambda model: {},
    "VeRA": lambda model: {"method": "vera", "rank": 64},
}


def result(name: str, model: str = MODELS[0]):
    """The sweep of one variant."""
    faster = 10 if name == "VeRA" else 1
    lanes = [{"lr": faster * rate, "seed": seed} for seed in SEEDS for rate in RATES[model]]
    given = {"rank": 8, "alpha": 16.0, "targets": "layer_*", **VARIANTS[name](model)}
    if name == "VeRA":  # which has no scale
        del given["alpha"]
    tx = (
        (lambda lane: lx.optim.loraplus(lane["lr"]))
        if name == "LoRA+"
        else (lambda lane: optax.adam(lane["lr"]))
    )
    label = name.lower().replace("+", "plus").replace("-", "_")
    label = f"{study.named(NAME, model)}-{label}"
    return SWEEPS[model](label, lanes, split=given, tx=tx, lanes_per_program=len(lanes))


def run(model: str) -> None:
    rows, facts = [], FACTS[model]()
    for name in VARIANTS:
        rows += study.rows_of(result(name, model), variant=name)
        jax.clear_caches()
        command = study.command(NAME, model)
        study.save(study.named(NAME, model), rows, command, steps=study.STEPS, **facts)


def show(model: str) -> None:
    records = study.load(study.named(NAME, model))
    found = {key[0]: rows for key, rows in study.grouped(records, "variant").items()}
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
    study.draw(made, study.named(NAME, model))
    head = [
        "variant",
        f"loss at {shared:.1e}",
        "best rate tried",
        "loss there",
        "minus LoRA",
        "best rate, fitted",
    ]
    study.publish(study.named(NAME, model), head, lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, list(VARIANTS), MODELS)
