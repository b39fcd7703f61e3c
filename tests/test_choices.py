"""DoRA weights side by side, masked, chosen and taken: the column goes along, as in the merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import IO, MASK, normal

import lorax_fn as lx

X = normal(2, (3, 8))
PARAMS = {"q": normal(3, (8, 6), 0.3), "k": normal(4, (8, 6), 0.3)}


def filled(w, axis, fill):
    return jnp.take(w, np.array([0, 9, 5]), axis, mode="fill", fill_value=fill)


# name -> (function of both weights and x, whether it stays low-rank)
JOINED = {
    "outputs joined": (lambda q, k, x: x @ jnp.concatenate([q, k, jnp.ones((8, 2))], 1), True),
    "inputs joined": (lambda q, k, x: jnp.tile(x, 2) @ jnp.concatenate([q, k], 0), False),
    "stacked": (lambda q, k, x: lax.scan(lambda c, w: (c, x @ w), 0, jnp.stack([q, k]))[1], True),
    "outputs masked": (lambda q, k, x: x @ jnp.where(MASK[:6], q, 2 * k), True),
    "inputs masked": (lambda q, k, x: x @ jnp.where(MASK[:, None], q, 0), False),
    "branches": (lambda q, k, x: x @ lax.cond(x[0, 0] > 0, lambda: q, lambda: k * 2), True),
    "taken, out of bounds": (lambda q, k, x: x @ filled(q, 1, 0.5), True),
    "looked up, out of bounds": (lambda q, k, x: x[:, :3] @ filled(q, 0, 0.5), False),
    "copies taken, out of bounds": (
        lambda q, k, x: jnp.einsum("bi,bio->bo", x, filled(jnp.broadcast_to(q, (6, 8, 6)), 0, 0)),
        True,
    ),
    "copies taken, filled": (
        lambda q, k, x: jnp.einsum("bi,bio->bo", x, filled(jnp.broadcast_to(q, (6, 8, 6)), 0, 0.5)),
        False,
    ),
    "looked up, zeros out of bounds": (lambda q, k, x: x[:, :3] @ filled(q, 0, 0), True),
}


@pytest.mark.sampled(3)
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


@pytest.mark.parametrize("name", ["outputs masked", "inputs masked", "branches"])
def test_an_adapter_of_a_bank_is_picked_before_the_choice(name):
    """A number for each row, and a mixture of all, as the adapters that they stand for."""
    fn, _ = JOINED[name]
    layout, ranks = {"*": IO}, (2, 3)
    loras = [lx.split(PARAMS, rank, targets=["q", "k"], layout=layout)[1] for rank in ranks]
    loras = [jax.tree.map(lambda x, i=i: x + normal(5 + i, x.shape, 0.3), one) for i, one in enumerate(loras)]
    bank, weights = lx.bank(loras), jnp.array([0.3, 0.7])
    run = lx.adapt(lambda p: fn(p["q"], p["k"], X), fallback="error")

    @jax.jit
    def of(bank):
        rows = jax.vmap(lambda i: run(PARAMS, bank[i]))(jnp.array([1, -1, 0]))
        return [*rows, run(PARAMS, bank[weights])]

    mixture = lx.combine(list(zip(weights.tolist(), loras, strict=True)))
    for got, lora in zip(of(bank), [loras[1], {}, loras[0], mixture], strict=True):
        merged = lx.merge(PARAMS, lora)
        np.testing.assert_allclose(got, fn(merged["q"], merged["k"], X), rtol=1e-4, atol=1e-4)
