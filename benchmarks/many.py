"""Many adapters over one base: a mixed batch by `lx.bank`, beside one adapter, loops, merged copies, PEFT.

    python benchmarks/many.py                 # the tables of README.md
    python benchmarks/many.py --quick         # fewer rounds and adapters, for CI
    python benchmarks/many.py --check         # exit with status 1 where a target is missed
    python benchmarks/many.py --json many.json

The model is that of step.py, written for rows of any number of axes. The rows of the mixed batch are
compared with each adapter's own before anything is timed. Variants take turns within each round, and ratios
are formed within rounds: of wall time, and of CPU time, which other programs on the machine disturb less.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import results
from step import Sizes

import lorax_fn as lx

TARGETS = {("clock", 64): 1.10, ("flops", 64): 1.02}  # a mixed batch against one adapter for all of it


class Block(nn.Module):
    """One pre-LN block; leading axes of ``x`` are rows, any number of them."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        width, heads = self.sizes.width, self.sizes.heads
        h = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(width, name=n)(h).reshape(*h.shape[:-1], heads, -1) for n in "qkv")
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / jnp.sqrt(jnp.float32(width // heads))
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = nn.softmax(jnp.where(causal, scores, jnp.float32(-1e30)))
        x = x + nn.Dense(width, name="o")(jnp.einsum("...hqk,...khd->...qhd", scores, v).reshape(x.shape))
        h = nn.gelu(nn.Dense(self.sizes.hidden, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(h)


class Model(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        for i in range(self.sizes.layers):
            x = Block(self.sizes, name=f"block_{i}")(x)
        return x


def adapters(params, count, rank):
    rng = np.random.default_rng(0)
    _, lora = lx.split(params, rank)
    return [
        jax.tree.map(lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), lora)
        for _ in range(count)
    ]


def variants(sizes, count):
    """Compiled calls of no arguments by name, and the FLOPs and temp bytes of each program."""
    model = Model(sizes)
    x = jax.random.normal(jax.random.key(0), (sizes.batch, sizes.tokens, sizes.width))
    params = jax.jit(model.init)(jax.random.key(1), x[:1])
    loras, apply = adapters(params, count, sizes.rank), lx.adapt(model.apply)
    bank, ids = lx.bank(loras), jnp.arange(sizes.batch) % count
    rows = [np.flatnonzero(np.asarray(ids) == i) for i in range(count)]
    used = [i for i in range(count) if len(rows[i])]

    one = jax.jit(apply)
    mixed = jax.jit(lambda params, bank, ids, x: jax.vmap(lambda i, x: apply(params, bank[i], x))(ids, x))
    plain = jax.jit(model.apply)
    programs = {
        "one adapter": one.lower(params, loras[0], x).compile(),
        "bank": mixed.lower(params, bank, ids, x).compile(),
    }
    groups = {i: x[rows[i]] for i in used}
    merged = {i: lx.merge(params, loras[i]) for i in used}

    def loop():
        return [one(params, loras[i], groups[i]) for i in used]

    calls = {
        "one adapter": lambda: programs["one adapter"](params, loras[0], x),
        "bank": lambda: programs["bank"](params, bank, ids, x),
        "loop over adapters": loop,
        "merged copies": lambda: [plain(merged[i], groups[i]) for i in used],
    }
    want = loop()
    got = calls["bank"]()
    tolerance = 1e-4 if results.products() == "float32" else 1e-2
    for i, alone in zip(used, want, strict=True):
        np.testing.assert_allclose(got[rows[i]], alone, rtol=0, atol=tolerance * np.abs(alone).max())
    costs = {
        name: (program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes)
        for name, program in programs.items()
    }
    return calls, costs


def peft_call(sizes, count):
    """PEFT's mixed batch (`adapter_names`) on blocks of the same linear layers, in torch; None without it."""
    try:
        import peft
        import torch
    except ImportError:
        return None
    torch.set_grad_enabled(False)
    device = "cuda" if results.on_gpu() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = results.products() == "TF32"
    width, hidden, heads = sizes.width, sizes.hidden, sizes.heads

    class TorchBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in "qkvo":
                setattr(self, name, torch.nn.Linear(width, width))
            self.up, self.down = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
            self.first, self.second = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)

        def forward(self, x):
            h = self.first(x)
            q, k, v = (getattr(self, n)(h).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
            h = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(h.transpose(1, 2).flatten(2))
            return x + self.down(torch.nn.functional.gelu(self.up(self.second(x)), approximate="tanh"))

    net = torch.nn.Sequential(*(TorchBlock() for _ in range(sizes.layers)))
    config = peft.LoraConfig(r=sizes.rank, target_modules=[*"qkvo", "up", "down"], init_lora_weights=False)
    net = peft.get_peft_model(net, config, "0")
    for i in range(1, count):
        net.add_adapter(str(i), config)
    net.eval().to(device)
    x = torch.randn(sizes.batch, sizes.tokens, width, device=device)
    names = [str(i % count) for i in range(sizes.batch)]

    def waited(**options):
        y = net(x, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        else:
            y.numpy()

    return {"PEFT, mixed batch": lambda: waited(adapter_names=names), "PEFT, one adapter": waited}


def timed(calls, rounds):
    """Wall and CPU seconds ``[rounds]`` by name; the order of the variants changes from round to round."""
    wall, cpu = {name: [] for name in calls}, {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for round_ in range(rounds):
        names = list(calls)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name]())
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    return {k: np.array(v) for k, v in wall.items()}, {k: np.array(v) for k, v in cpu.items()}


def measured(sizes, counts, rounds):
    """One dict per number of adapters and variant; ratios are medians of those within each round."""
    found = []
    for count in counts:
        calls, costs = variants(sizes, count)
        wall, cpu = timed(calls, rounds)
        theirs = peft_call(sizes, count)
        if theirs is not None:  # timed apart: torch's threads spin for a while after each call
            for into, new in zip((wall, cpu), timed(theirs, rounds), strict=True):
                into |= new
        for name in wall:
            one = "PEFT, one adapter" if name.startswith("PEFT") else "one adapter"
            row = {
                "adapters": count,
                "variant": name,
                "ms": float(np.median(wall[name]) * 1e3),
                "beside": one,
            }
            row |= {
                what: float(np.median(t[name] / t[one])) for what, t in (("clock", wall), ("processor", cpu))
            }
            if name in costs:
                flops, temp = costs[name]
                row |= {"flops": flops / costs["one adapter"][0], "temp_mb": temp / 1e6}
            found.append(row)
    return found


def show(title, rows):
    print(f"\n{title}\n")
    print(
        "| adapters | variant | ms | clock / one adapter | processor / one adapter | FLOPs / one | temp MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        flops = f"{row['flops']:.4f} | {row['temp_mb']:.1f}" if "flops" in row else " | "
        ratios = f"{row['clock']:.3f} | {row['processor']:.3f}"
        print(f"| {row['adapters']} | {row['variant']} | {row['ms']:.1f} | {ratios} | {flops} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    counts, rounds = ([4, 64], 3) if options.quick else ([1, 4, 16, 64], 8)
    facts = results.facts("torch", "peft")
    tables = {
        "Prompts: 16 rows of 64 tokens": measured(Sizes(batch=16, tokens=64), counts, rounds),
        "Decoding: 32 rows of one token": measured(Sizes(batch=32, tokens=1), counts, 3 * rounds),
    }
    for title, rows in tables.items():
        show(title, rows)
    print(f"\nmedians of {rounds} and {3 * rounds} rounds; {facts}\n")
    if options.json:
        options.json.write_text(json.dumps({**facts, "rounds": rounds, "tables": tables}, indent=1) + "\n")
    bank = {row["adapters"]: row for row in next(iter(tables.values())) if row["variant"] == "bank"}
    missed = False
    for (what, count), most in TARGETS.items():
        value = bank[count][what]
        missed |= value > most
        said = "PASS" if value <= most else "MISS"
        print(f"{said}  {what} of {count} adapters / one: {value:.4f}, target at most {most}")
    sys.exit(1 if missed and options.check else 0)


if __name__ == "__main__":
    main()
