"""Nequix, a force field in Equinox and e3nn: forces by an inner gradient, equivariant with any adapter.

    pip install --no-deps -r examples/science/requirements-light.txt
    python examples/science/nequix_forces.py

Nequix keeps one array per path between irreps, so that an adapter mixes channels and never components:
whatever is trained, forces turn with the molecule. Here this is tested by turning it.

Expect: 16 weights adapted; values within 2e-7 of the merged model, gradients within 1e-7; turned, 1e-7.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from nequix.model import Nequix
from science.check import adapted_is_merged, largest_difference

import lorax_fn as lx


def molecule(atoms=6):
    """All pairs of a few atoms of two species, and one atom of padding, which jraph takes to be there."""
    positions = 1.5 * jax.random.normal(jax.random.key(1), (atoms + 1, 3))
    senders, receivers = np.nonzero(~np.eye(atoms, dtype=bool))
    return jraph.GraphsTuple(
        nodes={"species": jnp.arange(atoms + 1) % 2, "positions": positions},
        edges={},
        globals={"cell": None},
        senders=jnp.asarray(senders),
        receivers=jnp.asarray(receivers),
        n_node=jnp.array([atoms, 1]),
        n_edge=jnp.array([len(senders), 0]),
    )


def main():
    model = Nequix(
        jax.random.key(0),
        n_species=2,
        lmax=1,
        hidden_irreps="8x0e+8x1o",
        n_layers=2,
        radial_mlp_size=16,
        avg_n_neighbors=5.0,
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    graph = molecule()

    def energy_and_forces(arrays, positions):
        nodes = graph.nodes | {"positions": positions}
        energy, forces, _ = eqx.combine(arrays, static)(graph._replace(nodes=nodes))
        return energy[0], forces[:-1]

    positions = graph.nodes["positions"]
    params, lora = adapted_is_merged(energy_and_forces, arrays, positions)

    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn = jnp.asarray(turn * np.sign(np.linalg.det(turn)), jnp.float32)
    adapted = jax.jit(lx.adapt(energy_and_forces, fallback="error"))
    energy, forces = adapted(params, lora, positions)
    turned_energy, turned_forces = adapted(params, lora, positions @ turn.T)
    off = largest_difference(turned_forces, forces @ turn.T)
    print(f"turned by a rotation: forces differ by {off:.0e}")
    assert jnp.allclose(turned_energy, energy, rtol=1e-5) and off < 1e-5
    bare = jax.jit(energy_and_forces)(params, positions)
    assert largest_difference(forces, bare[1]) > 1e-3  # the adapters do act


if __name__ == "__main__":
    main()
