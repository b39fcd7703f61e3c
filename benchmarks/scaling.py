"""How the cost of a gradient grows: against rank, tokens, layers, adapters in a batch, and lanes of a sweep.

    python benchmarks/scaling.py            # about three minutes on two cores
    python benchmarks/scaling.py --save     # results/scaling.json; draw.py draws it beside the curve below
    python benchmarks/scaling.py --tiny     # small sizes, to try it out

The model is a stack of layers ``tanh(x @ W)``, W ``[n, n]``, and the gradient is by what trains and by x, as
inside a deeper model. On paper full fine-tuning costs ``3 mn`` products per token and layer, and LoRA
``2 mn + 3 r (m + n)``: a fraction ``2/3 + r (m + n) / mn``.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from step import table, timed

import lorax_fn as lx

WIDTH, TOKENS, LAYERS, RANK = 768, 512, 3, 16
RANKS, MANY_TOKENS, DEPTHS = (1, 4, 16, 64, 128, 256), (64, 256, 1024, 2048), (1, 2, 4, 8)
ADAPTERS, LANES = (1, 4, 16, 64), (1, 2, 4, 8)


def model(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"])
    return x


def problem(layers: int, tokens: int, rank: int, width: int) -> tuple[Any, dict, jax.Array]:
    keys = jax.random.split(jax.random.key(0), layers + 1)
    params = [{"kernel": jax.random.normal(key, (width, width)) / width**0.5} for key in keys[1:]]
    params, lora = lx.split(params, rank=rank)
    lora = jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), lora)
    return params, lora, jax.random.normal(keys[0], (4, tokens // 4, width))


def loss(y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(y))


def full(params: Any, x: jax.Array) -> Any:
    return jax.grad(lambda params, x: loss(model(params, x)), argnums=(0, 1))(params, x)


def adapted(lora: dict, params: Any, x: jax.Array) -> Any:
    run = lx.adapt(model, fallback="error")
    return jax.grad(lambda lora, x: loss(run(params, lora, x)), argnums=(0, 1))(lora, x)


def measured(programs: dict[str, tuple], rounds: int) -> dict[str, tuple[list[float], float]]:
    """``name: (seconds of each round, FLOPs)`` of ``name: (function, arguments)``."""
    compiled = {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in programs.items()}
    seconds = timed(compiled, rounds)
    return {name: (seconds[name], run.cost_analysis()["flops"]) for name, (run, _) in compiled.items()}


def against_full(points: list[tuple[int, tuple[int, int, int, int]]], rounds: int) -> list[dict]:
    """For each ``(value, sizes)``: LoRA as a fraction of full fine-tuning, and what paper says."""
    rows = []
    for value, sizes in points:
        _, _, rank, width = sizes
        params, lora, x = problem(*sizes)
        found = measured({"full": (full, (params, x)), "lora": (adapted, (lora, params, x))}, rounds)
        (lora_took, lora_flops), (full_took, full_flops) = found["lora"], found["full"]
        ratios = np.divide(lora_took, full_took)
        rows.append(
            {
                "at": value,
                "time": float(np.median(ratios)),
                "quartiles": np.percentile(ratios, [25, 75]).tolist(),
                "flops": lora_flops / full_flops,
                "on paper": 2 / 3 + 2 * rank / width,
                "ms": 1e3 * float(np.median(lora_took)),
            }
        )
    return rows


def in_one_batch(width: int, tokens: int, rounds: int) -> list[dict]:
    """A forward pass of 64 rows that share out so many adapters of a bank, as a fraction of one adapter's."""
    params, lora, _ = problem(LAYERS, tokens, RANK, width)
    x = jax.random.normal(jax.random.key(1), (64, max(1, tokens // 64), width))
    run = lx.adapt(model, fallback="error")

    def mixed(params, bank, ids, x):
        return jax.vmap(lambda i, x: run(params, bank[i], x))(ids, x)

    programs: dict[str, tuple] = {"one": (run, (params, lora, x))}
    for count in ADAPTERS:
        programs[str(count)] = mixed, (params, lx.bank([lora] * count), jnp.arange(64) % count, x)
    return relative(measured(programs, rounds), "one")


def relative(found: dict, to: str, lanes: bool = False) -> list[dict]:
    base, rows = found.pop(to), []
    for name, (took, flops) in found.items():
        share = int(name) if lanes else 1
        ratios = np.divide(took, base[0]) / share
        quartiles = np.percentile(ratios, [25, 75]).tolist()
        rows.append({"at": int(name), "time": float(np.median(ratios)), "quartiles": quartiles,
                     "flops": flops / base[1] / share, "ms": 1e3 * float(np.median(took))})  # fmt: skip
    return rows


def of_lanes(width: int, tokens: int, rounds: int) -> list[dict]:
    """A gradient of so many stacked adapters under `jax.vmap`, per lane, as a fraction of one adapter's."""
    params, lora, x = problem(LAYERS, tokens, RANK, width)
    programs: dict[str, tuple] = {"one": (adapted, (lora, params, x))}
    for count in LANES:
        programs[str(count)] = (
            jax.vmap(adapted, in_axes=(0, None, None)),
            (lx.stack([lora] * count), params, x),
        )
    return relative(measured(programs, rounds), "one", lanes=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--save", action="store_true", help="write results/scaling.json")
    args = parser.parse_args()
    facts, width = results.facts(), 256 if args.tiny else WIDTH
    tokens = 64 if args.tiny else TOKENS
    found = {
        "rank": against_full([(r, (LAYERS, tokens, r, width)) for r in RANKS], args.rounds),
        "tokens": against_full([(t, (LAYERS, t, RANK, width)) for t in MANY_TOKENS], args.rounds),
        "layers": against_full([(n, (n, tokens, RANK, width)) for n in DEPTHS], args.rounds),
        "adapters in a batch": in_one_batch(width, tokens, args.rounds),
        "lanes": of_lanes(width, tokens, args.rounds),
    }
    for what, rows in found.items():
        lines = [[what, "time", "quartiles", "FLOPs", "on paper", "ms"]]
        for row in rows:
            low, high = row["quartiles"]
            paper = f"{row['on paper']:.3f}" if "on paper" in row else "-"
            lines.append([str(row["at"]), f"{row['time']:.3f}", f"[{low:.3f}, {high:.3f}]",
                          f"{row['flops']:.3f}", paper, f"{row['ms']:.1f}"])  # fmt: skip
        print(f"\n{table(lines)}", flush=True)
    if args.save:
        sizes = {"width": width, "tokens": tokens, "layers": LAYERS, "rank": RANK, "rounds": args.rounds}
        results.save("scaling", {**facts, "sizes": sizes, "figures": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
