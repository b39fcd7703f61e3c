"""Figures that a compiler counts, so that they are the same on every machine, beside the committed ones.

    python benchmarks/guards.py             # prints them
    python benchmarks/guards.py --check     # exit with status 1 if one grew by more than 2 %; in CI
    python benchmarks/guards.py --save      # writes results/guards.json, for this version of JAX

Of each program: FLOPs, bytes accessed and bytes of temporaries of the compiled step, and lines of the
lowered module. Of a short training run: how often JAX compiled. Programs are small, and their machine code
is not optimized; all passes that decide these figures run.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # JAX reads this once, so it comes first
    FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{FAST} {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import optax
import results
from libraries import linen
from libraries.measured import counts
from libraries.problem import Problem, inputs

import lorax_fn as lx

MOST = 1.02  # how much a figure may grow
SMALL = {"width": 64, "hidden": 128, "heads": 4, "layers": 2, "batch": 2, "tokens": 16, "rank": 4}
TRAINING, SCANNED, DECODING = Problem(**SMALL), Problem(**SMALL, scanned=True), Problem(**SMALL, decode=True)


def of_peer(peer: Any) -> dict[str, float]:
    """The figures of a way of `peers.py`."""
    return figures(jax.jit(peer.make_step(), donate_argnums=0), peer.fresh(), peer.fixed)


def figures(jitted: Any, *args: Any) -> dict[str, float]:
    lowered = jitted.lower(*args)
    return {**counts(lowered.compile()), "lines": lowered.as_text().count("\n")}


def of_method(method: str) -> dict[str, float]:
    """One step of `make_train_step` with a method."""
    model, batch = linen.Transformer(TRAINING), inputs(TRAINING)
    params, lora = lx.split(linen.variables(TRAINING), rank=4, method=method)
    return of_step(model, params, lora, batch)


def of_quantized() -> dict[str, float]:
    """One step of LoRA on nf4 weights."""
    model, batch = linen.Transformer(TRAINING), inputs(TRAINING)
    params, lora = lx.split(lx.quantize(linen.variables(TRAINING), "nf4"), rank=4)
    return of_step(model, params, lora, batch)


def of_step(model: Any, params: Any, lora: Any, batch: dict) -> dict[str, float]:
    apply, tx = lx.adapt(model.apply, fallback="error"), lx.train_only(optax.adamw(1e-4))

    def loss_fn(params, lora, batch, key):
        return jnp.mean(jnp.square(apply(params, lora, batch["x"]) - batch["target"]))

    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    return figures(jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0), state, params, batch)


def of_bank() -> dict[str, float]:
    """A forward pass of a batch whose rows have adapters of their own."""
    model, x = linen.Transformer(TRAINING), inputs(TRAINING)["x"]
    params, lora = linen.adapters(TRAINING)
    apply = lx.adapt(model.apply, fallback="error")

    def mixed(params, bank, ids, x):
        return jax.vmap(lambda i, x: apply(params, bank[i], x[None])[0])(ids, x)

    return figures(jax.jit(mixed), params, lx.bank([lora] * 3), jnp.arange(len(x)), x)


def compilations() -> dict[str, float]:
    """How often JAX compiles in a training run: split, five steps, another scale, merge."""
    heard: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        heard.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    model, batch = linen.Transformer(TRAINING), jax.tree.map(jnp.asarray, inputs(TRAINING))
    params, tx = jax.tree.map(jnp.asarray, linen.variables(TRAINING)), optax.adamw(1e-4)
    counted, before = {}, len(heard)

    def count(name):
        nonlocal before
        counted[name], before = len(heard) - before, len(heard)

    params, lora = lx.split(params, rank=4)
    count("split")
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    count("create a train state")
    apply = lx.adapt(model.apply, fallback="error")

    def loss_fn(params, lora, batch, key):
        return jnp.mean(jnp.square(apply(params, lora, batch["x"]) - batch["target"]))

    step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)
    for _ in range(5):
        state, _ = step(state, params, batch)
    count("five steps")
    lx.merge(params, state.lora)
    count("merge")
    again = jax.tree.map(lambda x: x + 0, state.lora)
    before = len(heard)
    lx.merge(params, again)
    count("merge again")
    return counted


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "by hand": lambda: of_peer(linen.by_hand(TRAINING)),
    "lx.adapt": lambda: of_peer(linen.adapt(TRAINING)),
    "lx.adapt, scanned and checkpointed": lambda: of_peer(linen.adapt(SCANNED)),
    "lx.adapt, decoding": lambda: of_peer(linen.adapt(DECODING)),
    "dora": lambda: of_method("dora"),
    "vera": lambda: of_method("vera"),
    "nf4": of_quantized,
    "bank": of_bank,
    "compilations": compilations,
}


def grown(found: dict, committed: dict, most: float = MOST) -> list[str]:
    """A line for each figure above what is committed, and for each that is missing on either side."""
    lines = []
    for case in sorted({*found, *committed}):
        new, old = found.get(case, {}), committed.get(case, {})
        for name in sorted({*new, *old}):
            if name not in new or name not in old:
                lines.append(f"{case}, {name}: {'not measured' if name not in new else 'not committed'}")
            elif new[name] > most * old[name]:
                lines.append(f"{case}, {name}: {new[name]:g}, committed {old[name]:g}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 if a figure grew by over 2 %"
    )
    parser.add_argument("--save", action="store_true", help="write results/guards.json")
    args = parser.parse_args()
    found = {}
    for name, measure in CASES.items():
        found[name] = measure()
        print(f"{name}: " + ", ".join(f"{what} {value:g}" for what, value in found[name].items()), flush=True)
    path = results.FOLDER / "guards.json"
    committed = results.load("guards") if path.exists() else {}
    if args.save:
        results.save("guards", {**committed, jax.__version__: found})
        return 0
    if jax.__version__ not in committed:
        print(f"nothing is committed for JAX {jax.__version__}: nothing is compared")
        return 0
    lines = grown(found, committed[jax.__version__])
    print(*lines or [f"no figure grew by more than {MOST - 1:.0%}"], sep="\n")
    return int(args.check and bool(lines))


if __name__ == "__main__":
    sys.exit(main())
