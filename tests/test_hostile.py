"""Damaged and forged checkpoints: a `LoraError` or the same numbers, and no other error, hang or memory.

    python tests/test_hostile.py 20000 7

runs that many forgeries and as many damages of seed 7, and prints what was accepted.
"""

import collections
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import zlib

import fit_setup as run
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx
from lorax_fn import checkpoint
from lorax_fn.checkpoint import files

WORDS = (None, True, -1, 0, 1.5, 2**31, 2**40, 2**63, 2**64, 10**300, "", "x", "../../x", "/etc/passwd")
WORDS += (
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[[]]],
    "os.system",
    "__class__",
    [2**40, 2**40],
    [-1],
    "object",
    "O",
)
WORDS += (
    "float8_e4m3fn",
    "V8",
    "S4",
    "datetime64[s]",
    "complex128",
    "float64",
    {"stack": [0], "inputs": [0]},
)
WORDS += ({"stack": [], "inputs": [99], "outputs": [-7]}, float("nan"), float("inf"), "lora", "fry", [0], "*")


def write(root):
    """An adapter checkpoint with one adapter of most kinds, and a checkpoint of a run."""
    names = {"q": "dora", "v": "vera", "z": "lokr", "h": "loha", "f": "lora_fa", "c": "lora_xs"}
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 4))} for i, name in enumerate(names)}
    params |= {"x": jnp.ones((3, 4, 6)), "emb": jnp.ones((9, 4)), "b": jnp.ones(4)}
    _, lora = lx.split(
        params,
        rank={"x": (1, 0, 2), "*": 2},
        targets=[*names, "x"],
        method=names | {"*": "lora"},
        full=["b"],
        rows={"emb": [1, 4]},
        layout={"x": lx.Layout((0,), (1,), (2,))},
    )
    extra = {"mean": jnp.ones(3), "n": [1, (jnp.zeros((), jnp.int32), None)]}
    checkpoint.save(root / "adapter", lora, params=params, extra=extra)
    source = iter([run.batch_at(0)] * 2)
    lx.fit(run.STEP, run.new_state(), run.PARAMS, source, steps=2, checkpoint_dir=root, progress=False)
    return {"adapter": numbers(root / "adapter"), "step-00000002": numbers(root / "step-00000002")}


def numbers(path):
    def raw(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    lora = checkpoint.load(path)
    extra = checkpoint.load_extra(path)
    return jax.tree.structure((lora, extra)), [raw(x) for x in jax.tree.leaves((lora, extra))]


def facts_file(path):
    return next(path / name for name in ("adapter.json", "train.json") if (path / name).exists())


def put(path, facts, seal):
    """Writes facts with a right crc32, as files.write_facts does, but lets pass what is no JSON."""
    rest = {name: value for name, value in facts.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    facts_file(path).write_text(json.dumps(rest | {"crc32": crc}))
    if seal:
        with contextlib.suppress(ValueError):
            files.write_seal(next(path.glob("arrays*")), rest)


def forge(dice, path, seal):
    """Changes one fact, or removes, adds or doubles one; with sums that are right."""
    facts = json.loads(facts_file(path).read_text())
    places = []

    def walk(node, trail):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, name, (*trail, name)))
            if isinstance(value, dict | list):
                walk(value, (*trail, name))

    walk(facts, ())
    weights = [
        0.2 if trail[0] in ("files", "base") else 2.0 if trail[0] == "adapters" else 1 for *_, trail in places
    ]
    (node, name, trail), (other, key, _) = dice.choices(places, weights, k=2)
    how = dice.choice(["set", "set", "set", "delete", "add", "swap"])
    if how == "set":
        node[name] = dice.choice(WORDS)
    elif how == "swap":
        node[name] = json.loads(json.dumps(other[key]))
    elif how == "delete":
        del node[name]
    elif isinstance(node, dict):
        node[dice.choice(["__init__", "weight", "extra", "key", "rate"])] = dice.choice(WORDS)
    else:
        node.append(node[0])
    put(path, facts, seal)
    return f"{how} {'/'.join(map(str, trail))}"


def damage(dice, path):
    """What disks and people do to files; no sum is repaired."""
    file = dice.choice(sorted(x for x in path.rglob("*") if x.is_file()))
    data = bytearray(file.read_bytes()) or bytearray(b"x")
    how = dice.choice(["flip", "cut", "grow", "delete", "link", "pipe", "directory", "swap", "huge", "nul"])
    at = dice.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << dice.randrange(8)
    elif how == "cut":
        data = data[:at]
    elif how == "grow":
        data += b"garbage"
    elif how == "nul":
        data = bytearray(len(data))
    elif how == "swap":
        data = dice.choice(sorted(x for x in path.rglob("*") if x.is_file())).read_bytes()
    file.unlink()
    if how == "link":
        file.symlink_to(dice.choice(["/dev/zero", "/etc/hostname", file.name]))
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "directory":
        file.mkdir()
    elif how != "delete":
        file.write_bytes(bytes(data))
        if how == "huge":
            os.truncate(file, 64 << 30)  # sparse
    return f"{how} {file.relative_to(path)}"


def tried(path, want):
    """``"refused"``, ``"same"`` or ``"other"`` numbers; anything else is raised."""

    def late(*_):
        raise AssertionError("it took more than 20 seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        return "same" if numbers(path) == want else "other"
    except lx.LoraError:
        return "refused"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def campaign(root, change, count, seed, want):
    """How often what happened; and what was accepted with other numbers."""
    dice, seen, accepted = random.Random(seed), collections.Counter(), []
    for i in range(count):
        name = dice.choice(sorted(want))
        path = root / f"case{i}" / name
        shutil.copytree(root / name, path)
        done = change(dice, path)
        try:
            verdict = tried(path, want[name])
        except BaseException as failure:
            failure.add_note(f"case {i}: {done}")
            raise
        seen[verdict] += 1
        accepted += [f"{name}: {done}"] if verdict == "other" else []
        shutil.rmtree(path.parent)
    return seen, accepted


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return root, write(root)


def test_damage_is_refused_or_does_not_matter(written):
    root, want = written
    seen, accepted = campaign(root, damage, 100, 1, want)
    assert not accepted and seen["refused"] > 70


def test_forged_facts_do_not_belong_to_their_arrays(written):
    root, want = written
    seen, accepted = campaign(root, lambda dice, path: forge(dice, path, seal=False), 100, 2, want)
    assert not accepted and seen["refused"] > 90


def test_facts_that_were_sealed_again_still_make_sense(written):
    """A sum can't promise who wrote it: other numbers may be read then, but nothing else may happen."""
    root, want = written
    seen, _ = campaign(root, lambda dice, path: forge(dice, path, seal=True), 200, 3, want)
    assert seen["refused"] > 160


TEXTS = {
    "deep": "[" * 200_000 + "]" * 200_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a huge number": '{"format": ' + "9" * 10**6 + "}",
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "a mark": "\ufeff{}",
}


@pytest.mark.parametrize("what", TEXTS)
def test_json_that_is_no_checkpoint(written, tmp_path, what):
    root, want = written
    for name in want:
        shutil.copytree(root / name, tmp_path / name)
        facts_file(tmp_path / name).write_text(TEXTS[what])
        assert tried(tmp_path / name, want[name]) == "refused"


def shape(value):
    return lambda facts: next(iter(facts["adapters"][0]["arrays"].values())).update(shape=value)


def static(**values):
    def change(facts):
        for entry in facts["adapters"]:
            entry["static"] |= {name: value for name, value in values.items() if name in entry["static"]}

    return change


FORGERIES = {
    "2^40 elements": shape([2**40, 4]),
    "2^120 bytes": shape([2**60, 2**60]),
    "a negative axis": shape([-2, 3]),
    "an empty array": shape([0, 2]),
    "a rank beyond A": static(rank=10**9),
    "a negative rank": static(rank=-2),
    "an unknown scaling": static(scaling="evil"),
    "alpha as text": static(alpha="4"),
    "axes that overlap": static(layout={"stack": [0], "inputs": [0], "outputs": [0]}),
    "no adapters": lambda facts: facts.update(adapters=[]),
    "a path twice": lambda facts: facts["adapters"].append(facts["adapters"][0]),
    "another leaf": lambda facts: facts["adapters"][0].update(path="../../x"),
    "a file outside": lambda facts: facts["files"].update({"../../../etc/passwd": {"size": 1, "crc32": 1}}),
    "20,000 adapters": lambda facts: facts.update(
        adapters=[facts["adapters"][0] | {"path": str(i)} for i in range(20_000)]
    ),
    "version 1": lambda facts: facts.update(version=1),
    "version true": lambda facts: facts.update(version=True),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_forgeries_that_are_refused_even_when_sealed_again(written, tmp_path, what):
    root, want = written
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in want:
        shutil.copytree(root / name, tmp_path / name)
        facts = json.loads(facts_file(tmp_path / name).read_text())
        FORGERIES[what](facts)
        put(tmp_path / name, facts, seal=True)
        assert tried(tmp_path / name, want[name]) == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # kilobytes


def edited(**values):
    def change(entry):
        entry["static"] |= values

    return change


def swapped(entry):
    first, second = list(entry["arrays"])[:2]
    entry["arrays"] = {first: entry["arrays"][second], second: entry["arrays"][first]}


MEANINGFUL = {
    "alpha": edited(alpha=64.0),
    "scaling": edited(scaling="rslora"),
    "rank": edited(rank=1),
    "method": lambda entry: entry.update(method="LoRAFA"),
    "shapes": swapped,
}


@pytest.mark.parametrize("what", MEANINGFUL)
def test_facts_that_make_sense_are_bound_to_their_arrays(written, tmp_path, what):
    """Every one of these would be read as other numbers by its crc32 alone."""
    root, want = written
    for name in want:
        shutil.copytree(root / name, tmp_path / name)
        facts = json.loads(facts_file(tmp_path / name).read_text())
        MEANINGFUL[what](next(entry for entry in facts["adapters"] if entry["method"] == "LoRA"))
        put(tmp_path / name, facts, seal=False)
        with pytest.raises(lx.LoraError, match=r"alpha, shapes, methods(.|\n)*not those that the arrays"):
            checkpoint.load(tmp_path / name)


def test_an_array_directory_elsewhere_is_refused(written, tmp_path):
    root, want = written
    for name in want:
        path = tmp_path / name
        shutil.copytree(root / name, path)
        arrays = next(path.glob("arrays*"))
        arrays.rename(tmp_path / f"{name}-moved")
        arrays.symlink_to(tmp_path / f"{name}-moved")
        with pytest.raises(lx.LoraError, match=r"a link(.|\n)*cp -rL"):
            checkpoint.load(path)
    facts = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    put(tmp_path / "adapter", facts | {"arrays": "../adapter-moved"}, seal=False)
    with pytest.raises(lx.LoraError, match=r"'../adapter-moved', which is not a text like arrays-"):
        checkpoint.load(tmp_path / "adapter")


def main(count, seed):
    root = pathlib.Path(tempfile.mkdtemp())
    want = write(root)
    for name, change in (
        ("damaged", damage),
        ("forged", lambda dice, path: forge(dice, path, seal=False)),
        ("sealed", lambda dice, path: forge(dice, path, seal=True)),
    ):
        seen, accepted = campaign(root, change, count, seed, want)
        print(name, dict(seen), *accepted, sep="\n  ", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
