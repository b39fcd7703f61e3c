"""`usage`: what a traced function does with each weight; models of the frameworks are in test_models.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rule_cases import IO, OI, RULE_CASES, SIO, make_adapter, normal

import lorax_fn as lx

L = lx.Layout


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of(fn, shape, *args):
    return lx.usage(lambda p, *args: fn(p["w"], *args), {"w": abstract(*shape)}, *args)["w"]


@pytest.mark.parametrize("case", RULE_CASES, ids=lambda c: c.name)
def test_every_rule_is_called_served(case):
    """What the matrix proves to be served is reported as served, and no product goes without a layout."""
    use = lx.usage(case.fn, {"w": case.weight}, case.input)["w"]
    assert use.times >= 1 and use.ops and use.shape == case.shape
    if use.layout is not None:
        assert use.served, use.source
        assert use.layout.ndim == len(case.shape)


X = abstract(2, 3, 8)
HEADS = abstract(2, 3, 4, 5)
IDS = abstract(2, 3, dtype=jnp.int32)
KERNEL = ("NHWC", "HWIO", "NHWC")


def when(x, *branches):
    return lax.cond(x.ravel()[0] > 0, *branches)


# name -> function, shape of w, inputs, layout, ops, times, flops
TABLE = {
    "dense": (lambda w, x: x @ w, (8, 6), [X], IO, ("dot_general",), 1, 2 * 6 * 8 * 6),
    "equinox": (lambda w, x: x @ w.T, (6, 8), [X], OI, ("dot_general",), 1, 2 * 6 * 8 * 6),
    "query": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (8, 2, 3), [X], L((), (0,), (1, 2)),
              ("dot_general",), 1, 2 * 6 * 8 * 6),
    "attention output": (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (4, 5, 6), [HEADS],
                         L((), (0, 1), (2,)), ("dot_general",), 1, 2 * 6 * 20 * 6),
    "embedding": (lambda w, i: jnp.tanh(w[i]), (11, 6), [IDS], IO, ("gather",), 1, 0),
    "tied": (lambda w, i: jnp.tanh(w[i]) @ w.T, (11, 6), [IDS], IO, ("gather", "dot_general"), 2,
             2 * 6 * 6 * 11),
    "conv": (lambda w, x: lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=KERNEL),
             (3, 3, 4, 6), [abstract(2, 8, 8, 4)], L((), (0, 1, 2), (3,)), ("conv_general_dilated",), 1,
             2 * 2 * 16 * 6 * 36),
    "experts gathered": (lambda w, i: jnp.einsum("td,tdh->th", jnp.ones((5, 8)), w[i]), (3, 8, 4),
                         [abstract(5, dtype=jnp.int32)], SIO, ("dot_general",), 1, 2 * 5 * 8 * 4),
    "ragged": (lambda w, x, n: lax.ragged_dot(x, w, n), (3, 8, 4),
               [abstract(6, 8), abstract(3, dtype=jnp.int32)], SIO, ("ragged_dot_general",), 1,
               2 * 6 * 8 * 4),
    "scanned": (lambda w, x: lax.scan(lambda c, w: (c @ w, None), x, w)[0], (5, 8, 8), [X], SIO,
                ("dot_general",), 5, 5 * 2 * 6 * 64),
    "scan constant": (lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=7)[0], (8, 8), [X], IO,
                      ("dot_general",), 7, 7 * 2 * 6 * 64),
    "carried through a checkpoint": (lambda w, x: lax.fori_loop(
                                         0, 3, lambda i, c: jax.checkpoint(lambda c: (c[0] @ c[1], c[1]))(c),
                                         (x, w))[0], (8, 8), [X], IO, ("dot_general",), 3, 3 * 2 * 6 * 64),
    "scanned experts": (lambda w, x: lax.scan(
                            lambda c, w: (jnp.einsum("etd,edh->eth", c, w), None), x, w)[0],
                        (5, 2, 8, 8), [X], L((0, 1), (2,), (3,)), ("dot_general",), 5, 5 * 2 * 6 * 64),
    "remat in jit": (lambda w, x: jax.jit(jax.checkpoint(lambda x: x @ w))(x), (8, 6), [X], IO,
                     ("dot_general",), 1, 2 * 6 * 48),
    "layer list": (lambda w, x: x @ w[0] @ w[1], (2, 8, 8), [X], SIO, ("dot_general",), 2, 2 * 2 * 6 * 64),
    "norm scale": (lambda w, x: x * w[None, None], (8,), [X], None, ("mul",), 1, 0),
    "stacked norm scale": (lambda w, x: lax.scan(lambda c, w: (c * w[None, None], None), x, w)[0], (5, 8),
                           [X], None, ("mul",), 5, 0),
    "norm scale by heads": (lambda w, x: jnp.einsum("bthk,kd->bthd", x * w[None, None], jnp.ones((5, 3))),
                            (4, 5), [HEADS], None, ("mul",), 1, 0),
    "unused": (lambda w, x: x, (8, 6), [X], None, (), 0, 0),
    "cond returns it": (lambda w, x: x @ when(x, lambda: w, lambda: 2 * w), (8, 6), [X], IO,
                        ("dot_general",), 1, 2 * 6 * 48),
    "cond or ones": (lambda w, x: x @ when(x, lambda: w, lambda: jnp.ones((8, 6))), (8, 6), [X], IO,
                     ("dot_general",), 1, 2 * 6 * 48),
    "product in one branch": (lambda w, x: when(x, lambda: x @ w, lambda: jnp.zeros((2, 3, 6))), (8, 6), [X],
                              IO, ("dot_general",), 1, 2 * 6 * 48),
    "product in both branches": (lambda w, x: when(x, lambda: x @ w, lambda: x @ (2 * w)), (8, 6), [X], IO,
                                 ("dot_general",), 2, 2 * 2 * 6 * 48),
    "switch of views": (lambda w, x: x @ lax.switch(x.argmax(), [lambda: w.T, lambda: -w.T]), (6, 8), [X], OI,
                        ("dot_general",), 1, 2 * 6 * 48),
    "switched layers": (lambda w, x: x @ lax.switch(x.argmax(), [lambda: w[0], lambda: w[1]]), (2, 8, 6), [X],
                        SIO, ("dot_general",), 1, 2 * 6 * 48),
    "cond in jit": (lambda w, x: x @ jax.jit(lambda w: when(x, lambda: w, lambda: w * 2))(w), (8, 6), [X], IO,
                    ("dot_general",), 1, 2 * 6 * 48),
    "lookup in branches": (lambda w, i: when(i, lambda: w[i], lambda: 2 * w[i]), (11, 6), [IDS], IO,
                           ("gather",), 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_layout_ops_times_and_flops(name):
    fn, shape, args, layout, ops, times, flops = TABLE[name]
    use = of(fn, shape, *args)
    assert use.ops == ops
    assert use.times == times
    if flops is not None:
        assert use.layout == layout
        assert use.flops == flops
        assert use.served == (layout is not None)


def test_unserved_use_names_its_source_line():
    use = of(lambda w, x: x @ w + x @ jnp.sin(w), (8, 6), X)
    assert use.layout == IO and not use.served
    assert len(use.source) == 1 and "sin" in use.source[0] and "test_usage.py:" in use.source[0]


def test_17_constants_and_vectors():
    """A constant operand is no parameter, a fully contracted vector is skipped."""
    params = {"w": abstract(8, 6), "v": abstract(8), "step": abstract(dtype=jnp.int32)}
    use = lx.usage(lambda p, x: (x @ p["w"]) @ jnp.ones((6, 2)) + (x @ p["v"])[..., None], params, X)
    assert set(use) == {"w", "v", "step"}
    assert use["w"].layout == IO and use["v"].layout is None and use["step"].layout is None


def test_20_scan_stacked_kernel_and_tied_table():
    """(3, 8, 8) gives A (3, 8, 2) and B (3, 2, 8); a tied table has one layout."""

    def fn(p, ids):
        x = jnp.tanh(p["embed"][ids])
        x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"])[0]
        return x @ p["embed"].T

    params = {"embed": normal(1, (11, 8)), "layers": normal(2, (3, 8, 8))}
    ids = jnp.array([[1, 2, 10]])
    layout = lx.usage(fn, params, ids)
    params, lora = lx.split(params, rank=2, targets=["embed", "layers"], layout=layout)
    assert lora["layers"].a.shape == (3, 8, 2) and lora["layers"].b.shape == (3, 2, 8)
    moved = jax.tree.map(lambda x: x + 0.1, lora)
    got = lx.adapt(fn, fallback="error")(params, moved, ids)
    np.testing.assert_allclose(got, fn(lx.merge(params, moved), ids), rtol=1e-4, atol=1e-4)


SQUARE, ONE = normal(5, (6, 6), 0.4), jnp.int32(4)
# name -> function of the table, another weight and a number; what is found. A row alone may be a bias too.
PICKED = {
    "row by a literal": (lambda t, w, i: jnp.tanh(t[3] @ w), (11, 6), None),
    "row by a number": (lambda t, w, i: jnp.tanh(t[i] @ w), (11, 6), None),
    "bias of a layer": (lambda t, w, i: t[i] + jnp.ones(6) @ w, (11, 6), None),
    "row of several axes": (lambda t, w, i: jnp.einsum("hd,dk->hk", t[i], w), (11, 2, 6), None),
    "row by an array of one": (lambda t, w, i: jnp.tanh(t[i[None]] @ w), (11, 6), IO),
    "tied": (lambda t, w, i: jnp.tanh(t[i] @ w) @ t.T, (11, 6), IO),
    "tied, a literal": (lambda t, w, i: t @ jnp.tanh(t[3]), (11, 6), IO),
    "tied, kept axis": (lambda t, w, i: lax.dynamic_slice_in_dim(t, i, 1, 0) @ w @ t.T, (11, 6), IO),
    "tied, in a loop": (lambda t, w, i: lax.fori_loop(0, 3, lambda j, y: y + t[j] @ t.T, jnp.zeros(11)),
                        (11, 6), IO),
    "tied, logits first": (lambda t, w, i: t[jnp.argmax(jnp.ones(6) @ t.T)] @ w, (11, 6), OI),
    "layer by a number": (lambda t, w, i: jnp.ones(6) @ t[i], (3, 6, 6), SIO),
    "q, k, v by number": (lambda t, w, i: sum(jnp.ones(6) @ t[j] for j in range(3)), (3, 6, 6), SIO),
    "q, k, v split": (lambda t, w, i: sum(jnp.einsum("d,sde->e", jnp.ones(6), v) for v in jnp.split(t, 3)),
                      (3, 6, 6), SIO),
    "q, k, v of one product": (lambda t, w, i: jnp.einsum("d,sde->se", jnp.ones(6), t), (3, 6, 6),
                               L((), (1,), (0, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKED)
def test_what_a_number_picks_is_a_layer_a_lookup_or_open(name):
    """Right, or no layout and an error that says so; what has a layout adapts and equals the merged model."""
    fn, shape, layout = PICKED[name]
    params = {"table": normal(4, shape, 0.4), "other": SQUARE}

    def run(p, i):
        return fn(p["table"], p["other"], i)

    use = lx.usage(run, params, ONE)
    assert use["table"].layout == layout and use["table"].served == (layout is not None), use
    if layout is None:
        with pytest.raises(lx.LoraError, match="table"):
            lx.split(params, rank=2, targets="table", layout=use)
        return
    lora = {"table": make_adapter(shape, layout)}
    if use["other"].layout:
        lora["other"] = make_adapter((6, 6), IO, seed=3)
    got = lx.adapt(run, fallback="error")(params, lora, ONE)
    np.testing.assert_allclose(got, run(lx.merge(params, lora), ONE), rtol=1e-4, atol=1e-5)
    assert ("gather" in use["table"].ops) == (len(shape) == 2)  # a table, which waits to be named


def test_28_module_called_twice_has_one_adapter():
    """Dense(2) applied twice, x (1, 4) padded back: one adapter, A (4, 1), B (1, 2)."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(2)
            return dense(jnp.pad(dense(x), ((0, 0), (0, 2))))

    x = jnp.ones((1, 4))
    variables = Twice().init(jax.random.key(0), x)
    use = lx.usage(Twice().apply, variables, x)
    assert use["params/Dense_0/kernel"].times == 2
    params, lora = lx.split(variables, rank=1, layout=use)
    (adapter,) = lora.values()
    assert adapter.a.shape == (4, 1) and adapter.b.shape == (1, 2)
    moved = jax.tree.map(lambda x: x + 0.5, lora)
    got = lx.adapt(Twice().apply, fallback="error")(params, moved, x)
    np.testing.assert_allclose(got, Twice().apply(lx.merge(params, moved), x), rtol=1e-5)


def test_32_dtypes_follow_the_function():
    """Float16 compute over float32 params stays float16; a bfloat16 base stays bfloat16."""
    x = jnp.ones((1, 3))
    half = lx.adapt(lambda p, x: x.astype(jnp.float16) @ p["w"].astype(jnp.float16), fallback="error")
    lora = {"w": make_adapter((3, 4), IO)}
    params = {"w": normal(1, (3, 4))}
    assert half(params, lora, x).dtype == jnp.float16
    want = x @ lx.merge(params, lora)["w"]
    np.testing.assert_allclose(half(params, lora, x).astype(jnp.float32), want, atol=1e-2)  # 4: cast to fp16
    base = {"w": params["w"].astype(jnp.bfloat16)}
    got = lx.adapt(lambda p, x: x.astype(jnp.bfloat16) @ p["w"])(base, lora, x)
    assert got.dtype == jnp.bfloat16 and lx.merge(base, lora)["w"].dtype == jnp.bfloat16


def test_the_table_as_text():
    params = {"q": abstract(8, 2, 3), "norm": abstract(8), "odd": abstract(8, 6)}

    def fn(p, x):
        x = x * p["norm"][None, None]
        return jnp.einsum("btd,dhk->bthk", x, p["q"]).sum() + (x @ p["odd"] + x @ jnp.cos(p["odd"])).sum()

    lines = str(lx.usage(fn, params, X)).splitlines()
    assert lines[0].split()[:4] == ["path", "shape", "ops", "stack"]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert set(rows) == {"q", "norm", "odd"}
    assert (
        "8x2x3" in rows["q"] and "(0,)" in rows["q"] and "(1, 2)" in rows["q"] and rows["q"].endswith("yes")
    )
    assert "mul" in rows["norm"] and " - " in rows["norm"]
    assert "no: cos" in rows["odd"] and "test_usage.py:" in rows["odd"]


def test_plain_lists_need_no_names():
    def mlp(layers, x):
        for w, b in layers:
            x = jnp.tanh(x @ w + b[None])
        return x

    layers = [(normal(i, (8, 8), 0.3), jnp.zeros(8)) for i in range(3)]
    x = normal(9, (4, 8))
    layout = lx.usage(mlp, layers, x)
    params, lora = lx.split(layers, rank=2, layout=layout)
    assert set(lora) == {"0/0", "1/0", "2/0"}
    lora = {path: make_adapter((8, 8), IO, seed=int(path[0])) for path in lora}
    got = lx.adapt(mlp, fallback="error")(params, lora, x)
    np.testing.assert_allclose(got, mlp(lx.merge(params, lora), x), rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_or_allocated():
    huge = {"w": abstract(80, 28672, 8192, dtype=jnp.bfloat16)}
    x = abstract(1, 2048, 28672, dtype=jnp.bfloat16)
    use = lx.usage(lambda p, x: lax.scan(lambda c, w: (c, (x @ w)[0, 0, 0]), 0, p["w"])[1], huge, x)["w"]
    assert use.layout == SIO and use.times == 80 and use.flops == 80 * 2 * 2048 * 28672 * 8192


def conv(dims, **options):
    def fn(p, x):
        strides = options.get("strides", (1,) * (x.ndim - 2))
        rest = {k: v for k, v in options.items() if k not in ("strides", "padding")}
        return lax.conv_general_dilated(
            x, p["w"], strides, options.get("padding", "VALID"), dimension_numbers=dims, **rest
        )

    return fn


NWC = ("NWC", "WIO", "NWC")
QUAX = (((4,), (2,)), ((2, 0), (1, 4)))
# id -> function, W, x, rank, shapes of A and B
PEERS = {
    "6 19 conv": (jax.checkpoint(conv(NWC)), (2, 13, 17), (7, 11, 13), 3, (2, 13, 3), (3, 17)),
    "6 strides": (conv(NWC, strides=(2,), padding="SAME"), (2, 13, 17), (7, 11, 13), 3, (2, 13, 3), (3, 17)),
    "6 kernel dilation": (conv(NWC, rhs_dilation=(2,)), (2, 13, 17), (7, 11, 13), 3, (2, 13, 3), (3, 17)),
    "6 input dilation": (conv(NWC, lhs_dilation=(2,), padding=((1, 0),)), (2, 13, 17), (7, 11, 13), 3,
                         (2, 13, 3), (3, 17)),
    "6 groups": (conv(NWC, feature_group_count=2), (2, 6, 8), (7, 11, 12), 3, (2, 6, 3), (3, 8)),
    "18": (conv(KERNEL, padding="SAME"), (3, 3, 16, 32), (1, 5, 5, 16), 3, (3, 3, 16, 3), (3, 32)),
    "7": (lambda p, i: jnp.take(p["w"], i, axis=0), (4321, 100), None, 19, (4321, 19), (19, 100)),
    "29 q": (lambda p, x: jnp.einsum("btd,ndh->btnh", x, p["w"]), (4, 8, 5), (2, 3, 8), 2, (8, 2),
             (2, 4, 5)),
    "29 o": (lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"]), (4, 5, 8), (2, 3, 4, 5), 2, (4, 5, 2),
             (2, 8)),
    "48 left": (lambda p, x: lax.dot_general(p["w"], x, QUAX), (3, 2, 1, 4, 5), (8, 1, 5, 7, 3, 9, 10), 5,
                (3, 1, 5, 5), (3, 1, 5, 2, 4)),
    "48 right": (lambda p, x: lax.dot_general(x, p["w"], QUAX), (8, 1, 5, 7, 3, 9, 10), (3, 2, 1, 4, 5), 5,
                 (1, 3, 5, 5), (1, 3, 5, 8, 7, 9, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_peers_shapes(name):
    """The factors that `usage` gives, and the function on them."""
    fn, shape, x, rank, a, b = PEERS[name]
    x = jnp.arange(143).reshape(11, 13) * 30 if x is None else normal(2, x)
    params = {"w": normal(1, shape)}
    params, lora = lx.split(params, rank=rank, targets="w", layout=lx.usage(fn, params, x))
    assert lora["w"].a.shape == a and lora["w"].b.shape == b
    run = lx.adapt(fn, fallback="error")
    np.testing.assert_allclose(run(params, lora, x), fn(params, x), rtol=1e-5, atol=1e-4)
    moved = {"w": make_adapter(shape, lora["w"].layout, rank)}
    want = fn(lx.merge(params, moved), x)
    np.testing.assert_allclose(run(params, moved, x), want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


def test_6_two_convolutions_have_different_factors():
    params = {"one": normal(1, (2, 4, 4)), "two": normal(1, (2, 4, 4))}

    def fn(p, x):
        return conv(NWC)({"w": p["two"]}, conv(NWC)({"w": p["one"]}, x))

    layout = lx.usage(fn, params, abstract(1, 9, 4))
    _, lora = lx.split(params, rank=2, targets=["one", "two"], layout=layout)
    assert np.abs(lora["one"].a - lora["two"].a).max() > 0.1


def weight_normalized(p, x):
    return x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


def standardized(p, x):
    w = p["w"] - p["w"].mean(0, keepdims=True)
    return x @ (w / (p["w"].std(0, keepdims=True) + 1e-5))


LATER = {
    "scaled by a parameter": (lambda p, x: x @ (p["w"] * p["g"]), True),
    "times a parameter": (lambda p, x: x @ (p["w"] * p["m"]), False),
    "weight-normalized": (weight_normalized, False),
    "weight-standardized": (standardized, False),
}


@pytest.mark.parametrize("name", LATER)
def test_a_weight_that_is_computed_with_has_the_layout_of_its_product(name):
    fn, served = LATER[name]
    params = {"w": normal(1, (8, 6)), "m": normal(2, (8, 6)), "g": normal(3, (1, 6))}
    use = lx.usage(fn, params, abstract(3, 8))["w"]
    assert (use.layout, use.served) == (IO, served)
    assert use.flops == 2 * 3 * 8 * 6
    base, lora = lx.split(params, rank=2, targets=["w"], layout={"w": use.layout})
    lora = jax.tree.map(lambda leaf: leaf + 0.2, lora)
    got = lx.adapt(fn, fallback="error" if served else "allow")(base, lora, normal(4, (3, 8)))
    np.testing.assert_allclose(got, fn(lx.merge(base, lora), normal(4, (3, 8))), rtol=1e-4, atol=1e-4)


def test_experts_that_share_their_input_are_a_stack():
    def moe(p, x, gates):
        h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
        return jnp.einsum("tef,efd,te->td", h, p["down"], gates)

    params = {"up": jnp.ones((4, 8, 10)), "down": jnp.ones((4, 10, 8))}
    use = lx.usage(moe, params, abstract(3, 8), abstract(3, 4))
    assert use["up"].layout == use["down"].layout == SIO and use["up"].served and use["down"].served


def test_heads_of_attention_stay_outputs():
    def attention(p, x):
        q, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qv")
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->hts", q, q)), v)
        return jnp.einsum("thk,hkd->td", mixed, p["o"])

    params = {"q": jnp.ones((8, 2, 4)), "v": jnp.ones((8, 2, 4)), "o": jnp.ones((2, 4, 8))}
    use = lx.usage(attention, params, abstract(3, 8))
    assert use["q"].layout == use["v"].layout == lx.Layout((), (0,), (1, 2))
    assert use["o"].layout == lx.Layout((), (0, 1), (2,))
