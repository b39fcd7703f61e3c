"""TimesFM 2.5, a forecaster of time series in Flax NNX: layers under `nnx.scan`, with a cache for decoding.

    pip install --no-deps -r examples/science/requirements-light.txt
    python examples/science/timesfm_forecast.py

Its own module with small sizes and random weights; that of 200M parameters differs in the numbers alone.

Expect: 10 weights adapted; values within 2e-7 of the merged model, gradients within 3e-7.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from science.check import adapted_is_merged
from timesfm.flax import util
from timesfm.timesfm_2p5 import timesfm_2p5_base, timesfm_2p5_flax

WIDTH, LAYERS, HEADS = 32, 2, 4
FULL = timesfm_2p5_base.TimesFM_2p5_200M_Definition()


def sized(block, inputs, outputs):
    return dataclasses.replace(block, input_dims=inputs, hidden_dims=WIDTH, output_dims=outputs)


class Small(timesfm_2p5_flax.TimesFM_2p5_200M_flax_module):
    config = dataclasses.replace(
        FULL,
        input_patch_len=8,
        output_patch_len=16,
        output_quantile_len=16,
        tokenizer=sized(FULL.tokenizer, 16, WIDTH),
        stacked_transformers=dataclasses.replace(
            FULL.stacked_transformers,
            num_layers=LAYERS,
            transformer=dataclasses.replace(
                FULL.stacked_transformers.transformer, model_dims=WIDTH, hidden_dims=WIDTH, num_heads=HEADS
            ),
        ),
        output_projection_point=sized(FULL.output_projection_point, WIDTH, 160),
        output_projection_quantiles=sized(FULL.output_projection_quantiles, WIDTH, 160),
    )


def main():
    graphdef, params, rest = nnx.split(Small(), nnx.Param, ...)
    series = jnp.sin(jnp.arange(64.0) / 5).reshape(1, 8, 8)
    seen = jnp.zeros(series.shape, bool)
    shape = (LAYERS, 1, 8, HEADS, WIDTH // HEADS)
    cache = util.DecodeCache(
        next_index=jnp.zeros((LAYERS, 1), jnp.int32),
        num_masked=jnp.zeros((LAYERS, 1), jnp.int32),
        key=jnp.zeros(shape),
        value=jnp.zeros(shape),
    )

    def forecast(params, rest, series):
        (_, _, points, _), _ = nnx.merge(graphdef, params, rest)(series, seen, cache)
        return points

    _, lora = adapted_is_merged(forecast, params, rest, series)
    stacked = [adapter for adapter in lora.values() if adapter.layout.stack]
    print(f"{len(stacked)} of them hold {LAYERS} layers in one array: {stacked[0].a.shape}")
    assert stacked


if __name__ == "__main__":
    main()
