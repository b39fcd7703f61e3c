"""The skinny products of eight lanes of a sweep, ``y_k = x_k A_k B_k``, in six forms, with their gradients.

    python benchmarks/lane_products.py            # a minute on two idle cores
    python benchmarks/lane_products.py --save     # results/lane_products.json

Each lane has its own tokens and its own rank, 1 to 64, and both widths are 384. All forms are checked to give
the same values and gradients before anything is timed. Forms take turns within a round, and ratios, to the
lanes one by one, are formed within rounds.
"""

import argparse
import os
import sys
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import results
from step import spread, table, timed
from sweep import RANKS

from lorax_fn.sweeps.lanes import STEP

WIDTH = 384
ONE_BY_ONE = "own ranks, one by one"


def padded(array: jax.Array, axis: int, width: int) -> jax.Array:
    edges = [(0, 0)] * array.ndim
    edges[axis] = (0, width - array.shape[axis])
    return jnp.pad(array, edges)


def in_groups(width_of: Callable) -> Callable:
    """Neighbors whose ranks get the same width are one batched product of that width."""

    def form(x, a, b):
        widths = [width_of(rank) for rank in RANKS]
        made, at = [], 0
        while at < len(RANKS):
            end = at + widths[at:].count(widths[at])
            first = jnp.stack([padded(y, 1, widths[at]) for y in a[at:end]])
            second = jnp.stack([padded(y, 0, widths[at]) for y in b[at:end]])
            made.append((x[at:end] @ first) @ second)
            at = end
        return jnp.concatenate(made)

    return form


def one_by_one(x, a, b):
    return jnp.stack([(x[k] @ a[k]) @ b[k] for k in range(len(RANKS))])


def side_by_side(x, a, b):
    """All lanes' tokens times all factors, laid side by side; a mask leaves each lane its own columns."""
    lane = np.repeat(np.arange(len(RANKS)), RANKS)
    mask = jnp.asarray(lane == np.arange(len(RANKS))[:, None], x.dtype)
    h = (x.reshape(-1, WIDTH) @ jnp.concatenate(a, 1)).reshape(*x.shape[:2], -1) * mask[:, None]
    return (h.reshape(-1, sum(RANKS)) @ jnp.concatenate(b)).reshape(x.shape)


def ragged(x, a, b):
    """One `jax.lax.ragged_dot` per factor, which takes all groups at the widest rank."""
    sizes = jnp.full(len(RANKS), x.shape[1], jnp.int32)
    first = jnp.stack([padded(y, 1, max(RANKS)) for y in a])
    second = jnp.stack([padded(y, 0, max(RANKS)) for y in b])
    h = jax.lax.ragged_dot(x.reshape(-1, WIDTH), first, sizes)
    return jax.lax.ragged_dot(h, second, sizes).reshape(x.shape)


FORMS: dict[str, Callable] = {
    ONE_BY_ONE: one_by_one,
    "grouped by multiples of 8": in_groups(lambda rank: -(-rank // STEP) * STEP),
    "grouped by powers of 2": in_groups(lambda rank: 1 << (rank - 1).bit_length()),
    "padded to 64": in_groups(lambda rank: max(RANKS)),
    "side by side, masked": side_by_side,
    "ragged_dot": ragged,
}


def gradient(form: Callable) -> Callable:
    """Value and gradients of a weighted sum of all results, by x, A and B."""
    return jax.jit(jax.value_and_grad(lambda x, a, b, c: jnp.sum(form(x, a, b) * c), (0, 1, 2)))


def arguments(tokens: int) -> tuple:
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    x = normal(len(RANKS), tokens, WIDTH)
    return x, [normal(WIDTH, r) for r in RANKS], [normal(r, WIDTH) for r in RANKS], normal(*x.shape)


def measured(tokens: int, rounds: int) -> list[dict]:
    args = arguments(tokens)
    runs = {name: (gradient(form), args) for name, form in FORMS.items()}
    want = runs[ONE_BY_ONE][0](*args)
    for run, _ in runs.values():
        for x, y in zip(jax.tree.leaves(run(*args)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    seconds = timed(runs, rounds)
    flops = {name: run.lower(*args).compile().cost_analysis()["flops"] for name, (run, _) in runs.items()}
    return [{"form": name, "tokens": tokens, "seconds": seconds[name], "flops": flops[name]} for name in runs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", action="store_true", help="write results/lane_products.json")
    args = parser.parse_args()
    facts = results.facts()
    rows, lines = [], [["tokens per lane", "form", "ms", "time / one by one", "FLOPs / one by one"]]
    for tokens in (32, 512):
        found = measured(tokens, args.rounds)
        rows += found
        for row in found:
            ratio = spread(np.divide(row["seconds"], found[0]["seconds"]))
            ms, flops = 1e3 * np.median(row["seconds"]), row["flops"] / found[0]["flops"]
            lines.append([str(tokens), row["form"], f"{ms:.2f}", ratio, f"{flops:.2f}"])
    print(f"{facts['machine']}, JAX {jax.__version__}, {args.rounds} rounds\n\n{table(lines)}")
    if args.save:
        results.save("lane_products", {**facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
