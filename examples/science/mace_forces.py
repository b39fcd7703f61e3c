"""MACE and NequIP in Flax Linen (mlip): forces by an inner gradient, one weight per species and irrep.

    pip install -r examples/science/requirements-mlip.txt
    python examples/science/mace_forces.py

An adapter mixes channels of one irrep and never its components: with any adapter, energies stay and forces
turn when the molecule is turned. Here this is tested by turning it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from mlip.data import ChemicalSystem, DatasetInfo
from mlip.graph import Graph
from mlip.graph.batching_helpers import pad_with_graphs
from mlip.models import ForceField, Mace, Nequip
from science.check import adapted_is_merged, largest_difference

import lorax_fn as lx

SPECIES = {1: 0.0, 6: 0.0, 8: 0.0}
INFO = DatasetInfo(atomic_energies_map=SPECIES, graph_cutoff_angstrom=4.0, avg_num_neighbors=4.0)
MODELS = {
    "MACE": (
        Mace,
        Mace.Config(
            num_channels=4, l_max=1, correlation=2, readout_irreps=("4x0e", "0e"), radial_mlp_hidden=[8]
        ),
    ),
    "NequIP": (Nequip, Nequip.Config(target_irreps="4x0e+4x1o", l_max=1, radial_mlp_hidden=[8])),
}


def molecule():
    positions = np.asarray(jax.random.normal(jax.random.key(1), (5, 3)), np.float64) * 1.2
    system = ChemicalSystem(
        atomic_numbers=np.array([6, 1, 1, 8, 1]),
        positions=positions,
        forces=np.zeros((5, 3)),
        energy=0.0,
        stress=np.zeros((3, 3)),
    )
    graph = Graph.from_chemical_system(system, graph_cutoff_angstrom=4.0)
    # One atom more, in a graph of its own: the package takes the last graph for padding.
    padded = pad_with_graphs(graph, graph.n_node.sum() + 1, graph.n_edge.sum() + 1, 2)
    return jax.tree.map(jnp.asarray, padded)  # in float32


def main():
    graph = molecule()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn = jnp.asarray(turn * np.sign(np.linalg.det(turn)), jnp.float32)
    for name, (network, config) in MODELS.items():
        field = ForceField.from_mlip_network(network(config, INFO))

        def energy_and_forces(params, positions, field=field):
            moved = graph.replace(nodes=graph.nodes.replace(positions=positions))
            found = dataclasses.replace(field, params=params).predict(moved)
            return found.energy[0], found.forces[:5]

        print(name)
        positions = jnp.asarray(graph.nodes.positions)
        params, lora = adapted_is_merged(energy_and_forces, field.params, positions)
        adapted = jax.jit(lx.adapt(energy_and_forces, fallback="error"))
        energy, forces = adapted(params, lora, positions)
        turned_energy, turned_forces = adapted(params, lora, positions @ turn.T)
        off = largest_difference(turned_forces, forces @ turn.T)
        print(f"turned by a rotation: forces differ by {off:.0e}")
        assert jnp.allclose(turned_energy, energy, rtol=1e-5, atol=1e-6) and off < 1e-5


if __name__ == "__main__":
    main()
