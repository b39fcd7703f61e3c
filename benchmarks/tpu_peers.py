"""The training steps of `peers.py`, as the TPU compiler counts them: no TPU is needed, and none is used.

    pip install "jax[tpu]"                        # libtpu is the compiler
    python benchmarks/tpu_peers.py                # blocks a and b in bfloat16 and float32: half an hour
    python benchmarks/tpu_peers.py a --dtypes bfloat16
    python benchmarks/tpu_peers.py --save         # results/tpu_peers.json, which draw.py shows

Every way of `peers.py` that is plain JAX is compiled for one v5e chip. With bfloat16 every array has that
dtype, factors and optimizer state included; in "factors in float32" these stay as `split` makes them. "no
barrier" is `lx.adapt` without the optimization barrier that it puts before the gradient of a factor. The
compiler's `optimal_seconds` is kept in the results, but not shown: it is negative for these programs.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import results
from jax.sharding import SingleDeviceSharding
from libraries import linen, nnx_lora, tpu
from libraries.measured import counts
from libraries.problem import Problem
from step import table

HAND, ADAPT, WITHOUT = "by hand", "lx.adapt", "lx.adapt, no barrier"
WIDE = "lx.adapt, factors in float32"
BLOCKS = {"a": Problem(), "b": Problem(layers=12, scanned=True)}
WAYS: dict[str, Callable] = {
    ADAPT: linen.adapt,
    WITHOUT: lambda problem: linen.as_on("gpu", problem, WITHOUT),
    WIDE: linen.adapt,
    HAND: linen.by_hand,
    "by hand, flat tokens": linen.flat_by_hand,
    "nnx.LoRA": nnx_lora.nnx_lora,
    "qwix": linen.qwix,
    "full fine-tuning": linen.full,
    "merge in the loss": linen.merge_in_loss,
    "limit: forward and dx": linen.limit,
}
COLUMNS = {"flops": 1e9, "bytes accessed": 1e6, "temp bytes": 1e6}


def compiled(peer: Any, dtype: Any, trained: Any) -> Any:
    """The step of a way for one chip; ``trained`` is the dtype of what the step carries."""
    where = SingleDeviceSharding(tpu.one_chip())

    def placed(x, dtype):
        kind = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=where)

    given = [jax.tree.map(lambda x, kind=kind: placed(x, kind), tree)
             for tree, kind in ((peer.start, trained), (peer.fixed, dtype))]  # fmt: skip
    return jax.jit(peer.make_step(), donate_argnums=0).lower(*given).compile()


def measured(name: str, problem: Problem, dtype: Any) -> dict[str, float]:
    peer = WAYS[name](problem)
    jax.clear_caches()
    began, trained = time.perf_counter(), jnp.dtype("float32") if name == WIDE else dtype
    program = compiled(peer, dtype, trained)
    seconds = time.perf_counter() - began
    optimal = program.cost_analysis().get("optimal_seconds")
    return {**counts(program), "optimal_seconds": optimal, "to build, s": seconds}


def printed(rows: list[dict]) -> str:
    hand = next((row for row in rows if row["name"] == HAND), rows[0])
    lines = [["", "GFLOP", "/ by hand", "MB accessed", "/ by hand", "temp MB", "/ by hand"]]
    for row in rows:
        cells = [row["name"]]
        for of, unit in COLUMNS.items():
            cells += [f"{row[of] / unit:.3f}", f"{row[of] / hand[of]:.4f}"]
        lines.append(cells)
    return table(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", nargs="*", help="a, b; default: both")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--save", action="store_true", help="write results/tpu_peers.json")
    args = parser.parse_args()
    facts = results.facts("libtpu", "qwix")
    tables = {} if args.tiny else results.held("tpu_peers").get("tables", {})
    for block in args.blocks or BLOCKS:
        problem = BLOCKS[block]
        if args.tiny:
            problem = dataclasses.replace(problem, width=128, hidden=256, heads=2, layers=2, tokens=32)
        for dtype in args.dtypes:
            rows = tables.setdefault(f"{block}, {dtype}", {})
            for name in args.ways:
                try:
                    rows[name] = {"name": name, **measured(name, problem, jnp.dtype(dtype))}
                except Exception as error:  # said, not hidden: a way that does not compile is a finding
                    print(f"not compiled: {name}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                print(rows[name], flush=True)
                if args.save:  # after each way, as each takes its time
                    results.save("tpu_peers", {**facts, "tables": tables})
            print(f"\n{block}, {dtype}: {problem}\n\n{printed(list(rows.values()))}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
