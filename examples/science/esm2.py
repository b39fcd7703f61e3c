"""ESM-2, a language model of proteins in Equinox (esm2quinox), with adapters in its stacked layers.

    pip install --no-deps -r examples/science/requirements-light.txt
    python examples/science/esm2.py

A tiny one with random weights; `esm2quinox.from_torch` fills it with those of Meta.

Expect: 6 weights adapted; values within 6e-7 of the merged model, gradients within 6e-7.
"""

import equinox as eqx
import esm2quinox
import jax
from science.check import adapted_is_merged


def main():
    model = esm2quinox.ESM2(
        num_layers=3, embed_size=32, num_heads=4, token_dropout=True, key=jax.random.key(0)
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    proteins = esm2quinox.tokenise(["MKTAYIAKQR#SFVKSHFSRQ", "GSHM#PLE"])

    def logits(arrays, tokens):
        return jax.vmap(lambda row: eqx.combine(arrays, static)(row).logits)(tokens)

    _, lora = adapted_is_merged(logits, arrays, proteins)
    assert lora["layers/attn/query_proj/weight"].a.shape == (3, 32, 2)  # a stack of three layers
    assert len(lora) == 6  # not the head, which is also the embedding table


if __name__ == "__main__":
    main()
