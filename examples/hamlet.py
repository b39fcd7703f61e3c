"""What the scripts share to fine-tune on Hamlet: the texts, the loss, the loop and the evaluation."""

import argparse
from typing import Any

import data
import jax
import numpy as np
import optax

import lorax_fn as lx

BATCH, LENGTH = 4, 128  # one step reads 512 tokens
HELD_OUT = 24  # rows at the end of the play, which are never trained on
HAMLET = "Hamlet, held out"


def mean_nll(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Mean negative log-likelihood per token, in nats: ``[B, T, vocab]``, ``[B, T + 1]`` -> scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def read_texts(tokenizer, smoke: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The rows to train on, and the rows to evaluate on: the play's end and an unrelated text."""
    play = data.blocks(tokenizer.encode(data.hamlet()).ids, LENGTH)
    genesis = data.blocks(tokenizer.encode(data.king_james()).ids, LENGTH)
    amount = 8 if smoke else HELD_OUT
    return play[:-HELD_OUT], {
        HAMLET: play[-HELD_OUT:][:amount],
        "King James": genesis[: amount // 2],
    }


def train(args: argparse.Namespace, adapted, params, lora, rows) -> tuple[lx.TrainState, Any]:
    """Adam with warm-up and cosine decay, run by `lx.fit`.

    Args:
      args: ``steps``, ``lr`` (at its peak) and ``seed``.
      adapted: ``adapted(params, lora, tokens) -> logits``.
      params: the frozen weights.
      lora: where the adapters start.
      rows: ``[rows, T + 1]`` tokens.

    Returns:
      The last state, and the compiled step, which knows what memory it takes.
    """
    warmup = min(max(args.steps // 10, 1), args.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(args.lr / 10, args.lr, warmup, args.steps, args.lr / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(params, lora, batch, key):
        del key  # no dropout here
        return mean_nll(adapted(params, lora, batch[:, :-1]), batch)

    # The frozen weights are an argument of the step, and only the state is donated.
    step = jax.jit(lx.make_train_step(loss_fn, tx), donate_argnums=0)
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(args.seed))
    stream = data.batches(rows, BATCH, args.seed)
    compiled = step.lower(state, params, rows[:BATCH]).compile()

    def tokens(batch):
        return batch[:, 1:].size

    state = lx.fit(compiled, state, params, stream, steps=args.steps, count=tokens, unit="tokens")
    return state, compiled


def evaluation(adapted):
    """Builds ``evaluate(params, lora, rows) -> mean NLL`` of one batch, jitted."""
    return jax.jit(lambda params, lora, rows: mean_nll(adapted(params, lora, rows[:, :-1]), rows))


def measure(evaluate, params, lora, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean NLL of each text."""
    return {
        name: float(
            np.mean([evaluate(params, lora, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)])
        )
        for name, rows in texts.items()
    }


def size(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
