"""Intruder dimensions: leading singular vectors of W + dW that are unlike every singular vector of W.

    python examples/ablation/intruders.py        # after rank_and_rate.py and table.py, whose runs it reads

After Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence"
(https://arxiv.org/abs/2410.21228): of the ten leading vectors on the side of the outputs, those whose largest
cosine with any of W is below 0.6.
"""

import numpy as np
import rank_and_rate
import study
import table

import lorax_fn as lx

NAME, LEADING, SIMILAR = "intruders", 10, 0.6


def vectors(w: np.ndarray) -> np.ndarray:
    """The singular vectors on the side of the outputs, ``[k, m]``, the leading one first."""
    w = w.astype(np.float64)
    if w.shape[0] >= w.shape[1]:
        return np.linalg.eigh(w.T @ w)[1].T[::-1]
    squares, left = np.linalg.eigh(w @ w.T)  # of the smaller side, which is quicker
    return ((left.T @ w) / np.sqrt(squares)[:, None])[::-1]


def count(params: dict, lora: dict, known: dict) -> float:
    """The mean over the adapted matrices of how many of the leading vectors are intruders."""
    counts = []
    for path, adapter in lora.items():
        layer, name, kind = path.split("/")
        if kind != "kernel":
            continue
        w = np.asarray(params[layer][name][kind])
        if path not in known:
            known[path] = vectors(w)
        changed = np.asarray(lx.merge({"w": w}, {"w": adapter})["w"])
        leading = vectors(changed)[:LEADING]
        counts.append(int((np.abs(leading @ known[path].T).max(1) < SIMILAR).sum()))
    return float(np.mean(counts))


def run() -> None:
    params, known, rows = study.frozen(study.DOMAIN), {}, []

    def add(result, records, **facts):
        rate, own = study.at_best(records)
        for offset in (0, 1):  # the best rate, and half a decade above it
            rates = sorted({row["lr"] for row in records})
            at = min(rates.index(rate) + offset, len(rates) - 1)
            for lane, record in enumerate(result.final()):
                if record["lr"] == rates[at] and all(
                    record.get(k) == v for k, v in facts.items() if k in ("name", "rank")
                ):
                    found = {"lr": rates[at], "seed": record["seed"], "loss": record["loss"]}
                    found["intruders"] = count(params, result.lora(lane), known)
                    rows.append({**facts, "offset": offset, **found})

    for shared in rank_and_rate.RANKS:
        result = rank_and_rate.result(shared)
        for (name, rank, alpha), records in study.grouped(result.final(), "name", "rank", "alpha").items():
            add(result, records, way="LoRA", name=name, rank=rank, alpha=alpha)
    full = table.result("full")
    add(full, full.final(), way="full")
    study.save(NAME, rows, f"python examples/ablation/{NAME}.py", leading=LEADING, similar=SIMILAR)


def show() -> None:
    found = study.grouped(study.load(NAME), "offset", "name", "rank")
    told = {place: study.mean_and_error([row["intruders"] for row in rows]) for place, rows in found.items()}
    first = next(iter(rank_and_rate.SCALINGS))  # at the shared rank all scales are one run, under this name
    made, axes = study.figure(2, height=3.0)
    lines = []
    for offset, at in enumerate(axes):
        where = ("at the best rate", "half a decade above it")[offset]
        for i, scheme in enumerate(rank_and_rate.SCALINGS):
            names = [first if rank == rank_and_rate.SHARED else scheme for rank in rank_and_rate.RANKS]
            own = [told[offset, name, r] for name, r in zip(names, rank_and_rate.RANKS, strict=True)]
            x = np.asarray(rank_and_rate.RANKS) * 1.05 ** (i - 1)
            style = {"marker": "o", "color": study.COLORS[i], "capsize": 3, "label": scheme}
            at.errorbar(x, *zip(*own, strict=True), **style)
            lines.append([scheme, where, *(study.spread(*one, 2) for one in own)])
        mean, error = told[offset, None, None]
        lines.append(["full", where, study.spread(mean, error, 2), "", "", ""])
        at.axhline(mean, color="gray", linestyle="--", label="full")
        at.set(xscale="log", xlabel="rank", ylabel=f"intruders of {LEADING}")
        at.set_xticks(rank_and_rate.RANKS, list(map(str, rank_and_rate.RANKS)))
        at.minorticks_off()
        at.set_title(where, fontsize=9)
    axes[0].legend()
    study.draw(made, NAME)
    study.publish(NAME, ["scale", "rate", *(f"rank {rank}" for rank in rank_and_rate.RANKS)], lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, lambda part: None, ())
