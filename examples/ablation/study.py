"""What the studies share: a frozen slice of MiniLM, sentiment in four domains, sweeps, and committed records.

The model is the embedding and the first layers of MiniLM with a linear head. The head is fitted once, by
ridge regression on what the frozen layers give, and stays: runs differ only in what they train on top.
"""

import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from models import minilm

HERE = Path(__file__).parent
RECORDS, OUT = HERE / "records", data.OUT / "ablation"
PAGE, PICTURES = HERE.parents[1] / "docs" / "evidence.md", HERE.parents[1] / "docs" / "pictures"
DOMAIN, LAYERS, TOKENS, BATCH, STEPS = "tweets", 2, 16, 16, 40
RATES = tuple(float(f"{10**x:.3g}") for x in np.arange(-4.5, -1.4, 0.5))  # half a decade apart
TRAIN, TEST, HEAD = 2048, 256, 2048  # sentences to train on, to test on, and to fit the head on

Sentences = dict[str, np.ndarray]  # ids and mask [B, T]; label and weight [B]


@functools.cache
def sentences(domain: str) -> tuple[Sentences, Sentences]:
    """Training and test sentences of a domain; no document is in both. Neutral ones are left out."""
    rows = data.sentiment()[domain]
    rng = np.random.default_rng(0)
    documents = rng.permutation(sorted({document for document, _, _ in rows})).tolist()
    held_out = set(documents[: len(documents) // 5])
    rows = [rows[i] for i in rng.permutation(len(rows)) if abs(rows[i][1]) >= 0.5]
    parts = []
    for inside, count in ((False, TRAIN), (True, TEST)):
        some = [row for row in rows if (row[0] in held_out) == inside][:count]
        label = np.array([rating > 0 for _, rating, _ in some], np.float32)
        share = np.where(label == 1, label.mean(), 1 - label.mean())
        tokens = minilm.tokenized([said for _, _, said in some], TOKENS)
        parts.append({**tokens, "label": label, "weight": (0.5 / share).astype(np.float32)})
    return parts[0], parts[1]


@functools.cache
def frozen(*domains: str) -> dict:
    """The model, with a head fitted on some training sentences of these domains."""
    params = minilm.load(LAYERS)
    some = [{name: x[: HEAD // len(domains)] for name, x in sentences(d)[0].items()} for d in domains]
    few = {name: np.concatenate([part[name] for part in some]) for name in some[0]}
    x = minilm.features(params, few["ids"], few["mask"])
    return {**params, "head": minilm.fitted_head(x, few["label"], few["weight"])}


def batches_of(domain: str, size: int = BATCH) -> Callable[[int], Iterator[Sentences]]:
    """``batches(seed)``: batches of training sentences, in an order of the seed's own."""
    train, _ = sentences(domain)

    def batches(seed):
        rng = np.random.default_rng(100 + seed)
        while True:
            order = rng.permutation(len(train["label"]))
            for at in range(0, len(order) - size + 1, size):
                yield {name: x[order[at : at + size]] for name, x in train.items()}

    return batches


def loss_of(z: jax.Array, batch: Sentences) -> jax.Array:
    """Cross-entropy in which both classes weigh the same."""
    return jnp.mean(batch["weight"] * (jax.nn.softplus(z) - z * batch["label"]))


def scores_of(z: jax.Array, batch: Sentences) -> dict[str, jax.Array]:
    """The loss and the balanced accuracy."""
    right = (z > 0) == (batch["label"] > 0.5)
    return {"loss": loss_of(z, batch), "accuracy": jnp.mean(batch["weight"] * right)}


def class_scores(z: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The cross-entropy of logits ``[..., V]``, in nats, and how often the likeliest class is right."""
    loss = optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
    return {"loss": loss, "accuracy": jnp.mean(z.argmax(-1) == labels)}


def mean_scores(scores: Callable, batches: Any) -> dict[str, jax.Array]:
    """The mean of ``scores(batch)`` over batches along axis 0 of each array, one after another."""
    return jax.tree.map(jnp.mean, jax.lax.map(scores, batches))


def sweep(
    name: str, lanes: Sequence[dict], *, domain: str = DOMAIN, model: Callable = minilm.logits, **given: Any
) -> Any:
    """`run` of these lanes on one domain of sentences."""
    apply = lx.adapt(model, fallback="error")
    _, test = sentences(domain)
    size = given.pop("batch", BATCH)

    def loss_fn(params, lora, batch, key):
        return loss_of(apply(params, lora, batch["ids"], batch["mask"]), batch)

    def eval_fn(state, params):
        return scores_of(apply(params, state.lora, test["ids"], test["mask"]), test)

    asked = {"params": frozen(domain), "batches": batches_of(domain, size), "eval_fn": eval_fn, **given}
    return run(name, loss_fn, lanes, **asked)


def run(
    name: str, loss_fn: Callable, lanes: Sequence[dict], *, params: Any, batches: Callable, **given: Any
) -> Any:
    """`lx.sweep` with what all studies share, which goes on from ``out/ablation`` after a kill."""
    OUT.mkdir(parents=True, exist_ok=True)
    lock = open(OUT / f"{name}.lock", "w")  # noqa: SIM115  # held until the sweep ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another process runs {name}; the same command goes on when it is done")
    asked = {
        "steps": STEPS,
        "tx": lambda lane: optax.adam(lane["lr"]),
        "key": jax.random.key(0),
        "split": {"targets": "layer_*"},
        **given,
    }
    start = time.perf_counter()
    result = lx.sweep(
        loss_fn,
        params,
        list(lanes),
        batches,
        data="seed",
        file=OUT / f"{name}.jsonl",
        progress=False,
        **asked,
    )
    lock.close()
    if not result.finished:
        sys.exit("interrupted; the same command goes on where it was")
    print(f"{name}: {len(lanes)} lanes in {time.perf_counter() - start:.0f} s", flush=True)
    return result


def grouped(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of these columns, in their order."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def curve(rows: Sequence[dict], score: str = "loss") -> tuple[list[float], np.ndarray]:
    """The rates of some rows, and their scores ``[seeds, rates]``; NaN where a run diverged."""
    rates, seeds = sorted({row["lr"] for row in rows}), sorted({row["seed"] for row in rows})
    scores = np.full((len(seeds), len(rates)), np.nan)
    for row in rows:
        value = np.nan if row["diverged"] else row[score]
        scores[seeds.index(row["seed"]), rates.index(row["lr"])] = value
    return rates, scores


def best(rows: Sequence[dict]) -> lx.sweeps.Optimum:
    """The best rate of some rows, by a parabola through three rates, and its bootstrap over seeds.

    A loss above that at the lowest rate, where a run hardly moves, counts as that one: how far runs go astray
    at high rates says nothing about where the best one is.
    """
    rates, scores = curve(rows)
    return lx.sweeps.optimum(rates, np.fmin(scores, scores[:, :1]), points=3)


def at_best(rows: Sequence[dict]) -> tuple[float, list[dict]]:
    """The measured rate with the lowest mean loss, and its rows by seed."""
    rates, scores = curve(rows)
    mean = np.where(np.isfinite(scores).all(0), np.nan_to_num(scores).mean(0), np.inf)
    rate = rates[int(np.argmin(mean))]
    return rate, sorted((row for row in rows if row["lr"] == rate), key=lambda row: row["seed"])


def lowest(rows: Sequence[dict]) -> float:
    """The mean loss at the best rate that was tried."""
    return mean_and_error([row["loss"] for row in at_best(rows)[1]])[0]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    x = np.asarray(values, float)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def save(name: str, rows: Sequence[dict], command: str, domain: str = DOMAIN, **facts: Any) -> None:
    """Writes rows as ``records/<name>.json`` with what made them: columns once, then one line per row."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable} of {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
        | {"lorax_fn": lx.__version__},
        "model": f"the first {LAYERS} layers of all-MiniLM-L6-v2, float32",
        "data": f"{domain}, {TOKENS} tokens per sentence, {TEST} test sentences per domain",
        **facts,
        "columns": columns,
    }
    lines = [json.dumps([_short(row.get(column)) for column in columns]) for row in rows]
    text = json.dumps(facts, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(text, "utf-8")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def head(name: str) -> dict[str, Any]:
    """What `save` wrote, rows and all."""
    return json.loads((RECORDS / f"{name}.json").read_text("utf-8"))


def load(name: str) -> list[dict]:
    """The rows that `save` wrote."""
    held = head(name)
    return [dict(zip(held["columns"], row, strict=True)) for row in held["rows"]]


def rows_of(result: Any, *names: str, **facts: Any) -> list[dict]:
    """Of each lane's last record the entries that a study keeps."""
    kept = (*names, "lr", "seed", "step", "train_loss", "loss", "accuracy", "diverged")
    return [{**facts, **{name: record[name] for name in kept}} for record in result.final()]


COLORS = ("#4269d0", "#e8850c", "#2f8f5b", "#c0392b", "#8e5bb5", "#9c6b4e", "#3ca9b8", "#d75fa2", "#6b7280")


def figure(columns: int, width: float = 8.0, height: float = 3.4) -> tuple[Any, Any]:
    """A figure with axes side by side, on white."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "legend.frameon": False, "legend.fontsize": 8, "font.size": 9, "svg.hashsalt": "lorax_fn",
        "svg.fonttype": "none",
    })  # fmt: skip
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(1, columns)


def draw(made: Any, name: str) -> None:
    """Saves a figure as ``docs/pictures/<name>.svg``, and as PNG in ``out`` to be looked at."""
    PICTURES.mkdir(exist_ok=True)
    made.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    OUT.mkdir(parents=True, exist_ok=True)
    made.savefig(OUT / f"{name}.png", dpi=110)
    print(f"drew {name}.svg, {(PICTURES / f'{name}.svg').stat().st_size // 1000} kB")


def publish(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, and puts it into ``docs/evidence.md`` between the marks of this name."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    table = "\n".join(lines)
    print(table)
    text = PAGE.read_text("utf-8")
    before, found, rest = text.partition(f"<!-- {name} -->\n")
    if not found:
        raise ValueError(f"{PAGE.name} has no mark <!-- {name} -->")
    after = rest[rest.index("<!-- end -->") :]
    PAGE.write_text(f"{before}{found}{table}\n{after}", "utf-8")


def named(name: str, model: str) -> str:
    """The name of a study's records and figure for one model; that of the first model has no ending."""
    return name if model == "minilm" else f"{name}_{model}"


def command(name: str, model: str) -> str:
    """The command that runs a study on one model."""
    return f"python examples/ablation/{name}.py" + ("" if model == "minilm" else f" --model {model}")


def spread(mean: float, error: float, digits: int = 4) -> str:
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def rate(one: lx.sweeps.Optimum) -> str:
    """A best rate with its interval."""
    edge = "" if one.inside else ", at an end of the axis"
    return f"{one.x:.1e} [{one.low:.1e}, {one.high:.1e}]{edge}"


def gap(rows: Sequence[dict], base: Sequence[dict], score: str = "loss") -> tuple[float, float]:
    """Mean and standard error of the difference to other rows, seed by seed."""
    return mean_and_error([a[score] - b[score] for a, b in zip(rows, base, strict=True)])


def main(
    run: Callable, show: Callable, about: str, result: Callable, parts: Sequence, models: Sequence[str] = ()
) -> None:
    """The command of a study: run, then draw.

    ``--draw`` only draws, from the records. ``--only A B`` runs these parts, each ``result(part)``, and
    leaves them in ``out/ablation``: several processes can so share the work. A study of several ``models``
    has ``--model``, the first one by default, and its functions take ``model=``.
    """
    import argparse

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw the figure, from the records")
    parser.add_argument("--only", nargs="+", choices=list(map(str, parts)), help="run these parts, and stop")
    if models:
        parser.add_argument("--model", choices=models, default=models[0])
    args = parser.parse_args()
    given = {"model": args.model} if models else {}
    if args.only:
        for part in parts:
            if str(part) in args.only:
                result(part, **given)
        return
    if not args.draw:
        run(**given)
    show(**given)
