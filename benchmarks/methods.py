"""One AdamW step of each method, timed side by side and reported relative to LoRA.

    python benchmarks/methods.py              # the table of README.md
    python benchmarks/methods.py --quick      # fewer rounds, for CI
    python benchmarks/methods.py --check      # exit with status 1 if a target is missed

The model is the transformer of step.py, with two blocks of width 512. Before anything is timed, two steps of
each method are compared with the same two steps differentiated through the merged weights. Methods take turns
in short rounds. Ratios are computed within a round, of wall time and of CPU time (of all threads of this
process), which other programs on the machine disturb less.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
import results
from step import Sizes, Transformer, costs, in_turn, mse, spread, table

import lorax_fn as lx

METHODS = ("lora", "dora", "lora_fa", "vera", "loha", "lokr")  # the first three have targets
SIZES = Sizes(width=512, hidden=2048, heads=8, layers=2, batch=4, tokens=128)
TX = lx.train_only(optax.adamw(1e-4))


def make_state(method: str, variables: Any) -> tuple[Any, Any]:
    """Frozen params, and a train state whose trained arrays are all away from zero."""
    params, lora = lx.split(variables, rank=SIZES.rank, alpha=SIZES.alpha, method=method)
    if len(lora) != 6 * SIZES.layers:
        raise SystemExit(f"{len(lora)} weights adapted, not six a layer: {sorted(lora)}")
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x, trains: x + 0.02 * rng.normal(size=x.shape).astype("f4") if trains else x,
        lora,
        lx.mask(lora),
    )
    return params, lx.TrainState.create(lora=lora, tx=TX, key=jax.random.key(0))


def compiled_step(apply: Any, params: Any, state: Any, batch: dict) -> Any:
    def loss_fn(params, lora, batch, key):
        return mse(apply(params, lora, batch["x"]), batch)

    return jax.jit(lx.make_train_step(loss_fn, TX), donate_argnums=0).lower(state, params, batch).compile()


def two_losses(program: Any, params: Any, state: Any, batch: dict) -> list[float]:
    """The losses of the first step and of the second, which depends on the first gradient."""
    state, losses = copied(state), []
    for _ in range(2):
        state, metrics = program(state, params, batch)
        losses.append(float(metrics["loss"]))
    return losses


def copied(state: Any) -> Any:
    return jax.tree.map(lambda x: x.copy(), state)  # as a step donates its state


def measure(programs: dict, start: dict, batch: dict, rounds: int, warmup: int = 3) -> dict[str, np.ndarray]:
    """``[rounds, 2]`` for each method: seconds of wall time and of CPU time."""
    states = {name: copied(state) for name, (_, state) in start.items()}
    taken: dict[str, list] = {name: [] for name in programs}
    for i in range(-warmup, rounds):
        for name in in_turn(programs, i):
            params = start[name][0]
            jax.block_until_ready(states[name])
            clock, processor = time.perf_counter(), time.process_time()
            states[name], metrics = programs[name](states[name], params, batch)
            jax.block_until_ready((states[name], metrics))
            if i >= 0:
                taken[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {name: np.array(pairs) for name, pairs in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Times one training step of each method.")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 60, with --quick 12)")
    parser.add_argument("--few", action="store_true", help="only the methods that have a target")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--save", action="store_true", help="write results/methods.json")
    args = parser.parse_args()
    rounds, facts = args.rounds or (12 if args.quick else 60), results.facts()

    load = facts["load at the start"]
    print(f"{facts['machine']}, load {load} at the start; JAX {jax.__version__}; {SIZES}\n")
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (SIZES.batch, SIZES.tokens, SIZES.width)
    batch = {"x": jax.random.normal(keys[0], shape), "target": jax.random.normal(keys[1], shape)}
    model = Transformer(SIZES)
    variables = jax.jit(model.init)(keys[2], batch["x"])

    start, programs, found = {}, {}, {}
    for name in METHODS[:3] if args.few else METHODS:
        start[name] = make_state(name, variables)
        programs[name] = compiled_step(lx.adapt(model.apply, fallback="error"), *start[name], batch)
        merged = compiled_step(
            lambda params, lora, x: model.apply(lx.merge(params, lora), x), *start[name], batch
        )
        losses = [two_losses(program, *start[name], batch) for program in (programs[name], merged)]
        tolerance = 2e-5 if results.products() == "float32" else 2e-3
        np.testing.assert_allclose(*losses, rtol=tolerance, err_msg=name)
        found[name] = costs(programs[name])

    taken = measure(programs, start, batch, rounds)
    rows = [
        ["method", "ms / step", "clock / lora", "processor / lora", "GFLOP", "/ lora", "temp MB", "/ lora"]
    ]
    for name, pairs in taken.items():
        ratios = pairs / taken["lora"]
        flops, temp = (found[name][what] for what in ("flops", "temp bytes"))
        rows.append([name, f"{1e3 * np.median(pairs[:, 0]):.0f}", spread(ratios[:, 0]), spread(ratios[:, 1]),
                     f"{flops / 1e9:.2f}", f"{flops / found['lora']['flops']:.4f}",
                     f"{temp / 1e6:.1f}", f"{temp / found['lora']['temp bytes']:.3f}"])  # fmt: skip
    print(f"{table(rows)}\n\nmedian [quartiles] of {rounds} rounds\n")

    if args.save:
        each = [
            {"name": name, "seconds": pairs[:, 0].tolist(), **found[name]} for name, pairs in taken.items()
        ]
        results.save("methods", {**facts, "sizes": dataclasses.asdict(SIZES), "rows": each})
    outputs = 4 * SIZES.batch * SIZES.tokens * SIZES.layers * (5 * SIZES.width + SIZES.hidden)
    dora, lora, frozen_a = (found[name] for name in ("dora", "lora", "lora_fa"))
    clock, processor = np.median(taken["dora"] / taken["lora"], axis=0)
    checks = [
        ("dora clock / lora", clock, 1.15),
        ("dora processor / lora", processor, 1.15),
        ("dora flops / lora", dora["flops"] / lora["flops"], 1.10),
        ("dora temp / (lora + outputs)", dora["temp bytes"] / (lora["temp bytes"] + outputs), 1.0),
        ("lora_fa temp / lora", frozen_a["temp bytes"] / lora["temp bytes"], 1.0),
    ]
    for what, ratio, most in checks:
        print(f"{'MISS' if ratio > most else 'PASS'}  {what}: {ratio:.4f}, target at most {most}")
    return int(args.check and any(ratio > most for _, ratio, most in checks))


if __name__ == "__main__":
    sys.exit(main())
