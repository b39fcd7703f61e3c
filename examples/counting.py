"""The task of `fit_iterator.py` and `fit_grain.py`: a small model of sequences that count up.

The base is untrained; the adapter learns that ``n + 1`` follows ``n``. It takes a second on a CPU.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lx

VOCAB, WIDTH, LENGTH, STEPS = 32, 64, 16, 60


def model(params, tokens):
    """Next-token logits, ``[B, T]`` -> ``[B, T, vocab]``."""
    hidden = jax.nn.gelu(params["embed"][tokens] @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"]


def new_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "up": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 8},
        "down": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCAB)) / 8},
    }


def rows():
    """Sequences of 3 to 12 tokens, packed; the first two tokens of each are its prompt."""
    rng = np.random.default_rng(0)
    starts, sizes = rng.integers(0, VOCAB - 12, 200), rng.integers(3, 13, 200)
    sequences = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return lx.data.pack(sequences, LENGTH, prompts=[2] * len(sequences))


PARAMS, LORA = lx.split(new_params(), rank=8)
ADAPTED, TX = lx.adapt(model), optax.adam(0.005)


def loss_fn(params, lora, batch, key):
    del key  # no dropout here
    logits = ADAPTED(params, lora, batch["inputs"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.mean(losses, where=batch["mask"])


STEP = jax.jit(lx.make_train_step(loss_fn, TX), donate_argnums=0)


def new_state():
    # A donating step consumes its state. fit does not, but with a copy, any loop can start from here.
    return lx.TrainState.create(lora=jax.tree.map(jnp.copy, LORA), tx=TX, key=jax.random.key(1))


def train(batches, steps, folder=None, rows=None):
    return lx.fit(
        STEP,
        new_state(),
        PARAMS,
        batches,
        steps=steps,
        every=20,
        checkpoint_dir=folder,
        callbacks=[] if rows is None else [rows.append],
        count=lambda batch: int(batch["mask"].sum()),
        unit="tokens",
    )


def train_and_resume(new_batches):
    """Trains in one run, and in two runs, of which the second continues where the first was cut off."""
    rows = []
    whole = train(new_batches(), STEPS, rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        train(new_batches(), STEPS // 2, folder)
        resumed = train(new_batches(), STEPS, folder)  # a new state, restored from the checkpoint
    first, last = rows[0]["loss"], rows[-1]["loss"]
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.lora, resumed.lora)))
    print(f"loss {first:.2f} -> {last:.2f}; the resumed run ends with the same bits: {same}")
    assert same and last < first / 4
