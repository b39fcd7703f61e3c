"""What the adapted program costs, by the compiler's own count: the machine's mood has no say."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from rule_cases import IO, make_adapter, normal

import lorax_fn as lx
from lorax_fn.transform.jaxpr import scan_counts


def costs(fn, *args):
    """FLOPs and bytes of temporaries of the compiled program."""
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


# One layer: 1024 x 1024, 512 tokens, rank 8.

W, X = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((4, 128, 1024), jnp.float32)


def layer(p, x):
    return x @ p["w"]


def layer_lora():
    return {
        "w": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_adapter((1024, 1024), IO, 8))
    }


def squared(y):
    return jnp.sum(y * y)


def adapted_grad(lora, w, x):
    run = lx.adapt(layer, fallback="error")
    return jax.grad(lambda lora: squared(run({"w": w}, lora, x)))(lora)


def hand_grad(ab, w, x):
    return jax.grad(lambda ab: squared(x @ w + 0.5 * ((x @ ab[0]) @ ab[1])))(ab)


def test_gradient_of_a_layer_costs_half_of_full_fine_tuning():
    """The base GEMM forward is 1.07 GFLOP, the rest is skinny; x needs no gradient."""
    flops, temp = costs(adapted_grad, layer_lora(), W, X)
    full, _ = costs(lambda w, x: jax.grad(lambda w: squared(x @ w))(w), W, X)
    assert flops <= 1.14e9
    assert full == pytest.approx(2.15e9, rel=0.01)
    ab = (layer_lora()["w"].a, layer_lora()["w"].b)
    hand, hand_temp = costs(hand_grad, ab, W, X)
    assert flops <= 1.002 * hand and temp <= 1.02 * hand_temp, (flops / hand, temp / hand_temp)


def test_48_gradient_has_exactly_the_leaves_of_lora():
    """512 x 256 at rank 8 is 24,576 bytes; a cotangent of W would be 524,288 more."""
    params, lora = lx.split({"w": normal(1, (512, 256)), "b": jnp.zeros(256)}, rank=8, layout={"w": IO})
    run = lx.adapt(lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]), fallback="error")

    def loss(params, lora):
        return jnp.sum(run(params, lora, normal(2, (4, 512), 0.01)))

    grads = jax.jit(jax.grad(loss, 1))(params, lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(grads)) == 8 * (512 + 256) * 4
    assert not np.asarray(grads["w"].a).any() and np.asarray(grads["w"].b).any()  # B = 0 at the start
    base, stacked = jax.grad(loss, (0, 1))(params, lora), grad_of_jit(loss)(params, lora)
    assert np.asarray(base[0]["w"]).any() and np.asarray(base[0]["b"]).any()
    chex.assert_trees_all_close(stacked, grads, rtol=1e-5)


def grad_of_jit(loss):
    return jax.grad(jax.jit(loss), 1)


def jaxpr_shapes(jaxpr, primitive):
    """Result shapes of every equation of one primitive, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield from (v.aval.shape for v in eqn.outvars)
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from jaxpr_shapes(inner, primitive)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_no_product_has_the_weights_shape(checkpointed):
    """Neither W + AB nor a cotangent of W: no product of the traced gradient gives (in, out) or (out, in)."""

    def model(p, x):
        def body(x, w):
            return jnp.tanh(x @ w["up"]) @ w["down"], None

        return lax.scan(jax.checkpoint(body) if checkpointed else body, x, p)[0]

    params = {"up": normal(1, (3, 40, 56), 0.1), "down": normal(2, (3, 56, 40), 0.1)}
    layout = lx.usage(model, params, jnp.ones((2, 5, 40)))
    params, lora = lx.split(params, rank=4, layout=layout)
    run = lx.adapt(model, fallback="error")
    grad = jax.grad(lambda lora, x: squared(run(params, lora, x)))
    shapes = set(jaxpr_shapes(jax.make_jaxpr(grad)(lora, jnp.ones((2, 5, 40))).jaxpr, "dot_general"))
    assert shapes and not {(40, 56), (56, 40), (3, 40, 56), (3, 56, 40)} & shapes, shapes
    text = jax.jit(grad).lower(lora, jnp.ones((2, 5, 40))).compile().as_text()
    assert not re.findall(r"= f32\[(?:40,56|56,40)\]\S* dot\(", text)


# A pre-LN block of Flax Linen, against the same block with LoRA written in by hand.

D, HEADS, FF, RANK, LAYERS = 128, 4, 512, 8, 4


class HandLoRA(nn.Module):
    """``y + s * ((x @ a) @ b)``, as written into models by hand."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.param("a", nn.initializers.lecun_normal(), (x.shape[-1], RANK))
        b = self.param("b", nn.initializers.zeros, (RANK, self.features))
        return x @ w + bias[None, None] + 4.0 * ((x @ a) @ b)


class Block(nn.Module):
    linear: type

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="ln1")(x)
        shape = (*x.shape[:-1], HEADS, D // HEADS)
        q, k, v = (self.linear(D, name=name)(h).reshape(shape) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) * (D // HEADS) ** -0.5)
        x = x + self.linear(D, name="o")(jnp.einsum("bhts,bshk->bthk", scores, v).reshape(x.shape))
        h = nn.gelu(self.linear(FF, name="up")(nn.LayerNorm(name="ln2")(x)))
        return x + self.linear(D, name="down")(h), None


class Stack(nn.Module):
    linear: type
    scanned: bool
    checkpointed: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.checkpointed else Block
        if self.scanned:
            many = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return many(self.linear, name="layers")(x, None)[0]
        for i in range(LAYERS):
            x, _ = block(self.linear, name=f"layer_{i}")(x)
        return x


def block_grads(scanned, checkpointed):
    """The two gradient functions and their abstract arguments: adapted, by hand."""
    x = jax.ShapeDtypeStruct((4, 64, D), jnp.float32)
    plain, hand = (Stack(linear, scanned, checkpointed) for linear in (nn.Dense, HandLoRA))
    variables = jax.eval_shape(plain.init, jax.random.key(0), x)
    params, lora = jax.eval_shape(functools.partial(lx.split, rank=RANK), variables)
    run = lx.adapt(plain.apply, fallback="error")

    def adapted(lora, params, x):
        return jax.value_and_grad(lambda lora: squared(run(params, lora, x)))(lora)

    by_hand = jax.eval_shape(hand.init, jax.random.key(0), x)
    flat, treedef = jax.tree_util.tree_flatten_with_path(by_hand)
    trains = [path[-1].key in "ab" for path, _ in flat]

    def written(trained, frozen, x):
        def loss(trained):
            t, f = iter(trained), iter(frozen)
            leaves = [next(t) if train else next(f) for train in trains]
            return squared(hand.apply(jax.tree.unflatten(treedef, leaves), x))

        return jax.value_and_grad(loss)(trained)

    trained = [leaf for (_, leaf), train in zip(flat, trains, strict=True) if train]
    frozen = [leaf for (_, leaf), train in zip(flat, trains, strict=True) if not train]
    assert sum(x.size for x in trained) == sum(x.size for x in jax.tree.leaves(lora))
    return (adapted, (lora, params, x)), (written, (trained, frozen, x))


@pytest.mark.parametrize(
    ("scanned", "checkpointed"),
    [
        pytest.param(False, False, id="unrolled-plain"),
        pytest.param(True, True, id="scanned-checkpointed"),
        pytest.param(False, True, id="unrolled-checkpointed", marks=pytest.mark.slow),
        pytest.param(True, False, id="scanned-plain", marks=pytest.mark.slow),
    ],
)
def test_linen_block_costs_what_a_hand_written_one_costs(scanned, checkpointed):
    (adapted, args), (written, hand_args) = block_grads(scanned, checkpointed)
    flops, temp = costs(adapted, *args)
    hand_flops, hand_temp = costs(written, *hand_args)
    print(f"flops {flops / hand_flops:.4f}, temp {temp / hand_temp:.4f} of hand-written")
    assert flops <= 1.01 * hand_flops, flops / hand_flops
    assert temp <= 1.02 * hand_temp, temp / hand_temp


# Tracing: an unrolled stack whose layers are inner jits stays one function a layer.


def llama_layer(linear, p, x):
    def norm(x, g):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g.reshape(1, 1, -1)

    h = norm(x, p["n1"])
    q, k, v = (linear(p[n], h).reshape(*x.shape[:2], 4, -1) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    x = x + linear(p["o"], jnp.einsum("bhts,bshk->bthk", scores, v).reshape(x.shape))
    h = norm(x, p["n2"])
    return x + linear(p["down"], jax.nn.silu(linear(p["gate"], h)) * linear(p["up"], h))


def by_hand(p, x):
    w, a, b = p
    return x @ w + 4.0 * ((x @ a) @ b)


def plain_layer(p, x):
    return llama_layer(lambda w, x: x @ w, p, x)


def hand_layer(p, x):
    return llama_layer(by_hand, p, x)


@pytest.mark.parametrize("wrap", [lambda layer: layer, jax.jit], ids=["plain", "jitted"])
def test_an_unrolled_stack_lowers_to_no_more_than_a_hand_written_one(wrap):
    """32 layers: no more lines, and functions that do not grow in number with the layers."""
    d, ff, depth = 32, 64, 32
    sizes = {
        "q": (d, d),
        "k": (d, d),
        "v": (d, d),
        "o": (d, d),
        "gate": (d, ff),
        "up": (d, ff),
        "down": (ff, d),
    }
    one = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    norms = {name: jax.ShapeDtypeStruct((d,), jnp.float32) for name in ("n1", "n2")}
    params = {f"layer_{i}": {**one, **norms} for i in range(depth)}
    x = jax.ShapeDtypeStruct((2, 8, d), jnp.float32)

    def stack(layer):
        return lambda p, x: functools.reduce(lambda x, i: layer(p[f"layer_{i}"], x), range(depth), x)

    layout = {f"layer_*/{name}": IO for name in sizes}
    params, lora = jax.eval_shape(functools.partial(lx.split, rank=4, layout=layout), params)
    assert len(lora) == 7 * depth
    run = lx.adapt(stack(wrap(plain_layer)), fallback="error")
    lowered = jax.jit(jax.grad(lambda lora, p, x: squared(run(p, lora, x)))).lower(lora, params, x)

    factors = {name: (jax.ShapeDtypeStruct((n, 4), jnp.float32), jax.ShapeDtypeStruct((4, m), jnp.float32))
               for name, (n, m) in sizes.items()}  # fmt: skip
    trained = {f"layer_{i}": factors for i in range(depth)}

    hand = wrap(hand_layer)

    def hand_loss(trained, p, x):
        joined = {i: {n: (w, *trained[i][n]) if n in sizes else w for n, w in p[i].items()} for i in p}
        return squared(stack(hand)(joined, x))

    by_hand_lowered = jax.jit(jax.grad(hand_loss)).lower(trained, params, x)
    text, hand_text = lowered.as_text(), by_hand_lowered.as_text()
    lines, hand_lines = len(text.splitlines()), len(hand_text.splitlines())
    print(f"{lines} lines of StableHLO, {hand_lines} by hand")
    functions = text.count("func.func")
    assert functions < depth // 2, f"{functions} functions: inner ones are repeated"
    assert text.count("func.func private @plain_layer") == hand_text.count("func.func private @hand_layer")
    assert lines <= hand_lines


def test_a_second_step_compiles_nothing():
    params, lora = lx.split({"w": normal(1, (16, 8))}, rank=2, layout={"w": IO})
    run, tx = lx.adapt(layer, fallback="error"), optax.sgd(1e-2, momentum=0.9)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(lora, state, x):
        grads = jax.grad(lambda lora: squared(run(params, lora, x)))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    state = tx.init(lora)
    for i in range(3):
        lora, state = step(lora, state, normal(i, (4, 16)))
    assert step._cache_size() == 1


# What a loop keeps for its backward pass.


def kept_by_the_loop(fn, *args):
    """Shapes of what the forward scan of a gradient stacks up, one per layer, largest first."""
    scans = [eqn for eqn in jax.make_jaxpr(fn)(*args).eqns if eqn.primitive.name == "scan"]
    stacked = scans[0].outvars[scan_counts(scans[0])[1] :]
    return sorted((var.aval.shape[1:] for var in stacked), key=lambda shape: -np.prod(shape))


def test_products_of_one_activation_keep_it_once_as_by_hand():
    """Two weights read the same x [2, 8, 64]: the scan keeps x, and no flat copy of it per weight."""
    weights = {name: jax.ShapeDtypeStruct((3, 64, 64), jnp.float32) for name in ("q", "k")}
    x = jax.ShapeDtypeStruct((2, 8, 64), jnp.float32)

    def model(weights, x):
        body = lambda x, w: (jnp.tanh(x @ w["q"]) * jnp.tanh(x @ w["k"]), None)  # noqa: E731
        return jax.lax.scan(body, x, weights)[0]

    def by_hand(factors, weights, x):
        def body(x, layer):
            w, f = layer
            q, k = (x @ w[name] + 2.0 * ((x @ f[name][0]) @ f[name][1]) for name in "qk")
            return jnp.tanh(q) * jnp.tanh(k), None

        return jax.lax.scan(body, x, (weights, factors))[0]

    layout = lx.Layout(stack=(0,), inputs=(1,), outputs=(2,))
    _, lora = lx.split(weights, rank=4, targets=["q", "k"], layout=dict.fromkeys("qk", layout))
    factors = {name: (lora[name].a, lora[name].b) for name in "qk"}
    run = lx.adapt(model, fallback="error")
    ours = jax.grad(lambda lora, weights, x: squared(run(weights, lora, x)))
    theirs = jax.grad(lambda factors, weights, x: squared(by_hand(factors, weights, x)))
    got, want = kept_by_the_loop(ours, lora, weights, x), kept_by_the_loop(theirs, factors, weights, x)
    assert got == want
    assert want.count((2, 8, 64)) == 5, "x, and of each weight tanh and its derivative"


def test_the_forward_pass_merges_no_tokens():
    """On a TPU, a reshape keeps the change from being fused with what it is added to."""
    text = str(jax.make_jaxpr(lx.adapt(layer, fallback="error"))({"w": W}, layer_lora(), X))
    assert "dot_general" in text and "reshape" not in text


@pytest.mark.parametrize(("backend", "tokens", "barriers"), [("cpu", 96, 1), ("tpu", 97, 1), ("gpu", 98, 0)])
def test_a_gpu_transposes_no_tangent(monkeypatch, backend, tokens, barriers):
    """The barrier that makes the gradient of A quick on a CPU would only cost copies there."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # JAX keeps traces by shape, so each case has its own.
    x, w = jax.ShapeDtypeStruct((tokens, 80), jnp.float32), jax.ShapeDtypeStruct((80, 64), jnp.float32)
    _, lora = lx.split({"w": w}, rank=4)
    run = lx.adapt(lambda params, x: x @ params["w"], fallback="error")
    gradient = jax.grad(lambda lora, params, x: squared(run(params, lora, x)))
    assert str(jax.make_jaxpr(gradient)(lora, {"w": w}, x)).count("optimization_barrier") == barriers
