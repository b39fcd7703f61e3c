"""The table that everyone quotes: seven ways to adapt one model to one task, with quality and cost.

    python examples/ablation/table.py           # quality, each way at its own best rate
    python examples/ablation/table.py --costs   # seconds and bytes; on a machine that does nothing else

Full fine-tuning trains the two layers, biases and norms included, but not the embedding. LoRA, DoRA and
QLoRA (nf4) have rank 8, the bottlenecks 32 units, and the prefixes 16 positions. The head is frozen but for
"head only".
"""

import sys
import time

import baselines
import jax
import numpy as np
import optax
import study
import variants
from models import minilm

import lorax_fn as lx

NAME, SEEDS = "table", range(3)
SCALES = {"full": 0.1, "prefix tuning": 10.0, "head only": 10.0}  # of the rates that are tried
ADAPTERS = {"rank": 8, "alpha": 16.0, "targets": "layer_*"}
WAYS = {
    "full": {"full": "layer_*", "targets": []},
    "LoRA": ADAPTERS,
    "QLoRA": ADAPTERS,
    "bottleneck": {"full": "bottleneck", "targets": []},
    "prefix tuning": {"full": "prefix", "targets": []},
    "head only": {"full": "head", "targets": []},
    "DoRA": {**ADAPTERS, "method": "dora"},
}


def base(way: str) -> dict:
    params = study.frozen(study.DOMAIN)
    if way == "QLoRA":
        return lx.quantize(params, "nf4", targets="layer_*")
    if way == "bottleneck":
        return baselines.with_bottlenecks(params, study.LAYERS)
    return baselines.with_prefixes(params, study.LAYERS) if way == "prefix tuning" else params


def result(way: str, batch: int = study.BATCH, steps: int = study.STEPS):
    """The sweep of one way over its rates."""
    if way in ("LoRA", "DoRA") and batch == study.BATCH:
        return variants.result(way)
    rates = [float(f"{SCALES.get(way, 1.0) * rate:.3g}") for rate in study.RATES]
    return study.sweep(
        f"{NAME}-{way.split()[0].lower()}-{batch}",
        [{"lr": rate, "seed": seed} for seed in SEEDS for rate in rates],
        model=baselines.logits if way in ("bottleneck", "prefix tuning") else minilm.logits,
        params=base(way),
        split=WAYS[way],
        batch=batch,
        steps=steps,
        lanes_per_program=7,
    )


def start() -> dict[str, float]:
    """The scores of the frozen model."""
    _, test = study.sentences(study.DOMAIN)
    z = minilm.logits(study.frozen(study.DOMAIN), test["ids"], test["mask"])
    return {name: float(x) for name, x in study.scores_of(z, test).items()}


def run() -> None:
    rows, frozen = [], start()
    for way in WAYS:
        rows += study.rows_of(result(way), way=way)
        jax.clear_caches()
        study.save(
            NAME,
            rows,
            f"python examples/ablation/{NAME}.py",
            batch=study.BATCH,
            steps=study.STEPS,
            frozen=frozen,
        )


def costs(rounds: int = 15) -> None:
    """Parameters, seconds of a step and of inference, and the compiled step's bytes; ways take turns."""
    train, test = study.sentences(study.DOMAIN)
    batch = {name: x[: study.BATCH] for name, x in train.items()}
    texts = test["ids"][:64], test["mask"][:64]
    runs, rows = {}, {}
    for way, split in WAYS.items():
        model = baselines.logits if way in ("bottleneck", "prefix tuning") else minilm.logits
        apply = lx.adapt(model, fallback="error")
        params, lora = lx.split(base(way), **split)
        tx = optax.adam(1e-4)
        state = lx.TrainState.create(lora=jax.tree.map(jax.numpy.copy, lora), tx=tx, key=jax.random.key(0))

        def loss_fn(params, lora, batch, key, apply=apply):
            return study.loss_of(apply(params, lora, batch["ids"], batch["mask"]), batch)

        step = (
            jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0).lower(state, params, batch).compile()
        )
        told = step.memory_analysis()
        used = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
        unmerged = jax.jit(apply).lower(params, lora, *texts).compile()
        whole = lx.merge(lx.dequantize(params) if way == "QLoRA" else params, lora)
        merged = jax.jit(model).lower(whole, *texts).compile()
        runs[way] = [state, step, params, unmerged, lora, merged, whole]
        count = sum(x.size for x in jax.tree.leaves(lx.trainable(lora)))
        total = sum(x.size for x in jax.tree.leaves(study.frozen(study.DOMAIN)))
        rows[way] = {
            "way": way,
            "trained": count,
            "share": count / total,
            "mb": (used + told.temp_size_in_bytes) / 1e6,
            "base_mb": sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6,
        }
    seconds: dict[str, list] = {way: [] for way in WAYS}
    for i in range(-1, rounds):
        for way in list(WAYS)[i % len(WAYS) :] + list(WAYS)[: i % len(WAYS)]:
            state, step, params, unmerged, lora, merged, whole = runs[way]
            marks = [time.perf_counter()]
            state, _ = jax.block_until_ready(step(state, params, batch))
            marks.append(time.perf_counter())
            jax.block_until_ready(unmerged(params, lora, *texts))
            marks.append(time.perf_counter())
            jax.block_until_ready(merged(whole, *texts))
            marks.append(time.perf_counter())
            runs[way][0] = state
            if i >= 0:
                seconds[way].append(np.diff(marks))
    for way, taken in seconds.items():
        low, middle, high = np.quantile(1e3 * np.array(taken), [0.25, 0.5, 0.75], axis=0)
        for name, *values in zip(("step", "unmerged", "merged"), low, middle, high, strict=True):
            rows[way] |= {f"{name}_{q}": float(v) for q, v in zip(("low", "ms", "high"), values, strict=True)}
    study.save(
        "table_costs", list(rows.values()), f"python examples/ablation/{NAME}.py --costs", rounds=rounds
    )


def show() -> None:
    found = {key[0]: rows for key, rows in study.grouped(study.load(NAME), "way").items()}
    cost = {row["way"]: row for row in study.load("table_costs")} if exists("table_costs") else {}
    _, full = study.at_best(found["full"])
    made, axes = study.figure(1, width=6.4, height=2.8)
    frozen = study.head(NAME)["frozen"]
    before = f"{frozen['loss']:.4f}", f"{100 * frozen['accuracy']:.1f}"
    lines = [["nothing", "0", "", "", "", "", "", *before, "", "0"]]
    for i, (way, rows) in enumerate(found.items()):
        rate, own = study.at_best(rows)
        loss, of_loss = study.mean_and_error([row["loss"] for row in own])
        right = study.mean_and_error([100 * row["accuracy"] for row in own])
        shares = [100 * a["accuracy"] / b["accuracy"] for a, b in zip(own, full, strict=True)]
        drop = (frozen["loss"] - loss) / (frozen["loss"] - study.lowest(found["full"]))
        edge = "" if study.best(rows).inside else ", an end"
        c = cost.get(way)
        told = [f"{c[name]:.1f}" if c else "" for name in ("step_ms", "mb", "unmerged_ms", "merged_ms")]
        lines.append([
            way, f"{c['trained']:,} ({100 * c['share']:.2f} %)" if c else "", *told, f"{rate:.1e}{edge}",
            study.spread(loss, of_loss), study.spread(*right, 1),
            study.spread(*study.mean_and_error(shares), 1), f"{100 * drop:.0f}",
        ])  # fmt: skip
        axes.errorbar([loss], [i], xerr=[2 * of_loss], marker="o", color=study.COLORS[i], capsize=3)
    axes.set_yticks(range(len(found)), list(found))
    axes.margins(y=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss at the best rate, two standard errors")
    study.draw(made, NAME)
    head = [
        "way",
        "trained",
        "step, ms",
        "step, MB",
        "inference, ms",
        "merged, ms",
        "best rate tried",
        "loss there",
    ]
    study.publish(NAME, [*head, "accuracy, %", "/ full, %", "drop of the loss / full, %"], lines)


def exists(name: str) -> bool:
    return (study.RECORDS / f"{name}.json").is_file()


if __name__ == "__main__":
    if "--costs" in sys.argv:
        costs()
    else:
        study.main(run, show, __doc__, result, list(WAYS))
