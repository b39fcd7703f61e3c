"""One adapted function: from threads, pickled, with numbers of all kinds, with modules that change."""

import pickle
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from rule_cases import IO, SIO, make_adapter, normal

import lorax_fn as lx

W, X = normal(1, (6, 6)), normal(2, (3, 6))
PARAMS, LORA = {"w": W}, {"w": make_adapter((6, 6), IO)}


def top(params, x):
    return jnp.tanh(x @ params["w"])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def in_threads(count, run):
    """What each of several threads that start at once raised, if anything."""
    raised, barrier = [], threading.Barrier(count)

    def go(i):
        barrier.wait()
        try:
            run(i)
        except Exception as problem:
            raised.append(problem)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=go, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    return raised


def model(params, x):
    x = jax.jit(top)(params, x)
    x, _ = lax.scan(lambda c, _: (jax.jit(top)(params, c), None), x, None, length=2)
    return lax.cond(x[0, 0] > 0, top, lambda p, x: x @ (2 * p["w"]), params, x)


@pytest.mark.parametrize("jitted", [False, True])
def test_threads_that_call_it_for_the_first_time(jitted):
    run = lx.adapt(model, fallback="error")
    run = jax.jit(run) if jitted else run
    loras = [{"w": make_adapter((6, 6), IO, rank=1 + i % 2, seed=i)} for i in range(6)]
    want = [model(lx.merge(PARAMS, lora), X) for lora in loras]
    assert in_threads(6, lambda i: close(run(PARAMS, loras[i], X), want[i])) == []


def test_threads_are_refused_each_for_its_own_weights():
    run = lx.adapt(lambda p, x: jax.jit(lambda w, x: x @ jnp.sin(w))(p["w"], x) @ p["v"], fallback="error")
    params, other = {"w": W, "v": W}, {"v": LORA["w"]}

    def go(i):
        if i % 2:
            run(params, other, X)
        else:
            with pytest.raises(lx.LoraError, match="path:    w\n"):
                run(params, {"w": LORA["w"]} | other, X)

    assert in_threads(6, go) == []


def test_an_eager_shard_map_takes_another_set_of_adapters():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = (jax.P(), jax.P(), jax.P("x"))
    fn = jax.shard_map(lambda w, v, x: x @ w @ v, mesh=mesh, in_specs=specs, out_specs=jax.P("x"))
    run = lx.adapt(lambda p, x: fn(p["w"], p["v"], x), fallback="error")
    params, x = {"w": W, "v": W}, normal(3, (4, 6))
    for paths in (["w"], ["v"], ["w", "v"]):
        lora = {path: LORA["w"] for path in paths}
        merged = lx.merge(params, lora)
        close(run(params, lora, x), x @ merged["w"] @ merged["v"])


def test_it_pickles_before_and_after_a_call():
    run = lx.adapt(top)
    for _ in range(2):
        close(pickle.loads(pickle.dumps(run))(PARAMS, LORA, X), run(PARAMS, LORA, X))


def test_equal_numbers_of_other_kinds_are_told_apart():
    def fn(p, x, s):
        if isinstance(s, bool):
            return (x @ p["w"]) * 7
        return (x @ p["w"]) * jnp.copysign(jnp.float32(1), jnp.asarray(s, jnp.float32))

    run, merged = lx.adapt(fn, fallback="error"), lx.merge(PARAMS, LORA)
    for s in (0.0, -0.0, 1, True, 1.0, False, 0, -0.0, 0.0):
        close(run(PARAMS, LORA, X, s), fn(merged, X, s))


def test_floats_are_traced_as_jit_does_unless_the_function_needs_the_number():
    traced = []

    def fn(p, x, s, *, when="always"):
        traced.append(s)
        return x @ p["w"] * s if when == "always" or s > 0 else x

    run = lx.adapt(fn, fallback="error")
    for s in (0.5, 0.25, 0.125):
        close(run(PARAMS, LORA, X, s), s * (X @ lx.merge(PARAMS, LORA)["w"]))
    assert len(traced) == 1
    close(run(PARAMS, LORA, X, -1.0, when="positive"), X)
    close(run(PARAMS, LORA, X, 2.0, when="positive"), 2 * (X @ lx.merge(PARAMS, LORA)["w"]))


@pytest.mark.parametrize("argnum", [-1, 1.0, True])
def test_an_argnum_that_is_no_position_from_the_front_raises(argnum):
    with pytest.raises(lx.LoraError, match="counted from 0"):
        lx.adapt(top, argnum=argnum)
    with pytest.raises(lx.LoraError, match=r"counted from 0(.|\n)*at most 1"):
        lx.usage(top, PARAMS, X, argnum=argnum)


def test_usage_takes_a_position_among_the_arguments_given():
    assert lx.usage(lambda x, p: x @ p["w"], PARAMS, X, argnum=1)["w"].times == 1
    with pytest.raises(lx.LoraError, match="counted from 0"):
        lx.usage(lambda x, p: x @ p["w"], PARAMS, X, argnum=2)


def test_an_adapter_is_equal_to_itself_alone_and_has_no_hash():
    adapter = LORA["w"]
    assert adapter == adapter and adapter != lx.LoRA(
        *jax.tree.leaves(adapter)[:2], 1.0, 1, "lora", adapter.layout
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter)
    with pytest.raises(ValueError, match="static"):
        jax.jit(lambda x, adapter: x, static_argnums=1)(X, adapter)


def test_none_for_lora_is_told_the_empty_dict():
    with pytest.raises(lx.LoraError, match="pass {}"):
        lx.adapt(top)(PARAMS, None, X)


def test_a_transfer_guard_holds_for_what_a_jitted_call_adds():
    stacked = {"w": make_adapter((2, 6, 6), SIO)}
    params = {"w": normal(1, (2, 6, 6))}

    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0] + x @ p["w"][1]

    run = lx.adapt(fn, fallback="error")
    step = jax.jit(lambda lora, x, key: run(params, lx.dropout(lora, 0.5, key), x))
    key, x = jax.random.key(0), jax.device_put(X)
    with jax.transfer_guard("disallow"):
        step(stacked, x, key)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def call(m, x):
    return m(x)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_module_writes_to_itself_is_carried(jitted, whole):
    def make():
        net = Net(nnx.Rngs(0))
        path = "linear/kernel"
        return net, {path: lx.Full(net.linear.kernel[...]) if whole else LORA["w"]}

    net, lora = make()
    run = lx.adapt(call, fallback="error")
    run = nnx.jit(run) if jitted else run
    first, second = run(net, lora, X), run(net, lora, X)
    plain, _ = make()
    plain.linear.kernel[...] = lora["linear/kernel"].weight(plain.linear.kernel[...])
    close(first, plain(X))
    close(second, plain(X))  # another mask than the first
    assert np.abs(first - second).max() > 0.1
    close(net.norm.mean[...], plain.norm.mean[...])
    assert np.abs(net.norm.mean[...]).max() > 0


def test_a_module_that_gains_a_variable_raises_with_the_lines_that_do_it():
    def fn(m, x):
        m.seen = nnx.BatchStat(x.sum())
        return m(x)

    with pytest.raises(lx.LoraError, match=r"nnx.merge\(graphdef, params, rest, copy=True\)"):
        lx.adapt(fn)(Net(nnx.Rngs(0)), {"linear/kernel": LORA["w"]}, X)


def test_a_module_that_writes_to_an_adapted_weight_raises():
    def fn(m, x):
        m.linear.kernel[...] = m.linear.kernel[...] * 2
        return m(x)

    with pytest.raises(lx.LoraError, match="writes to a Variable that has an adapter"):
        lx.adapt(fn, fallback="allow")(Net(nnx.Rngs(0)), {"linear/kernel": LORA["w"]}, X)
