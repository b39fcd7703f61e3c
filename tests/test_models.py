"""Models of Linen, NNX, Haiku and Equinox, unchanged: `usage` finds their weights, `adapt` equals `merge`."""

import jax
import pytest
from merged_oracle import check_model
from models import MODELS, SAME

import lorax_fn as lx


@pytest.fixture(params=MODELS, ids=str)
def row(request):
    return MODELS[request.param]


def relaxed(row):
    """Some models need promotions that this library's own code is not allowed."""
    mode = ("standard", "allow") if row.loose else ("strict", "raise")
    return jax.numpy_dtype_promotion(mode[0]), jax.numpy_rank_promotion(mode[1])


def test_usage_finds_the_weights_and_adapt_equals_merge(row):
    dtypes, ranks = relaxed(row)
    with dtypes, ranks:
        fn, params, args = row.make()
        check_model(fn, params, args, row.layouts, row.targets)


def test_conventions_alone_are_the_same_or_raise(row):
    dtypes, ranks = relaxed(row)
    with dtypes, ranks:
        _, params, _ = row.make()
    if row.plain == SAME:
        _, lora = lx.split(params, rank=2, targets=row.targets)
        assert {path: adapter.layout for path, adapter in lora.items()} == dict(row.layouts)
    else:
        with pytest.raises(lx.LoraError, match=row.plain):
            lx.split(params, rank=2, targets=row.targets)
