"""Dispatch, start-up and throughput: what is paid beside the arithmetic of a step.

    python benchmarks/startup.py                 # all of it: a few minutes on a CPU
    python benchmarks/startup.py dispatch split  # some: dispatch split haiku import files merge quantize
    python benchmarks/startup.py --save          # results/startup.json
    python benchmarks/startup.py --check         # exit with status 1 if a target is missed

Each figure is a median; what is compared takes its turns with what it is compared to.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results

import lorax_fn as lx

TARGETS = {  # what is at most so much
    "jitted call, 300 weights of 256 x 256, lx.adapt / base": 1.5,
    "split of 1,000 abstract leaves, ms": 50,
}


def clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(runs: dict[str, tuple], rounds: int, inner: int = 1) -> dict[str, float]:
    """Median seconds of a call by name, of ``name: (function, *arguments)``."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1, rounds):
        for name, (run, *args) in runs.items():
            start = time.perf_counter()
            for _ in range(inner):
                out = run(*args)
            jax.block_until_ready(out)
            if i >= 0:
                taken[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(times) for name, times in taken.items()}


def many_weights(count: int, width: int = 32) -> tuple[dict, Callable]:
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(lambda key: jax.random.normal(key, (width, width)) / width**0.5)
    params = {f"layer_{i:03}": {"kernel": draw(key)} for i, key in enumerate(keys)}

    def model(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    return params, model


def dispatch() -> dict[str, float]:
    """Jitted calls with 300 adapted weights, beside the base and LoRA by hand; eager calls with 12."""
    found = {}
    for width in (32, 256):
        base, model = many_weights(300, width)
        params, lora = lx.split(base, rank=4)
        x = jnp.ones((1, width))
        by_hand = {path.split("/")[0]: {"a": adapter.a, "b": adapter.b} for path, adapter in lora.items()}

        def hand(params, factors, x):
            for name in sorted(params):
                y = x @ params[name]["kernel"]
                x = jnp.tanh(y + 8.0 * ((x @ factors[name]["a"]) @ factors[name]["b"]))
            return x

        plain, written, adapted = jax.jit(model), jax.jit(hand), jax.jit(lx.adapt(model))
        nothing = jax.jit(lambda params, lora, x: x)
        calls = {
            "base": (plain, params, x),
            "by hand": (written, params, by_hand, x),
            "lx.adapt": (adapted, params, lora, x),
            "arguments of the base": (nothing, params, {}, x),
            "arguments by hand": (nothing, params, by_hand, x),
            "arguments of lx.adapt": (nothing, params, lora, x),
        }
        took = in_turns(calls, rounds=15, inner=10)
        what = f"jitted call, 300 weights of {width} x {width}"
        found |= {f"{what}, {name}, ms": 1e3 * seconds for name, seconds in took.items()}
        found[f"{what}, lx.adapt / base"] = took["lx.adapt"] / took["base"]
        found[f"{what}, lx.adapt / by hand"] = took["lx.adapt"] / took["by hand"]
    base, model = many_weights(12)
    params, lora = lx.split(base, rank=4)
    x = jnp.ones((1, 32))
    model(params, x)  # compiles the single operations
    eager = lx.adapt(model)
    found["eager call, 12 weights, first, ms"] = 1e3 * clocked(lambda: eager(params, lora, x))
    calls = in_turns({"base": (model, params, x), "adapt": (eager, params, lora, x)}, 20)
    found["eager call, 12 weights, later, ms"] = 1e3 * calls["adapt"]
    found["eager call, 12 weights, base, ms"] = 1e3 * calls["base"]
    return found


def split() -> dict[str, float]:
    """`lx.split` of an abstract tree of 1,000 leaves, 700 of them matrices."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
        f"layers_{i:03}": {
            **{name: {"kernel": leaf(256, 256)} for name in ("q", "k", "v", "o", "gate", "up", "down")},
            **{name: {"scale": leaf(256)} for name in ("norm_1", "norm_2", "norm_3")},
        }
        for i in range(100)
    }
    assert len(jax.tree.leaves(params)) == 1000
    took = in_turns({"split": (lambda: len(lx.split(params, rank=8)[1]),)}, 7)["split"]
    first = clocked_in_a_new_process(
        "import jax, jax.numpy as jnp, time, lorax_fn as lx\n"
        "params = {f'{i}': {'kernel': jax.ShapeDtypeStruct((256, 256), jnp.float32)} for i in range(1000)}\n"
        "start = time.perf_counter(); lx.split(params, rank=8); print(time.perf_counter() - start)"
    )
    return {
        "split of 1,000 abstract leaves, ms": 1e3 * took,
        "split of 1,000 abstract leaves, first in a process, ms": 1e3 * first,
    }


def clocked_in_a_new_process(script: str) -> float:
    """What the script prints last, as a number."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def haiku() -> dict[str, float]:
    """A GPT of 404 million parameters in Haiku, abstract: traces of it, `lx.usage`, `lx.adapt`, gradients."""
    import haiku as hk

    layers, width, heads, vocab, tokens = 32, 1024, 16, 1000, 128

    def forward(ids):
        x = hk.Embed(vocab, width)(ids)
        mask = jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))
        norm = lambda x: hk.LayerNorm(-1, True, True)(x)  # noqa: E731
        for _ in range(layers):
            h = norm(x)
            start = hk.initializers.VarianceScaling(1.0)
            x = x + hk.MultiHeadAttention(heads, width // heads, w_init=start)(h, h, h, mask)
            x = x + hk.Linear(width)(jax.nn.gelu(hk.Linear(4 * width)(norm(x))))
        return norm(x) @ hk.get_parameter("head", (width, vocab), init=hk.initializers.RandomNormal())

    model = hk.without_apply_rng(hk.transform(forward))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    size = sum(x.size for x in jax.tree.leaves(params))

    def loss(params, ids):
        return jnp.mean(model.apply(params, ids) ** 2)

    def fresh(fn):
        return lambda *args: fn(*args)  # a new function, so that no earlier trace is used

    found = {"Haiku model, million parameters": size / 1e6}
    usage_took, lora = [], {}
    for _ in range(3):
        start = time.perf_counter()
        layout = lx.usage(fresh(model.apply), params, ids)
        usage_took.append(time.perf_counter() - start)
    _, lora = lx.split(params, rank=16, layout=layout)
    runs = {
        "trace of the base, s": lambda: jax.jit(fresh(loss)).trace(params, ids),
        "trace of lx.adapt, s": lambda: jax.jit(lx.adapt(fresh(loss))).trace(params, lora, ids),
        "trace of the gradient by all weights, s": lambda: jax.jit(jax.grad(fresh(loss))).trace(params, ids),
        "trace of the gradient by the adapters, s": lambda: jax.jit(
            jax.grad(lx.adapt(fresh(loss)), argnums=1)
        ).trace(params, lora, ids),
    }
    found["Haiku model, lx.usage, s"] = statistics.median(usage_took)
    for name, run in runs.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[f"Haiku model, {name}"] = statistics.median(times)
    return found


def imports() -> dict[str, float]:
    """Seconds of `import lorax_fn` beyond those of its dependencies, each in a new process."""
    scripts = {
        "import jax, s": "import jax",
        "import of jax, flax, optax, orbax-checkpoint, s": "import jax, flax, optax, orbax.checkpoint, chex",
        "import lorax_fn, s": "import lorax_fn",
    }
    timed = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    taken: dict[str, list[float]] = {name: [] for name in scripts}
    for _ in range(5):
        for name, script in scripts.items():
            taken[name].append(clocked_in_a_new_process(timed.format(script)))
    found = {name: statistics.median(times) for name, times in taken.items()}
    pairs = zip(*taken.values(), strict=True)
    found["import lorax_fn beyond jax, s"] = statistics.median(ours - jax_ for jax_, _, ours in pairs)
    return found


def saved_and_loaded(plain: dict, lora: dict) -> dict[str, float]:
    """Seconds to save and to load, by Orbax and by `lx.checkpoint`."""
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, plain)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as orbax:
        at = Path(folder)
        steps = {
            "Orbax, save": lambda: (orbax.save(at / "orbax", plain), orbax.wait_until_finished()),
            "lx.checkpoint, save": lambda: lx.checkpoint.save(at / "lora", lora),
            "Orbax, load": lambda: orbax.restore(at / "orbax", shapes),
            "lx.checkpoint, load": lambda: lx.checkpoint.load(at / "lora"),
        }
        seconds = {}
        for name, step in steps.items():
            start = time.perf_counter()
            out = step()
            jax.block_until_ready([x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)])
            seconds[name] = time.perf_counter() - start
        return seconds


def files(gigabytes: float = 1.0) -> dict[str, float]:
    """`lx.checkpoint.save` and `load` of an adapter, beside plain Orbax on the same arrays."""
    width, rank = 4096, 256
    layers = max(1, round(gigabytes * 2**30 / (2 * 4 * width * rank)))
    keys = jax.random.split(jax.random.key(0))  # random numbers, as files of others would be compressed away
    a = jax.random.normal(keys[0], (layers, width, rank))
    b = jax.random.normal(keys[1], (layers, rank, width))
    layout = lx.Layout(stack=(0,), inputs=(1,), outputs=(2,))
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}}
    lora = jax.eval_shape(
        lambda: lx.split(
            jax.tree.map(lambda x: jnp.zeros(x.shape), params), rank, layout={"layers/kernel": layout}
        )[1]
    )
    lora = jax.tree.map(lambda x: a if x.shape == a.shape else b, lora)
    jax.block_until_ready(lora)
    size = sum(x.nbytes for x in jax.tree.leaves(lora)) / 1e9
    plain = {"a": a, "b": b}
    taken: dict[str, list[float]] = {}
    for _ in range(3):
        for name, seconds in saved_and_loaded(plain, lora).items():
            taken.setdefault(name, []).append(seconds)
    return {"adapter saved, GB": size} | {
        f"{name}, GB/s": size / statistics.median(times) for name, times in taken.items()
    }


def merge(million: int = 1024) -> dict[str, float]:
    """`lx.merge` of a billion bfloat16 parameters, and of half as many in float32, beside a copy."""
    found, width = {}, 2048
    for dtype, count in (("bfloat16", million), ("float32", million // 2)):
        layers = max(1, count * 10**6 // width**2)
        ones = jax.jit(lambda i, dtype=dtype: jnp.full((width, width), i, dtype))
        params = {f"layer_{i:03}": {"kernel": ones(jnp.float32(i % 7 + 1))} for i in range(layers)}
        params, lora = lx.split(params, rank=16)
        lora = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), lora)
        size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
        jitted, copied = jax.jit(lx.merge), jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

        def unchecked(params, lora, jitted=jitted):  # under jit, nothing is checked
            places = {path.split("/")[0]: path for path in lora}
            return [jitted({at: params[at]}, {path: lora[path]}) for at, path in places.items()]

        runs = {
            "copy": (copied, params),
            "copy, leaf by leaf": (lambda params: jax.tree.map(jnp.copy, params), params),
            "merge": (lx.merge, params, lora),
            "merge without its check": (unchecked, params, lora),
            "merge, jitted": (jitted, params, lora),
        }
        what = f"{layers * width**2 / 1e9:.2f}B {dtype} parameters"
        found |= {f"{name} of {what}, GB/s": size / took for name, took in in_turns(runs, 3).items()}
    return found


def quantize(width: int = 1024, samples: int = 2048) -> dict[str, float]:
    """Weights per second of `lx.quantize` and of GPTQ, on one weight of a million numbers."""
    w = jax.random.normal(jax.random.key(0), (width, width)) / width**0.5
    x = jax.random.normal(jax.random.key(1), (samples, width))
    params = {"kernel": w}
    runs: dict[str, tuple] = {
        name: (lambda name=name: jax.tree.leaves(lx.quantize(params, name)),)
        for name in ("nf4", "int8", "int4")
    }
    runs["gptq"] = (
        lambda: jax.tree.leaves(lx.quantization.gptq(lambda params, x: x @ params["kernel"], params, [x])),
    )
    took = in_turns(runs, 3)
    return {f"{name}, million weights per second": w.size / 1e6 / seconds for name, seconds in took.items()}


PARTS = {
    "dispatch": dispatch,
    "split": split,
    "haiku": haiku,
    "import": imports,
    "files": files,
    "merge": merge,
    "quantize": quantize,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--save", action="store_true", help="write results/startup.json")
    args = parser.parse_args()
    facts, found = results.facts("dm-haiku", "orbax-checkpoint"), {}
    print(f"{facts['machine']}; JAX {jax.__version__}; NumPy {np.__version__}")
    for name in args.parts or PARTS:
        for what, value in PARTS[name]().items():
            found[what] = value
            print(f"{what}: {value:.4g}", flush=True)
    missed = [what for what, most in TARGETS.items() if found.get(what, 0) > most]
    print(json.dumps({what: found[what] for what in missed}) if missed else "no target is missed")
    if args.save:
        earlier = results.held("startup").get("figures", {})
        results.save("startup", {**facts, "figures": {**earlier, **found}})
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
