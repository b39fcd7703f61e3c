"""quax: `quax.examples.lora.LoraArray` in place of each weight of a plain function."""

import jax
import jax.numpy as jnp

from libraries.linen import peer
from libraries.measured import JaxPeer
from libraries.problem import Problem, arranged, factors, nested, weights


def norm(x, p):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def layer(problem, p, x, past):
    split = (*x.shape[:2], problem.heads, problem.width // problem.heads)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    h = norm(x, p["norm_1"])
    q, k, v = (dense(name, h).reshape(split) for name in "qkv")
    new = k, v
    if past is not None:
        k, v = (jnp.concatenate([old, own], 1) for old, own in zip(past, new, strict=True))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
    if past is None:
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + dense("o", mixed.reshape(x.shape))
    return x + dense("down", jax.nn.gelu(dense("up", norm(x, p["norm_2"])))), new


def model(problem, params, x, past=None):
    if problem.scanned:
        body = jax.checkpoint(lambda x, p: (layer(problem, p, x, None)[0], None), prevent_cse=False)
        return norm(jax.lax.scan(body, x, params["layers"])[0], params["norm"])
    news = []
    for i in range(problem.layers):
        x, new = layer(problem, params[f"layers_{i}"], x, past and tuple(part[i] for part in past))
        news.append(new)
    x = norm(x, params["norm"])
    return (x, news) if past else x


def quax(problem: Problem) -> JaxPeer:
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    held = {path: jnp.asarray(x) for path, x in arranged(problem, weights(problem)).items()}
    for path, (a, b) in arranged(problem, factors(problem)).items():
        wrapped = LoraArray(held[f"{path}/kernel"], rank=problem.rank, key=jax.random.key(0))
        held[f"{path}/kernel"] = eqx.tree_at(
            lambda w: (w.a, w.b), wrapped, (jnp.asarray(a), jnp.asarray(problem.scale * b))
        )
    params = nested(held)
    is_lora = lambda x: isinstance(x, LoraArray)  # noqa: E731
    wanted = jax.tree.map(
        lambda x: eqx.tree_at(lambda w: (w._w, w.a, w.b), x, (False, True, True)) if is_lora(x) else False,
        params,
        is_leaf=is_lora,
    )
    trainable, frozen = eqx.partition(params, wanted)

    def make_apply():
        run = quax.quaxify(lambda params, *x: model(problem, params, *x))
        return lambda trainable, frozen, *x: run(eqx.combine(trainable, frozen), *x)

    return peer("quax", problem, make_apply, trainable, frozen, exact=False)
