"""Models of Linen, NNX, Haiku and Equinox, unchanged: `usage` finds their weights, `adapt` equals `merge`."""

import jax
import jax.numpy as jnp
import models_linen  # noqa: F401  (fills the table)
import models_others  # noqa: F401
import pytest
from merged_oracle import check_model, check_values, randomized
from model_table import MODELS, SAME

import lorax_fn as lx


@pytest.mark.parametrize("name", MODELS)
def test_usage_finds_the_weights_and_adapt_equals_merge(name):
    row = MODELS[name]
    fn, params, args = row.make()
    check_model(fn, params, args, row.layouts, row.targets)


def quantized(name, draw=lambda tree: tree):
    """The model's function, its base with every adapted weight in 8 bits, adapters, arguments."""
    row = MODELS[name]
    fn, params, args = row.make()
    layout = lx.usage(fn, params, *args)
    _, lora = lx.split(params, rank=2, alpha=2.0, targets=row.targets, layout=layout)
    params = lx.quantize(draw(params), "int8", block=2, double=False, targets=row.targets, layout=layout)
    return fn, params, draw(lora), jax.tree.map(jnp.asarray, args)


@pytest.mark.parametrize("name", MODELS)
def test_no_quantized_weight_is_unpacked_outside_a_product(name):
    """With adapters and without; traced only: `test_a_quantized_base_equals_merge` has the values."""
    fn, params, lora, args = quantized(name)
    run = lx.adapt(fn, fallback="error")
    leaves, treedef = jax.tree.flatten(params)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def traced(arrays, lora):
        params = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return run(params, lora, *args), fn(lx.dequantize(params), *args)

    for adapters in (lora, {}):
        got, want = jax.eval_shape(traced, arrays, adapters)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_base_equals_merge(name):
    fn, params, lora, args = quantized(name, randomized)
    check_values(fn, params, lora, args)


@pytest.mark.parametrize("name", MODELS)
def test_conventions_alone_find_the_same_or_raise(name):
    row = MODELS[name]
    _, params, _ = row.make()
    if isinstance(row.plain, set) or row.plain == SAME:
        _, lora = lx.split(params, rank=2, targets=row.targets)
        wanted = row.layouts if row.plain == SAME else {path: row.layouts[path] for path in row.plain}
        assert {path: adapter.layout for path, adapter in lora.items()} == dict(wanted)
    else:
        with pytest.raises(lx.LoraError, match=row.plain):
            lx.split(params, rank=2, targets=row.targets)
