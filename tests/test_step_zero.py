"""B = 0: the adapted model is the base model: bit-equal op by op, within 4 ulp once compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_cases import RULE_CASES

import lorax_fn as lx


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", RULE_CASES[::6], ids=lambda case: case.name)
def test_bit_equal_op_by_op_and_within_4_ulp_compiled(case):
    params, adapter = {"w": case.weight}, case.adapter
    lora = {"w": dataclasses.replace(adapter, b=jnp.zeros_like(adapter.b))}
    adapted = lx.adapt(case.fn, fallback="error")
    want = np.asarray(case.fn(params, case.input))
    assert np.array_equal(adapted(params, lora, case.input), want, equal_nan=True)

    # Compiled, additions may fuse in another order: 4 ulp of the largest entry.
    both = jax.jit(lambda lora, x: (adapted(params, lora, x), case.fn(params, x)))
    got, want = map(np.asarray, both(lora, case.input))
    assert np.abs(got - want).max() <= 4 * np.spacing(np.abs(want).max())
