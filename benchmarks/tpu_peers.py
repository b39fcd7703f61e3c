"""The training steps of `peers.py`, as the TPU compiler counts them: no TPU is needed, and none is used.

    pip install "jax[tpu]"                        # libtpu is the compiler
    python benchmarks/tpu_peers.py                # blocks a and b in bfloat16 and float32: half an hour
    python benchmarks/tpu_peers.py a --dtypes bfloat16
    python benchmarks/tpu_peers.py --save         # results/tpu_peers.json, which draw.py shows

Every way of `peers.py` that is plain JAX is compiled for one v5e chip. Beside FLOPs, bytes accessed and bytes
of temporaries stands the compiler's own estimate of the time. With bfloat16 every array has that dtype,
factors and optimizer state included. "no barrier" is `lx.adapt` without the optimization barrier that it puts
before the gradient of a factor.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

# libtpu does not need these to compile, but without them it would look for the machine that they describe.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so others may compile too
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import results
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from libraries import linen, nnx_lora
from libraries.measured import counts
from libraries.problem import Problem
from step import table

from lorax_fn.transform import contractions

HAND, ADAPT, WITHOUT = "by hand", "lx.adapt", "lx.adapt, no barrier"
BLOCKS = {"a": Problem(), "b": Problem(layers=12, scanned=True)}
WAYS: dict[str, Callable] = {
    ADAPT: linen.adapt,
    WITHOUT: linen.adapt,
    HAND: linen.by_hand,
    "by hand, flat tokens": linen.flat_by_hand,
    "nnx.LoRA": nnx_lora.nnx_lora,
    "qwix": linen.qwix,
    "full fine-tuning": linen.full,
    "merge in the loss": linen.merge_in_loss,
    "limit: forward and dx": linen.limit,
}
COLUMNS = {"flops": 1e9, "bytes accessed": 1e6, "temp bytes": 1e6, "optimal_seconds": 1e-3}


def compiled(peer: Any, dtype: Any) -> Any:
    """The step of a way for one chip, all of whose floats are of this dtype."""
    chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    where = SingleDeviceSharding(chip)

    def placed(x):
        kind = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=where)

    given = jax.tree.map(placed, (peer.start, peer.fixed))
    return jax.jit(peer.make_step(), donate_argnums=0).lower(*given).compile()


def measured(name: str, problem: Problem, dtype: Any) -> dict[str, float]:
    peer = WAYS[name](problem)
    jax.clear_caches()
    began = time.perf_counter()
    if name == WITHOUT:
        with mock.patch.object(contractions, "_with_flat_gradient", lambda factor, other: factor):
            program = compiled(peer, dtype)
    else:
        program = compiled(peer, dtype)
    seconds = time.perf_counter() - began
    optimal = program.cost_analysis().get("optimal_seconds")
    return {**counts(program), "optimal_seconds": optimal, "to build, s": seconds}


def printed(rows: list[dict]) -> str:
    hand = next(row for row in rows if row["name"] == HAND)
    lines = [["way", "GFLOP", "/ by hand", "MB accessed", "/ by hand", "temp MB", "/ by hand", "optimal ms",
              "/ by hand", "to build, s"]]  # fmt: skip
    for row in rows:
        cells = [row["name"]]
        for of, unit in COLUMNS.items():
            cells += [f"{row[of] / unit:.3f}", f"{row[of] / hand[of]:.4f}"]
        lines.append([*cells, f"{row['to build, s']:.0f}"])
    return table(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", nargs="*", help="a, b; default: both")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--save", action="store_true", help="write results/tpu_peers.json")
    args = parser.parse_args()
    path = results.FOLDER / "tpu_peers.json"
    facts = results.facts("libtpu", "qwix")
    tables = results.load("tpu_peers")["tables"] if path.exists() else {}
    for block in args.blocks or BLOCKS:
        problem = BLOCKS[block]
        if args.tiny:
            problem = dataclasses.replace(problem, width=128, hidden=256, heads=2, layers=2, tokens=32)
        for dtype in args.dtypes:
            rows = []
            for name in args.ways:
                try:
                    rows.append({"name": name, **measured(name, problem, jnp.dtype(dtype))})
                except Exception as error:  # said in the table: a way that does not compile is a finding
                    print(f"not compiled: {name}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                print(rows[-1], flush=True)
            print(f"\n{block}, {dtype}: {problem}\n\n{printed(rows)}\n", flush=True)
            tables[f"{block}, {dtype}"] = rows
            if args.save:
                results.save("tpu_peers", {**facts, "tables": tables})
    return 0


if __name__ == "__main__":
    sys.exit(main())
