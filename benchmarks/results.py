"""What every benchmark writes to `results/*.json` beside its figures: machine, versions, date."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def machine() -> str:
    """``2 CPU cores, AMD EPYC``."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    return f"{os.cpu_count()} CPU cores, {model or 'of an unknown model'}"


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
    return {"date": date, "machine": machine(), "load at the start": load, "versions": versions(*more)}


def save(name: str, content: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(rounded(content), indent=1) + "\n")


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def rounded(x: Any) -> Any:
    """Floats to six digits, which is more than a clock can tell, and as much as a loss needs."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x
