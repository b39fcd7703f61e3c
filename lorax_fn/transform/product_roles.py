"""Which axes of a weight a product contracts, which are batch axes, and how many FLOPs it takes."""

import math
from typing import Any


def _dot(eqn: Any, position: int):
    (sums, batches), avals = eqn.params["dimension_numbers"], [v.aval for v in eqn.invars]
    # Each entry of the result takes 2 FLOPs, a product and a sum, per contracted entry.
    contracted = math.prod(avals[0].shape[i] for i in sums[0])
    return (batches[position], sums[position]), 2 * contracted * math.prod(eqn.outvars[0].aval.shape)


def _conv(eqn: Any, position: int):
    if position != 1:
        return None, 0
    # A kernel contracts its window and its own input channels, which are those of one group.
    out_axis, in_axis, *window = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[i] for i in (in_axis, *window))
    return ((), (in_axis, *window)), flops


def _ragged(eqn: Any, position: int):
    if position != 1:
        return None, 0
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (sums, batches), groups = dims.dot_dimension_numbers, dims.rhs_group_dimensions
    # Rows are split among groups, so each row meets one expert's kernel: the FLOPs are those of one dense
    # layer.
    contracted = math.prod(eqn.invars[1].aval.shape[i] for i in sums[1])
    return ((*batches[1], *groups), sums[1]), 2 * contracted * math.prod(eqn.outvars[0].aval.shape)


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv, "ragged_dot_general": _ragged}
