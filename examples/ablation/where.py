"""Where to adapt at an equal number of parameters: q and v, attention, MLP, or all weights of a layer.

    python examples/ablation/where.py

Each place gets exactly 69,120 trained parameters over two layers. The scale is 2 everywhere.
"""

import study

NAME, SEEDS = "where", range(3)
PLACES = {
    "q, v": {"rank": {"query": 22, "value": 23}, "targets": ["query", "value"]},
    "attention": {"rank": {"out": 12, "*": 11}, "targets": ["query", "key", "value", "out"]},
    "MLP": {"rank": 9, "targets": ["up", "down"]},
    "all": {"rank": 5, "targets": "layer_*"},
}
PARAMETERS = 69_120


def twice(rank):
    return 2.0 * rank


def result(place: str):
    lanes = [{"lr": rate, "seed": seed} for rate in study.RATES for seed in SEEDS]
    split = {**PLACES[place], "alpha": twice}
    made = study.sweep(f"{NAME}-{place.split(',')[0]}", lanes, split=split, lanes_per_program=21)
    return made


def run() -> None:
    rows = []
    for place in PLACES:
        made = result(place)
        lora = made.lora(0)
        count = sum(x.a.size + x.b.size for x in lora.values())
        assert count == PARAMETERS, count
        rows += study.rows_of(made, place=place)
        study.save(
            NAME,
            rows,
            f"python examples/ablation/{NAME}.py",
            parameters=PARAMETERS,
            batch=study.BATCH,
            steps=study.STEPS,
        )


def show() -> None:
    found = {key[0]: rows for key, rows in study.grouped(study.load(NAME), "place").items()}
    _, base = study.at_best(found["all"])
    made, (left, right) = study.figure(2, height=3.0)
    lines = []
    for i, (place, rows) in enumerate(found.items()):
        rates, scores = study.curve(rows)
        left.plot(rates, scores.mean(0), marker="o", markersize=3, color=study.COLORS[i], label=place)
        rate, own = study.at_best(rows)
        mean, error = study.mean_and_error([row["loss"] for row in own])
        right.errorbar([mean], [i], xerr=[2 * error], marker="o", color=study.COLORS[i], capsize=3)
        difference = study.spread(*study.gap(own, base)) if place != "all" else "0"
        right_share = study.mean_and_error([100 * row["accuracy"] for row in own])
        lines.append(
            [place, f"{rate:.1e}", study.spread(mean, error), difference, study.spread(*right_share, 1)]
        )
    left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
    lowest = min(study.curve(rows)[1].mean(0).min() for rows in found.values())
    start = max(study.curve(rows)[1].mean(0)[0] for rows in found.values())
    left.set_ylim(lowest - 0.1 * (start - lowest), start + 0.8 * (start - lowest))
    left.legend()
    right.set_yticks(range(len(found)), list(found))
    right.margins(y=0.12)
    right.invert_yaxis()
    right.set(xlabel="held-out loss at the best rate, two standard errors")
    study.draw(made, NAME)
    study.publish(NAME, ["adapted", "best rate tried", "loss there", "minus all", "accuracy, %"], lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, list(PLACES))
