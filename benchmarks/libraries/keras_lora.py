"""Keras: `Dense.enable_lora` on a functional model, called by `stateless_call` as its guide for JAX does."""

import os

from libraries.linen import peer
from libraries.measured import JaxPeer
from libraries.problem import LINEAR, Problem, factors, weights


def make_model(problem: Problem):
    import keras
    from keras import layers, ops

    split = (problem.heads, problem.width // problem.heads)
    length = 1 if problem.decode else problem.tokens
    x = first = keras.Input((length, problem.width), batch_size=problem.batch)
    shape = (problem.layers, problem.tokens, *split)
    past = [keras.Input(shape, batch_size=problem.batch) for _ in range(2)] if problem.decode else None
    news = []
    for i in range(problem.layers):

        def dense(name, x, i=i):
            units = problem.shapes[name][1]
            return layers.Dense(units, name=f"layers_{i}_{name}")(x)

        def norm(name, x, i=i):
            return layers.LayerNormalization(epsilon=1e-6, name=f"layers_{i}_{name}")(x)

        h = norm("norm_1", x)
        q, k, v = (ops.reshape(dense(name, h), (problem.batch, length, *split)) for name in "qkv")
        news += [k, v]
        if past:
            k, v = (ops.concatenate([old[:, i], own], 1) for old, own in zip(past, (k, v), strict=True))
        scores = ops.einsum("bqhd,bkhd->bhqk", q, k) / split[1] ** 0.5
        if not past:
            scores = ops.where(ops.tril(ops.ones((length, length), bool)), scores, -1e30)
        mixed = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(scores), v)
        x = x + dense("o", ops.reshape(mixed, x.shape))
        x = x + dense("down", ops.gelu(dense("up", norm("norm_2", x)), approximate=True))
    y = layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    return keras.Model([first, *past], [y, *news]) if past else keras.Model(first, y)


def keras_lora(problem: Problem) -> JaxPeer:
    if problem.scanned:
        raise ValueError("Keras has no scanned layers")
    if problem.dtype != "float32":
        raise ValueError("written for float32 only")
    os.environ["KERAS_BACKEND"] = "jax"
    model = make_model(problem)
    names = {"scale": "gamma"}
    for path, value in weights(problem).items():
        *at, leaf = path.split("/")
        layer = model.get_layer("_".join(at))
        getattr(
            layer, "_kernel" if leaf == "kernel" else names.get(leaf, "beta" if "norm" in path else leaf)
        ).assign(value)
    for i in range(problem.layers):
        for name in LINEAR:
            layer = model.get_layer(f"layers_{i}_{name}")
            layer.enable_lora(problem.rank, lora_alpha=problem.alpha)
            layer.lora_kernel_a.assign(factors(problem)[f"layers_{i}/{name}"][0])
            layer.lora_kernel_b.assign(factors(problem)[f"layers_{i}/{name}"][1])
    for variable in model.trainable_variables:
        variable.trainable = "lora" in variable.name
    trainable = [variable.value for variable in model.trainable_variables]
    frozen = [variable.value for variable in model.non_trainable_variables]

    def apply(trainable, frozen, x, past=None):
        if past is None:
            return model.stateless_call(trainable, frozen, x)[0]
        past = [part.swapaxes(0, 1) for part in past]
        y, *news = model.stateless_call(trainable, frozen, [x, *past])[0]
        return y, news

    return peer("Keras enable_lora", problem, lambda: apply, trainable, frozen)
