"""What every file of this folder checks: the adapted model is the merged one, in values and in gradients."""

import jax
import jax.numpy as jnp

import lorax_fn as lx

VALUES, GRADIENTS = 1e-6, 1e-5  # largest difference, in parts of the largest entry


def moved(lora, scale=0.1):
    """Adapters with random numbers in every factor: zeros in B would hide half of a gradient."""
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        leaf + jnp.asarray(scale, leaf.dtype) * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def largest_difference(one, other):
    """Over all leaves: the largest difference, in parts of the largest entry of the second."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max(float(jnp.abs(b).max()) for _, b in pairs)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest


def adapted_is_merged(fn, params, *args, rank=2, scale=0.1, layout=None, values=VALUES, **choices):
    """Splits, adapts with ``fallback="error"`` and compares; returns the params and adapters that it used.

    ``fn(params, *args)`` returns arrays of floats. The gradient is that of a sum with fixed random weights.
    """
    layout = lx.usage(fn, params, *args) if layout is None else layout
    params, start = lx.split(params, rank=rank, alpha=float(rank), layout=layout, **choices)
    lora, adapted = moved(start, scale), lx.adapt(fn, fallback="error")

    def loss(out):
        leaves = jax.tree.leaves(out)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return sum(
            (leaf * jax.random.normal(k, leaf.shape)).mean() for k, leaf in zip(keys, leaves, strict=True)
        )

    def compared(forward):
        def with_value(lora, params, *args):
            out = forward(params, lora, *args)
            return loss(out), out

        compiled = jax.jit(jax.value_and_grad(with_value, has_aux=True))
        return lambda lora: compiled(lora, params, *args)

    (_, got), got_grads = compared(adapted)(lora)
    merged = compared(lambda params, lora, *args: fn(lx.merge(params, lora), *args))
    (_, want), want_grads = merged(lora)
    (_, bare), _ = merged(start)
    off, grads_off = largest_difference(got, want), largest_difference(got_grads, want_grads)
    changed = largest_difference(want, bare)
    print(f"{len(lora)} weights adapted; values differ by {off:.0e}, gradients by {grads_off:.0e}")
    assert changed > 1e-3, f"the adapters change next to nothing: {changed:.0e}"
    assert off <= values and grads_off <= GRADIENTS, (off, grads_off)
    return params, lora
