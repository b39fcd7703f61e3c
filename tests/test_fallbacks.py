"""Where no rule serves, the weight is built: right in value, and said once, with path, primitive and line."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rule_cases import IO, SIO, make_adapter, normal

import lorax_fn as lx


@jax.custom_vjp
def owned_product(w, x):
    return x @ w


owned_product.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, ct: (saved[1].T @ ct, ct @ saved[0].T))


def doubled_in_shards(w):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    return jax.shard_map(lambda w: 2 * w, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))(w)


# name -> (function of the weight and x, the primitive that is named, whether a source line is)
FALLBACKS = {
    "sin": (lambda w, x: x @ jnp.sin(w), "sin", True),
    "maximum": (lambda w, x: x @ jnp.maximum(w, 1.0), "max", True),
    "entry by entry": (lambda w, x: x @ (w * jnp.arange(48.0).reshape(8, 6)), "mul", True),
    "divided by": (lambda w, x: x @ (1 / w), "div", True),
    "largest of all": (lambda w, x: x * jnp.max(w), "reduce_max", True),
    "reshape across": (lambda w, x: x.reshape(6, 4) @ w.reshape(4, 12), "reshape", True),
    "squared": (lambda w, x: x @ (w @ w.T), "dot_general", True),
    "custom_vjp": (owned_product, "custom_vjp_call", True),
    "returned": (lambda w, x: w, "return", False),
    "loop changes it": (lambda w, x: lax.fori_loop(0, 2, lambda i, w: w * 0.5, w), "scan", True),
    "one branch turns it": (
        lambda w, x: x[:, :6] @ lax.cond(x[0, 0] > 0, lambda w: w[:6], lambda w: w[:6].T, w),
        "cond",
        True,
    ),
    "a mask entry by entry": (
        lambda w, x: x @ jnp.where(jnp.arange(48.0).reshape(8, 6) % 3 > 0, w, 0),
        "select_n",
        True,
    ),
    "shard_map returns it": (lambda w, x: x @ doubled_in_shards(w), "shard_map", True),
    "relu, a custom_jvp that JAX jits": (lambda w, x: x @ jax.nn.relu(w), "max", True),
}
W, ADAPTER, X = normal(1, (8, 6)), make_adapter((8, 6), IO), normal(2, (3, 8))
PARAMS, LORA = {"layer": {"w": W}}, {"layer/w": ADAPTER}


def adapted(name, fallback):
    fn = FALLBACKS[name][0]
    return lx.adapt(lambda p, x: fn(p["layer"]["w"], x), fallback=fallback)


def caught(fn, *args):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = fn(*args)
    return result, [str(w.message) for w in seen if issubclass(w.category, lx.LoraFallbackWarning)]


@pytest.mark.parametrize("name", FALLBACKS)
def test_warns_once_with_path_shape_primitive_and_line(name):
    """A use without a rule is said, and its value is right."""
    fn, primitive, has_line = FALLBACKS[name]
    run = adapted(name, "warn")
    got, messages = caught(run, PARAMS, LORA, X)
    np.testing.assert_allclose(got, fn(ADAPTER.weight(W), X), rtol=2e-5, atol=2e-5)
    assert len(messages) == 1, messages
    assert "path:    layer/w\n" in messages[0]
    assert re.search(
        r"shape:   \((8, 6|6, 8|4, 6|6, 6)\)\n", messages[0]
    )  # as it is there: transposed, a shard
    assert f"primitive {primitive!r}" in messages[0]
    assert not has_line or re.search(r"name stack .*test_fallbacks\.py:\d+", messages[0])
    assert caught(run, PARAMS, LORA, X)[1] == []  # once a weight and primitive, not once a call


@pytest.mark.parametrize("name", FALLBACKS)
def test_error_raises_the_text_of_the_warning(name):
    _, (message, *_) = caught(adapted(name, "warn"), PARAMS, LORA, X)
    with pytest.raises(lx.LoraError) as raised:
        adapted(name, "error")(PARAMS, LORA, X)
    assert str(raised.value) == message


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FALLBACKS)
def test_allow_is_silent_and_gradients_are_right(name):
    fn = FALLBACKS[name][0]
    run = adapted(name, "allow")
    got, messages = caught(jax.jit(run), PARAMS, LORA, X)
    assert messages == []
    np.testing.assert_allclose(got, fn(ADAPTER.weight(W), X), rtol=1e-4, atol=1e-4)
    grad = jax.grad(lambda a: jnp.sum(jnp.tanh(run(PARAMS, {"layer/w": a}, X))))(ADAPTER)
    want = jax.grad(lambda a: jnp.sum(jnp.tanh(fn(a.weight(W), X))))(ADAPTER)
    np.testing.assert_allclose(grad.b, want.b, rtol=1e-3, atol=1e-4 * np.abs(want.b).max())


def test_what_the_report_says_to_do_works():
    """Both ways out that ``do:`` names are written so that they can be pasted."""

    def fn(p, x):
        return x @ p["in"]["kernel"] + x @ jnp.sin(p["out"]["kernel"])

    params = {"in": {"kernel": W}, "out": {"kernel": W}}
    base, lora = lx.split(params, rank=2)
    with pytest.raises(lx.LoraError) as raised:
        lx.adapt(fn, fallback="error")(base, lora, X)
    want = "leave the weight out: lx.split(..., exclude=['out/kernel']); or accept the cost: "
    assert f"do:      {want}" + 'lx.adapt(fn, fallback="allow").' in str(raised.value)
    base, lora = lx.split(params, rank=2, exclude=["out/kernel"])
    lx.adapt(fn, fallback="error")(base, lora, X)


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_a_report_under_grad_names_the_path(inner):
    """Inside a jit weights go by position; what is reported in a gradient has the caller's names."""
    run = lx.adapt(lambda p, x: inner(lambda w, x: jnp.tanh(x @ jnp.sin(w)))(p["layer"]["w"], x))
    _, messages = caught(jax.grad(lambda lora: run(PARAMS, lora, X).sum()), LORA)
    assert len(messages) == 1 and "path:    layer/w\n" in messages[0]
    with pytest.raises(lx.LoraError, match="path:    layer/w\n"):
        strict = lx.adapt(jax.grad(lambda p, x: inner(lambda w: jnp.sin(w).sum() * x.sum())(p["layer"]["w"])),
                          fallback="error")  # fmt: skip
        strict(PARAMS, LORA, X)


def test_8_a_slice_is_no_fallback_but_its_sine_is():
    x = normal(2, (3, 5))
    lx.adapt(lambda p, x: x @ p["w"][3:, :4], fallback="error")({"w": W}, {"w": ADAPTER}, x)
    with pytest.raises(lx.LoraError, match="'cos'"):
        lx.adapt(lambda p, x: x @ jnp.cos(p["w"][3:, :4]), fallback="error")({"w": W}, {"w": ADAPTER}, x)


def squashed(p, x):
    return jax.nn.relu(x @ jax.nn.relu(p["w"]))


def in_a_scan(p, x):
    return lax.scan(lambda c, _: (c + jax.jit(squashed)(p, x), None), jnp.zeros((3, 6)), length=2)[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
@pytest.mark.parametrize("fn", [squashed, in_a_scan], ids=lambda fn: fn.__name__)
def test_the_warning_stands_at_the_users_call_and_names_the_operations_line(fn, wrap):
    """Python shows where a warning was raised: not a line of this package or of JAX."""
    run, x = wrap(lx.adapt(fn)), X
    with pytest.warns(lx.LoraFallbackWarning) as seen:
        here = inspect.currentframe().f_lineno + 1
        run({"w": W}, {"w": ADAPTER}, x)
    assert [(warning.filename, warning.lineno) for warning in seen] == [(__file__, here)]
    used = squashed.__code__.co_firstlineno + 1
    assert f"test_fallbacks.py:{used}" in str(seen[0].message)
    with pytest.raises(lx.LoraError, match=f"test_fallbacks.py:{used}"):
        wrap(lx.adapt(fn, fallback="error"))({"w": W}, {"w": ADAPTER}, x)
    use = lx.usage(fn, {"w": W}, X)["w"]
    assert [f"test_fallbacks.py:{used}" in source for source in use.source] == [True]


def test_the_name_stack_is_named():
    def fn(p, x):
        with jax.named_scope("decoder"), jax.named_scope("mlp"):
            return x @ jnp.sin(p["w"])

    with pytest.raises(lx.LoraError, match="name stack decoder/mlp"):
        lx.adapt(fn, fallback="error")({"w": W}, {"w": ADAPTER}, X)


def test_layers_that_share_an_inner_jit_are_named_each():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ jnp.sin(w))

    def fn(p, x):
        for name in ("one", "two", "three"):
            x = layer(p[name], x)
        return x

    params = {name: normal(i, (8, 8)) for i, name in enumerate(("one", "two", "three"))}
    lora = {name: make_adapter((8, 8), IO, seed=i) for i, name in enumerate(params)}
    run = lx.adapt(fn)
    got, messages = caught(run, params, lora, X)
    np.testing.assert_allclose(got, fn(lx.merge(params, lora), X), rtol=1e-4, atol=1e-5)
    assert [re.search(r"path:\s+(\S+)", m)[1] for m in messages] == ["one", "two", "three"]
    assert all("'sin'" in m for m in messages)
    with pytest.raises(lx.LoraError, match="path:    two"):
        lx.adapt(fn, fallback="error")(params, {"two": lora["two"]}, X)
    assert caught(run, params, lora, X)[1] == []


def test_two_paths_and_two_primitives_are_four_warnings():
    def fn(p, x):
        return x @ jnp.sin(p["a"]) + x @ jnp.cos(p["a"]) + x @ jnp.sin(p["b"]) + x @ jnp.cos(p["b"])

    _, messages = caught(lx.adapt(fn), {"a": W, "b": 2 * W}, {"a": ADAPTER, "b": ADAPTER}, X)
    found = {(re.search(r"path:\s+(\S+)", m)[1], re.search(r"primitive '(\w+)'", m)[1]) for m in messages}
    assert found == {(path, name) for path in "ab" for name in ("sin", "cos")} and len(messages) == 4


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_under_scan_a_slice_of_the_stack_is_built(jit):
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ jnp.sin(w)), None), x, p["w"])[0]

    stack, adapter = normal(4, (3, 8, 8)), make_adapter((3, 8, 8), SIO)
    run = lx.adapt(fn)
    got, messages = caught(jax.jit(run) if jit else run, {"w": stack}, {"w": adapter}, X)
    np.testing.assert_allclose(got, fn({"w": adapter.weight(stack)}, X), rtol=1e-4, atol=1e-5)
    assert len(messages) == 1 and "shape:   (8, 8)" in messages[0] and "test_fallbacks.py" in messages[0]


def test_custom_vjp_that_no_weight_enters_is_no_fallback():
    @jax.custom_vjp
    def doubled(y):
        return 2 * y

    doubled.defvjp(lambda y: (2 * y, None), lambda _, ct: (5 * ct,))  # its own rule, told from the true one
    run = lx.adapt(lambda p, x: doubled(x @ p["w"]), fallback="error")
    grad = jax.grad(lambda a: jnp.sum(run({"w": W}, {"w": a}, X)))(ADAPTER)
    want = jax.grad(lambda a: jnp.sum(5 * X @ a.weight(W)))(ADAPTER)
    np.testing.assert_allclose(grad.a, want.a, rtol=1e-4, atol=1e-4)


def test_custom_jvp_keeps_factors_apart():
    @jax.custom_jvp
    def product(w, x):
        return x @ w

    product.defjvp(lambda primals, t: (product(*primals), primals[1] @ t[0] + t[1] @ primals[0]))
    run = lx.adapt(lambda p, x: product(p["w"], jax.nn.relu(x)), fallback="error")
    np.testing.assert_allclose(
        run({"w": W}, {"w": ADAPTER}, X), jax.nn.relu(X) @ ADAPTER.weight(W), rtol=1e-4, atol=1e-4
    )


def test_unknown_fallback_and_missing_adapters():
    with pytest.raises(lx.LoraError, match="unknown fallback 'ignore'"):
        lx.adapt(lambda p: p, fallback="ignore")
    with pytest.raises(lx.LoraError, match="adapters are missing"):
        lx.adapt(lambda p, x: x)(PARAMS)


def test_a_bfloat16_weight_is_built_under_strict_promotion():
    params, lora = lx.split({"kernel": jnp.full((3, 2), 0.5, jnp.bfloat16)}, rank=1)
    got = lx.adapt(lambda params: jnp.sin(params["kernel"]), fallback="allow")(params, lora)
    assert got.dtype == jnp.bfloat16 and bool((got == jnp.sin(params["kernel"])).all())
