"""The serving example over loopback: rows equal generation alone, and one client's mistakes hurt no other."""

import concurrent.futures
import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from models.llama import STACKED, TABLE, Llama, LlamaConfig  # noqa: E402
from serve.app import make_app, pieces  # noqa: E402
from serve.engine import Engine, Refused, Request, empty_bank  # noqa: E402
from serve.loading import reader  # noqa: E402

CONFIG = LlamaConfig(vocab=32, width=16, hidden=24, layers=2, heads=2, kv_heads=1)
LAYOUT = {"embedding": TABLE, "kernel": STACKED}
NAMES = ["red", "green", "blue"]


class Letters:
    """A tokenizer of 32 characters."""

    vocab, stop = 32, None

    def encode(self, text):
        return [ord(c) % 32 for c in text]

    def decode(self, tokens):
        return "".join(chr(64 + t) for t in tokens)


def adapter(params, seed, rank):
    _, lora = lx.split(params, rank, layout=LAYOUT)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda x: 0.5 * jax.random.normal(next(keys), x.shape), lora)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    params = Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    loras = {name: adapter(params, i, 1 + i) for i, name in enumerate(NAMES)}
    for name in NAMES[:2]:
        lx.checkpoint.save(folder / name, loras[name], params=params)
    lx.peft.save(folder / "blue", loras["blue"], mapping=lx.mappings.preset("llama", "examples"))
    bank = empty_bank(params, LAYOUT, slots=2, rank=4)
    engine = Engine(CONFIG, params, bank, reader(folder, params), rows=4, length=24, queue=64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = make_app(engine, Letters(), folder)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    yield params, loras, client, engine, folder
    client.close()
    server.should_exit = True
    thread.join()
    engine.close()


def greedy(params, lora, prompt, new):
    """What the whole model says, without a cache, a bank or a batch."""
    apply = jax.jit(lx.adapt(Llama(CONFIG).apply))
    tokens, size = Letters().encode(prompt), len(prompt) + new
    while len(tokens) < size:
        padded = jnp.array([tokens + [0] * (size - len(tokens))])
        tokens.append(int(apply(params, lora, padded)[0, len(tokens) - 1].argmax()))
    return Letters().decode(tokens[-new:])


def ask(client, model, prompt="HELLO", new=6, **options):
    done = client.completions.create(model=model, prompt=prompt, max_tokens=new, temperature=0, **options)
    return done.choices[0].text


def test_concurrent_clients_get_what_their_adapter_says_alone(served):
    params, loras, client, engine, _ = served
    want = {name: greedy(params, loras.get(name, {}), "HELLO", 6) for name in ["base", *NAMES]}
    assert len(set(want.values())) > 2
    ask(client, "base")
    compiled = engine.step._cache_size()
    names = [["base", *NAMES][i % 4] for i in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        got = list(pool.map(lambda name: ask(client, name), names))
    assert got == [want[name] for name in names]
    assert engine.step._cache_size() == compiled
    assert engine.adapters.swaps > 3  # three adapters take turns in two slots


def test_a_temperature_draws_and_greedy_does_not(served):
    client = served[2]
    ask = lambda t: client.completions.create(model="red", prompt="AB", max_tokens=6, temperature=t)  # noqa: E731
    assert len({ask(2.0).choices[0].text for _ in range(6)}) > 1
    assert len({ask(0.0).choices[0].text for _ in range(3)}) == 1


def test_streams_and_hang_ups_free_their_row(served):
    params, _, client, engine, _ = served
    parts = client.completions.create(model="base", prompt="AB", max_tokens=4, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == greedy(params, {}, "AB", 4)
    stream = client.completions.create(model="base", prompt="A", max_tokens=20, stream=True)
    next(iter(stream))
    stream.close()
    until = time.time() + 30
    while any(engine.rows) and time.time() < until:
        time.sleep(0.01)
    assert not any(engine.rows)


def wait_for(happens, seconds=30):
    until = time.time() + seconds
    while not happens() and time.time() < until:
        time.sleep(0.01)
    assert happens()


@pytest.mark.parametrize("where", ["answered", "queued"])
def test_a_client_that_hangs_up_on_a_whole_answer_frees_its_place(served, monkeypatch, where):
    _, _, client, engine, _ = served
    wait_for(lambda: not any(engine.rows))
    fast, others = engine.step, []

    def slow(*args):
        time.sleep(0.1)
        return fast(*args)

    monkeypatch.setattr(engine, "step", slow)
    if where == "queued":
        others = [Request("base", [1], 23, 0.0, lambda token: None) for _ in engine.rows]
        for one in others:
            engine.submit(one)
        wait_for(lambda: all(engine.rows))
    body = json.dumps({"model": "base", "prompt": "A", "max_tokens": 23})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as line:
        line.sendall((head + body).encode())
        wait_for(lambda: len(engine.waiting) == 1 if where == "queued" else any(engine.rows))
        mine = engine.waiting[0] if where == "queued" else next(row for row in engine.rows if row)
    wait_for(lambda: mine.cancelled)
    for one in others:
        one.cancelled = True
    wait_for(lambda: not any(engine.rows) and not engine.waiting)
    assert mine.made < (1 if where == "queued" else 20)


def test_an_engine_that_fails_tells_everybody(served, monkeypatch):
    params, _, _, other, _ = served
    engine = Engine(CONFIG, params, other.adapters.bank, None, rows=1, length=8)
    told = []
    monkeypatch.setattr(engine, "_decode", lambda: 1 / 0)
    with engine.lock:  # both are there before the first step
        engine.waiting.extend(Request("base", [1], 1, 0.0, told.append) for _ in range(2))
    wait_for(lambda: len(told) == 2)
    assert all(one.status == 500 and "division" in str(one) for one in told)
    with pytest.raises(Refused) as refused:
        engine.submit(Request("base", [1], 1, 0.0, told.append))
    assert refused.value.status == 503
    engine.close()


def test_hung_up_clients_take_no_place_in_a_full_queue(served, monkeypatch):
    _, _, _, engine, _ = served
    monkeypatch.setattr(engine, "limit", 1)
    monkeypatch.setattr(engine, "_admit", lambda: None)  # nothing leaves the queue
    gone, new = (Request("base", [1], 1, 0.0, lambda token: None) for _ in range(2))
    engine.submit(gone)
    with pytest.raises(Refused):
        engine.submit(new)
    gone.cancelled = True
    engine.submit(new)
    assert list(engine.waiting) == [new]
    new.cancelled = True


def test_mistakes_are_told_and_hurt_nobody(served):
    params, _, client, engine, folder = served
    (folder / "broken").mkdir()
    other = Llama(LlamaConfig(vocab=32, width=16, hidden=20, layers=2, heads=2, kv_heads=1))
    other = other.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    lx.checkpoint.save(folder / "narrow", adapter(other, 1, 2), params=other)  # of a base of other shapes
    lx.checkpoint.save(folder / "wide", adapter(params, 1, 5), params=params)  # of a rank that no slot holds
    wrong = [
        (openai.NotFoundError, dict(model="nobody", prompt="A")),
        (openai.NotFoundError, dict(model="../red", prompt="A")),
        (openai.BadRequestError, dict(model="broken", prompt="A")),
        (openai.BadRequestError, dict(model="narrow", prompt="A")),
        (openai.BadRequestError, dict(model="wide", prompt="A")),
        (openai.BadRequestError, dict(model="base", prompt="A" * 20, max_tokens=5)),
        (openai.BadRequestError, dict(model="base", prompt="")),
        (openai.BadRequestError, dict(model="base", prompt=[1, 99])),
        (openai.BadRequestError, dict(model="base", prompt="A", max_tokens=0)),
        (openai.BadRequestError, dict(model="base", prompt="A", temperature=9)),
    ]
    for kind, options in wrong:
        with pytest.raises(kind):
            client.completions.create(**options)
    raw = client._client.post(f"{client.base_url}completions", content=b"{")
    assert raw.status_code == 400 and "not JSON" in raw.text
    engine.limit = 0
    with pytest.raises(openai.RateLimitError):
        ask(client, "base")
    engine.limit = 64
    lx.checkpoint.save(
        folder / "late", adapter(params, 9, 2), params=params
    )  # an adapter that comes while it runs
    assert ask(client, "late", "AB", 4) == greedy(params, adapter(params, 9, 2), "AB", 4)
    assert {"base", "late", *NAMES} <= {model.id for model in client.models.list()}
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert 'requests_total{status="429"} 1.0' in text and "serve_swaps" in text


def test_swaps_keep_memory_and_programs(served):
    _, _, _, engine, _ = served
    params, bank = served[0], engine.adapters.bank
    loras, programs = [adapter(params, i, 1 + i % 4) for i in range(4)], engine.step._cache_size()
    bank = jax.tree.map(jnp.copy, bank)
    for i in range(100):
        bank = bank.set(i % 2, loras[i % 4], donate=True)
        if i == 10:
            held = len(jax.live_arrays())
    assert len(jax.live_arrays()) == held and engine.step._cache_size() == programs
    np.testing.assert_array_equal(
        bank.get(1)["params/layers/mlp/up/kernel"].a, loras[3]["params/layers/mlp/up/kernel"].a
    )


def test_a_character_of_several_tokens_is_streamed_whole():
    piece = pieces(lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    assert [piece(token) for token in "a\u00e9b".encode()] == ["a", "", "\u00e9", "b"]
    assert (piece(0xC3), piece(None)) == ("", "\ufffd")


def test_an_adapter_is_read_once_until_its_folder_changes(served, tmp_path):
    params, load = served[0], reader(tmp_path, served[0])
    for seed in (1, 2):
        lx.checkpoint.save(tmp_path / "one", adapter(params, seed, 1), params=params)
        held = load("one")
        assert load("one") is held
        want = adapter(params, seed, 1)["params/layers/mlp/up/kernel"].a
        np.testing.assert_array_equal(held["params/layers/mlp/up/kernel"].a, want)


def resident():
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_swaps_keep_memory_and_compile_nothing(served, caplog):
    _, _, _, engine, folder = served
    names, adapters = NAMES, engine.adapters
    done = threading.Semaphore(0)

    def swap(count):
        """Asks for three adapters in turn where two fit: each request swaps one in and another out."""
        until = adapters.swaps + count
        i = 0
        while adapters.swaps < until:
            told = lambda token: done.release() if token is None else None  # noqa: E731
            engine.submit(Request(names[i % 3], [1], 1, 0.0, told))
            assert done.acquire(timeout=60)
            i += 1

    swap(100)
    held, arrays, pointer = resident(), len(jax.live_arrays()), adapters.bank
    pointer = pointer.slots["params/layers/mlp/up/kernel"].a.unsafe_buffer_pointer()
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, "jax"):
            swap(1000)
    finally:
        jax.config.update("jax_log_compiles", False)
    assert "Compiling" not in caplog.text, caplog.text[:2000]
    assert len(jax.live_arrays()) <= arrays + 8  # those of the last answer may still wait to be collected
    assert adapters.bank.slots["params/layers/mlp/up/kernel"].a.unsafe_buffer_pointer() == pointer
    assert resident() < held + 8e6, f"{(resident() - held) / 1e6:.1f} MB more"
