"""What a checkpoint holds besides its adapters, and what of its base it remembers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import bits, lora_of, normal, params_of

import lorax_fn as lx
from lorax_fn import checkpoint
from lorax_fn.checkpoint import files
from lorax_fn.checkpoint.fingerprint import fingerprint, places
from lorax_fn.checkpoint.storage import LoraCheckpointWarning
from lorax_fn.core.errors import LoraError
from lorax_fn.methods.whole import Full


def test_extra_comes_back_with_its_structure(tmp_path):
    """What a save was given beside the adapters: dicts, lists, tuples, None, numbers, weak types and keys."""
    extra = {
        "bn": {"mean": normal(1, (3,), jnp.bfloat16)},
        "l": [1, (jnp.float32(2), None)],
        "k": jax.random.key(4),
    }
    checkpoint.save(tmp_path / "ck", lora_of(), extra=extra)
    got = checkpoint.load_extra(tmp_path / "ck")
    assert bits(got) == bits(jax.tree.map(jnp.asarray, extra)) and got["l"][0].weak_type
    assert bits(checkpoint.load_extra(tmp_path / "ck", like=extra)) == bits(got)
    assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora_of())
    with pytest.raises(LoraError, match=r"not have the structure(.|\n)*bn/mean: bn/mean bfloat16\[3\] saved"):
        checkpoint.load_extra(tmp_path / "ck", like={**extra, "bn": {"mean": jnp.zeros(4)}})
    checkpoint.save(tmp_path / "ck", lora_of(), extra={})
    assert checkpoint.load_extra(tmp_path / "ck") == {}
    checkpoint.save(tmp_path / "ck", lora_of())
    with pytest.raises(LoraError, match=r"saved without extra(.|\n)*extra=state.extra"):
        checkpoint.load_extra(tmp_path / "ck")
    with pytest.raises(LoraError, match=r"these leaves can't be stored(.|\n)*f\n"):
        checkpoint.save(tmp_path / "ck", lora_of(), extra={"f": jnp.tanh})


def test_extra_of_other_nodes_needs_a_like(tmp_path):
    from flax import nnx

    state = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)
    checkpoint.save(tmp_path / "ck", lora_of(), extra=state)
    with pytest.raises(LoraError, match=r"structure of this extra(.|\n)*like=extra"):
        checkpoint.load_extra(tmp_path / "ck")
    assert bits(checkpoint.load_extra(tmp_path / "ck", like=state)) == bits(state)


def test_a_save_without_the_statistics_of_its_base_says_so(tmp_path):
    params = {"params": {"w": jnp.ones((4, 3))}, "batch_stats": {"bn": {"mean": jnp.zeros(3)}}}
    lora = {"params/w": Full(jnp.ones((4, 3)))}
    with pytest.warns(LoraCheckpointWarning, match=r"batch_stats/bn/mean(.|\n)*extra=state.extra") as caught:
        checkpoint.save(tmp_path / "ck", lora, params=params)
    assert caught[0].filename == __file__
    for extra in ({}, params["batch_stats"]):  # no warning: somebody has said what became of them
        checkpoint.save(tmp_path / "ck", lora, params=params, extra=extra)


def test_sharded_params_have_the_same_fingerprint():
    params = {"w": normal(0, (16, 700)), "b": normal(1, (16,), jnp.bfloat16)}
    want = fingerprint(params)
    assert fingerprint(jax.tree.map(np.asarray, params)) == want
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        sharded = jax.device_put(params, jax.NamedSharding(mesh, jax.P("d")))
        assert fingerprint(sharded) == want


@pytest.mark.parametrize("shape", [(4096, 4096), (512, 64, 128), (3, 5000), (4097, 4096), (10_000,)])
def test_the_fingerprint_leaves_no_axis_in_one_place(shape):
    """A sample at even strides met one column of a 4096 x 4096 weight."""
    index = np.unravel_index(places(int(np.prod(shape))), shape)
    assert len(set(zip(*index, strict=True))) == 4096
    for along, size in zip(index, shape, strict=True):
        assert len(set(along)) > min(size, 4096) * 0.6
    w = np.zeros(shape, np.float32)
    last = w.copy()
    last[..., shape[-1] // 2 :] = 1  # another base, and the first column is the same
    assert fingerprint({"w": w}) != fingerprint({"w": last})


def test_state_is_no_part_of_a_base(tmp_path):
    """A forward pass counts up random numbers: the base is the same afterwards."""
    lora = {"w": Full(jnp.ones(2))}
    before = {"w": jnp.ones(2), "count": jnp.uint32(0), "n": jnp.int32(3), "key": jax.random.key(0)}
    after = before | {"count": jnp.uint32(7), "n": jnp.int32(4), "key": jax.random.key(1)}
    checkpoint.save(tmp_path / "ck", lora, params=before)
    checkpoint.load(tmp_path / "ck", params=after)
    with pytest.raises(LoraError, match="w: content"):
        checkpoint.load(tmp_path / "ck", params=after | {"w": jnp.zeros(2)})


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    """Made of one of today: no sizes, no extra, no seal, and a fingerprint that counts integers."""
    params = params_of()
    checkpoint.save(tmp_path / "ck", lora_of(), params=params)
    facts = json.loads((tmp_path / "ck" / "adapter.json").read_text())
    del facts["extra"]
    facts |= {"version": 1, "base": fingerprint(params, 1)}
    facts["files"] = {name: file["crc32"] for name, file in facts["files"].items()}
    files.write_facts(tmp_path / "ck" / "adapter.json", facts)
    next((tmp_path / "ck").glob("arrays-*/facts.sha256")).unlink()
    assert bits(checkpoint.load(tmp_path / "ck", params=params)) == bits(lora_of())
    with pytest.raises(LoraError, match="key: content"):
        checkpoint.load(tmp_path / "ck", params=params | {"key": jax.random.key(6)})
    checkpoint.save(tmp_path / "ck", lora_of(2.0))  # replaced by one of version 2
    assert bits(checkpoint.load(tmp_path / "ck")) == bits(lora_of(2.0))


def test_adapters_that_took_a_part_of_w_are_not_saved_alone_in_silence(tmp_path):
    original = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    params, lora = lx.split(original, rank=2, init="pissa")
    with pytest.warns(lx.LoraCheckpointWarning, match=r"(?s)took a part of W \(kernel\).*to_plain"):
        lx.checkpoint.save(tmp_path / "alone", lora)
    lx.checkpoint.save(tmp_path / "with", lora, params=params)
    lx.checkpoint.save(tmp_path / "plain", lx.ranks.to_plain(original, params, lora))
    assert lx.checkpoint.load(tmp_path / "with", params=params)["kernel"].residual
    with pytest.raises(lx.LoraError, match="to_plain"):
        lx.checkpoint.load(tmp_path / "with", params=original)
    assert not lx.split(original, rank=2)[1]["kernel"].residual
