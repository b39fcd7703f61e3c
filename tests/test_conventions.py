"""Conventions are right or leave the question open, on names, biases and the trees of four frameworks."""

import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax_fn.core.errors import LoraError
from lorax_fn.core.layouts import Layout
from lorax_fn.splitting.merge import merge
from lorax_fn.splitting.split import split
from lorax_fn.targets.roles import classify
from lorax_fn.transform.usage import usage


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def adapted(params, **options):
    return sorted(split(params, rank=1, **options)[1])


# Conventions by name and bias -------------------------------------------------------------------------

OPEN = "open"
CASES = [  # name, weight, bias or None, layout or kind
    ("kernel", (8, 6), None, Layout((), (0,), (1,))),
    ("kernel", (8, 6), (6,), Layout((), (0,), (1,))),
    ("w", (8, 6), (6,), Layout((), (0,), (1,))),
    ("weight", (6, 8), None, Layout((), (1,), (0,))),
    ("weight", (6, 8), (6,), Layout((), (1,), (0,))),
    ("weight", (8, 8), None, Layout((), (1,), (0,))),
    ("weight_ih", (6, 8), None, Layout((), (1,), (0,))),
    ("kernel", (8, 2, 4), (2, 4), Layout((), (0,), (1, 2))),
    ("kernel", (2, 4, 8), (8,), Layout((), (0, 1), (2,))),
    ("kernel", (3, 8, 6), (3, 6), Layout((0,), (1,), (2,))),
    ("w", (3, 8, 6), (3, 6), Layout((0,), (1,), (2,))),
    ("kernel", (3, 8, 2, 4), (3, 2, 4), Layout((0,), (1,), (2, 3))),
    ("kernel", (3, 2, 4, 8), (3, 8), Layout((0,), (1, 2), (3,))),
    ("kernel", (3, 5, 8, 6), (3, 5, 6), Layout((0, 1), (2,), (3,))),
    ("kernel", (3, 8, 6), None, OPEN),  # stacked, or several inputs, or several outputs
    ("kernel", (2, 4, 8, 6), None, OPEN),
    ("kernel", (3, 3, 6), (3, 6), OPEN),  # the bias fits twice
    ("kernel", (4, 4, 2), (4, 2), OPEN),
    ("kernel", (8, 6), (8,), OPEN),  # the bias contradicts (in, out)
    ("weight", (6, 8), (8,), OPEN),  # GPT-2 keeps (in, out) under a torch name
    ("weight", (3, 6, 8), (3, 6), OPEN),  # two outputs, or a stack of one
    ("kernel", (3, 8), (3, 8), "other"),  # elementwise
    ("weight", (6, 3, 5, 5), (6,), "convolution"),
    ("kernel", (3, 3, 4, 8), (8,), "convolution"),
    ("scale", (3, 8), (3, 8), "other"),  # LayerNorm under scan
    ("kernel", (8,), None, "other"),
    ("embedding", (9, 8), None, "embedding"),
]


@pytest.mark.parametrize(("name", "shape", "bias", "expected"), CASES)
def test_name_and_bias_decide_or_leave_open(name, shape, bias, expected):
    module = {name: shaped(*shape)}
    if bias is not None:
        module["b" if name == "w" else "bias"] = shaped(*bias)
    role = classify({"m": module})[f"m/{name}"]
    if isinstance(expected, Layout):
        assert (role.kind, role.layout) == ("linear", expected)
    else:
        assert role.kind == expected
    if expected == OPEN:
        with pytest.raises(
            LoraError, match=rf"(?s)layout of these weights is open.*m/{name}.*lx\.usage\(fn, params"
        ):
            split({"m": module}, rank=1)
        assert adapted({"m": module, "k": {"kernel": shaped(2, 2)}}, exclude="m") == ["k/kernel"]
        assert adapted({"m": module}, targets=(), full=f"m/{name}") == [f"m/{name}"]


@pytest.mark.parametrize(
    ("module", "name", "shape", "bias", "kind"),
    [
        ("Conv_0", "kernel", (3, 4, 8), (8,), "convolution"),
        ("conv1_d", "w", (3, 4, 8), None, "convolution"),
        ("conv_ff", "kernel", (3, 4, 8), (3, 8), "open"),  # a convolution by name, a scanned Dense by bias
        ("conv_ff", "kernel", (4, 8), None, "linear"),
        ("embed_tokens", "weight", (9, 8), None, "embedding"),
        ("wte", "weight", (9, 8), None, "embedding"),
        ("token_embedding", "weight", (9, 8), None, "embedding"),
        ("embed_proj", "weight", (9, 8), None, "open"),
        ("input_layernorm", "weight", (3, 8), None, "other"),
        ("ln_f", "weight", (3, 8), None, "other"),
        ("adanorm_proj", "weight", (3, 8), None, "linear"),
        ("lm_head", "weight", (9, 8), None, "head"),
        ("head", "kernel", (3, 4, 5), None, "head"),
        ("headwise", "kernel", (8, 9), None, "linear"),
        ("classifier", "kernel", (8, 2), (2,), "head"),
    ],
)
def test_names_of_modules(module, name, shape, bias, kind):
    leaves = {name: shaped(*shape)} | ({} if bias is None else {"bias": shaped(*bias)})
    assert classify({module: leaves})[f"{module}/{name}"].kind == kind


@pytest.mark.parametrize("name", ["conv2_d_transpose", "conv_up", "up", "convs"])
@pytest.mark.parametrize("leaf", ["kernel", "w", "weight"])
def test_a_convolution_of_equal_channels_that_may_be_transposed_stays_open(name, leaf):
    """Flax's ``transpose_kernel=True``, Haiku and torch keep (out, in) then, and the bias fits both ways."""
    shape = (8, 8, 3, 3) if leaf == "weight" else (3, 3, 8, 8)
    params = {name: {leaf: shaped(*shape), "b": shaped(8)}}
    with pytest.raises(LoraError, match=r"(?s)which axes it contracts is open.*lx\.usage"):
        split(params, rank=1, targets=name)
    if leaf != "weight":
        assert adapted({"Conv_0": params[name]}, targets="Conv_0") == [f"Conv_0/{leaf}"]
        assert adapted({"conv2_d_1": params[name]}, targets="conv2_d_1") == [f"conv2_d_1/{leaf}"]


@pytest.mark.parametrize("transposed", [False, True])
def test_usage_tells_a_transposed_kernel_of_equal_channels(transposed):
    layer, x = nn.ConvTranspose(8, (3, 3), transpose_kernel=transposed), jnp.ones((1, 4, 4, 8))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    with pytest.raises(LoraError, match="is open"):
        split({"params": {"up": params["params"]}}, rank=1, targets="up")
    _, lora = split(params, rank=1, targets="kernel", layout=usage(layer.apply, params, x))
    assert lora["params/kernel"].layout.inputs == ((0, 1, 3) if transposed else (0, 1, 2))


def test_a_head_is_known_by_name_never_by_being_last():
    params = {
        "a": {"kernel": shaped(4, 4)},
        "z_out": {"kernel": shaped(4, 9)},
        "lm_head": {"kernel": shaped(4, 9)},
    }
    assert adapted(params) == ["a/kernel", "z_out/kernel"]
    assert adapted(params, targets=["a", "lm_head"]) == ["a/kernel", "lm_head/kernel"]


def test_dots_in_one_key_separate_components_and_find_the_sibling_bias():
    params = {
        "model.layers.0.fc.weight": shaped(6, 8),
        "model.layers.0.fc.bias": shaped(6),
        "lm_head.weight": shaped(9, 8),
    }
    assert adapted(params) == ["model.layers.0.fc.weight"]
    assert adapted(params, targets="lm_head") == ["lm_head.weight"]


# Frameworks: what A and B do is what the layer does ---------------------------------------------------


def moved(params, path, apply, x, contract):
    """Compares a merged model with the base plus the contraction that the layer's own docs promise."""
    _, lora = split(params, rank=2, targets=re.compile(re.escape(path)), init="gaussian", alpha=4.0)
    assert list(lora) == [path]
    adapter = lora[path]
    adapter = type(adapter)(
        adapter.a, jax.random.normal(jax.random.key(1), adapter.b.shape), 4.0, 2, "lora", adapter.layout
    )
    change = apply(merge(params, {path: adapter}), x) - apply(params, x)
    np.testing.assert_allclose(change, 2.0 * contract(x, adapter.a, adapter.b), rtol=2e-4, atol=2e-5)


def test_linen_dense_and_dense_general():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    dense = nn.Dense(6)
    moved(dense.init(jax.random.key(0), x), "params/kernel", dense.apply, x, lambda x, a, b: x @ a @ b)
    into = nn.DenseGeneral((2, 4))
    moved(
        into.init(jax.random.key(0), x), "params/kernel", into.apply, x,
        lambda x, a, b: jnp.einsum("bn,nr,rhk->bhk", x, a, b),
    )  # fmt: skip
    out, y = nn.DenseGeneral(5, axis=(-2, -1)), jax.random.normal(jax.random.key(0), (3, 2, 4))
    moved(
        out.init(jax.random.key(0), y), "params/kernel", out.apply, y,
        lambda x, a, b: jnp.einsum("bhk,hkr,rm->bm", x, a, b),
    )  # fmt: skip


def test_linen_embedding_and_convolution_where_named():
    ids = jnp.array([[0, 3]])
    embed = nn.Embed(5, 4)
    moved(embed.init(jax.random.key(0), ids), "params/embedding", embed.apply, ids, lambda i, a, b: a[i] @ b)
    conv, x = nn.Conv(6, (1,)), jax.random.normal(jax.random.key(0), (2, 5, 4))
    params = {"params": {"Conv_0": conv.init(jax.random.key(0), x)["params"]}}
    moved(
        params, "params/Conv_0/kernel", lambda p, x: conv.apply({"params": p["params"]["Conv_0"]}, x), x,
        lambda x, a, b: x @ a[0] @ b,
    )  # fmt: skip


def test_haiku_linear():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(6)(x)))
    moved(model.init(jax.random.key(0), x), "linear/w", model.apply, x, lambda x, a, b: x @ a @ b)


@pytest.mark.parametrize("use_bias", [True, False])
def test_equinox_linear_stacked_or_not_is_out_in_by_its_type(use_bias):
    x = jax.random.normal(jax.random.key(0), (8,))
    layer = eqx.nn.Linear(8, 8, use_bias=use_bias, key=jax.random.key(0))
    moved(layer, "weight", lambda layer, x: layer(x), x, lambda x, a, b: x @ a @ b)
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, use_bias=use_bias, key=key))(keys)
    xs = jax.random.normal(jax.random.key(0), (3, 8))
    moved(
        stacked, "weight", eqx.filter_vmap(lambda layer, x: layer(x)), xs,
        lambda x, a, b: jnp.einsum("ln,lnr,lrm->lm", x, a, b),
    )  # fmt: skip


def test_equinox_types_decide_before_names():
    key = jax.random.key(0)
    model = {
        "mlp": eqx.nn.MLP(4, 3, 5, 1, key=key),
        "attention": eqx.nn.MultiheadAttention(2, 4, key=key),
        "embedding": eqx.nn.Embedding(5, 4, key=key),
        "down": eqx.nn.Conv2d(3, 4, 3, key=key),
        "cell": eqx.nn.GRUCell(4, 5, key=key),
        "scale": eqx.filter_vmap(lambda key: eqx.nn.LayerNorm(4))(jax.random.split(key, 3)),
    }
    projections = [f"attention/{name}_proj/weight" for name in ("key", "output", "query", "value")]
    cell, mlp = ["cell/weight_hh", "cell/weight_ih"], ["mlp/layers/0/weight", "mlp/layers/1/weight"]
    assert adapted(model) == projections + cell + mlp
    roles = classify(model)
    assert roles["down/weight"].layout == Layout((), (1, 2, 3), (0,))
    assert roles["embedding/weight"].layout == Layout((), (0,), (1,))
    assert roles["scale/weight"].reason == "norm"


def attention(use_bias=True):
    return nnx.MultiHeadAttention(num_heads=2, in_features=8, use_bias=use_bias, rngs=nnx.Rngs(0))


def test_nnx_attention_adapts_exactly_query_and_value():
    module = attention()
    for params in (nnx.state(module), nnx.to_pure_dict(nnx.state(module)), module):
        assert adapted({"attn": params}, targets=["query", "value"]) == [
            "attn/query/kernel",
            "attn/value/kernel",
        ]
        assert adapted(params) == ["key/kernel", "out/kernel", "query/kernel", "value/kernel"]
    assert adapted(nnx.state(module), targets="value") == ["value/kernel"]


def test_nnx_attention_without_biases_is_open_and_lists_all():
    with pytest.raises(LoraError, match=r"(?s)key/kernel.*out/kernel.*query/kernel.*value/kernel.*usage"):
        split(nnx.state(attention(use_bias=False)), rank=1)


def test_linen_boxes_give_the_same_paths():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, x = nn.Dense(6, kernel_init=init), jnp.ones((1, 8))
    boxed = model.init(jax.random.key(0), x)
    assert adapted(boxed) == adapted(nn.unbox(boxed)) == ["params/kernel"]
    merged = merge(*split(boxed, rank=1))
    assert isinstance(merged["params"]["kernel"], nn.Partitioned)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.Dense(6)(y)), None


def test_scanned_linen_layers_are_stacks():
    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = jax.eval_shape(layers.init, jax.random.key(0), jnp.ones((1, 2, 8)), None)
    roles = {path: role for path, role in classify(params).items() if role.kind == "linear"}
    found = {path.split("/")[-2]: role.layout for path, role in roles.items()}
    inner, outer = Layout((0,), (1,), (2, 3)), Layout((0,), (1, 2), (3,))
    plain = Layout((0,), (1,), (2,))
    assert found == {
        "query": inner, "key": inner, "value": inner, "out": outer, "Dense_0": plain, "Dense_1": plain,
    }  # fmt: skip
