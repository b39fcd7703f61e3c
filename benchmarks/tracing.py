"""Tracing and lowering the gradient of an unrolled 32-layer Llama stack: `lx.adapt` against LoRA by hand.

    python benchmarks/tracing.py              # the table of README.md
    python benchmarks/tracing.py --quick      # fewer rounds, for CI
    python benchmarks/tracing.py --check      # exit with status 1 if a target is missed

Nothing is compiled or run. The blocks are plain functions of plain dicts: RMSNorm, rotary embedding,
grouped-query attention, SwiGLU. Each is measured as written, and with `jax.jit` around the block, where JAX
traces the block once and both ways should have one copy of it.
"""

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from step import ADAPT, HAND, in_turn, spread, table

import lorax_fn as lx

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD, RANK, ALPHA = 64, 128, 4, 2, 16, 4, 32.0
SHAPES = {
    "q": (WIDTH, HEADS * HEAD),
    "k": (WIDTH, KV_HEADS * HEAD),
    "v": (WIDTH, KV_HEADS * HEAD),
    "o": (HEADS * HEAD, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
MOST = {"seconds": 1.5, "lines": 1.0}  # adapt / by hand


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale


def rotate(x):
    """Rotary embedding of ``[B, T, heads, head]``."""
    frequency = 10_000.0 ** (-jnp.arange(HEAD // 2, dtype=jnp.float32) / (HEAD // 2))
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def block(params, x, linear):
    """One Llama layer, which uses weights only by ``linear(name, x)``."""
    batch, tokens, _ = x.shape
    h = norm(x, params["norm_1"])
    q = rotate(linear("q", h).reshape(batch, tokens, HEADS, HEAD))
    k = rotate(linear("k", h).reshape(batch, tokens, KV_HEADS, HEAD))
    v = linear("v", h).reshape(batch, tokens, KV_HEADS, HEAD)
    q = q.reshape(batch, tokens, KV_HEADS, HEADS // KV_HEADS, HEAD)
    scores = jnp.einsum("bqghd,bkgd->bghqk", q, k) / HEAD**0.5
    scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -1e30)
    mixed = jnp.einsum("bghqk,bkgd->bqghd", jax.nn.softmax(scores), v)
    x = x + linear("o", mixed.reshape(batch, tokens, HEADS * HEAD))
    h = norm(x, params["norm_2"])
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h))


def plain_block(params, x):
    return block(params, x, lambda name, x: x @ params[name]["kernel"])


def hand_block(params, factors, x):
    def linear(name, x):
        change = (x @ factors[name]["a"]) @ factors[name]["b"]
        return x @ params[name]["kernel"] + (ALPHA / RANK) * change

    return block(params, x, linear)


def make_losses(jitted: bool) -> dict[str, Callable]:
    """New losses of (trainable, params, x), so that no earlier trace is reused."""
    plain, by_hand = lambda p, x: plain_block(p, x), lambda p, f, x: hand_block(p, f, x)
    if jitted:
        plain, by_hand = jax.jit(plain), jax.jit(by_hand)

    def stack(params, x):
        for layer in params:
            x = plain(layer, x)
        return x

    def hand_loss(factors, params, x):
        for layer, layer_factors in zip(params, factors, strict=True):
            x = by_hand(layer, layer_factors, x)
        return jnp.sum(jnp.square(x))

    apply = lx.adapt(stack, fallback="error")
    return {HAND: hand_loss, ADAPT: lambda lora, params, x: jnp.sum(jnp.square(apply(params, lora, x)))}


def make_inputs(layers: int) -> tuple[dict, list, jax.Array]:
    """What trains in each way (with the same numbers), the params and a batch."""
    params = []
    for i, key in enumerate(jax.random.split(jax.random.key(0), layers)):
        keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
        layer = {name: {"kernel": jax.random.normal(keys[name], SHAPES[name]) / 8} for name in SHAPES}
        params.append({**layer, "norm_1": jnp.ones(WIDTH), "norm_2": jnp.ones(WIDTH) + 0.01 * i})
    params, lora = lx.split(params, rank=RANK, alpha=ALPHA)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)  # B is not zero: the gradients are compared
    factors = [
        {name: {"a": lora[f"{i}/{name}/kernel"].a, "b": lora[f"{i}/{name}/kernel"].b} for name in SHAPES}
        for i in range(layers)
    ]
    return {HAND: factors, ADAPT: lora}, params, jax.random.normal(jax.random.key(1), (2, 32, WIDTH))


def check_equal(jitted: bool) -> None:
    """Checks that both ways give the same gradient, on two layers."""
    trainable, params, x = make_inputs(2)
    losses = make_losses(jitted)
    grads = {name: jax.jit(jax.grad(loss))(trainable[name], params, x) for name, loss in losses.items()}
    for i, layer in enumerate(grads[HAND]):
        for name, want in layer.items():
            got = grads[ADAPT][f"{i}/{name}/kernel"]
            for side in "ab":
                scale = float(jnp.abs(want[side]).max())
                np.testing.assert_allclose(getattr(got, side), want[side], rtol=1e-3, atol=1e-4 * scale)


def measure(layers: int, rounds: int, jitted: bool) -> tuple[dict, dict]:
    """Seconds to trace and to lower by name, ``[rounds, 2]``, and lines of the module."""
    trainable, params, x = make_inputs(layers)
    seconds: dict[str, list] = {HAND: [], ADAPT: []}
    lines = {}
    for i in range(-1, rounds):  # the first round warms up
        for name in in_turn(seconds, i):
            jax.clear_caches()
            gradient = jax.jit(jax.grad(make_losses(jitted)[name]))
            start = time.perf_counter()
            traced = gradient.trace(trainable[name], params, x)
            middle = time.perf_counter()
            lowered = traced.lower()
            if i >= 0:
                seconds[name].append((middle - start, time.perf_counter() - middle))
            lines[name] = lowered.as_text().count("\n")
    return {name: np.array(pairs) for name, pairs in seconds.items()}, lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Times tracing and lowering of a deep unrolled model.")
    parser.add_argument("--layers", type=int, default=32, help="blocks (default: 32)")
    parser.add_argument("--rounds", type=int, help="rounds (default: 7, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    args = parser.parse_args()
    layers, rounds = args.layers, args.rounds or (3 if args.quick else 7)

    rows = [
        ["block", "variant", "trace ms", "lower ms", "trace + lower / by hand", "lines", "lines / by hand"]
    ]
    verdicts = []
    for jitted in (False, True):
        form = "jitted" if jitted else "plain"
        check_equal(jitted)
        seconds, lines = measure(layers, rounds, jitted)
        for name, took in seconds.items():
            trace, lower = 1e3 * np.median(took, axis=0)
            ratios = took.sum(1) / seconds[HAND].sum(1)
            length = lines[name] / lines[HAND]
            rows.append([form, name, f"{trace:.0f}", f"{lower:.0f}", spread(ratios),
                         str(lines[name]), f"{length:.3f}"])  # fmt: skip
        verdicts.append((form, "seconds", float(np.median(ratios))))
        verdicts.append((form, "lines", length))
    print(f"JAX {jax.__version__}; {layers} layers; median [quartiles] of {rounds} rounds; caches cleared\n")
    print(table(rows), end="\n\n")
    for form, measured, ratio in verdicts:
        verdict = "MISS" if ratio > MOST[measured] else "PASS"
        print(f"{verdict}  {form} {measured} / by hand: {ratio:.4f}, target at most {MOST[measured]}")
    missed = sum(ratio > MOST[measured] for _, measured, ratio in verdicts)
    return int(args.check and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
