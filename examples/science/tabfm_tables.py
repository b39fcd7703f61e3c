"""TabFM, in-context learning on tables (Flax NNX): `nnx.vmap` and `nnx.scan` under rematerialization.

    pip install -r examples/science/requirements-tabfm.txt
    python examples/science/tabfm_tables.py

Small and in float64: in its default bfloat16 the model on merged weights rounds, too, and cannot serve as the
oracle; in float32 it comes within 2e-6.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from science.check import adapted_is_merged, moved
from tabfm.src.jax.model import TabFM
from tabfm.src.jax.tabfm_v1_0_0 import ClassificationConfig

CONFIG = ClassificationConfig(
    embed_dim=32,
    col_num_blocks=1,
    col_nhead=2,
    col_num_inds=8,
    row_num_blocks=1,
    row_nhead=2,
    row_num_cls=2,
    icl_num_blocks=2,
    icl_nhead=2,
    ff_factor=2,
    fourier_features_num_frequencies=4,
)


@jax.enable_x64(True)
def main():
    model = TabFM(**CONFIG.to_dict(), rngs=nnx.Rngs(0), dtype=jnp.float64)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    table = jax.random.normal(jax.random.key(1), (1, 10, 4))
    labels = jnp.arange(10)[None] % 3
    rows = jnp.array([7])  # the first seven are examples, the rest are asked for

    def classify(params, rest, table):
        return nnx.merge(graphdef, params, rest)(table, labels, rows)

    params = moved(params, 0.02)  # output layers start at zero
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    adapted_is_merged(classify, params, rest, table, scale=0.05, dtype=jnp.float64)


if __name__ == "__main__":
    main()
