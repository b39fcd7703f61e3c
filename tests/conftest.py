"""The conditions that every test and every doctest runs under; pytest loads this file before any of them.

CI and a laptop run the same: hypothesis draws the same examples each time, keys come from the test's own
name, and each pytest-xdist worker is a process of its own that reads this file before JAX starts.
"""

import itertools
import os
import zlib

# Tests compile far more than they compute: code is generated without optimizing it. The passes over the
# program, which decide its FLOPs and bytes, all run. JAX reads this once, so it comes first.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{FAST} {os.environ.get('XLA_FLAGS', '')}"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Set before JAX starts its backend: eight devices in one CPU, so that mesh and pmap tests always run.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
# A silent cast or broadcast is a wrong answer waiting for its day.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: an example's first run compiles. Few examples: each one may compile.
hypothesis.settings.register_profile(
    "lorax_fn", derandomize=True, max_examples=15, deadline=None, database=None
)
hypothesis.settings.load_profile("lorax_fn")


@pytest.fixture
def getkey(request):
    """A function that gives a new PRNG key at each call, the same ones in every run of the same test."""
    root = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    count = itertools.count()
    return lambda: jax.random.fold_in(root, next(count))
