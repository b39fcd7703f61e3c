"""One AdamW step, timed four ways: full fine-tuning, merging in the loss, LoRA by hand, `lx.adapt`.

    python benchmarks/step.py                 # the table of README.md
    python benchmarks/step.py --quick         # fewer rounds and compilations, for CI
    python benchmarks/step.py --check         # exit with status 1 if a target is missed

The model is a pre-LN transformer in plain Flax Linen: `nn.Dense` projections and explicit attention. All
variants use the same modules; LoRA by hand replaces `nn.Dense` by `LoRADense` below. All four start from the
same function (B is not zero, and full fine-tuning starts from the merged weights), and their losses are
compared before anything is timed. Seconds depend on the machine and its load, so the variants take turns
within each round, and ratios are computed within rounds.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx

FULL, MERGE, HAND, ADAPT = "full", "merge in loss", "by hand", "adapt"
TARGETS = {  # (measure, against) -> at most
    ("time", HAND): 0.95,
    ("time", FULL): 0.75,
    ("flops", HAND): 1.002,
    ("temp bytes", HAND): 1.02,
    ("trace + compile", HAND): 1.15,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shape of the model, the batch and the adapters."""

    width: int = 768
    hidden: int = 3072
    heads: int = 12
    layers: int = 4
    batch: int = 8
    tokens: int = 128
    rank: int = 16
    alpha: float = 32.0


# The model has no code for LoRA: its linear layers are made by `dense`, which is nn.Dense.


class Attention(nn.Module):
    """Softmax attention with one `dense` each for q, k, v and the output."""

    heads: int
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x):
        *batch, tokens, width = x.shape
        split = (*batch, tokens, self.heads, width // self.heads)
        q, k, v = (self.dense(width, name=name)(x).reshape(split) for name in "qkv")
        # Python's numbers, because they leave the dtype of bfloat16 as it is.
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))
        scores = jnp.where(causal, scores, -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return self.dense(width, name="o")(mixed.reshape(x.shape))


class Transformer(nn.Module):
    """Pre-LN blocks: ``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``."""

    sizes: Sizes
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x):
        for i in range(self.sizes.layers):
            mixed = Attention(self.sizes.heads, self.dense, name=f"attention_{i}")
            x = x + mixed(nn.LayerNorm(name=f"norm_attention_{i}")(x))
            h = nn.LayerNorm(name=f"norm_mlp_{i}")(x)
            h = nn.gelu(self.dense(self.sizes.hidden, name=f"up_{i}")(h))
            x = x + self.dense(self.sizes.width, name=f"down_{i}")(h)
        return nn.LayerNorm(name="norm")(x)


class LoRADense(nn.Module):
    """LoRA as usually written by hand: ``y`` of nn.Dense, with bias, and then ``y + s * ((x @ a) @ b)``."""

    features: int
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x):
        n = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (n, self.features))
        y = x @ kernel + self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.variable("lora", "a", jnp.zeros, (n, self.rank)).value
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features)).value
        return y + self.scale * ((x @ a) @ b)


# The variants. Each is a loss of (trainable, frozen, batch); one optimizer steps them all.


@dataclasses.dataclass
class Variant:
    """A way to train: the loss to differentiate, what trains, and what does not."""

    loss: Callable[[], Callable]  # created for each compilation, so that none is reused
    trainable: Any
    frozen: Any

    def step(self) -> Callable:
        loss, tx = self.loss(), optax.adamw(1e-4)

        def step(trainable, state, frozen, batch):
            value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        return jax.jit(step, donate_argnums=(0, 1))

    def gradient(self) -> Callable:
        return jax.jit(jax.value_and_grad(self.loss()))

    def fresh(self) -> tuple[Any, Any]:
        """Copies of what trains and of its optimizer state, which a step donates."""
        trainable = jax.tree.map(jnp.array, self.trainable)
        return trainable, optax.adamw(1e-4).init(trainable)


def mse(output, batch):
    return jnp.mean(jnp.square(output - batch["target"]))


def make_variants(sizes: Sizes) -> tuple[dict[str, Variant], dict[str, jax.Array]]:
    """The four ways, from one set of weights and factors."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (sizes.batch, sizes.tokens, sizes.width)
    batch = {"x": jax.random.normal(keys[0], shape), "target": jax.random.normal(keys[1], shape)}
    model = Transformer(sizes)
    params = jax.jit(model.init)(keys[2], batch["x"])
    params, lora = lx.split(params, rank=sizes.rank, alpha=sizes.alpha)
    if len(lora) != 6 * sizes.layers:
        raise SystemExit(f"{len(lora)} weights adapted, not six a layer: {sorted(lora)}")
    noise = jax.random.split(keys[3], len(lora))
    lora = {  # with B = 0, comparing losses would prove nothing
        path: dataclasses.replace(adapter, b=0.02 * jax.random.normal(key, adapter.b.shape))
        for key, (path, adapter) in zip(noise, lora.items(), strict=True)
    }
    factors = flax.traverse_util.unflatten_dict(
        {
            (*path.split("/")[1:-1], name): getattr(adapter, name)
            for path, adapter in lora.items()
            for name in "ab"
        }
    )

    def dense(features, name):
        return LoRADense(features, rank=sizes.rank, scale=sizes.alpha / sizes.rank, name=name)

    by_hand = Transformer(sizes, dense)

    def full_loss():
        return lambda trainable, _, batch: mse(model.apply(trainable, batch["x"]), batch)

    def merge_loss():
        return lambda lora, params, batch: mse(model.apply(lx.merge(params, lora), batch["x"]), batch)

    def hand_loss():
        return lambda factors, params, batch: mse(
            by_hand.apply({**params, "lora": factors}, batch["x"]), batch
        )

    def adapt_loss():
        apply = lx.adapt(model.apply, fallback="error")
        return lambda lora, params, batch: mse(apply(params, lora, batch["x"]), batch)

    variants = {
        FULL: Variant(full_loss, lx.merge(params, lora), {}),
        MERGE: Variant(merge_loss, lora, params),
        HAND: Variant(hand_loss, factors, params),
        ADAPT: Variant(adapt_loss, lora, params),
    }
    return variants, batch


# Measuring.


def lowered(variant: Variant, batch: dict, what: str) -> Any:
    if what == "gradient":
        return variant.gradient().lower(variant.trainable, variant.frozen, batch)
    return variant.step().lower(*variant.fresh(), variant.frozen, batch)


def compile_times(variants: dict[str, Variant], batch: dict, rounds: int) -> tuple[dict, dict]:
    """Seconds to trace and to compile a step with cleared caches, by name: ``[rounds, 2]``."""
    seconds: dict[str, list] = {name: [] for name in variants}
    programs = {}
    for i in range(rounds + 1):  # the first round warms up the compiler itself
        for name in in_turn(variants, i):
            args = (*variants[name].fresh(), variants[name].frozen, batch)
            jax.block_until_ready(args)
            jax.clear_caches()
            start = time.perf_counter()
            lowering = variants[name].step().lower(*args)
            middle = time.perf_counter()
            programs[name] = lowering.compile()
            if i:
                seconds[name].append((middle - start, time.perf_counter() - middle))
    return {name: np.array(pairs) for name, pairs in seconds.items()}, programs


def in_turn(names: Any, i: int) -> list[str]:
    """Another order each round, so that no variant always follows the same one."""
    names = list(names)
    start = i % len(names)
    names = names[start:] + names[:start]
    return names if (i // len(names)) % 2 == 0 else names[::-1]


def timed(runs: dict[str, tuple], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each round by name, of ``name: (function, arguments)``, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-warmup, rounds):
        for name in in_turn(runs, i):
            run, args = runs[name]
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check_losses(variants: dict, programs: dict, batch: dict, steps: int = 3) -> dict[str, list[float]]:
    """Checks that all variants begin with the same loss, and the three of the same factors keep it equal."""
    losses: dict[str, list[float]] = {}
    for name, variant in variants.items():
        trainable, state = variant.fresh()
        losses[name] = []
        for _ in range(steps):
            trainable, state, loss = programs[name](trainable, state, variant.frozen, batch)
            losses[name].append(float(loss))
    for name, values in losses.items():
        count = 1 if name == FULL else steps
        np.testing.assert_allclose(values[:count], losses[HAND][:count], rtol=1e-4, err_msg=name)
    return losses


def step_times(
    variants: dict, programs: dict, batch: dict, rounds: int, warmup: int
) -> dict[str, np.ndarray]:
    """Seconds of a step by name, ``[rounds]``; the variants take turns within each round."""
    states = {name: variant.fresh() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-warmup, rounds):
        for name in in_turn(variants, i):
            jax.block_until_ready(states[name])
            start = time.perf_counter()
            *state, loss = programs[name](*states[name], variants[name].frozen, batch)
            jax.block_until_ready((state, loss))
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
            states[name] = tuple(state)
    return {name: np.array(values) for name, values in seconds.items()}


def costs(program: Any) -> dict[str, float]:
    analysis, memory = program.cost_analysis(), program.memory_analysis()
    return {"flops": analysis["flops"], "temp bytes": memory.temp_size_in_bytes}


# Reporting.


def spread(ratios: np.ndarray) -> str:
    return with_quartiles(*np.percentile(ratios, [25, 50, 75]))


def with_quartiles(low: float, middle: float, high: float) -> str:
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def cost_rows(found: dict[str, dict], of: str) -> list[list[str]]:
    rows = [[of, "GFLOP", "/ by hand", "temp MB", "/ by hand"]]
    for name, cost in found.items():
        flops, temp = cost["flops"] / found[HAND]["flops"], cost["temp bytes"] / found[HAND]["temp bytes"]
        rows.append([name, f"{cost['flops'] / 1e9:.2f}", f"{flops:.4f}",
                     f"{cost['temp bytes'] / 1e6:.1f}", f"{temp:.3f}"])  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Times one training step four ways.")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 25, with --quick 5)")
    parser.add_argument(
        "--compiles", type=int, help="timed compilations of each (default: 7, with --quick 3)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and compilations, for CI")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    args = parser.parse_args()
    rounds = args.rounds or (5 if args.quick else 25)
    compiles = args.compiles or (3 if args.quick else 7)

    variants, batch = make_variants(Sizes())
    device = jax.devices()[0]
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{device.device_kind}, {os.cpu_count()} cores{load}; JAX {jax.__version__}; {Sizes()}\n")
    compiling, programs = compile_times(variants, batch, compiles)
    losses = check_losses(variants, programs, batch)
    print(
        "losses of the first steps, equal to 1e-4:", ", ".join(f"{v[0]:.6f}" for v in losses.values()), "\n"
    )
    seconds = step_times(variants, programs, batch, rounds, warmup=2)

    rows = [
        ["variant", "ms / step", "/ by hand", "/ full", "trace ms", "compile ms", "trace + compile / by hand"]
    ]
    for name, took in seconds.items():
        trace, build = 1e3 * np.median(compiling[name], axis=0)
        both = compiling[name].sum(1) / compiling[HAND].sum(1)
        rows.append([name, f"{1e3 * np.median(took):.0f}", spread(took / seconds[HAND]),
                     spread(took / seconds[FULL]), f"{trace:.0f}", f"{build:.0f}", spread(both)])  # fmt: skip
    print(f"{table(rows)}\n\nmedian [quartiles] of {rounds} rounds; compilations: {compiles}\n")
    found = {name: costs(program) for name, program in programs.items()}
    gradient = {name: costs(lowered(v, batch, "gradient").compile()) for name, v in variants.items()}
    print(
        table(cost_rows(found, "step")), table(cost_rows(gradient, "gradient only")), sep="\n\n", end="\n\n"
    )

    missed = 0
    for (measure, against), most in TARGETS.items():
        if measure == "time":
            ratio = float(np.median(seconds[ADAPT] / seconds[against]))
        elif measure == "trace + compile":
            ratio = float(np.median(compiling[ADAPT].sum(1) / compiling[against].sum(1)))
        else:
            ratio = max(of[ADAPT][measure] / of[against][measure] for of in (found, gradient))
        missed += ratio > most
        print(
            f"{'MISS' if ratio > most else 'PASS'}  {measure} / {against}: {ratio:.4f}, target at most {most}"
        )
    return int(args.check and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
