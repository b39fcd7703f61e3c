"""What might make LoRA faster still: each idea, written by hand, beside the same model without it.

    python benchmarks/tricks.py            # the blocks a and b of peers.py
    python benchmarks/tricks.py alone      # each product that LoRA adds, by itself
    python benchmarks/tricks.py alone d    # what DoRA adds to the block d
    python benchmarks/tricks.py --save     # results/tricks.json; with alone, tricks_alone.json or ..._d.json

All are `by hand, flat tokens` of `peers.py` with one change. *h* is ``x @ A`` ``[tokens, r]``, which the
gradient of B needs.

- h recomputed: not kept for the backward pass, but computed again.
- h saved: the checkpoint of block b saves it, where it saves nothing otherwise.

*alone* compiles and times the products that LoRA adds to a step of block a one by one, each in its fastest
form and with a warm cache, if XLA compiles it for a CPU. The same for what DoRA adds to LoRA; in the scanned
layers of block d, the norms of a stack are computed at once, and ``x W`` is kept for the gradient. Within a
step, XLA runs some of them beside others, so their sum is no bound.
"""

import argparse
import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from jax.ad_checkpoint import checkpoint_name
from libraries import linen
from libraries.problem import Problem, arranged, factors, nested
from peers import ADAPT, check_losses, timed
from peers import BLOCKS as EVERY
from step import in_turn, spread, table
from step import timed as in_rounds

import lorax_fn as lx

PLAIN, KEPT, RECOMPUTED, SAVED = "by hand", "h kept", "h recomputed", "h saved by the checkpoint"
BLOCKS = {
    "a": (Problem(), (KEPT, RECOMPUTED)),
    "b": (Problem(layers=12, scanned=True), (KEPT, SAVED)),
}


class Dense(nn.Module):
    """LoRA by hand on flat tokens, with a change of how h is kept."""

    features: int
    problem: Problem
    way: str

    @nn.compact
    def __call__(self, x):
        n, rank = x.shape[-1], self.problem.rank
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (n, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.variable("lora", "a", jnp.zeros, (n, rank)).value
        b = self.variable("lora", "b", jnp.zeros, (rank, self.features)).value
        rows = x.reshape(-1, n)

        def change(rows, a, b):
            h = rows @ a
            return self.problem.scale * ((checkpoint_name(h, "h") if self.way == SAVED else h) @ b)

        change = jax.checkpoint(change) if self.way == RECOMPUTED else change
        y = rows @ kernel + bias + change(rows, a, b)
        return y.reshape(*x.shape[:-1], self.features)


def made(problem: Problem, way: str) -> Any:
    if way == PLAIN:
        return linen.by_hand(problem)

    def dense(features, **options):
        return Dense(features, problem, way, **options)

    policy = jax.checkpoint_policies.save_only_these_names("h") if way == SAVED else None
    model = linen.Transformer(problem, dense, policy)
    held = arranged(problem, factors(problem))
    lora = nested({f"{path}/{'ab'[i]}": pair[i] for path, pair in held.items() for i in (0, 1)})
    apply = lambda lora, params, *x: model.apply({**params, "lora": lora}, *x)  # noqa: E731
    return linen.peer(way, problem, lambda: apply, lora, linen.variables(problem))


# Of a weight W [n, m]: each product as a function of x [tokens, n], y and u [tokens, m], h [tokens, r], W, A
# and B.
ALONE = {
    "x W": lambda x, y, u, h, w, a, b: x @ w,
    "dy Wᵀ": lambda x, y, u, h, w, a, b: y @ w.T,
    "x W + h B": lambda x, y, u, h, w, a, b: x @ w + h @ b,
    "dy Wᵀ + dh Aᵀ": lambda x, y, u, h, w, a, b: y @ w.T + h @ a.T,
    "h = x A": lambda x, y, u, h, w, a, b: x @ a,
    "dh = dy Bᵀ": lambda x, y, u, h, w, a, b: y @ b.T,
    "dA = (dhᵀ x)ᵀ": lambda x, y, u, h, w, a, b: h.T @ x,
    "dB = hᵀ dy": lambda x, y, u, h, w, a, b: h.T @ y,
}
# The same for DoRA, whose output is c * (x W) + h (c B), with a column c [m].
NORM = "norm of the columns"
DORA = {
    NORM: lambda x, y, u, h, w, a, b: adapted(w, a, b).norm(w),
    "dc = sum of dy * (x W)": lambda x, y, u, h, w, a, b: jnp.sum(y * u, 0),
    "c dy": lambda x, y, u, h, w, a, b: b[0] * y,
}
# What scanned layers add to that: their gradient finds x W in an array of all layers.
KEEP = {"keeping x W": lambda x, y, u, h, w, a, b: jnp.copy(y)}
LIMIT, ADAM = "limit: forward and dx", "AdamW on A and B"


def adapted(w: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    """The DoRA of a weight ``[n, m]``, or of a stack of them."""
    *stack, n, m = range(a.ndim)
    layout = lx.Layout(stack=tuple(stack), inputs=(n,), outputs=(m,))
    magnitude = b[..., 0, :]
    return lx.DoRA(a=a, b=b, alpha=1.0, rank=a.shape[-1], scaling="lora", layout=layout, magnitude=magnitude)


def alone(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """The seconds of each product, summed over all weights of the model; of the limit's and LoRA's step.

    Of scanned layers, what DoRA adds alone.
    """
    draw, tokens = np.random.default_rng(0), problem.batch * problem.tokens
    scanned = problem.scanned
    pieces = {**DORA, **KEEP} if scanned else {**ALONE, **DORA}
    layers_of_a_call = {NORM: problem.layers} if scanned else {}  # of the other pieces, one

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    whole = {ADAPT: linen.adapt(problem)} | ({} if scanned else {LIMIT: linen.limit(problem)})
    runs: dict[Any, Any] = {
        name: (jax.jit(way.make_step()), (way.start, way.fixed)) for name, way in whole.items()
    }
    counts: dict[Any, int] = {}
    for n, m in problem.shapes.values():
        if (n, m) not in counts:
            activations = [normal(tokens, size) for size in (n, m, m, problem.rank)]
            args = [*activations, normal(n, m), normal(n, problem.rank), normal(problem.rank, m)]
            runs |= {(name, n, m): (jax.jit(run), args) for name, run in pieces.items()}
            if scanned:
                stacks = [jnp.broadcast_to(x, (problem.layers, *x.shape)) + 0 for x in args[4:]]
                runs[NORM, n, m] = runs[NORM, n, m][0], [*activations, *stacks]
        counts[n, m] = counts.get((n, m), 0) + problem.layers
    if not scanned:
        pairs = [(normal(n, problem.rank), normal(problem.rank, m)) for n, m in problem.shapes.values()]
        tx, every = optax.adamw(1e-4), [pairs] * problem.layers
        runs[ADAM] = jax.jit(lambda g, s, p: tx.update(g, s, p)), (every, tx.init(every), every)
    # Five calls in a row, of which all but the first find the cache warm.
    taken: dict[Any, list[float]] = {key: [] for key in runs}
    for i in range(rounds):
        for key in in_turn(runs, i):
            (seconds,) = in_rounds({key: runs[key]}, 5).values()
            taken[key].append(np.median(seconds) if key in whole else min(seconds))
    sums = {
        name: sum(count * np.array(taken[name, *shape]) for shape, count in counts.items())
        / layers_of_a_call.get(name, 1)
        for name in pieces
    }
    whole_steps = {name: seconds for name, seconds in taken.items() if isinstance(name, str)}
    return {name: seconds.tolist() for name, seconds in sums.items()} | whole_steps


def added_table(taken: dict[str, list[float]]) -> str:
    """What LoRA adds to the limit, at its fastest, and DoRA to LoRA.

    Of products with an addition, it is what they take beyond the base product.
    """
    best = {name: min(seconds) for name, seconds in taken.items()}
    parts = [("DoRA", ADAPT, best.keys() & {*DORA, *KEEP})]
    if LIMIT in best:
        best["+ h B"] = best.pop("x W + h B") - best.pop("x W")
        best["+ dh Aᵀ"] = best.pop("dy Wᵀ + dh Aᵀ") - best.pop("dy Wᵀ")
        parts.insert(0, ("LoRA", LIMIT, best.keys() - DORA.keys()))
    texts = []
    for what, of, names in parts:
        whole = np.median(taken[of])
        added = {name: seconds for name, seconds in best.items() if name in names - {LIMIT, ADAPT}}
        added["together"] = sum(added.values())
        rows = [[name, f"{1e3 * seconds:.1f}", f"{seconds / whole:.3f}"] for name, seconds in added.items()]
        texts.append(
            table([[f"what {what} adds", "ms", f"/ {of.split(':')[0]}, {1e3 * whole:.0f} ms"], *rows])
        )
    return "\n\n".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", nargs="*", help="a, b; default: both; or: alone, or: alone d")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--save", action="store_true", help="write results/tricks*.json")
    args = parser.parse_args()
    results.keep_memory()
    facts, found = results.facts(), {}
    small = {"width": 64, "hidden": 128, "heads": 4, "layers": 2, "tokens": 16} if args.tiny else {}
    if args.blocks[:1] == ["alone"]:
        block = " ".join(args.blocks[1:]) or "a"
        if block not in ("a", "d") or (block == "d" and args.tiny):
            parser.error("alone takes the block a or d; d has real weights, which are not tiny")
        taken = alone(dataclasses.replace(EVERY[block], **small), args.rounds)
        print(added_table(taken))
        if args.save:
            results.save(
                "tricks_alone" if block == "a" else f"tricks_alone_{block}", {**facts, "seconds": taken}
            )
        return 0
    for block in args.blocks or BLOCKS:
        problem, ways = BLOCKS[block]
        problem = dataclasses.replace(problem, **small)
        peers = [made(problem, way) for way in (PLAIN, *ways)]
        for peer in peers:
            peer.compile()
        peers, wrong, _ = check_losses(peers, results.TOLERANCES["float32"])
        if wrong:
            raise SystemExit(f"other losses than by hand: {wrong}")
        for peer in peers:
            peer.reset()
        seconds = timed(peers, args.rounds, 1)
        rows = [{"name": peer.name, "seconds": seconds[peer.name], **peer.costs()} for peer in peers[1:]]
        lines = [["way", "ms", "/ h kept", "FLOPs / h kept", "temp MB", "/ h kept"]]
        for row in rows:
            lines.append([
                row["name"], f"{1e3 * np.median(row['seconds']):.1f}",
                spread(np.divide(row["seconds"], rows[0]["seconds"])),
                f"{row['flops'] / rows[0]['flops']:.4f}", f"{row['temp bytes'] / 1e6:.1f}",
                f"{row['temp bytes'] / rows[0]['temp bytes']:.4f}",
            ])  # fmt: skip
        print(f"{block}: {problem}\n\n{table(lines)}\n", flush=True)
        found[block] = rows
    if args.save:
        results.save("tricks", {**facts, "blocks": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
