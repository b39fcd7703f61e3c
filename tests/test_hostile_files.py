"""Files of strangers: each error that the safetensors format names, tricks of index and config, and a fuzz.

Whatever a file holds, the answer is a `LoraError` or a right result: no crash, no hang, no huge allocation,
and nothing is written outside the target. The long fuzz runs with ``-m slow``.
"""

import json
import pathlib
import random
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn.interop.files import open_tensors, read_tensors

PARAMS = {"a.q_proj.weight": jnp.ones((6, 4)), "a.v_proj.weight": jnp.ones((5, 4))}
TENSOR = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    lora = lx.split(PARAMS, 2)[1]
    lx.peft.save(folder, lora, params=PARAMS)
    lx.kohya.save(folder / "a.safetensors", lora, params=PARAMS)
    lx.huggingface.save(folder, PARAMS)
    lx.huggingface.save(folder / "shards", PARAMS, shard_bytes=90)
    return folder


def put_together(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


FILES = {
    "header too small": b"\x01\x02",
    "header too large": struct.pack("<Q", 2**62) + b"{}",
    "header length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header is not utf-8": put_together(b"\xff\xfe{}"),
    "header does not start with a brace": put_together(b"[1, 2]"),
    "header is not JSON": put_together(b'{"x": '),
    "header nests without end": put_together(b'{"x":' * 20_000),
    "unknown dtype": put_together(one("F33"), bytes(8)),
    "offsets beyond the file": put_together(one(shape=(4,), offsets=(0, 16)), bytes(8)),
    "offsets of another size": put_together(one(shape=(3,)), bytes(8)),
    "offsets the wrong way round": put_together(one(offsets=(8, 0)), bytes(8)),
    "negative offsets": put_together(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', bytes(8)),
    "overlapping tensors": put_together(one() | {"y": one(offsets=(4, 12))["x"]}, bytes(12)),
    "a hole between tensors": put_together(one() | {"y": one(offsets=(12, 20))["x"]}, bytes(20)),
    "bytes after the last tensor": put_together(one(), bytes(64)),
    "metadata incomplete": put_together(one(), bytes(4)),
    "shape that overflows": put_together(one(shape=(2**40, 2**40)), bytes(8)),
    "shape of 2^63": put_together(one(shape=(2**63,)), bytes(8)),
    "negative shape": put_together(one(shape=(-2,)), bytes(8)),
    "absurdly many axes": put_together(one(shape=(1,) * 200, offsets=(0, 4)), bytes(4)),
    "metadata that is not text": put_together({"__metadata__": {"a": 1}} | one(), bytes(8)),
    "four bits that fill no byte": put_together(one("F4", (3,), (0, 1)), bytes(1)),
    "a directory of nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_error_of_the_format_is_a_lora_error(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(FILES[name])
    with pytest.raises(lx.LoraError, match="cannot be read"):
        read_tensors(path)


# What the safetensors library calls its errors of reading, and the file above that has each.
NAMED = {
    "header too small": "header too small",
    "header too large": "header too large",
    "invalid header length": "header length beyond the file",
    "invalid UTF-8 in header": "header is not utf-8",
    "invalid JSON in header": "header is not JSON",
    "invalid shape, data type, or offset": "offsets of another size",
    "invalid offset for tensor": "overlapping tensors",
    "incomplete metadata, file not fully covered": "metadata incomplete",
    "overflow computing buffer size": "shape that overflows",
    "does not end up at a byte boundary": "four bits that fill no byte",
}


@pytest.mark.parametrize("words", NAMED)
def test_the_reason_of_the_library_is_in_the_message(words, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(FILES[NAMED[words]])
    with pytest.raises(lx.LoraError, match=words):
        read_tensors(tmp_path / "x.safetensors")


def test_a_tensor_or_file_that_is_not_there_is_a_lora_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(put_together(one(), bytes(8)))
    with open_tensors(path) as tensors:
        for look in (lambda: tensors["y"], lambda: tensors.shape("y"), lambda: tensors.dtype("y")):
            with pytest.raises(lx.LoraError, match="does not contain tensor y"):
                look()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(lx.LoraError, match="no such file"):
        read_tensors(tmp_path / "folder.safetensors")


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x.bin",
        "a\x00.safetensors",
        3,
        None,
    ],
)
def test_an_index_leads_nowhere_else(tmp_path, file):
    folder = tmp_path / "in"
    folder.mkdir()
    lx.huggingface.save(tmp_path / "out", PARAMS)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.q_proj.weight": file}})
    )
    with pytest.raises(lx.LoraError, match="not plain"):
        lx.huggingface.load(folder, PARAMS)


def test_an_index_that_disagrees_with_its_files_is_an_error(tmp_path):
    lx.huggingface.save(tmp_path, PARAMS, shard_bytes=90)
    index = tmp_path / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    for weight_map in (
        {},
        [],
        {"a.q_proj.weight": "gone.safetensors"},
        {"other": facts["weight_map"]["a.q_proj.weight"]},
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(lx.LoraError):
            lx.huggingface.load(tmp_path, PARAMS)


def test_a_checkpoint_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(lx.LoraError, match="runs the code"):
        lx.huggingface.load(tmp_path, PARAMS)


def test_names_in_a_file_name_no_path(good, tmp_path):
    from safetensors.numpy import save_file

    tensors = {k.replace("a.q_proj", "../../x"): np.array(v) for k, v in read_tensors(good / TENSOR).items()}
    save_file(tensors, tmp_path / TENSOR)
    (tmp_path / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    with pytest.raises(lx.LoraError, match="extra"):
        lx.peft.load(tmp_path, PARAMS)


def mutated(raw, rng):
    """One of the ways in which a file goes wrong: bytes, cuts, edits of the header's numbers and words."""
    raw = bytearray(raw)
    (length,) = struct.unpack("<Q", raw[:8])
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 1:
        del raw[rng.randrange(len(raw)) :]
    elif kind == 2:
        raw[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1]))
    elif kind == 3:
        at = 8 + rng.randrange(length)
        raw[at : at + rng.randint(0, 6)] = bytes(rng.randrange(32, 127) for _ in range(rng.randint(0, 6)))
    elif kind == 4:
        raw += bytes(rng.randrange(256) for _ in range(rng.randint(1, 40)))
    else:
        header = json.loads(raw[8 : 8 + length])
        name = rng.choice([k for k in header if k != "__metadata__"])
        entry, number = header[name], rng.choice([0, 1, -1, 3, 2**31, 2**63, 2**64, 1e400, 0.5, None, "x"])
        what = rng.choice(["shape", "data_offsets", "dtype", "name", "gone"])
        if what in ("shape", "data_offsets") and entry[what]:
            entry[what][rng.randrange(len(entry[what]))] = number
        elif what in ("dtype", "shape"):
            entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I8", "BOOL", "C64", "F8_E4M3", "", 3])
        elif what == "name":
            header[rng.choice(["", "/", "..", "base_model.model.", name + "x", "\x00"])] = header.pop(name)
        else:
            del entry[rng.choice(list(entry))]
        text = json.dumps(header).encode()
        raw[: 8 + length] = struct.pack("<Q", len(text)) + text
    return bytes(raw)


def edited(path, rng):
    """A whole file again, whose tensors are of other shapes, dtypes, values or names."""
    from safetensors.numpy import save

    tensors = {name: np.array(x) for name, x in read_tensors(path).items()}
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(tensors))
        x = tensors[name]
        value = rng.choice([0.0, -1.0, np.nan, np.inf, 3e38, 1e-45])
        with np.errstate(all="ignore"):
            others = [
                x.T, x.ravel(), x[None], x[:1] if x.ndim else x, x[:0] if x.ndim else x, np.stack([x, x]),
                np.full(x.shape, value).astype(x.dtype),
                x.astype(rng.choice(["f2", "f8", "i1", "i8", "?", "u2"])),
            ]  # fmt: skip
        tensors[name] = np.ascontiguousarray(rng.choice(others))
        if rng.random() < 0.3:
            end = rng.choice(
                ["", ".alpha", "2", ".lora_A.weight", ".lora_mid.weight", ".dora_scale", ".hada_w1_a"]
            )
            tensors[name.rpartition(".lora")[0] + end] = tensors.pop(name)
    return save(tensors)


def broken(path, rng):
    return mutated(path.read_bytes(), rng) if rng.random() < 0.5 else edited(path, rng)


def peft_file(folder, rng, good):
    facts = json.loads((good / "adapter_config.json").read_text())
    if rng.random() < 0.2:
        wrong = [0, -1, 2**70, "x", [], [[]], {"x": 1}, None, True, {"(a*)*": 3}]
        facts[rng.choice(list(facts))] = rng.choice(wrong)
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    (folder / TENSOR).write_bytes(broken(good / TENSOR, rng))
    return {path: dw.shape for path, dw in lx.delta(lx.peft.load(folder, PARAMS)).items()}


WRONG = [
    *(0, 1, -1, 0.5, 2**31, 2**70, 1e30, None, True, False, "", "x", "(a*)*", "..", "LORA", "VERA", "all"),
    *("all-linear", "q_proj|v_proj", [], [[]], ["x"], {}, {"x": 1}, {"(a+)+": 3}, {"q_proj": 2}, {".*": 4}),
]


def text_with_mistakes(text, rng):
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        raw[at : at + rng.randint(0, 3)] = bytes(rng.randrange(32, 127) for _ in range(rng.randint(0, 3)))
    return bytes(raw[: rng.randrange(1, len(raw))] if rng.random() < 0.1 else raw)


def config_file(folder, rng, good):
    """Good tensors under a config of wrong values, missing and unknown fields, or broken text."""
    facts = json.loads((good / "adapter_config.json").read_text())
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*facts, "layer_replication", "use_qalora", "new_scale", "alpha", "init_r"])
        if rng.random() < 0.15:
            facts.pop(name, None)
        else:
            facts[name] = rng.choice(WRONG)
    text = json.dumps(facts)
    raw = text_with_mistakes(text, rng) if rng.random() < 0.3 else text.encode()
    (folder / "adapter_config.json").write_bytes(raw)
    (folder / TENSOR).write_bytes((good / TENSOR).read_bytes())
    return {path: dw.shape for path, dw in lx.delta(lx.peft.load(folder, PARAMS)).items()}


def index_file(folder, rng, good):
    """Shards under an index that names other files or tensors, or is broken; at times a shard is broken."""
    for file in (good / "shards").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    where = facts["weight_map"]
    kind, name = rng.randrange(5), rng.choice(list(where))
    if kind == 0:
        where[name] = rng.choice(
            [*where.values(), "../x.safetensors", "/x.safetensors", "gone.safetensors", *WRONG]
        )
    elif kind == 1:
        where[rng.choice(["", "x", name + "x", "\x00"])] = where.pop(name)
    elif kind == 2:
        facts[rng.choice(["weight_map", "metadata"])] = rng.choice(WRONG)
    elif kind == 3:
        shard = folder / where[name]
        shard.write_bytes(broken(shard, rng))
    text = json.dumps(facts)
    index.write_bytes(text_with_mistakes(text, rng) if kind == 4 else text.encode())
    return {path: x.shape for path, x in lx.huggingface.load(folder, PARAMS).items()}


def weights_file(folder, rng, good):
    (folder / "model.safetensors").write_bytes(broken(good / "model.safetensors", rng))
    return {path: x.shape for path, x in lx.huggingface.load(folder, PARAMS).items()}


def kohya_file(folder, rng, good):
    (folder / "a.safetensors").write_bytes(broken(good / "a.safetensors", rng))
    return {path: dw.shape for path, dw in lx.delta(lx.kohya.load(folder / "a.safetensors", PARAMS)).items()}


def fuzz(kind, good, folder, count, seed):
    rng, loaded, slowest = random.Random(seed), 0, 0.0
    for _ in range(count):
        start = time.monotonic()
        try:
            shapes = kind(folder, rng, good)
            loaded += 1
            assert all(shape == PARAMS[path].shape for path, shape in shapes.items())
        except lx.LoraError:
            pass
        slowest = max(slowest, time.monotonic() - start)
    return loaded, slowest


def memory_peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("kind", [peft_file, config_file, weights_file, index_file, kohya_file])
@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::lorax_fn.LoraFileWarning")
def test_a_fuzz_of_mutations_gives_errors_of_ours_alone(good, tmp_path, kind, count):
    before = memory_peak()
    folder = tmp_path / "in"
    folder.mkdir()
    loaded, slowest = fuzz(kind, good, folder, count, seed=count)
    assert 0 < loaded < 0.8 * count and slowest < 5.0, (loaded, slowest)
    assert memory_peak() - before < 400  # MiB: nothing allocates what a header claims
    files = {"in", "adapter_config.json", TENSOR, "model.safetensors", "a.safetensors"}
    files |= {path.name for path in (good / "shards").iterdir()}
    assert {p.name for p in pathlib.Path(tmp_path).rglob("*")} <= files
