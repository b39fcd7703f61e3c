"""LoRA on quantized weights: bytes and time of a step beside float weights, and what unpacking costs.

    python benchmarks/qlora.py              # two minutes on two cores
    python benchmarks/qlora.py --save       # results/qlora.json
    python benchmarks/qlora.py --torch-python .venv-peft/bin/python   # and PEFT on bitsandbytes

The model is a stack of layers ``tanh(x @ W)`` with LoRA of rank 16 on each, and a step is one of AdamW.
Unpacking is measured alone too: all weights to float32, beside a copy of as many float32 numbers, which is
the memory's limit.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from step import spread, table, timed

import lorax_fn as lx

FORMATS = ("float32", "bfloat16", "nf4", "int8", "int4")
TORCH = """
import json, sys, time, torch, peft, bitsandbytes as bnb
layers, width, tokens, rounds, device, tf32 = json.loads(sys.argv[1])
torch.backends.cuda.matmul.allow_tf32 = tf32
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
def net(linear):
    return torch.nn.Sequential(*(m for _ in range(layers) for m in (linear(), torch.nn.Tanh())))
def make(linear):
    model = net(linear)
    names = [str(2 * i) for i in range(layers)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names)).to(device)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
def nf4():
    layer = bnb.nn.Linear4bit(width, width, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(width, width) / width**0.5
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to(device)
x = torch.randn(tokens, width, device=device)
ways = {"torch float32": make(lambda: torch.nn.Linear(width, width, bias=False)), "torch nf4": make(nf4)}
found = {name: [] for name in ways}
for i in range(-2, rounds):
    for name, (model, tx) in ways.items():
        wait()
        start = time.perf_counter()
        tx.zero_grad(); model(x).square().mean().backward(); tx.step()
        wait()
        if i >= 0: found[name].append(time.perf_counter() - start)
size = sum(p.nbytes for n, p in ways["torch nf4"][0].named_parameters() if "base_layer" in n)
versions = {module.__name__: module.__version__ for module in (torch, peft, bnb)}
print(json.dumps({"seconds": found, "bytes": size, "versions": versions}))
"""


def model(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"])
    return x


def stored(params: Any, name: str) -> Any:
    if name in ("float32", "bfloat16"):
        return jax.tree.map(lambda x: x.astype(name), params)
    return lx.quantize(params, name)


def size_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def compiled_step(params: Any, x: jax.Array) -> tuple[Any, Any]:
    params, lora = lx.split(params, rank=16)
    apply, tx = lx.adapt(model, fallback="error"), optax.adamw(1e-4)

    def step(carried, params, x):
        lora, state = carried
        loss = lambda lora: jnp.mean(jnp.square(apply(params, lora, x).astype(jnp.float32)))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state, lora)
        return (optax.apply_updates(lora, updates), state), value

    start = jax.block_until_ready((lora, tx.init(lora)))
    return jax.jit(step).lower(start, params, x).compile(), (start, params, x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--torch-python", help="an interpreter with torch, peft and bitsandbytes")
    parser.add_argument("--save", action="store_true", help="write results/qlora.json")
    args = parser.parse_args()
    facts = results.facts()
    keys = jax.random.split(jax.random.key(0), args.layers)
    params = [{"kernel": jax.random.normal(key, 2 * (args.width,)) / args.width**0.5} for key in keys]
    count = args.layers * args.width**2
    x = jax.random.normal(jax.random.key(1), (args.tokens, args.width))
    forms = {name: stored(params, name) for name in FORMATS}
    steps = {
        name: compiled_step(form, x.astype("bfloat16") if name == "bfloat16" else x)
        for name, form in forms.items()
    }
    took = timed(steps, args.rounds, warmup=2)
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1.0, tree))
    unpack = {"float32": (copy, (params,))}
    for name in FORMATS[2:]:
        unpack[name] = jax.jit(lambda form: lx.dequantize(form)), (forms[name],)
    unpacking = timed(unpack, args.rounds, warmup=2)
    rows = [
        {
            "name": name,
            "seconds": took[name],
            "weight bytes": size_of(forms[name]),
            "temp bytes": steps[name][0].memory_analysis().temp_size_in_bytes,
            "unpack seconds": unpacking.get(name, []),
            "ns per weight": 1e9 * float(np.median(unpacking[name])) / count if name in unpacking else None,
        }
        for name in FORMATS
    ]
    found: dict[str, Any] = {"weights": count, "rows": rows}
    if args.torch_python:
        where = "cuda" if results.on_gpu() else "cpu", results.products() == "TF32"
        sizes = json.dumps([args.layers, args.width, args.tokens, args.rounds, *where])
        done = subprocess.run([args.torch_python, "-c", TORCH, sizes], capture_output=True, text=True)
        if done.returncode:
            found["torch failed"] = done.stderr.strip().splitlines()[-1][:200]
            print(f"torch: {found['torch failed']}")
        else:
            answer = json.loads(done.stdout.splitlines()[-1])
            facts["versions"] |= answer["versions"]
            for name, seconds in answer["seconds"].items():
                size = answer["bytes"] if name == "torch nf4" else 4 * count
                rows.append({"name": name, "seconds": seconds, "weight bytes": size})
    lines = [["weights", "ms / step", "/ float32", "weights MB", "temp MB", "unpacking, ns per weight"]]
    for row in rows:
        base = next(
            r for r in rows if r["name"] == ("torch float32" if "torch" in row["name"] else "float32")
        )
        lines.append([
            row["name"], f"{1e3 * np.median(row['seconds']):.1f}",
            spread(np.divide(row["seconds"], base["seconds"])), f"{row['weight bytes'] / 1e6:.1f}",
            f"{row['temp bytes'] / 1e6:.1f}" if "temp bytes" in row else "-",
            f"{row['ns per weight']:.3f}" if row.get("ns per weight") else "-",
        ])  # fmt: skip
    print(table(lines))
    if args.save:
        sizes = {"layers": args.layers, "width": args.width, "tokens": args.tokens, "rank": 16}
        results.save("qlora", {**facts, "sizes": sizes, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
