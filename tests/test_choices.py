"""DoRA weights side by side, masked and chosen: the column goes along, as in the merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import IO, MASK, normal

import lorax_fn as lx

X = normal(2, (3, 8))
PARAMS = {"q": normal(3, (8, 6), 0.3), "k": normal(4, (8, 6), 0.3)}

# name -> (function of both weights and x, whether it stays low-rank)
JOINED = {
    "outputs joined": (lambda q, k, x: x @ jnp.concatenate([q, k, jnp.ones((8, 2))], 1), True),
    "inputs joined": (lambda q, k, x: jnp.tile(x, 2) @ jnp.concatenate([q, k], 0), False),
    "stacked": (lambda q, k, x: lax.scan(lambda c, w: (c, x @ w), 0, jnp.stack([q, k]))[1], True),
    "outputs masked": (lambda q, k, x: x @ jnp.where(MASK[:6], q, 2 * k), True),
    "inputs masked": (lambda q, k, x: x @ jnp.where(MASK[:, None], q, 0), False),
    "branches": (lambda q, k, x: x @ lax.cond(x[0, 0] > 0, lambda: q, lambda: k * 2), True),
}


@pytest.mark.parametrize("other", ["dora", "lora"])
@pytest.mark.parametrize("name", JOINED)
def test_columns_go_along(name, other):
    fn, low_rank = JOINED[name]
    params, lora = lx.split(
        PARAMS, rank=2, targets=["q", "k"], method={"q": "dora", "k": other}, layout={"*": IO}
    )
    trains = lx.mask(lora)
    lora = jax.tree.map(lambda leaf, t: leaf + normal(5, leaf.shape, 0.3) if t else leaf, lora, trains)

    def plain(p):
        return fn(p["q"], p["k"], X)

    run = lx.adapt(plain, fallback="error" if low_rank else "allow")

    def value_and_grads(run):
        def loss(lora, params):
            y = run(params, lora)
            return (jnp.tanh(y) * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(lora, params)

    got = value_and_grads(run)
    want = value_and_grads(lambda params, lora: plain(lx.merge(params, lora)))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * (1 + np.abs(two).max()))
