"""FLOPs of the loss gradient of every model: what the factored form must compute, and no more."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import models_linen  # noqa: F401  (fills the table)
import models_others  # noqa: F401
import numpy as np
import pytest
from flops import RANK, check_flops, factored_flops, gradient_flops, loss_of
from model_table import MODELS

import lorax_fn as lx


def prepared(name):
    row = MODELS[name]
    fn, params, args = row.make()
    args = jax.tree.map(np.asarray, args)
    _, lora = lx.split(params, rank=RANK, targets=row.targets, layout=row.layouts)
    return fn, lora, params, args


@pytest.mark.parametrize("name", MODELS)
def test_gradient_costs_what_the_factored_form_must(name):
    """The contractions agree to the last FLOP."""
    check_flops(*prepared(name))


def test_the_count_on_paper_is_that_of_the_formula():
    """Two layers, 8 to 6 to 5, on 3 rows: the second layer's input needs a gradient, the first one's not."""

    def layer(n, m, x_needs_gradient):
        base, down, up = 2 * 3 * n * m, 2 * 3 * n * RANK, 2 * 3 * RANK * m
        forward, by_factors, by_x = base + down + up, down + 2 * up, base + down
        return forward + by_factors + x_needs_gradient * by_x

    fn, lora, params, args = prepared("linen_dense")
    assert factored_flops(fn, lora, params, args) == layer(8, 6, False) + layer(6, 5, True) == 1854


def wide(module, *shape):
    """A model whose contractions outweigh its elementwise work a hundred times."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), x), (x,)


WIDE = {
    "dense": lambda: wide(nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256)]), 256, 512),
    "conv": lambda: wide(nn.Sequential([nn.Conv(64, (3, 3), strides=2), nn.Conv(64, (3, 3))]), 2, 16, 16, 64),
    "attention": lambda: wide(nn.MultiHeadDotProductAttention(2), 2, 32, 512),
}


@pytest.mark.parametrize("name", WIDE)
def test_the_compiler_counts_the_same(name):
    """`cost_analysis` of the compiled gradient, elementwise work and all, within 1 % of the paper's count.

    The guard works: through ``W + AB``, whose gradient has the cotangent of ``W``, it is half as much again.
    """
    fn, params, args = WIDE[name]()
    _, lora = lx.split(params, rank=RANK, targets="kernel", layout=lx.usage(fn, params, *args))
    run = lx.adapt(fn, fallback="error")
    grad = jax.jit(jax.value_and_grad(lambda lora, params, *args: loss_of(run(params, lora, *args))))
    compiled = grad.lower(lora, params, *args).compile().cost_analysis()["flops"]
    assert compiled == pytest.approx(factored_flops(fn, lora, params, args), rel=0.01)
    merged = gradient_flops(lambda lora, params, *args: fn(lx.merge(params, lora), *args), lora, params, args)
    assert merged > 1.3 * compiled
