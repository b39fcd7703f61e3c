"""Forgetting: four domains of sentiment in sequence, in five orders, with full fine-tuning and with LoRA.

    python examples/ablation/forgetting.py

After 30 steps on a domain, all four are tested. Forgetting is the mean, over the domains before the last, of
the loss at the end minus the loss right after training on it; learning is the mean loss right after training.
"""

import functools

import jax
import numpy as np
import study
from models import minilm

import lorax_fn as lx

NAME, EACH, SEEDS, TEST = "forgetting", 30, range(5), 128
DOMAINS = tuple(study.data.DOMAINS)
WAYS = {
    "full": {"full": "layer_*", "targets": []},
    "LoRA": {"rank": 8, "alpha": 16.0, "targets": "layer_*"},
}
RATES = {
    "full": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "LoRA": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}


def order_of(seed: int) -> list[str]:
    return np.random.default_rng(seed).permutation(DOMAINS).tolist()


def batches(seed: int):
    for domain in order_of(seed):
        feed = study.batches_of(domain)(seed)
        for _ in range(EACH):
            yield next(feed)


@functools.cache
def tests() -> dict[str, study.Sentences]:
    return {d: {name: x[:TEST] for name, x in study.sentences(d)[1].items()} for d in DOMAINS}


def result(way: str):
    apply = lx.adapt(minilm.logits, fallback="error")

    def eval_fn(state, params):
        scores = {}
        for domain, test in tests().items():
            found = study.scores_of(apply(params, state.lora, test["ids"], test["mask"]), test)
            scores |= {f"{domain} {name}": value for name, value in found.items()}
        return scores

    return study.sweep(
        f"{NAME}-{way.lower()}",
        [{"lr": rate, "seed": seed} for rate in RATES[way] for seed in SEEDS],
        params=study.frozen(*DOMAINS),
        batches=batches,
        split=WAYS[way],
        steps=EACH * len(DOMAINS),
        every=EACH,
        eval_fn=eval_fn,
        best="train_loss",
        lanes_per_program=5,
    )


def run() -> None:
    rows = []
    start = study.frozen(*DOMAINS)
    for domain, test in tests().items():
        found = study.scores_of(minilm.logits(start, test["ids"], test["mask"]), test)
        rows += [{"way": "frozen", "domain": domain, **{name: float(x) for name, x in found.items()}}]
    for way in WAYS:
        for record in result(way).records:
            order = order_of(record["seed"])
            for domain in DOMAINS:
                scores = {name: record[f"{domain} {name}"] for name in ("loss", "accuracy")}
                facts = {"lr": record["lr"], "seed": record["seed"], "after": record["step"] // EACH}
                place = {"domain": domain, "position": order.index(domain) + 1}
                rows.append({"way": way, **facts, **place, **scores})
        jax.clear_caches()
        facts = {"steps_each": EACH, "batch": study.BATCH, "test_sentences_used": TEST}
        command = f"python examples/ablation/{NAME}.py"
        study.save(NAME, rows, command, domain=", ".join(DOMAINS), **facts)


def matrix(rows: list[dict], score: str) -> np.ndarray:
    """``[seeds, after, position]`` of a score, of the rows of one way and rate."""
    made = np.full((len(SEEDS), len(DOMAINS), len(DOMAINS)), np.nan)
    for row in rows:
        made[row["seed"], row["after"] - 1, row["position"] - 1] = row[score]
    return made


def learned_and_forgotten(rows: list[dict], score: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Of each seed: the mean score right after training, and by how much it is higher at the end."""
    m = matrix(rows, score)
    right_after = np.diagonal(m, axis1=1, axis2=2)
    return right_after.mean(1), (m[:, -1] - right_after)[:, :-1].mean(1)


def show() -> None:
    rows = study.load(NAME)
    frozen = np.mean([row["loss"] for row in rows if row["way"] == "frozen"])
    right = np.mean([row["accuracy"] for row in rows if row["way"] == "frozen"])
    lines = [["frozen", "", f"{frozen:.4f}, accuracy {100 * right:.1f} %", "", ""]]
    found = study.grouped([row for row in rows if row["way"] != "frozen"], "way", "lr")
    made, axes = study.figure(3, width=9.6, height=3.0)
    best = {}
    for i, way in enumerate(WAYS):
        places = []
        for rate in RATES[way]:
            learned, forgotten = learned_and_forgotten(found[way, rate])
            _, lost = learned_and_forgotten(found[way, rate], "accuracy")
            (x, of_x), (y, of_y) = study.mean_and_error(learned), study.mean_and_error(forgotten)
            z, of_z = study.mean_and_error(-lost)
            told = study.spread(x, of_x), study.spread(y, of_y), study.spread(100 * z, 100 * of_z, 1)
            lines.append([way, f"{rate:.0e}", *told])
            if x < frozen:  # rates at which training teaches nothing are in the table alone
                style = {"color": study.COLORS[i], "marker": "o", "markersize": 4, "capsize": 2}
                label = None if places else way
                axes[0].errorbar([x], [y], xerr=[of_x], yerr=[of_y], label=label, **style)
                beside = {"rotation": (-60, 60)[i], "va": ("top", "bottom")[i], "color": study.COLORS[i]}
                beside |= {"fontsize": 7, "xytext": (3, (-4, 4)[i]), "textcoords": "offset points"}
                axes[0].annotate(f"{rate:.0e}", (x, y), **beside)
                places.append((x, y))
            if way not in best or x < best[way][0]:
                best[way] = x, rate
        axes[0].plot(*zip(*places, strict=True), color=study.COLORS[i], alpha=0.4)
    axes[0].axhline(0, color="gray", linewidth=0.8)
    axes[0].set(
        xlabel="loss right after training (learning)", ylabel="rise of the loss by the end (forgetting)"
    )
    axes[0].set_ylim(bottom=-0.03)
    axes[0].get_gridspec().set_width_ratios([1.5, 1, 1])
    axes[0].legend()
    for way, at in zip(WAYS, axes[1:], strict=True):
        mean = matrix(found[way, best[way][1]], "accuracy").mean(0)
        at.imshow(mean, cmap="viridis", vmin=0.5, vmax=0.9)
        for i, j in np.ndindex(mean.shape):
            at.text(j, i, f"{100 * mean[i, j]:.0f}", ha="center", va="center", fontsize=8, color="white")
        ticks = range(len(DOMAINS)), ["1st", "2nd", "3rd", "4th"]
        at.set_xticks(*ticks)
        at.set_yticks(*ticks)
        at.grid(visible=False)
        at.set(xlabel="accuracy on the domain", ylabel="after training on")
        at.set_title(f"{way}, {best[way][1]:.0e}", fontsize=9)
    study.draw(made, NAME)
    head = ["way", "rate", "loss right after training", "rise by the end", "accuracy lost by the end, points"]
    study.publish(NAME, head, lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, result, list(WAYS))
