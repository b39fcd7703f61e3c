"""Mamba-2 in Flax NNX (mamba2-jax): adapters around a chunked state-space scan.

pip install --no-deps -r examples/science/requirements-light.txt
python examples/science/mamba2.py

Expect: 4 weights adapted; values within 8e-7 of the merged model, gradients within 9e-7.
"""

import jax.numpy as jnp
from flax import nnx
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from science.check import adapted_is_merged


def main():
    config = Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=2
    )
    graphdef, params, rest = nnx.split(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    tokens = jnp.arange(24).reshape(2, 12) % 50

    def logits(params, rest, tokens):
        return nnx.merge(graphdef, params, rest)(tokens)["logits"]

    _, lora = adapted_is_merged(logits, params, rest, tokens)
    assert len(lora) == 4 and {path.split("/")[-2] for path in lora} == {"in_proj", "out_proj"}


if __name__ == "__main__":
    main()
