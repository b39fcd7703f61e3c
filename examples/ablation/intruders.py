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
                if record["lr"] == rates[at] and record["seed"] == 0 and all(
                    record.get(k) == v for k, v in facts.items() if k in ("name", "rank")
                ):  # fmt: skip
                    found = count(params, result.lora(lane), known)
                    rows.append(
                        {
                            **facts,
                            "offset": offset,
                            "lr": rates[at],
                            "intruders": found,
                            "loss": record["loss"],
                        }
                    )

    for shared in rank_and_rate.RANKS:
        result = rank_and_rate.result(shared)
        for (name, rank, alpha), records in study.grouped(result.final(), "name", "rank", "alpha").items():
            add(result, records, way="LoRA", name=name, rank=rank, alpha=alpha)
    full = table.result("full")
    add(full, full.final(), way="full")
    study.save(NAME, rows, f"python examples/ablation/{NAME}.py", leading=LEADING, similar=SIMILAR)


def show() -> None:
    rows = study.load(NAME)
    made, axes = study.figure(2, height=3.0)
    lines = []
    for offset, at in enumerate(axes):
        some = [row for row in rows if row["offset"] == offset]
        shared = next(row for row in some if row["rank"] == rank_and_rate.SHARED)
        for i, scheme in enumerate(rank_and_rate.SCALINGS):
            own = [row for row in some if row["name"] == scheme and row["rank"] != rank_and_rate.SHARED]
            own = sorted([*own, shared], key=lambda row: row["rank"])
            x, y = ([row[name] for row in own] for name in ("rank", "intruders"))
            at.plot(x, y, marker="o", color=study.COLORS[i], label=scheme)
            cells = [f"{row['intruders']:.1f}" for row in own]
            lines.append([scheme, ("best", "half a decade above")[offset], *cells])
        full = next(row for row in some if row["way"] == "full")
        lines.append(
            ["full", ("best", "half a decade above")[offset], f"{full['intruders']:.1f}", "", "", ""]
        )
        at.axhline(full["intruders"], color="gray", linestyle="--", label="full")
        at.set(xscale="log", xlabel="rank", ylabel=f"intruders of {LEADING}")
        at.set_xticks(rank_and_rate.RANKS, list(map(str, rank_and_rate.RANKS)))
        at.minorticks_off()
        at.set_title(("at the best rate", "half a decade above it")[offset], fontsize=9)
    axes[0].legend()
    study.draw(made, NAME)
    study.publish(NAME, ["scale", "rate", *(f"rank {rank}" for rank in rank_and_rate.RANKS)], lines)


if __name__ == "__main__":
    study.main(run, show, __doc__, lambda part: None, ())
