"""Slots of banks: what is set there comes back, swaps compile nothing, memory, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bank_model import LAYOUT, PARAMS, TABLE, TOKENS, apply, drawn, near

import lorax_fn as lx


def test_a_hundred_swaps_compile_nothing_and_copy_one_slot(caplog):
    loras = [drawn(r, i) for i, r in enumerate((1, 2, 4, 3))]
    bank = lx.bank(loras, rank=4, capacity=8)
    run = jax.jit(lambda bank, ids: jax.vmap(lambda i, x: apply(PARAMS, bank[i], x))(ids, TOKENS[:2]))
    run(bank, jnp.array([0, 1]))
    bank = bank.set(0, loras[1], donate=True)
    pointer = bank.slots["table"].a.unsafe_buffer_pointer()
    with jax.log_compiles():
        for i in range(100):
            bank = bank.set(i % 8, loras[i % 4], donate=True)
            run(bank, jnp.array([i % 8, -1]))
        assert "ompil" not in caplog.text, caplog.text
        assert bank.slots["table"].a.unsafe_buffer_pointer() == pointer
        other = lx.bank(loras, rank=4, capacity=9)
        run(other, jnp.array([0, 1]))
        assert "Compiling" in caplog.text  # a bank of another size does compile
    got = run(bank, jnp.array([3, 2]))
    near(got[0], apply(PARAMS, loras[99 % 4], TOKENS[0]))


def test_get_is_what_set_put_there_and_clear_empties():
    loras = [
        drawn({"experts": (1, 2, 0, 3, 1, 1, 1, 1, 1, 1), "*": 2}, 1),
        drawn(3, 2, method="dora"),
        {"table": drawn(1, 3)["table"]},
    ]
    loras[0] = jax.tree.map(lambda x: x, loras[0])
    bank = lx.bank(loras, capacity=5, rank=4)
    assert len(bank) == 5 and "5 slots" in repr(bank) and lx.bank([{}, *loras]).get(0) == {}
    before = bank
    bank = bank.set(4, loras[1]).clear(0)
    assert bank.get(0) == {} == before.get(4) and bank.get(3) == {}
    for i, lora in ((1, loras[1]), (2, loras[2]), (4, loras[1])):
        back = bank.get(i)
        assert jax.tree.structure(back) == jax.tree.structure(lora)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), back, lora))
    uneven = before.get(0)["layers/experts"]
    assert uneven.rank == (1, 2, 0, 3, 1, 1, 1, 1, 1, 1) and uneven.alpha == 32.0
    assert lx.bank([loras[1]] * 7).nbytes == 7 * lx.bank([loras[1]]).nbytes
    shapes = jax.eval_shape(lambda: drawn(2, 0))
    assert lx.bank([shapes], capacity=3).slots["table"].a.shape == (3, 11, 2)
    traced = jax.jit(lambda bank, i, lora: bank.set(i, lora))(before, 4, loras[1])
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), traced.get(4), loras[1]))


def test_memory_is_that_of_the_adapters_and_the_base_is_shared():
    made = [lx.split(PARAMS, rank, layout=LAYOUT, targets=["table", "gate"]) for rank in (1, 2, 2)]
    for params, _ in made:
        for kept, given in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
            assert kept is given
    bank = lx.bank([lora for _, lora in made])
    one = sum(x.nbytes for x in jax.tree.leaves(made[1][1]))
    numbers = (
        4 * 3 * (1 + 1 + 1 + 1 + 3 * 2 + 1)
    )  # scale, alpha, rank and kind of each slot; gate has two layers
    assert bank.nbytes == 3 * one + numbers
    base = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)}
    assert not base & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(bank)}


def test_two_banks_by_rank_class_are_smaller_than_one():
    """Rows of either class in one call: each has -1 in the bank that it does not use."""
    loras = [drawn(r, i) for i, r in enumerate((1, 1, 1, 5))]
    small, large = lx.bank(loras[:3]), lx.bank(loras[3:])
    assert small.nbytes + large.nbytes < lx.bank(loras).nbytes / 2
    twice = lx.adapt(apply, fallback="error")
    i, j = jnp.array([2, -1, 0, -1]), jnp.array([-1, 0, -1, -1])
    rows = jax.jit(jax.vmap(lambda i, j, x: twice(PARAMS, small[i], large[j], x)))(i, j, TOKENS[:4])
    for row, lora in enumerate((loras[2], loras[3], loras[0], {})):
        near(rows[row], apply(PARAMS, lora, TOKENS[row]), 2e-5)


@pytest.mark.parametrize(
    "act, match",
    [
        (lambda bank: bank[3], "no such slot"),
        (lambda bank: bank[-2], "no such slot"),
        (lambda bank: bank[True], "neither a slot nor a mixture"),
        (lambda bank: bank[jnp.array([0, 1])], "neither a slot nor a mixture"),
        (lambda bank: bank[jnp.ones(3)], "neither a slot nor a mixture"),
        (lambda bank: bank.set(-1, {}), "no such slot"),
        (lambda bank: bank.set(2, {}), "no such slot"),
        (lambda bank: bank.set(0, drawn(3, 0)), "rank is larger than the bank's"),
        (lambda bank: bank.set(0, {"gate": drawn(1, 0)["table"]}), "no place"),
        (lambda bank: bank.set(0, {"table": drawn(1, 0)["layers/gate"]}), "does not fit this bank"),
        (lambda bank: bank.set(0, drawn(2, 0, method="dora")), "does not fit this bank"),
        (lambda bank: bank.set(0, {"table": lx.Full(TABLE)}), "low-rank adapters only"),
        (lambda bank: lx.bank([]), "no adapter says"),
        (lambda bank: lx.bank([drawn(2, 0)] * 3, capacity=2), "more adapters than slots"),
        (lambda bank: lx.bank([drawn(3, 0)], rank=2), "rank is larger"),
        (lambda bank: lx.bank([drawn(2, 0), {"table": drawn(1, 0)["layers/gate"]}]), "one base"),
        (lambda bank: jax.jit(lambda bank: bank.get(0))(bank), "not known here"),
        (lambda bank: lx.bank([lx.stack([drawn(2, 0), drawn(2, 1)])]), "stacked along axis 0"),
    ],
)  # fmt: skip
def test_mistakes_are_told(act, match):
    with pytest.raises(lx.LoraError, match=match):
        act(lx.bank([drawn(2, 0), drawn(1, 1)]))


def test_an_adapter_of_a_residual_base_is_not_mixed_in():
    original = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    plain = lx.split(original, rank=2)[1]
    params, lora = lx.split(original, rank=2, init="pissa")
    bank = lx.bank([plain], capacity=2, rank=4)
    with pytest.raises(lx.LoraError, match=r"(?s)another base.*to_plain"):
        bank.set(1, lora)
    bank = bank.set(1, lx.ranks.to_plain(original, params, lora))
    np.testing.assert_allclose(lx.delta(bank.get(1))["kernel"], 0.0, atol=1e-5)
