"""Chips for the TPU's compiler, libtpu, on a machine that has none."""

import os
from typing import Any

from jax.experimental import topologies


def topology(name: str) -> Any:
    """Describes the chips of a topology such as ``"v5e:2x2"``."""
    # libtpu does not need these to compile; without them it would look for the machine that they describe.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so others may compile too
    return topologies.get_topology_desc(name, platform="tpu")


def one_chip() -> Any:
    """A chip of the kind v5e."""
    return topology("v5e:2x2").devices[0]
