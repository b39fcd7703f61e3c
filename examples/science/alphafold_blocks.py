"""AlphaFold's Evoformer and structure module in Haiku (alphafold-colabfold), with narrow layers.

    pip install -r examples/science/requirements-alphafold.txt
    python examples/science/alphafold_blocks.py

Two Evoformer blocks under `layer_stack` with rematerialization and subbatching, so that weights are stacks of
two; and the structure module, whose invariant point attention runs twice over the same weights.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from alphafold.model import config as configs
from alphafold.model import folding, layer_stack, modules, prng
from science.check import adapted_is_merged

RESIDUES, SEQUENCES, MSA, PAIR, SINGLE = 8, 4, 16, 8, 16
CONFIG = configs.model_config("model_1").model
SETTINGS = CONFIG.global_config
SETTINGS.update({"zero_init": False, "deterministic": True, "bfloat16": False, "subbatch_size": 2})


def narrow(config, sizes):
    """Sets fields of a config and of the configs in it."""
    for name, value in config.items():
        if hasattr(value, "items"):
            narrow(value, sizes)
        elif name in sizes:
            config[name] = sizes[name]
    return config


def evoformer():
    sizes = {
        "num_head": 2,
        "num_outer_channel": 4,
        "num_intermediate_channel": 8,
        "num_intermediate_factor": 2,
    }
    config = narrow(CONFIG.embeddings_and_evoformer.evoformer, sizes)

    def network(msa, pair):
        masks = {"msa": jnp.ones((SEQUENCES, RESIDUES)), "pair": jnp.ones((RESIDUES, RESIDUES))}
        block = modules.EvoformerIteration(config, SETTINGS, is_extra_msa=False)

        def step(activations):
            key = prng.SafeKey(jax.random.PRNGKey(0))
            return block(activations, masks, is_training=False, safe_key=key)

        return layer_stack.layer_stack(2)(hk.remat(step))({"msa": msa, "pair": pair})

    keys = jax.random.split(jax.random.key(0), 2)
    msa = jax.random.normal(keys[0], (SEQUENCES, RESIDUES, MSA))
    return network, (msa, jax.random.normal(keys[1], (RESIDUES, RESIDUES, PAIR)))


def structure():
    sizes = {"num_layer": 2, "num_channel": 16, "num_head": 2, "num_scalar_qk": 4, "num_scalar_v": 4}
    config = narrow(CONFIG.heads.structure_module, sizes)
    batch = {
        "seq_mask": jnp.ones(RESIDUES),
        "aatype": jnp.arange(RESIDUES) % 20,
        "atom14_atom_exists": jnp.ones((RESIDUES, 14)),
        "atom37_atom_exists": jnp.ones((RESIDUES, 37)),
        "residx_atom37_to_atom14": jnp.arange(37)[None].repeat(RESIDUES, 0) % 14,
    }

    def network(single, pair):
        module = folding.StructureModule(config, SETTINGS)
        key = prng.SafeKey(jax.random.PRNGKey(0))
        folded = module({"single": single, "pair": pair}, batch, is_training=False, safe_key=key)
        return folded["final_atom_positions"], folded["traj"]

    keys = jax.random.split(jax.random.key(1), 2)
    single = jax.random.normal(keys[0], (RESIDUES, SINGLE))
    return network, (single, jax.random.normal(keys[1], (RESIDUES, RESIDUES, PAIR)))


def main():
    for name, (network, args) in {"Evoformer": evoformer(), "structure module": structure()}.items():
        print(name)
        transformed = hk.without_apply_rng(hk.transform(network))
        params = transformed.init(jax.random.PRNGKey(0), *args)
        adapted_is_merged(transformed.apply, params, *args, scale=0.05)


if __name__ == "__main__":
    main()
