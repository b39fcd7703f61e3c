"""Serves SmolLM2-135M with the adapters of a folder, in the OpenAI completions form.

cd examples && python -m serve --adapters ../out        # each folder in ../out is an adapter
curl localhost:8000/v1/completions -d '{"model": "smollm2-hamlet", "prompt": "To be", "max_tokens": 20}'
"""

import argparse
from pathlib import Path

import data
import uvicorn
from models.llama import STACKED, TABLE, load_gguf

from serve.app import make_app
from serve.engine import Engine, empty_bank
from serve.loading import reader


class Tokens:
    """The model's own tokenizer, as the application wants it."""

    def __init__(self, path, vocab: int, stop: int = 2):
        self.inner, self.vocab, self.stop = data.load_tokenizer(path), vocab, stop

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.inner.decode(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves SmolLM2-135M with many adapters.")
    parser.add_argument("--adapters", type=Path, required=True, help="a folder of adapters, one folder each")
    parser.add_argument("--slots", type=int, default=16, help="adapters held at once")
    parser.add_argument("--rank", type=int, default=16, help="the largest rank that fits")
    parser.add_argument("--rows", type=int, default=8, help="requests decoded at once")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt and its answer")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    gguf = data.smollm2()
    config, params = load_gguf(gguf)
    layout = {"embedding": TABLE, "kernel": STACKED}
    bank = empty_bank(params, layout, slots=args.slots, rank=args.rank)

    load = reader(args.adapters, params)
    engine = Engine(config, params, bank, load, rows=args.rows, length=args.length)
    try:
        uvicorn.run(make_app(engine, Tokens(gguf, config.vocab), args.adapters), port=args.port)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
