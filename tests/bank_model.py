"""A model of everything at once for the tests of banks, and adapters of it drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rule_cases import normal

import lorax_fn as lx

TABLE, LAYERS = normal(1, (11, 6), 0.3), normal(2, (2, 5, 6, 6), 0.4)
PARAMS = {
    "table": TABLE,
    "layers": {"experts": LAYERS, "gate": normal(3, (2, 6, 5))},
    "bias": normal(4, (6,)),
}
LAYOUT = {
    "table": lx.Layout((), (0,), (1,)),
    "experts": lx.Layout((0, 1), (2,), (3,)),
    "gate": lx.Layout((0,), (1,), (2,)),
}


def model(params, tokens):
    @jax.checkpoint
    def layer(x, w):
        share = jax.nn.softmax(x @ w["gate"])
        return x + (jnp.einsum("tn,enm->tem", jnp.tanh(x), w["experts"]) * share[..., None]).sum(1), None

    x = params["table"][tokens] + params["bias"][None]
    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["table"].T


def near(got, want, tol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * (1 + np.abs(np.asarray(want)).max()))


def drawn(rank, seed, params=PARAMS, **options):
    _, lora = lx.split(params, rank, layout=LAYOUT, targets=["table", "experts", "gate"], **options)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(
        lambda x, t: x + 0.1 * jax.random.normal(next(keys), x.shape) if t else x, lora, lx.mask(lora)
    )


TOKENS = jax.random.randint(jax.random.key(0), (5, 4), 0, 11)
apply = lx.adapt(model, fallback="error")
