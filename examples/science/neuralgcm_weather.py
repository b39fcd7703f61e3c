"""NeuralGCM, a weather model in Haiku, with the real weights and the ERA5 state of its own wheel.

    pip install -r examples/science/requirements-neuralgcm.txt
    python examples/science/neuralgcm_weather.py

First the check: the adapted model, one hour ahead, is the merged one. Then a twin experiment, since the wheel
has one state and no later one to compare with: a copy of the model whose parameterization was changed is the
truth, adapters learn from its first six hours, one at a time, and are judged by the forecast of a whole day.
"""

import importlib.resources
import io
import pickle

import jax
import jax.numpy as jnp
import neuralgcm
import optax
from neuralgcm import demo
from science.check import adapted_is_merged, moved

import lorax_fn as lx

PHYSICS = ["*neural_parameterization*process_tower*linear*/w"]  # of all layers that forecast tendencies
HOURS, LESSONS, STEPS = 24, 6, 24


class Unpickler(pickle.Unpickler):
    """Reads the arrays of an older JAX, whose types had a field that is gone."""

    def find_class(self, module, name):
        found = super().find_class(module, name)
        if name != "_reconstruct_array":
            return found

        def array(function, arguments, state, _):
            values = function(*arguments)
            values.__setstate__(state)
            return jnp.asarray(values)

        return array


def main():
    file = importlib.resources.files(neuralgcm).joinpath("data/tl63_stochastic_mini.pkl")
    model = neuralgcm.PressureLevelModel.from_checkpoint(Unpickler(io.BytesIO(file.read_bytes())).load())
    weather = demo.load_data(model.data_coords).isel(time=0)
    inputs, forcings = model.data_from_xarray(weather)
    treedef = jax.tree.structure(model)
    state = model.encode(inputs, forcings, jax.random.PRNGKey(0))

    def hour(params, state):
        """The state after one step of an hour, in spherical harmonics."""
        return jax.tree.unflatten(treedef, jax.tree.leaves(params)).advance(state, forcings)

    def prognostic(params, state):
        found = hour(params, state).state
        return {n: getattr(found, n) for n in ("vorticity", "divergence", "temperature_variation")}

    usage = lx.usage(prognostic, model.params, state)
    params, lora = adapted_is_merged(
        prognostic, model.params, state, targets=PHYSICS, layout=usage, rank=4, scale=0.02
    )
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(lora))} numbers in the adapters")

    truth = lx.merge(params, moved(lora, 0.05))
    adapted = lx.adapt(hour, fallback="error")
    step_hour = jax.jit(adapted)

    def forecast(params, lora, hours):
        states = [state]
        for _ in range(hours):
            states.append(step_hour(params, lora, states[-1]))
        return states

    scale = {
        n: float(jnp.abs(getattr(state.state, n)).mean()) for n in ("vorticity", "temperature_variation")
    }

    def error(one, other):
        """Mean square over two fields, each in parts of its size."""
        return sum(
            jnp.mean(((getattr(one.state, n) - getattr(other.state, n)) / size) ** 2)
            for n, size in scale.items()
        )

    start = jax.tree.map(jnp.zeros_like, lora)  # of the same shapes: nothing is compiled anew
    later = forecast(truth, start, HOURS)
    _, lora = lx.split(params, rank=4, alpha=4.0, targets=PHYSICS, layout=usage)
    before = float(error(forecast(params, lora, HOURS)[-1], later[-1]))

    def loss_fn(params, lora, batch, key):
        now, then = batch
        return error(adapted(params, lora, now), then) * 1e6

    tx = optax.adam(1e-3)
    trained = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    for i in range(STEPS):
        trained, metrics = step(trained, params, (later[i % LESSONS], later[i % LESSONS + 1]))
    after = float(error(forecast(params, trained.lora, HOURS)[-1], later[-1]))
    print(f"error of the forecast of {HOURS} hours: before {before:.2e}, after {after:.2e}")
    assert after < before / 2


if __name__ == "__main__":
    main()
