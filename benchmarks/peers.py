"""One training step of a transformer in every library that has LoRA: the same shapes, weights and batch.

    python benchmarks/peers.py a                 # 4 layers of width 768
    python benchmarks/peers.py b                 # 12 of them, scanned and checkpointed
    python benchmarks/peers.py c                 # MiniLM with its real weights, 32 x 64 tokens
    python benchmarks/peers.py d                 # SmolLM2-135M with its real weights, 4 x 128 tokens
    python benchmarks/peers.py e                 # decoding: one token through 4 layers
    python benchmarks/peers.py a --only plain    # or libraries: half of the ways
    python benchmarks/peers.py a --only compiling --compiles 9  # nothing but the time to compile two of them
    python benchmarks/peers.py a --only counting # the compiler's counts for these two, by version of JAX
    python benchmarks/peers.py a --torch-python .venv-peft/bin/python   # and PEFT on torch
    python benchmarks/peers.py a --save          # results/peers_a.json, which draw.py draws
    python benchmarks/peers.py a --tiny          # small sizes, to try it out
    python benchmarks/peers.py a --fresh-memory  # without what results.py tells malloc
    python benchmarks/peers.py a --dtype bfloat16 --batch 64   # other arithmetic, more examples

Every way starts from the same arrays, and its losses must equal those of LoRA by hand to 1e-4 (products in
TF32 1e-3, bfloat16 1e-2) before anything is timed: those of three steps, or the first where a library has no
alpha. All train by AdamW. Then the ways take turns within each round, and ratios are computed within rounds.
A library that is not installed or that fails is listed with its error. On a GPU, torch runs there too.
"""

import argparse
import dataclasses
import sys
import time
import traceback
from typing import Any

import jax
import numpy as np
import results
from libraries import keras_lora, linen, nnx_lora, quax_lora, torch_lora
from libraries.problem import Problem
from step import in_turn, spread, table

HAND, ADAPT = "by hand", "lx.adapt"
BLOCKS = {
    "a": Problem(),
    "b": Problem(layers=12, scanned=True),
    "c": Problem(width=384, hidden=1536, layers=6, batch=32, tokens=64, model="minilm"),
    "d": Problem(
        width=576, hidden=1536, heads=9, kv_heads=3, layers=30, batch=4, scanned=True, model="smollm2"
    ),
    "e": Problem(batch=1, decode=True),
}
TINY = {"width": 48, "hidden": 96, "heads": 4, "tokens": 8, "rank": 4}


def jax_lorax(problem: Problem) -> Any:
    import lorax  # noqa: F401

    raise NotImplementedError("jax-lorax was imported, which it could not be when this was written")


REFERENCES = {HAND: linen.by_hand, ADAPT: linen.adapt}
PLAIN = {
    "full fine-tuning": linen.full,
    "merge in the loss": linen.merge_in_loss,
    "by hand, flat tokens": linen.flat_by_hand,
    "lx.adapt, dora": linen.dora,
    "limit: forward and dx": linen.limit,
}
LIBRARIES = {
    "nnx.LoRA": nnx_lora.nnx_lora,
    "qwix": linen.qwix,
    "tunix PeftTrainer": nnx_lora.tunix,
    "Keras enable_lora": keras_lora.keras_lora,
    "quax": quax_lora.quax,
    "jax-lorax": jax_lorax,
}
BARRIER = "lx.adapt, barrier"
ON_REQUEST = {BARRIER: lambda problem: linen.as_on("cpu", problem, BARRIER)}
# Of the plain ways, those that decode.
FORWARD = {"full fine-tuning", "by hand, flat tokens", "limit: forward and dx"}
TORCH = {
    "c": ["lora", "lora compiled", "full"],
    "a": ["lora", "lora compiled", "dora", "full"],
    "b": ["lora"],
    "d": ["lora", "lora compiled", "full"],
    "e": ["lora", "lora compiled", "merged"],
}
SHOWN = ("qwix", "google-tunix", "keras", "quax", "jax-lorax", "equinox")


def made(problem: Problem, makers: dict, failed: dict[str, str]) -> list[Any]:
    """The ways that can be made, compiled once; the others go to ``failed`` with their errors."""
    peers = []
    for name, make in makers.items():
        try:
            peer = make(problem)
            peer.compile()  # also warms up the compiler
            peers.append(peer)
        except (Exception, SystemExit) as error:
            if name in REFERENCES:
                raise
            lines = str(error).strip().splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
            traceback.print_exc(limit=-2)
    return peers


def check_losses(
    peers: list[Any], rtol: float, steps: int = 3
) -> tuple[list[Any], dict[str, str], dict[str, list[float]]]:
    """The peers whose losses are those of LoRA by hand (of DoRA: of `lx.adapt`), and the others by name."""
    losses = {}
    for peer in peers:
        peer.reset()
        losses[peer.name] = [peer.step()[1] for _ in range(steps)]
    kept, wrong = [], {}
    for peer in peers:
        want = (
            losses[f"{ADAPT}, dora"] if peer.kind == "dora" and f"{ADAPT}, dora" in losses else losses[HAND]
        )
        count = {"limit": 0}.get(peer.kind, steps if peer.exact else 1)
        if np.allclose(losses[peer.name][:count], want[:count], rtol=rtol, atol=0):
            kept.append(peer)
        else:
            wrong[peer.name] = f"losses {losses[peer.name][:count]}, by hand {want[:count]}"
    return kept, wrong, losses


def timed(peers: list[Any], rounds: int, inner: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of a step by name, one per round: the median of ``inner`` steps in a row."""
    by_name = {peer.name: peer for peer in peers}
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    for i in range(-warmup, rounds):
        for name in in_turn(by_name, i):
            took = [by_name[name].step()[0] for _ in range(inner)]
            if i >= 0:
                seconds[name].append(float(np.median(took)))
    return seconds


def compile_times(peers: list[Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds to trace and to compile, by name, one pair per round."""
    by_name = {peer.name: peer for peer in peers if not isinstance(peer, torch_lora.TorchPeer)}
    found: dict[str, list] = {name: [] for name in by_name}
    for i in range(rounds):
        for name in in_turn(by_name, i):
            found[name].append(by_name[name].compile())
    return found


def compiling_table(found: dict[str, dict]) -> str:
    """By block, the time to trace and to compile `adapt` over that of LoRA by hand."""
    lines = [
        ["block", "by hand: trace, compile, s", "lx.adapt: trace, compile, s", "both / by hand", "rounds"]
    ]
    for block, row in found.items():
        hand, adapt = (np.array(row["seconds"][name]) for name in (HAND, ADAPT))
        halves = [", ".join(f"{x:.2f}" for x in np.median(taken, 0)) for taken in (hand, adapt)]
        lines.append([block, *halves, spread(adapt.sum(1) / hand.sum(1)), str(len(hand))])
    return table(lines)


def replay_table(seconds: dict[str, list]) -> str:
    """Milliseconds to trace, and to compile, of each way timed."""
    lines = [["way", "trace, ms", "compile, ms"]]
    for name, taken in seconds.items():
        lines.append([name, *(f"{1e3 * x:.0f}" for x in np.median(taken, 0))])
    return table(lines)


def counting_table(found: dict[str, dict]) -> str:
    """By block and version of JAX, FLOPs and temporaries of `adapt` over those of LoRA by hand."""
    lines = [["block", "JAX", "by hand: GFLOP, temp MB", "lx.adapt: GFLOP, temp MB", "FLOPs", "temp"]]
    for block, versions in sorted(found.items()):
        for version, row in versions.items():
            hand, adapt = row["ways"][HAND], row["ways"][ADAPT]
            sizes = [f"{way['flops'] / 1e9:.2f}, {way['temp bytes'] / 1e6:.1f}" for way in (hand, adapt)]
            flops, temp = (adapt[of] / hand[of] for of in ("flops", "temp bytes"))
            lines.append([block, version, *sizes, f"{flops:.4f}", f"{temp:.3f}"])
    return table(lines)


def rows_of(peers: list[Any], seconds: dict, compiling: dict, losses: dict) -> list[dict]:
    return [
        {
            "name": peer.name,
            "seconds": seconds[peer.name],
            "trace": [pair[0] for pair in compiling.get(peer.name, [])],
            "compile": [pair[1] for pair in compiling.get(peer.name, [])],
            **peer.costs(),
            "trainable": peer.trainable,
            "losses": losses[peer.name],
        }
        for peer in peers
    ]


def printed(rows: list[dict]) -> str:
    by_name = {row["name"]: row for row in rows}
    hand, adapt = by_name[HAND], by_name[ADAPT]
    lines = [["way", "ms", "/ by hand", "/ lx.adapt", "GFLOP", "/ by hand", "MB accessed", "temp MB",
              "/ by hand", "trace + compile ms", "/ by hand", "trainable"]]  # fmt: skip
    for row in rows:
        both = np.add(row["trace"], row["compile"])
        relative = [
            f"{row[of] / hand[of]:.4f}" if of in row and hand.get(of) else "-"
            for of in ("flops", "temp bytes")
        ]
        lines.append([
            row["name"], f"{1e3 * np.median(row['seconds']):.1f}",
            *(spread(np.divide(row["seconds"], of["seconds"])) for of in (hand, adapt)),
            f"{row['flops'] / 1e9:.2f}" if "flops" in row else "-", relative[0],
            f"{row['bytes accessed'] / 1e6:.0f}" if "bytes accessed" in row else "-",
            f"{row['temp bytes'] / 1e6:.1f}" if "temp bytes" in row else "-", relative[1],
            f"{1e3 * np.median(both):.0f}" if len(both) else "-",
            f"{np.median(both / np.add(hand['trace'], hand['compile'])):.3f}" if len(both) else "-",
            str(row["trainable"]),
        ])  # fmt: skip
    return table(lines)


def of_references(args: argparse.Namespace, problem: Problem, facts: dict) -> None:
    """Times to compile the references, to decode also the model without LoRA; or the compiler's counts."""
    name = f"peers_{args.only}"
    found = results.held(name) if args.save else {}
    if args.only == "compiling":
        others = {"merged": linen.full, "replayed": linen.replayed} if problem.decode else {}
        taken = compile_times(made(problem, REFERENCES | others, {}), args.compiles)
        found[args.block] = {**facts, "seconds": taken}
        print(f"{compiling_table({args.block: found[args.block]})}\n\n{replay_table(taken)}")
    else:
        counted = {peer.name: peer.costs() for peer in made(problem, REFERENCES, {})}
        found[args.block] = found.get(args.block, {}) | {jax.__version__: {**facts, "ways": counted}}
        print(counting_table(found))
    if args.save:
        results.save(name, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("block", choices=BLOCKS)
    parts = ("plain", "libraries", "compiling", "counting")
    parser.add_argument(
        "--only",
        choices=parts,
        help="half of the ways; or of the two references the times to compile, or the compiler's counts",
    )
    parser.add_argument("--ways", nargs="*", help="names of ways, beside the references; saved as ..._more")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--inner", type=int, help="steps in a row, of which a round takes the median")
    parser.add_argument("--compiles", type=int, default=3)
    parser.add_argument("--torch-python", help="an interpreter with torch and peft")
    parser.add_argument(
        "--torch-ways", nargs="*", help="of lora, lora compiled, lora graphs, dora, full, merged"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all arrays")
    parser.add_argument("--batch", type=int, help="another number of examples")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument(
        "--fresh-memory", action="store_true", help="on a CPU, each step gets its memory from the system anew"
    )
    parser.add_argument("--save", action="store_true", help="write results/*.json")
    args = parser.parse_args()
    alone = args.only in ("compiling", "counting")  # of the references, and without their times
    if alone and (args.ways or (args.save and (args.tiny or args.dtype != "float32" or args.batch))):
        parser.error(f"--only {args.only} takes no --ways, and saves no figures of other sizes or dtypes")
    unknown = set(args.ways or ()) - {*REFERENCES, *PLAIN, *LIBRARIES, *ON_REQUEST}
    if unknown:
        parser.error(f"--ways: {sorted(unknown)} are not among {[*PLAIN, *LIBRARIES, *ON_REQUEST]}")
    if not args.fresh_memory and not alone:  # it would hold back XLA's threads
        results.keep_memory()
    problem = BLOCKS[args.block]
    if args.tiny and problem.model != "transformer":
        layers = 2 if problem.model == "smollm2" else problem.layers
        problem = dataclasses.replace(problem, batch=2, tokens=8, layers=layers)
    elif args.tiny:
        problem = dataclasses.replace(problem, layers=2, batch=min(problem.batch, 2), **TINY)
    problem = dataclasses.replace(problem, dtype=args.dtype, batch=args.batch or problem.batch)
    facts, began = results.facts(*SHOWN), time.perf_counter()
    plain = {name: make for name, make in PLAIN.items() if not problem.decode or name in FORWARD}
    if problem.model != "transformer":  # inputs are tokens; of the others, only qwix takes a model in Linen
        plain = {name: make for name, make in plain.items() if "limit" not in name}
    libraries = LIBRARIES if problem.model == "transformer" else {"qwix": linen.qwix}
    makers = REFERENCES | (plain if args.only != "libraries" else {})
    makers |= libraries if args.only != "plain" else {}
    if args.ways:
        makers |= ON_REQUEST
        makers = REFERENCES | {name: make for name, make in makers.items() if name in args.ways}
    failed: dict[str, str] = {}
    if alone:
        of_references(args, problem, facts)
        return 0
    peers = made(problem, makers, failed)
    worker = None
    if args.torch_python and args.only != "plain":
        worker = torch_lora.Worker(args.torch_python, problem, args.torch_ways or TORCH[args.block])
        peers += made(
            problem, {w: lambda _, w=w: torch_lora.TorchPeer(worker, w) for w in worker.answers}, failed
        )
        answer = next(iter(worker.answers.values()))
        facts["versions"] |= {name: answer[name] for name in ("torch", "peft")}
    print(
        f"{facts['machine']}; JAX {jax.__version__}; {problem}; set up in {time.perf_counter() - began:.0f} s"
    )
    compiling = compile_times(peers, args.compiles)
    products = results.products() if problem.dtype == "float32" else problem.dtype
    peers, wrong, losses = check_losses(peers, results.TOLERANCES[products])
    for peer in peers:
        peer.reset()
    seconds = timed(peers, args.rounds, args.inner or (20 if problem.decode else 1))
    rows = rows_of(peers, seconds, compiling, losses)
    print(f"\n{printed(rows)}\n\nmedian [quartiles] of {args.rounds} rounds; compilations: {args.compiles}")
    for name, why in {**failed, **wrong}.items():
        print(f"not timed: {name}: {why}")
    if worker:
        worker.close()
    if args.save:
        parts = ["more" if args.ways else args.only, products.lower() if products != "float32" else None]
        parts += [f"batch{args.batch}" if args.batch else None, "fresh" if args.fresh_memory else None]
        name = "_".join([f"peers_{args.block}", *(part for part in parts if part)])
        shape = dataclasses.asdict(problem)
        results.save(name, {**facts, "problem": shape, "rows": rows, "not timed": failed | wrong})
    return 0


if __name__ == "__main__":
    sys.exit(main())
