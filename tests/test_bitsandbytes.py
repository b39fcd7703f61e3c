"""Codes and scales of bitsandbytes on CPU, bit by bit. Needs bitsandbytes: run with make test-peft."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn.quantization.formats import DYNAMIC, from_dynamic

pytestmark = pytest.mark.extra_env
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed: make test-peft", allow_module_level=True)

ROWS_OF_INPUTS = lx.Layout(inputs=(1,), outputs=(0,))  # torch's order, in which bitsandbytes' blocks follow


def functional():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and bitsandbytes about themselves
        from bitsandbytes import functional as found
    return found


def weights(getkey, dtype):
    return jax.random.normal(getkey(), (96, 512), dtype) * jnp.asarray(0.02, dtype)


def ours(w, **options):
    return lx.quantize({"weight": w}, "nf4", layout={"weight": ROWS_OF_INPUTS}, **options)["weight"]


def to_torch(w):
    import torch

    tensor = torch.from_numpy(np.array(w, np.float32))
    return tensor.to(torch.bfloat16) if w.dtype == jnp.bfloat16 else tensor


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [64, 128])
def test_codes_and_scales_are_theirs(getkey, dtype, block):
    w = weights(getkey, dtype)
    packed, state = functional().quantize_4bit(to_torch(w), blocksize=block, quant_type="nf4")
    q = ours(w, block=block, double=False)
    np.testing.assert_array_equal(q.codes.reshape(-1), packed.numpy().reshape(-1))
    np.testing.assert_array_equal(q.scales.reshape(-1), state.absmax.numpy())
    theirs = functional().dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_allclose(
        q.dense().astype(jnp.float32), theirs, rtol=1e-6 if dtype == jnp.float32 else 8e-3
    )


def test_second_level_is_theirs_within_its_own_error(getkey):
    w = weights(getkey, jnp.float32)
    packed, state = functional().quantize_4bit(
        to_torch(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    q, once = ours(w), ours(w, double=False)
    np.testing.assert_allclose(DYNAMIC, state.state2.code.numpy(), atol=1e-7)
    np.testing.assert_array_equal(q.codes.reshape(-1), packed.numpy().reshape(-1))
    np.testing.assert_allclose(q.offset.item(), state.offset.item(), rtol=1e-6)
    gap = 0.5 * np.diff(DYNAMIC).max()
    # their groups follow blocks, ours run along outputs: each is as near to the scale as its group allows
    theirs = (
        state.state2.code.numpy()[state.absmax.numpy()]
        * np.repeat(state.state2.absmax.numpy(), 256)[: 96 * 8]
    )
    theirs = theirs.reshape(96, 8) + state.offset.item()
    mine = from_dynamic(q.scales) * jnp.repeat(q.groups, 256, 0)[:96] + q.offset
    assert (np.abs(theirs - once.scales) <= gap * state.state2.absmax.numpy().max() * 1.001).all()
    assert (np.abs(mine - once.scales) <= gap * q.groups.max() * 1.001).all()
    np.testing.assert_allclose(
        np.abs(mine - once.scales).mean(), np.abs(theirs - once.scales).mean(), rtol=0.2
    )
