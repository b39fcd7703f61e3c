"""Models of Linen, NNX, Haiku and Equinox, unchanged: `usage` finds their weights, `adapt` equals `merge`."""

import models_linen  # noqa: F401  (fills the table)
import models_others  # noqa: F401
import pytest
from merged_oracle import check_model
from model_table import MODELS, SAME

import lorax_fn as lx


@pytest.mark.parametrize("name", MODELS)
def test_usage_finds_the_weights_and_adapt_equals_merge(name):
    row = MODELS[name]
    fn, params, args = row.make()
    check_model(fn, params, args, row.layouts, row.targets)


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
