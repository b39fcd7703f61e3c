"""The one check of every model: `adapt` against the untouched model on merged weights; what `usage` finds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lx

TOLERANCE = 2e-5  # of the largest entry; float32 sums in another order


def check_model(
    fn: Callable,
    params: Any,
    args: tuple,
    layouts: Mapping[str, lx.Layout],
    targets: Sequence[str] | None = None,
) -> None:
    """Asserts the adapted weights and their layouts, then values and gradients under ``fallback="error"``."""
    usage = lx.usage(fn, params, *args)
    _, lora = lx.split(params, rank=2, alpha=2.0, targets=targets, layout=usage)
    assert {path: adapter.layout for path, adapter in lora.items()} == dict(layouts), f"\n{usage}"
    assert len(lora) == len(layouts)
    for path in lora:
        assert usage[path].served and usage[path].times > 0, f"{path}\n{usage}"
    check_values(fn, randomized(params), randomized(lora), args)


def randomized(tree: Any) -> Any:
    """Every float leaf drawn anew: initial zeros (B, biases, output layers) would hide half of a gradient.

    Drawn by numpy: compiling initializers would take longer than all the rest. Keys and counts start anew.
    """
    rng = np.random.default_rng(0)

    def draw(leaf):
        if not hasattr(leaf, "shape"):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def check_values(fn: Callable, params: Any, lora: Any, args: tuple) -> None:
    """Outputs and gradients by ``lora`` of the adapted function and of the plain one on merged weights."""
    adapted, args = lx.adapt(fn, fallback="error"), jax.tree.map(jnp.asarray, args)
    leaves, treedef = jax.tree.flatten(params)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def value_and_grad(forward):
        def loss(lora):
            out = forward(lora).astype(jnp.float32)
            weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
            return (out * weights).sum() / out.size, out

        return jax.value_and_grad(loss, has_aux=True)

    # One program: each compilation costs more than all of its arithmetic. The arrays are its arguments, as
    # NNX refuses modules that mix tracers with constants; leaves that are no arrays stay as they are.
    @jax.jit
    def run(arrays, lora):
        params = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return (
            value_and_grad(lambda lora: adapted(params, lora, *args))(lora),
            value_and_grad(lambda lora: fn(lx.merge(params, lora), *args))(lora),
            fn(lx.dequantize(params), *args),
        )

    ((_, got), got_grads), ((_, want), want_grads), plain = run(arrays, lora)
    assert_close(got, want, "output")
    moved = np.abs(want - plain).max() / np.abs(plain).max()
    assert moved > 1e-3, f"the adapters change nothing: {moved}"
    for path, adapter in want_grads.items():
        for name in ("a", "b"):
            expected = getattr(adapter, name)
            assert np.abs(expected).max() > 0.0, f"no gradient reaches {path}.{name}"
            assert_close(getattr(got_grads[path], name), expected, f"{path}.{name}")


def assert_close(got: Any, want: Any, name: str) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max(), err_msg=name)
