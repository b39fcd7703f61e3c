"""What every benchmark writes to `results/*.json` beside its figures: machine, versions, date.

Figures of a GPU go to files of their own, `results/gpu_*.json`.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).with_name("results")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What tells glibc's malloc to keep what a program frees, instead of returning it to the system.
KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 30),
}
TOLERANCES = {"float32": 1e-4, "TF32": 1e-3, "bfloat16": 1e-2}  # of losses, by how products are computed


def keeps_memory() -> bool:
    return KEEPING.items() <= os.environ.items()


def keep_memory() -> None:
    """Starts this program once more, in a process that keeps the memory it frees.

    XLA asks for a step's temporaries anew each time. Memory that was returned to the system then comes back
    page by page, each cleared first: about a tenth of a second in each step of `peers.py a`. Elsewhere than
    on Linux, nothing happens; nor with a GPU, whose compiler's threads would wait for each other's memory.
    """
    if sys.platform == "linux" and not keeps_memory() and not on_gpu():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEPING})


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def products() -> str:
    """How a product of float32 is computed: in TF32 on a GPU, unless JAX is told otherwise."""
    strict = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return "TF32" if on_gpu() and not strict else "float32"


def machine() -> str:
    """``2 CPU cores, AMD EPYC``, with the name of the GPU before it; cores are those this process may use."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{jax.devices()[0].device_kind}, " if on_gpu() else ""
    return f"{gpu}{cores} CPU cores, {model or 'of an unknown model'}"


def versions(*more: str) -> dict[str, str]:
    """The versions of what is installed, of these packages and ``more``."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(*more: str) -> dict[str, Any]:
    """When and where a run was made; to be called at its start, for the load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = {"date": date, "machine": machine(), "load at the start": load, "versions": versions(*more)}
    found |= {"freed memory": "kept"} if keeps_memory() else {}
    return {**found, "products of float32": products()} if on_gpu() else found


def named(name: str) -> str:
    """The name of this platform's file."""
    return f"gpu_{name}" if on_gpu() else name


def save(name: str, content: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{named(name)}.json").write_text(json.dumps(rounded(content), indent=1) + "\n")


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def held(name: str) -> dict[str, Any]:
    """What is in this platform's file, if it exists."""
    return load(named(name)) if (FOLDER / f"{named(name)}.json").exists() else {}


def rounded(x: Any) -> Any:
    """Floats to six digits, which is more than a clock can tell, and as much as a loss needs."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x
