"""What theory says of alpha, rank and learning rates, seen in runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_setup import KEY, STEPS, apply, batches, init, loss_fn

import lorax_fn as lx
from lorax_fn.inits.plain import Gaussian


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Gaussian):
    """`Gaussian` times a factor."""

    factor: float = 1.0

    def __call__(self, key, w, layout, rank, scale, dtype):
        a, b, w = super().__call__(key, w, layout, rank, scale, dtype)
        return self.factor * a, b, w


def by_factor(lane):
    """Adam with a learning rate for each of A and B, and an eps that no gradient is small against."""

    def labels(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name, tree)

    rates = {name: optax.adam(lane[f"lr_{name}"], eps=1e-30) for name in "ab"}
    return optax.partition(rates, labels)


def test_adam_knows_alpha_and_the_size_of_a_only_through_the_learning_rates():
    """(alpha, sigma_A, lr_A, lr_B) -> (alpha / (p q), p sigma_A, p lr_A, q lr_B) changes no step."""
    lanes = []
    for p, q in [(1.0, 1.0), (3.0, 0.5), (0.25, 8.0), (1.0, 6.0)]:
        lanes.append(
            {"rank": 4, "alpha": 8.0 / (p * q), "init": Scaled(factor=p), "lr_a": p * 1e-2, "lr_b": q * 1e-2}
        )
    lanes.append(lanes[1] | {"lr_b": 1e-2})  # one of the four left as it was: another run
    result = lx.sweep(loss_fn, init(), lanes, batches(), steps=STEPS, tx=by_factor, key=KEY, progress=False)
    losses = result.curves["loss"]
    for other in losses[1:4]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-4)
    assert np.abs(losses[4] - losses[0]).max() > 1e-2 * losses[0].max()


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_first_step_does_not_depend_on_the_rank_in_expectation(scaling):
    """Adam's first step makes dW = -lr * scale * A sign(A^T G): r terms alike, each times alpha / r."""
    params, batch = init(layers=1, width=16), batches(width=16)[0]

    def change(rank):
        def one(key):
            _, lora = lx.split(params, rank=rank, alpha=1.0, scaling=scaling, key=key)
            state = lx.TrainState.create(lora=lora, tx=optax.adam(1e-3, eps=1e-30), key=key)
            after, _ = lx.make_train_step(loss_fn, optax.adam(1e-3, eps=1e-30))(state, params, batch)
            return jnp.mean(
                (apply(params, after.lora, batch["x"]) - apply(params, lora, batch["x"])) * batch["y"]
            )

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 400)))

    changes = {rank: change(rank) for rank in (1, 4, 16)}
    means = {rank: x.mean() for rank, x in changes.items()}
    errors = {rank: x.std() / 20.0 for rank, x in changes.items()}
    for rank in (4, 16):
        factor = 1.0 if scaling == "lora" else rank**0.5
        error = np.hypot(errors[1] * factor, errors[rank])
        assert abs(means[rank] - factor * means[1]) < 4 * error < 0.4 * abs(means[rank])
