"""Plain Flax Linen: full fine-tuning, merging, LoRA by hand, `lx.adapt`, the limit, and qwix."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxpr_as_fun

import lorax_fn as lx
from libraries import llama
from libraries.measured import JaxPeer, decoding, loss_of, mse, training
from libraries.problem import Problem, arranged, factors, inputs, nested, weights


class Block(nn.Module):
    """One pre-LN layer. `dense`, which is nn.Dense, makes its linear layers; ``past`` is for decoding."""

    problem: Problem
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x, past):
        sizes = self.problem
        split = (*x.shape[:2], sizes.heads, sizes.width // sizes.heads)
        h = nn.LayerNorm(name="norm_1")(x)
        q, k, v = (self.dense(sizes.width, name=name)(h).reshape(split) for name in "qkv")
        new = k, v
        if past is not None:
            k, v = (jnp.concatenate([old, own], 1) for old, own in zip(past, new, strict=True))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        if past is None:
            causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            scores = jnp.where(causal, scores, -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        x = x + self.dense(sizes.width, name="o")(mixed.reshape(x.shape))
        h = self.dense(sizes.hidden, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + self.dense(sizes.width, name="down")(nn.gelu(h)), None if past is None else new


class Transformer(nn.Module):
    """``x [B, T, D] -> [B, T, D]``; with ``past`` also the new keys and values of each layer."""

    problem: Problem
    dense: Callable = nn.Dense
    policy: Callable | None = None  # of the checkpoint

    @nn.compact
    def __call__(self, x, past=None):
        if self.problem.scanned:
            layers = nn.scan(
                nn.remat(Block, prevent_cse=False, policy=self.policy),
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.problem.layers,
            )
            x, _ = layers(self.problem, self.dense, name="layers")(x, None)
            return nn.LayerNorm(name="norm")(x)
        news = []
        for i in range(self.problem.layers):
            layer = None if past is None else tuple(part[i] for part in past)
            x, new = Block(self.problem, self.dense, name=f"layers_{i}")(x, layer)
            news.append(new)
        x = nn.LayerNorm(name="norm")(x)
        return x if past is None else (x, news)


class PostBlock(nn.Module):
    """One post-LN layer of BERT, all of whose tokens see each other."""

    problem: Problem
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x):
        sizes, norm = self.problem, partial(nn.LayerNorm, epsilon=1e-12)
        split = (*x.shape[:2], sizes.heads, sizes.width // sizes.heads)
        q, k, v = (self.dense(sizes.width, name=name)(x).reshape(split) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        x = norm(name="norm_1")(x + self.dense(sizes.width, name="o")(mixed.reshape(x.shape)))
        h = nn.gelu(self.dense(sizes.hidden, name="up")(x), approximate=False)
        return norm(name="norm_2")(x + self.dense(sizes.width, name="down")(h))


class MiniLM(nn.Module):
    """``ids [B, T] -> [B, T, D]``: the encoder of all-MiniLM-L6-v2."""

    problem: Problem
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, ids, past=None):
        sizes = self.problem
        rows = {"word": 30522, "position": 512, "token_type": 2}
        word, position, kind = (
            self.param(name, nn.initializers.normal(), (count, sizes.width)) for name, count in rows.items()
        )
        x = word[ids] + position[: ids.shape[1]] + kind[0]
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        for i in range(sizes.layers):
            x = PostBlock(sizes, self.dense, name=f"layers_{i}")(x)
        return x


def model_of(problem: Problem, dense: Callable = nn.Dense) -> nn.Module:
    kinds = {"transformer": Transformer, "minilm": MiniLM, "smollm2": llama.Llama}
    return kinds[problem.model](problem, dense)


class HandDense(nn.Module):
    """LoRA as usually written by hand: ``y`` of nn.Dense, with bias, and then ``y + s * ((x @ a) @ b)``."""

    features: int
    rank: int
    scale: float
    flat: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        n = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (n, self.features))
        a = self.variable("lora", "a", jnp.zeros, (n, self.rank)).value
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features)).value
        rows = x.reshape(-1, n) if self.flat else x  # the tokens flattened by hand
        y = rows @ kernel
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        y = y + self.scale * ((rows @ a) @ b)
        return y.reshape(*x.shape[:-1], self.features) if self.flat else y


def peer(
    name: str, problem: Problem, make_apply: Callable, trainable: Any, frozen: Any, **facts: Any
) -> JaxPeer:
    """The problem's step of ``make_apply()``, an ``apply(trainable, frozen, x, *past)``."""
    batch = inputs(problem)
    if problem.decode:

        def make_run():
            apply = make_apply()
            return lambda trainable, frozen, x, *past: apply(trainable, frozen, x, past)

        return decoding(name, make_run, trainable, frozen, batch, **facts)

    def make_loss():
        apply = make_apply()
        return lambda trainable, frozen, batch: loss_of(apply(trainable, frozen, batch["x"]), batch)

    return training(name, make_loss, trainable, frozen, batch, **facts)


@functools.cache
def held_weights(problem: Problem) -> dict[str, jax.Array]:
    """By path, and one copy for all ways."""
    return {path: jnp.asarray(x) for path, x in arranged(problem, weights(problem)).items()}


def variables(problem: Problem) -> dict:
    return {"params": nested(held_weights(problem))}


def adapters(problem: Problem, method: str = "lora") -> tuple[dict, dict]:
    """Frozen params and adapters with the problem's factors."""
    layout = lx.Layout(stack=(0,), inputs=(1,), outputs=(2,)) if problem.scanned else None
    layouts = {f"params/layers/{name}/kernel": layout for name in problem.linear}
    options: dict = {"layout": layouts} if layout else {}
    params = variables(problem)
    options |= {"targets": [f"params/{path}/kernel" for path in arranged(problem, factors(problem))]}
    params, lora = lx.split(params, rank=problem.rank, alpha=problem.alpha, method=method, **options)
    held = {f"params/{path}/kernel": pair for path, pair in arranged(problem, factors(problem)).items()}
    if set(lora) != set(held):
        raise SystemExit(f"adapted: {sorted(lora)}, not {sorted(held)}")
    lora = {
        path: dataclasses.replace(adapter, a=jnp.asarray(held[path][0]), b=jnp.asarray(held[path][1]))
        for path, adapter in lora.items()
    }
    return params, lora


def full(problem: Problem) -> JaxPeer:
    model = model_of(problem)
    merged = lx.merge(*adapters(problem))
    if problem.decode:
        return peer("merged", problem, lambda: lambda _, w, *x: model.apply(w, *x), {}, merged)
    apply = lambda w, _, *x: model.apply(w, *x)  # noqa: E731
    return peer("full fine-tuning", problem, lambda: apply, merged, {}, exact=False)


def with_step(way: JaxPeer, name: str, around: Callable) -> JaxPeer:
    """The way with ``around(step)`` for its step."""
    make_step = way.make_step
    way.name, way.make_step = name, lambda: around(make_step())
    return way


def replayed(problem: Problem) -> JaxPeer:
    """The merged model, traced and then replayed by JAX: the least that a transform of a trace costs."""

    def around(step):
        def run(*args):
            jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
            return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args)))

        return run

    return with_step(full(problem), "merged, replayed by JAX", around)


def merge_in_loss(problem: Problem) -> JaxPeer:
    model, (params, lora) = model_of(problem), adapters(problem)
    apply = lambda lora, params, *x: model.apply(lx.merge(params, lora), *x)  # noqa: E731
    return peer("merge in the loss", problem, lambda: apply, lora, params)


def by_hand(problem: Problem, flat: bool = False) -> JaxPeer:
    def dense(features, **options):
        return HandDense(features, problem.rank, problem.scale, flat, **options)

    model = model_of(problem, dense)
    held = arranged(problem, factors(problem))
    lora = nested({f"{path}/{'ab'[i]}": pair[i] for path, pair in held.items() for i in (0, 1)})
    apply = lambda lora, params, *x: model.apply({**params, "lora": lora}, *x)  # noqa: E731
    return peer(
        "by hand, flat tokens" if flat else "by hand", problem, lambda: apply, lora, variables(problem)
    )


def flat_by_hand(problem: Problem) -> JaxPeer:
    return by_hand(problem, flat=True)


def adapt(problem: Problem, method: str = "lora") -> JaxPeer:
    model, (params, lora) = model_of(problem), adapters(problem, method)

    def make_apply():
        run = lx.adapt(model.apply, fallback="error")
        return lambda lora, params, *x: run(params, lora, *x)

    name = "lx.adapt" if method == "lora" else f"lx.adapt, {method}"
    return peer(name, problem, make_apply, lora, params, kind=method)


def as_on(backend: str, problem: Problem, name: str) -> JaxPeer:
    """`adapt` in the form it has on another backend: without the barrier on a GPU, with it elsewhere.

    JAX keeps traces, so that it has to forget those of `adapt` first, as `JaxPeer.compile` makes it do.
    """

    def around(step):
        def run(*args):
            with mock.patch.object(jax, "default_backend", lambda: backend):
                return step(*args)

        return run

    return with_step(adapt(problem), name, around)


def dora(problem: Problem) -> JaxPeer:
    return adapt(problem, "dora")


def limit(problem: Problem) -> JaxPeer:
    """What no way to train adapters can do without: forward, and the gradient by the inputs alone.

    In decoding, all weights are read once, and added up.
    """
    model, batch = model_of(problem), inputs(problem)
    if problem.decode:

        def apply(_, params, x, past):
            del past
            return x + sum(w.sum() for w in jax.tree.leaves(params)) * 1e-9, None

        return peer("limit: reading weights", problem, lambda: apply, {}, variables(problem), kind="limit")

    def make_step():
        def step(x, fixed):
            params, target = fixed
            value, dx = jax.value_and_grad(lambda x: mse(model.apply(params, x), {"target": target}))(x)
            return x - 1e-4 * dx, value

        return step

    fixed = variables(problem), batch["target"]
    return JaxPeer("limit: forward and dx", make_step, jnp.asarray(batch["x"]), fixed, 0, kind="limit")


def qwix(problem: Problem) -> JaxPeer:
    import qwix

    modules = r".*([qkvo]|up|gate|down)"
    provider = qwix.LoraProvider(module_path=modules, rank=problem.rank, alpha=problem.alpha)
    model = qwix.apply_lora_to_model(model_of(problem), provider)
    x = inputs(problem)["x"]
    past = [inputs(problem)[name] for name in ("keys", "values")] if problem.decode else None
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x, past)["params"], sep="/")
    held = held_weights(problem)
    pairs = arranged(problem, factors(problem))
    for path, pair in pairs.items():
        held = {**held, f"{path}/kernel_lora_a": pair[0], f"{path}/kernel_lora_b": pair[1]}
    if set(shapes) != set(held):
        raise SystemExit(f"qwix made {sorted(set(shapes) ^ set(held))}")
    lora = {path: x for path, x in held.items() if "_lora_" in path}
    frozen = {path: x for path, x in held.items() if "_lora_" not in path}
    apply = lambda lora, frozen, *x: model.apply(  # noqa: E731
        {"params": unflatten_dict(frozen | lora, sep="/")}, *x
    )
    return peer("qwix", problem, lambda: apply, lora, frozen)
