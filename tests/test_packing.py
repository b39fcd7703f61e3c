"""Packing against loops written out, and masks against what a model does with them."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorax_fn as lx


@given(st.lists(st.integers(2, 9), max_size=12), st.integers(0, 2**31))
def test_every_prediction_is_packed_once_and_in_order(sizes, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, 100, size) for size in sizes]
    prompts = [int(rng.integers(0, size)) for size in sizes]
    rows = lx.data.pack(sequences, 8, prompts=prompts, pad=-1)
    found = []
    for row in range(len(rows["inputs"])):
        ids = rows["segments"][row]
        assert (np.diff(ids[ids > 0]) >= 0).all() and not ids[np.count_nonzero(ids) :].any()
        assert (rows["inputs"][row][ids == 0] == -1).all() and not rows["mask"][row][ids == 0].any()
        for segment in range(1, ids.max() + 1):
            part = {name: array[row][ids == segment] for name, array in rows.items()}
            np.testing.assert_array_equal(part["positions"], np.arange(len(part["inputs"])))
            found.append(tuple(tuple(part[name].tolist()) for name in ("inputs", "targets", "mask")))
    want = [
        (tuple(s[:-1].tolist()), tuple(s[1:].tolist()), tuple(i + 1 >= prompt for i in range(len(s) - 1)))
        for s, prompt in zip(sequences, prompts, strict=True)
    ]
    assert sorted(found) == sorted(want)
    # no two rows could have been one
    used = np.sort((rows["segments"] > 0).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > 8 or sum(sizes) - len(sizes) > 8 * (len(used) - 1) / 2


def test_packing_is_the_fullest_row_that_has_room():
    rows = lx.data.pack([range(6), range(3), range(4), range(2)], 8)
    np.testing.assert_array_equal(rows["segments"], [[1] * 5 + [2] * 2 + [3], [1] * 3 + [0] * 5])


def test_what_can_not_be_packed_is_listed():
    text = (
        r"sequences\[0\]\n +sequences\[1\]\n +sequences\[3\]\n(.|\n)*1 tokens, 0 of them(.|\n)*2 to 5 tokens"
    )
    with pytest.raises(lx.LoraError, match=text):
        lx.data.pack([[1], range(6), [1, 2], [1, 2]], 4, prompts=[0, 0, 1, 2])
    with pytest.raises(lx.LoraError, match="1 prompts, 2 sequences"):
        lx.data.pack([[1, 2], [1, 2]], 4, prompts=[0])


def test_packed_examples_do_not_see_each_other():
    """A transformer block on a packed row gives what it gives on each sequence alone."""
    block = nn.MultiHeadDotProductAttention(num_heads=2)
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    place = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    sequences = [[5, 9, 2, 7], [8, 1, 3], [4, 4]]
    rows = lx.data.pack(sequences, 8)
    x = table[rows["inputs"]] + place[rows["positions"]]
    assert len(x) == 1
    params = block.init(jax.random.key(0), x, x)
    packed = block.apply(params, x, x, mask=lx.data.attention_mask(rows["segments"]))[0]
    for segment, ids in enumerate(sequences, 1):
        alone = (table[ids[:-1]] + place[: len(ids) - 1])[None]
        want = block.apply(params, alone, alone, mask=nn.make_causal_mask(alone[..., 0]))[0]
        np.testing.assert_allclose(packed[rows["segments"][0] == segment], want, rtol=1e-5, atol=1e-6)


def test_prompts_of_padded_sequences():
    prompts, lengths = [0, 3, 2], [5, 4, 7]
    want = np.zeros((3, 6), bool)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        for place in range(6):
            want[row, place] = prompt <= place + 1 < length
    np.testing.assert_array_equal(lx.data.prompt_mask(prompts, lengths, 6), want)
    # the same as pack's, for one sequence a row
    rows = lx.data.pack([range(n) for n in lengths], 6, prompts=prompts)
    np.testing.assert_array_equal(np.sort(rows["mask"].sum(1)), np.sort(want.sum(1)))
