"""The overhead of `fit` per step over a loop of four lines: with metrics, with checkpoints, with a file.

    python benchmarks/fit.py                    # a few minutes on a CPU
    python benchmarks/fit.py --steps 500 --layers 2

The step is small on purpose, to measure the host's work around it. Each row is the median over rounds, in
milliseconds per step; rounds of all kinds alternate, so that a busy machine slows all of them.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

import lorax_fn as lx


def model(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def make(layers: int, width: int):
    """The donating step, a function that makes a state, the frozen weights and a batch."""
    shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
    draw = jax.jit(lambda key: 0.3 * jax.random.normal(key, shape.shape))
    keys = jax.random.split(jax.random.key(0), layers)
    params = {f"layer_{i}": {"kernel": draw(key)} for i, key in enumerate(keys)}
    params, lora = lx.split(params, rank=4)
    adapted, tx = lx.adapt(model), optax.adam(1e-3)

    def loss_fn(params, lora, batch, key):
        return jnp.mean((adapted(params, lora, batch["x"]) - batch["y"]) ** 2)

    def new_state():
        return lx.TrainState.create(lora=jax.tree.map(jnp.copy, lora), tx=tx, key=jax.random.key(1))

    step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)
    batch = {name: jnp.ones((8, width)) for name in "xy"}
    return step, new_state, params, batch


def bare(step, state, params, batch, steps):
    """The loop to compare `fit` with, which waits for each loss one step late."""
    last = None
    for _ in range(steps):
        state, metrics = step(state, params, batch)
        if last is not None:
            float(last["loss"])
        last = metrics
    jax.block_until_ready(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    step, new_state, params, batch = make(args.layers, args.width)
    bare(step, new_state(), params, batch, 10)

    def fit(folder, **kwargs):
        kwargs.setdefault("every", 100)
        lx.fit(step, new_state(), params, [batch], steps=args.steps, progress=False, **kwargs)

    kinds = {
        "bare loop": lambda folder: bare(step, new_state(), params, batch, args.steps),
        "fit": fit,
        "fit, nan_guard=False": lambda folder: fit(folder, nan_guard=False),
        "fit, metrics_file": lambda folder: fit(folder, metrics_file=folder / "metrics.jsonl"),
        "fit, a checkpoint every 100": lambda folder: fit(
            folder, checkpoint_dir=folder / "run", save_every=100
        ),
    }
    seconds = {name: [] for name in kinds}
    for _ in range(args.rounds):
        for name, run in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                run(pathlib.Path(folder))
                seconds[name].append((time.perf_counter() - start) / args.steps)
    least = statistics.median(seconds["bare loop"])
    print(f"{args.layers} layers of {args.width} x {args.width}, {args.steps} steps, JAX {jax.__version__}")
    for name, found in seconds.items():
        found = statistics.median(found)
        print(f"{name:30} {1e3 * found:.3f} ms a step, {1e3 * (found - least):+.3f}")


if __name__ == "__main__":
    main()
