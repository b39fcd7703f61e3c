"""Merges into wide and narrow dtypes: no digit is lost that the dtype can hold, and what is lost is said."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
METHODS = ("lora", "dora", "lora_fa", "vera", "loha", "lokr", "lora_xs")


def base(dtype, shape=(16, 12), seed=0):
    return {"kernel": jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)}


def moved(lora, by):
    return jax.tree.map(lambda x: x + jnp.asarray(by, x.dtype), lora)


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_float64_base_keeps_its_digits(method):
    with jax.enable_x64(True):
        w = {"kernel": jax.random.normal(jax.random.key(0), (16, 12), jnp.float64)}
        params, lora = lx.split(w, rank=2, method=method, dtype=jnp.float64)
        assert bits(lx.merge(params, lora)["kernel"]) == bits(w["kernel"])
        lora = moved(lora, 0.1)
        x = jax.random.normal(jax.random.key(1), (4, 16), jnp.float64)
        merged = lx.merge(params, lora)["kernel"]
        adapted = lx.adapt(lambda params, x: x @ params["kernel"])(params, lora, x)
        assert merged.dtype == jnp.float64
        np.testing.assert_allclose(x @ merged, adapted, rtol=0, atol=1e-13)
        if method == "lora":
            exact = w["kernel"] + lora["kernel"].scale * (lora["kernel"].a @ lora["kernel"].b)
            np.testing.assert_allclose(merged, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, *FLOAT8])
def test_numbers_that_nothing_is_added_to_keep_their_bits(dtype):
    w = base(dtype)["kernel"].at[0].set(-0.0).at[1, 0].set(jnp.nan)
    _, lora = lx.split({"kernel": w}, rank=2)
    assert bits(lx.merge({"kernel": w}, lora)["kernel"]) == bits(w)
    # a change of the first output alone
    part = {"kernel": lx.LoRA(jnp.ones((16, 1)), jnp.eye(1, 12), 1.0, 1, "lora", lora["kernel"].layout)}
    merged = lx.merge({"kernel": w}, part)["kernel"]
    assert bits(merged[:, 1:]) == bits(w[:, 1:]) and bits(merged[:, 0]) != bits(w[:, 0])


@pytest.mark.parametrize("dtype", [*FLOAT8, jnp.float16])
def test_a_sum_beyond_the_range_is_its_largest_number_and_said(dtype):
    largest = float(jnp.finfo(dtype).max)
    w = {"kernel": jnp.full((4, 3), largest, dtype)}
    lora = {"kernel": lx.Full(jnp.full((4, 3), 1.5 * largest).at[0].set(-2.0 * largest).at[1].set(1.0))}
    with pytest.warns(lx.LoraMergeWarning, match=r"(?s)kernel .*9 numbers are cut off at the largest"):
        merged = lx.merge(w, lora)["kernel"]
    np.testing.assert_array_equal(merged.astype(jnp.float32)[:, 0], np.array([-largest, 1, largest, largest]))


@pytest.mark.parametrize(
    ("dtype", "change", "cure"),
    [
        (jnp.float8_e4m3fn, 1e-3, "dtype=jnp.bfloat16"),
        (jnp.float8_e5m2, 1e-3, "dtype=jnp.bfloat16"),
        (jnp.bfloat16, 1e-5, "dtype=jnp.float32"),
    ],
)
def test_a_change_that_rounding_takes_is_warned_of_with_what_helps(dtype, change, cure):
    params, lora = lx.split({"up": base(dtype), "down": base(dtype, seed=1)}, rank=2, alpha=2.0)
    lora = moved(lora, np.sqrt(change))
    with pytest.warns(lx.LoraMergeWarning, match=cure) as caught:
        merged = lx.merge(params, lora)
    shares = lx.surviving(params, lora, merged)
    text = str(caught[0].message)
    assert set(shares) == {"up/kernel", "down/kernel"} and caught[0].filename == __file__
    for path, share in shares.items():
        w = params[path.split("/")[0]]["kernel"].astype(jnp.float32)
        dw = lx.delta(lora)[path]
        done = merged[path.split("/")[0]]["kernel"].astype(jnp.float32) - w
        np.testing.assert_allclose(share, (done * dw).sum() / (dw * dw).sum(), rtol=1e-3, atol=1e-5)
        assert share < 0.5 and f"{path} ({np.dtype(dtype)}): {share:.1%}" in text
    wide = jnp.bfloat16 if np.dtype(dtype).itemsize == 1 else jnp.float32
    kept = lx.surviving(params, lora, lx.merge(params, lora, dtype=wide))  # what the warning says to do
    assert min(kept.values()) > 0.9


def test_many_weights_that_lose_are_one_warning():
    names = [f"layer_{i}" for i in range(8)]
    params, lora = lx.split({name: base(jnp.float8_e4m3fn) for name in names}, rank=2, alpha=2.0)
    with pytest.warns(lx.LoraMergeWarning, match="and 3 more") as caught:
        lx.merge(params, moved(lora, 0.02))
    assert len(caught) == 1 and str(caught[0].message).count("survives") == 5


def test_what_survives_is_logged_and_nothing_is_said_under_jit(caplog):
    params, lora = lx.split(base(jnp.bfloat16), rank=2)
    lora = moved(lora, 0.1)
    with caplog.at_level(logging.INFO, "lorax_fn"):
        merged = lx.merge(params, lora)
    share = lx.surviving(params, lora, merged)["kernel"]
    assert 0.9 < share < 1.1 and f"kernel: {share:.1%}" in caplog.text
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "lorax_fn"):
        jitted = jax.jit(lx.merge)(params, moved(lora, 0.0))
    assert not caplog.records
    np.testing.assert_array_equal(jitted["kernel"], merged["kernel"])


def test_many_weights_of_one_shape_compile_one_program():
    params = {str(i): base(jnp.float32, (64, 24), i) for i in range(12)}
    stored, lora = lx.split(lx.quantize(params), rank=2)
    counts = []
    for options in ({}, {"requantize": True}):
        with jax.log_compiles(), _compiled() as names:
            lx.merge(stored, lora, **options)
            lx.merge(stored, lora, **options)
        counts.append(sum("merged" in name or "requantized" in name for name in names))
    assert counts == [1, 1]


class _compiled(logging.Handler):
    """The names of the programs that are compiled within."""

    def __enter__(self):
        self.names = []
        logging.getLogger("jax").addHandler(self)
        return self.names

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Finished XLA compilation"):
            self.names.append(text)

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)


def test_what_survives_is_that_of_the_exact_formula():
    """Two sums, each in a program of its own, give what `survival` gives; it takes over where they cannot."""
    from lorax_fn.splitting import rounding

    w = jax.random.normal(jax.random.key(0), (40, 24)).astype(jnp.bfloat16)
    params, lora = lx.split({"kernel": w}, rank=2)
    sized = lambda size: jax.tree.map(lambda x: size * jnp.ones_like(x), lora)  # noqa: E731
    for adapter in (sized(0.01), sized(0.0), sized(1e-8), sized(1e-13)):
        merged = jax.jit(lx.merge)(params, adapter)
        want = rounding.survival(adapter["kernel"], w, merged["kernel"])[0]
        got = lx.surviving(params, adapter, merged)["kernel"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    infinite = {"kernel": w.at[0].set(jnp.inf)}
    merged = jax.jit(lx.merge)(infinite, sized(0.05))
    assert 0.5 < lx.surviving(infinite, sized(0.05), merged)["kernel"] < 1.5
