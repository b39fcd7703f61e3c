"""GGUF blocks kept as they are, and the QLoRA example: on toy sizes, and (marked `real`) on SmolLM2."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_llama  # before the examples: it makes their folder one to import from
from toy_llama import needs_assets, real, tokens

import lorax_fn as lx
from lorax_fn.quantization.blocks import encode

import data  # isort: skip
from models import gguf_blocks, llama  # isort: skip

TOY = llama.LlamaConfig(hidden=64, layers=2)  # blocks of 32 fill every input axis
NORMS = ("output_norm", "attn_norm", "ffn_norm")
KINDS = ("Q4_1", "Q8_0")


def kinds(name):
    """Those of the SmolLM2 file: float norms, an embedding of 8 bits, all else of 4."""
    return None if name.endswith(NORMS) else "Q8_0" if name == "token_embd" else "Q4_1"


@functools.cache
def weight():
    w = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    w[0, :32], w[1, 32:64] = 0, 3  # a block of zeros and one without a spread
    return w


def kept(kind):
    """A stack of one weight [1, in, out] from the bytes that gguf makes; and what gguf reads from them."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(weight(), kind)
    parts = jax.tree.map(lambda rows: rows.T[None], gguf_blocks.take_apart(raw, kind.name))
    return gguf_blocks.put_together(parts, llama.STACKED), gguf.dequantize(raw, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_blocks_are_what_gguf_reads_bit_by_bit(kind):
    q, want = kept(kind)
    assert (q.shape, q.dtype, q.format) == ((1, 96, 6), np.float32, kind.lower())
    np.testing.assert_array_equal(jax.jit(lambda q: q.dense())(q)[0].T, want)
    assert 8 * q.nbytes / q.size == {"Q4_1": 5.0, "Q8_0": 8.5}[kind]
    assert {str(x.dtype) for x in (q.codes, q.scales)} == {"uint8" if kind == "Q4_1" else "int8", "float16"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_stored_again_gets_the_bytes_that_gguf_gives_it(kind):
    q, _ = kept(kind)
    again = q.store(jnp.asarray(weight().T[None]))
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)


def test_a_merge_into_kept_blocks_errs_by_half_a_step():
    q, want = kept("Q4_1")
    params, lora = lx.split({"w": q}, rank=2, layout={"w": llama.STACKED})
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    exact = lx.merge(params, lora)["w"]
    merged = lx.merge(params, lora, requantize=True)["w"]
    assert (merged.format, merged.codes.dtype, merged.scales.dtype) == ("q4_1", np.uint8, np.float16)
    step = np.repeat(merged.scales.astype(jnp.float32), 32, axis=1)
    off = abs(np.asarray(merged.dense() - exact))
    assert (off <= 0.51 * step + 2e-3 * abs(np.asarray(exact))).all()  # float16 rounds scale and minimum
    assert abs(np.asarray(exact[0].T) - want).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_of_kept_blocks_stacks_again(kind):
    q, want = kept(kind)
    entry = jax.tree.map(lambda x: x[0], q).entry(0)
    np.testing.assert_array_equal(entry.dense().T, want)
    again = jax.tree.map(lambda x: x[None], entry).stacked(0, 1)
    assert jax.tree.structure(again) == jax.tree.structure(q)


def test_a_file_whose_blocks_are_kept_is_the_dequantized_file(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "toy.gguf"
    toy_llama.write_gguf(path, TOY, toy_llama.toy(TOY)[1], kinds)
    config, want = llama.load_gguf(path)
    _, params = llama.load_gguf(path, keep_blocks=True)
    p = params["params"]
    assert p["embed"]["embedding"].format == "q8_0" and p["layers"]["mlp"]["down"]["kernel"].format == "q4_1"
    jax.tree.map(np.testing.assert_array_equal, lx.dequantize(params), want)

    # The table is looked up and it is the head; the layers are scanned. No weight may be built.
    model = llama.Llama(config)
    run = lx.adapt(model.apply, fallback="error")
    _, lora = lx.split(params, rank=2, layout=lx.usage(model.apply, params, tokens()))
    lora = jax.tree.map(lambda x: x + 0.05, lora)

    def loss(lora, params):
        return (run(params, lora, tokens()) ** 2).mean()

    grad = jax.jit(jax.value_and_grad(loss))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5),
        grad(lora, params),
        grad(lora, want),
    )


def test_layers_of_several_kinds_cannot_be_kept_as_one_stack(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "toy.gguf"
    kind_of = lambda name: "Q8_0" if name == "blk.1.ffn_up" else kinds(name)  # noqa: E731
    toy_llama.write_gguf(path, TOY, toy_llama.toy(TOY)[1], kind_of)
    with pytest.raises(ValueError, match="layers of ffn_up are in blocks of several kinds"):
        llama.load_gguf(path, keep_blocks=True)
    read = llama.load_gguf(path)[1]["params"]["layers"]["mlp"]["up"]["kernel"]
    assert read.shape == (2, 32, 64) and read.dtype == np.float32


ROWS, WIDTH = 4096, 128


@pytest.mark.parametrize("format, along", [("q8_0", 1), ("nf4", 0)])
def test_a_lookup_unpacks_no_table_also_in_a_loop(format, along):
    """Temporary bytes of a lookup, in tables of float32; the scales of nf4 are a 64th of one."""
    table = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    layout = lx.Layout((), (along,), (1 - along,))
    q = encode(table, layout, format, 32 if format == "q8_0" else 64, format == "nf4")
    ids = jnp.arange(8) * 7

    def fn(params, ids):
        def add(i, x):
            return x + params["table"][ids + i]

        return jax.lax.fori_loop(0, 3, add, params["table"][ids])

    run = jax.jit(lx.adapt(fn, fallback="error")).lower({"table": q}, {}, ids).compile()
    np.testing.assert_allclose(
        run({"table": q}, {}, ids), fn({"table": q.dense()}, ids), rtol=1e-5, atol=1e-5
    )
    assert run.memory_analysis().temp_size_in_bytes <= 0.05 * 4 * ROWS * WIDTH


# --- the script


@pytest.fixture
def script():
    pytest.importorskip("tqdm")
    import qlora_smollm2

    return qlora_smollm2


@pytest.mark.slow
def test_the_script_fine_tunes_a_quantized_toy_and_counts_its_bytes(script, capsys, monkeypatch):
    model, params = toy_llama.toy(TOY)
    layout = lx.usage(model.apply, params, tokens())
    rows = np.tile(np.arange(9, dtype=np.int32), (4, 1))  # counting: the toy can learn it
    texts = {script.HAMLET: rows}
    args = script.parse_args(["--steps", "30", "--lr", "2e-2", "--rank", "2"])
    assert (args.bases, args.block, args.keep_gguf) == (["nf4", "gptq", "nf4+int8"], 64, False)
    stored = script.quantized(params, "nf4+int8", args.block, layout)
    formats = {name: w["kernel"].format for name, w in stored["params"]["layers"]["attn"].items()}
    assert formats == {"q": "nf4", "k": "int8", "v": "int8", "o": "nf4"}
    with jax.numpy_dtype_promotion("standard"):  # optax's own Adam and cosine mix int32 and float32
        run = script.fine_tune(args, model, stored, layout, rows, texts)
        monkeypatch.setattr(script, "FORMATS", [("int8", False)])
        script.compare_formats(args, model, params, layout, texts)
    # Two layers; weights of 8 bits: k, v and down. As float32: the table and five norms.
    low, high = 2 * (2 * 32 * 32 + 2 * 32 * 64), 2 * (2 * 32 * 16 + 32 * 64)
    floats = 4 * (64 * 32 + 5 * 32)
    assert low / 2 + high + floats < run.base < 1.2 * (low / 2 + high) + floats
    np.testing.assert_allclose(run.bits, 8 * (run.base - floats) / (low + high), rtol=1e-6)
    assert run.adapters == 4 * 2 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert 2 * run.adapters <= run.optimizer <= 2 * run.adapters + 64
    assert run.arguments > run.base + run.adapters + run.optimizer
    assert run.before > 3 > 1 > run.after

    script.compare_runs({"float32": run, "nf4": run._replace(base=2_500_000)})
    formats, runs = capsys.readouterr().out.split("result")
    assert next(line for line in runs.splitlines() if "base, MB" in line).split()[-1] == "2.5"
    table = {line.split()[0]: line.split()[1:] for line in formats.splitlines() if line.startswith("  ")}
    assert table["float32"][0] == "32.00" and 8.5 < float(table["int8"][0]) < 9.1  # short blocks
    np.testing.assert_allclose(float(table["int8"][1]), float(table["float32"][1]), atol=0.02)


@pytest.mark.slow
def test_the_script_calibrates_a_toy(script, monkeypatch):
    model, params = toy_llama.toy(TOY)
    layout = lx.usage(model.apply, params, tokens())
    monkeypatch.setattr(script, "LENGTH", 8)
    rows = np.tile(np.arange(9, dtype=np.int32), (4, 1))
    known = script.calibrated(script.parse_args([]), model, params, layout, rows)
    plain = script.quantized(params, "nf4", 64, layout)
    assert jax.tree.structure(known) == jax.tree.structure(plain)


def test_the_script_says_which_base_is_over_its_limit(script):
    fine = script.Run(32.0, 0, 0, 0, 0, 0, before=4.0, after=3.5)
    runs = {"float32": fine, "nf4+int8": fine._replace(before=4.14, after=3.54)}
    assert script.problems(runs) == []
    runs["nf4+int8"] = fine._replace(before=4.16, after=3.56)
    assert [line.split()[1:5] for line in script.problems(runs)] == [
        ["costs", "more", "than", "0.15"],
        ["ends", "more", "than", "0.05"],
    ]
    assert script.problems({"float32": fine._replace(after=4.0)}) == ["float32: the adapter does not help"]


# --- SmolLM2 itself


@real
@needs_assets
def test_the_likelihood_of_kept_blocks_is_that_of_the_dequantized_load():
    pytest.importorskip("gguf")
    import hamlet

    config, params = llama.load_gguf(data.smollm2())
    evaluate = hamlet.evaluation(lx.adapt(llama.Llama(config).apply, fallback="error"))
    play = data.blocks(data.load_tokenizer(data.smollm2()).encode(data.hamlet()).ids, 128)[-24:-20]
    want = float(evaluate(params, {}, play))
    _, kept = llama.load_gguf(data.smollm2(), keep_blocks=True)
    formats = {leaf.format for leaf in jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, lx.Quantized))
               if isinstance(leaf, lx.Quantized)}  # fmt: skip
    assert formats == {"q4_1", "q8_0"}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) < 97e6  # 538e6 as float32
    np.testing.assert_allclose(float(evaluate(kept, {}, play)), want, atol=1e-4)


@real
@needs_assets
@pytest.mark.parametrize("option", [[], ["--keep-gguf"]])
def test_the_short_form_of_the_script_runs(option):
    run = [sys.executable, str(toy_llama.EXAMPLES / "qlora_smollm2.py"), "--smoke", *option]
    here = {**os.environ, "PYTHONPATH": str(toy_llama.EXAMPLES.parent)}  # this checkout's lorax_fn
    done = subprocess.run(run, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step: peak, MB" in done.stdout and "after, against LoRA" in done.stdout
