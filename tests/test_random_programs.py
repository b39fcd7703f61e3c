"""Random programs: the adapted one gives the values and gradients of the plain one on merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import make

import lorax_fn as lx

TOGETHER = 10  # programs that are compiled as one: most of the time is compilation
FIRST, *MORE = range(0, 100, TOGETHER)  # all hundred take more than a minute, so most of them are slow tests


@pytest.mark.parametrize("first", [FIRST, *(pytest.param(first, marks=pytest.mark.slow) for first in MORE)])
def test_random_programs(first):
    programs = {str(seed): make(seed) for seed in range(first, first + TOGETHER)}
    params = {name: params for name, (_, params, _) in programs.items()}
    lora = {f"{name}/w": lora["w"] for name, (_, _, lora) in programs.items()}
    x, ids = jnp.linspace(-1.0, 1.0, 6), jnp.arange(5, dtype=jnp.int32)

    def all_of(params, x):
        return {name: fn(params[name]["w"], x, ids) for name, (fn, _, _) in programs.items()}

    adapted = lx.adapt(all_of, fallback="allow")

    def with_gradients(run):
        def loss(lora, params):
            ys = run(params, lora, x)
            return sum(
                jnp.sum(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y) for y in ys.values()
            ), ys

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(lora, params)

    (_, got), got_grads = with_gradients(adapted)
    (_, want), want_grads = with_gradients(lambda params, lora, x: all_of(lx.merge(params, lora), x))
    trains = lx.mask(lora)
    for name in programs:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-4, err_msg=f"seed {name}")
        path = f"{name}/w"
        pairs = [
            *zip(*map(jax.tree.leaves, (got_grads[0][path], want_grads[0][path], trains[path])), strict=True)
        ]
        pairs += [(got_grads[1][name]["w"], want_grads[1][name]["w"], True)]
        for one, other, train in pairs:
            if train:
                size = max(1.0, float(jnp.abs(other).max()))
                np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3 * size, err_msg=f"seed {name}")
