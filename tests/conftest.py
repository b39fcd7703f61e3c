"""The conditions that every test and every doctest runs under; pytest loads this file before any of them.

CI and a laptop run the same: hypothesis draws the same examples each time, keys come from the test's own
name, and each pytest-xdist worker is a process of its own that reads this file before JAX starts.
"""

import collections
import gc
import itertools
import os
import zlib

# Tests compile far more than they compute: code is generated without optimizing it. The passes over the
# program, which decide its FLOPs and bytes, all run. JAX reads this once, so it comes first.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PLATFORMS = os.environ.get("JAX_PLATFORMS") or "cpu"
if ON_CPU := PLATFORMS == "cpu":
    os.environ["XLA_FLAGS"] = f"{FAST} {os.environ.get('XLA_FLAGS', '')}"
else:  # the workers share one card
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Set before JAX starts its backend: eight devices in one CPU, so that mesh and pmap tests always run.
jax.config.update("jax_platforms", PLATFORMS)
jax.config.update("jax_num_cpu_devices", 8)
if not ON_CPU:  # tolerances are those of float32, where a GPU would round operands to TF32
    jax.config.update("jax_default_matmul_precision", "highest")
# A silent cast or broadcast is a wrong answer waiting for its day.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX keeps every trace, and a full collection walks through all of them. Few of them are garbage.
gc.set_threshold(50_000, 20, 100)

# No deadline: an example's first run compiles. Few examples: each one may compile.
hypothesis.settings.register_profile(
    "lorax_fn", derandomize=True, max_examples=15, deadline=None, database=None
)
hypothesis.settings.load_profile("lorax_fn")


def with_too_few_devices_skipped():
    """Skips what asks for more devices than another platform has, in JAX's own words."""
    try:
        return (yield)
    except ValueError as error:
        if ON_CPU or jax.device_count() >= 8 or "Number of devices" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from with_too_few_devices_skipped())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from with_too_few_devices_skipped())


@pytest.hookimpl(tryfirst=True)  # before -m decides
def pytest_collection_modifyitems(items):
    """Of the variants of a test, ``sampled(n)`` leaves each n-th as it is; the others are slow."""
    seen = collections.Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % sampled.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


@pytest.fixture
def getkey(request):
    """A function that gives a new PRNG key at each call, the same ones in every run of the same test."""
    root = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    count = itertools.count()
    return lambda: jax.random.fold_in(root, next(count))
