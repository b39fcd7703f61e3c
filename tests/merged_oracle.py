"""The one check of every model: `adapt` against the untouched model on merged weights, and what `usage` finds."""

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
    params, lora = lx.split(params, rank=2, alpha=2.0, targets=targets, layout=usage)
    assert {path: adapter.layout for path, adapter in lora.items()} == dict(layouts), f"\n{usage}"
    assert len(lora) == len(layouts)
    for path in lora:
        assert usage[path].served and usage[path].flops > 0, f"{path}\n{usage}"
    check_values(fn, params, with_noise(lora), args)


def with_noise(lora: Any) -> Any:
    """B starts at zero, where half of the gradient vanishes: move every leaf."""
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def check_values(fn: Callable, params: Any, lora: Any, args: tuple) -> None:
    adapted = lx.adapt(fn, fallback="error")
    plain = fn(params, *args)
    weights = jax.random.normal(jax.random.key(8), plain.shape)  # no sum of outputs is zero by symmetry

    def loss(forward):
        def of(lora):
            out = forward(lora)
            return (out * weights).sum() / out.size, out

        return jax.value_and_grad(of, has_aux=True)

    # One program: each compilation costs more than all of its arithmetic.
    both = jax.jit(
        lambda lora: (
            loss(lambda lora: adapted(params, lora, *args))(lora),
            loss(lambda lora: fn(lx.merge(params, lora), *args))(lora),
        )
    )
    ((_, got), got_grads), ((_, want), want_grads) = both(lora)
    assert got.dtype == plain.dtype and got.shape == plain.shape
    assert_close(got, want, "output")
    moved = float(jnp.abs(want - plain).max() / jnp.abs(plain).max())
    assert moved > 1e-3, f"the adapters change nothing: {moved}"
    for path, adapter in want_grads.items():
        for name in ("a", "b"):
            expected = getattr(adapter, name)
            assert float(jnp.abs(expected).max()) > 0.0, f"no gradient reaches {path}.{name}"
            assert_close(getattr(got_grads[path], name), expected, f"{path}.{name}")


def assert_close(got: Any, want: Any, name: str) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max(), err_msg=name)
