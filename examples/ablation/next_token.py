"""The second model of a study: the first layers of SmolLM2-135M, and the next token in Hamlet.

The vocabulary is cut to the tokens that occur in the play. The head is what the whole model has, its tied
embedding, behind a linear map that is fitted once, by ridge regression, from what the frozen layers give to
what all thirty layers give; it stays. So runs differ only in what they train in the layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import study
from models import minilm
from models.llama import Block, LlamaConfig, load_gguf, rope_angles

import lorax_fn as lx

LAYERS, LENGTH, BATCH = 2, 32, 4
TEST, HEAD = 64, 256  # rows at the end of the play to test on, and at its start to fit the head on


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows ``[n, T + 1]`` to train on, those to test on, and the tokens ``[V]`` that their ids stand for."""
    ids = study.data.load_tokenizer(study.data.smollm2()).encode(study.data.hamlet()).ids
    kept, ids = np.unique(ids, return_inverse=True)
    rows = study.data.blocks(ids.tolist(), LENGTH)
    return rows[:-TEST], rows[-TEST:], kept


@functools.cache
def whole() -> tuple[LlamaConfig, dict]:
    """The sizes of SmolLM2, and its weights: one entry per layer, and the embeddings of the kept tokens."""
    config, held = load_gguf(study.data.smollm2())
    held, (_, _, kept) = held["params"], texts()
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], held["layers"]) for i in range(config.layers)}
    return dataclasses.replace(config, vocab=len(kept)), {
        "embed": held["embed"]["embedding"][kept],
        "norm": held["norm"]["scale"],
        **layers,
    }


def features(params: dict, tokens: jax.Array) -> jax.Array:
    """The last hidden states, each divided by its root mean square: ``[B, T] -> [B, T, D]``."""
    config, _ = whole()
    x = params["embed"][tokens]
    angles = rope_angles(tokens.shape[1], config.head_width, config.rope_theta)
    for i in range(sum(name.startswith("layer_") for name in params)):
        x, _ = Block(config).apply({"params": params[f"layer_{i}"]}, x, angles)
    return nn.RMSNorm(epsilon=config.norm_eps, use_scale=False).apply({}, x)


def logits(params: dict, tokens: jax.Array) -> jax.Array:
    """``[B, T] -> [B, T, V]``, from ``params`` with a head."""
    x = features(params, tokens) @ params["head"]["kernel"] + params["head"]["bias"]
    return x @ params["embed"].T


@functools.cache
def frozen() -> dict:
    """The first layers, with the fitted head."""
    _, full = whole()
    params = {name: full[name] for name in ("embed", *(f"layer_{i}" for i in range(LAYERS)))}
    run = jax.jit(features)
    tokens = texts()[0][:HEAD, :-1].reshape(-1, BATCH, LENGTH)
    x, y = (
        np.concatenate([np.asarray(run(p, rows)).reshape(-1, full["norm"].size) for rows in tokens])
        for p in (params, full)
    )
    head = minilm.ridge_regression(x, y * np.asarray(full["norm"]))
    return {**params, "head": head}


def batches(seed: int) -> Iterator[np.ndarray]:
    """Batches of training rows, in an order of the seed's own."""
    return study.data.batches(texts()[0], BATCH, 100 + seed)


def scores_of(model: Callable, rows: jax.Array) -> dict[str, jax.Array]:
    """The scores of ``model(tokens) -> logits`` for each token of some rows after the first."""
    return study.class_scores(model(rows[:, :-1]), rows[:, 1:])


def tested(model: Callable) -> dict[str, jax.Array]:
    """The mean scores of ``model(tokens) -> logits`` on the test rows, batch by batch."""
    parts = texts()[1].reshape(-1, BATCH, LENGTH + 1)
    return study.mean_scores(functools.partial(scores_of, model), jnp.asarray(parts))


def facts() -> dict[str, Any]:
    """What a record says of this model, with the test scores of the frozen layers and of all thirty."""
    _, full = whole()
    full = {**full, "head": {"kernel": jnp.diag(full["norm"]), "bias": jnp.zeros(())}}
    run = jax.jit(lambda params: tested(functools.partial(logits, params)))
    starts = {name: run(params) for name, params in (("frozen", frozen()), ("all_layers", full))}
    return {
        "model": f"the first {LAYERS} layers of SmolLM2-135M-Instruct, float32",
        "data": f"Hamlet, {LENGTH} tokens per row, {TEST} test rows, a vocabulary of {len(texts()[2])}",
        "batch": BATCH,
        **jax.tree.map(float, starts),
    }


def sweep(name: str, lanes: Sequence[dict], **given: Any) -> Any:
    """`study.run` of these lanes on Hamlet."""
    apply = lx.adapt(logits, fallback="error")

    def loss_fn(params, lora, rows, key):
        return scores_of(lambda tokens: apply(params, lora, tokens), rows)["loss"]

    def eval_fn(state, params):
        return tested(lambda tokens: apply(params, state.lora, tokens))

    asked = {"params": frozen(), "batches": batches, "eval_fn": eval_fn, **given}
    return study.run(name, loss_fn, lanes, **asked)
