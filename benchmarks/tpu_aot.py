"""Bytes and FLOPs of a training step on TPU chips, as counted by the TPU compiler, which needs no TPU.

    pip install "jax[tpu]"                    # libtpu is the compiler
    python benchmarks/tpu_aot.py              # every table of README.md: more than an hour on two cores
    python benchmarks/tpu_aot.py 7b ranks     # some of them: 7b, ranks, sharding, 70b, moe, qlora, flops
    python benchmarks/tpu_aot.py --list

The model is a Llama in plain functions without code for LoRA. Parameters are `jax.ShapeDtypeStruct`, and the
step is lowered and compiled for a topology of chips, but never run.
"""

import argparse
import dataclasses
import fnmatch
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from libraries import tpu

import lorax_fn as lx

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of a Llama, and of the pieces in which attention and loss go over the tokens."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    chunk: int = 256  # queries at a time, and tokens at a time in the loss
    unroll: int = 1  # layers per iteration of the scan
    experts: int = 0  # 0: one MLP for all tokens; else each token goes to two of these, as in Mixtral


MODELS = {
    "7B": Llama(layers=32, width=4096, hidden=11008, heads=32, kv_heads=32),
    "65B": Llama(layers=80, width=8192, hidden=22016, heads=64, kv_heads=64),
    "70B": Llama(layers=80, width=8192, hidden=28672, heads=64, kv_heads=8),
    "8x7B": Llama(layers=32, width=4096, hidden=14336, heads=32, kv_heads=8, experts=8),
    "tiny MoE": Llama(layers=2, width=256, hidden=512, heads=4, kv_heads=2, vocab=512, chunk=64, experts=4),
    "tiny": Llama(layers=6, width=512, hidden=2048, heads=4, kv_heads=2, vocab=512, chunk=64),
}


# The model. Weights are sharded over two mesh axes: "fsdp" also shards the batch, "tensor" heads and tokens.

RULES = {
    "embed/embedding": P(None, ("fsdp", "tensor")),
    "lm_head/kernel": P("fsdp", "tensor"),
    "layers/[od]*/kernel": P(None, "tensor", "fsdp"),  # o and down
    "layers/*/kernel": P(None, "fsdp", "tensor"),
}
RULES_OF_EXPERTS = {
    "layers/experts/down/kernel": P(None, "tensor", None, "fsdp"),
    "layers/experts/*/kernel": P(None, "tensor", "fsdp", None),
    "layers/router/kernel": P(),
}
STREAM = P("fsdp", "tensor")  # [B, T, width] between layers


def rules_of(c: Llama) -> dict:
    return {**RULES_OF_EXPERTS, **RULES} if c.experts else RULES


def weights(c: Llama) -> dict:
    """The parameters, bfloat16: linear layers are stacked ``[layers, in, out]``."""

    def weight(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    kv = c.width // c.heads * c.kv_heads
    sizes = {"q": (c.width, c.width), "k": (c.width, kv), "v": (c.width, kv), "o": (c.width, c.width)}
    mlp = {"gate": (c.width, c.hidden), "up": (c.width, c.hidden), "down": (c.hidden, c.width)}
    sizes |= {"router": (c.width, c.experts)} if c.experts else mlp
    layers: dict = {name: {"kernel": weight(c.layers, *size)} for name, size in sizes.items()}
    if c.experts:
        each = {name: {"kernel": weight(c.layers, c.experts, *size)} for name, size in mlp.items()}
        layers["experts"] = each
    return {
        "embed": {"embedding": weight(c.vocab, c.width)},
        "layers": layers | {name: {"scale": weight(c.layers, c.width)} for name in ("attn_norm", "mlp_norm")},
        "norm": {"scale": weight(c.width)},
        "lm_head": {"kernel": weight(c.width, c.vocab)},
    }


def norm(x, w):
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * w["scale"][None, None]


def rotate(x):
    """Rotary positions of ``[B, T, heads, d]``."""
    half = x.shape[-1] // 2
    rates = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), rates)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def pieces(x, size):
    """``[B, T, ...]`` as ``[T / size, B, size, ...]``, to be scanned."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def attend(q, k, v, chunk):
    """Causal attention ``[B, T, heads, d]``, ``chunk`` queries at a time, without a ``[T, T]`` array."""
    batch, length, heads, d = q.shape

    @jax.checkpoint
    def rows(_, inputs):
        start, q = inputs
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * d**-0.5
        seen = start + jnp.arange(chunk)[:, None] >= jnp.arange(length)[None]
        scores = jnp.where(seen[None, None, None], scores, jnp.float32(-1e30))
        return (), jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores).astype(v.dtype), v)

    q = q.reshape(batch, length, k.shape[2], -1, d)  # the query heads of one key head side by side
    _, out = jax.lax.scan(rows, (), (jnp.arange(0, length, chunk), pieces(q, chunk)))
    return out.swapaxes(0, 1).reshape(batch, length, heads * d)


def experts(c, h, w):
    """Each token of ``[B, T, width]`` through two of the experts, which take at most 1.25 of their share.

    Rows are sorted into ``[experts, B, slots, width]`` by products with one-hot arrays (GShard,
    https://arxiv.org/abs/2006.16668); a token that finds no slot keeps its residual stream.
    """
    slots = int(1.25 * 2 * h.shape[1] / c.experts)
    share, chosen = jax.lax.top_k(jax.nn.softmax((h @ w["router"]["kernel"]).astype(jnp.float32)), 2)
    picked = jax.nn.one_hot(chosen, c.experts, dtype=jnp.float32)  # [B, T, 2, E]
    flat = picked.reshape(h.shape[0], -1, c.experts)
    place = (jnp.cumsum(flat, 1) - 1).reshape(picked.shape).astype(jnp.int32)
    # [B, T, 2, E, slots]
    at = jax.nn.one_hot(place, slots, dtype=h.dtype) * picked[..., None].astype(h.dtype)
    rows = jnp.einsum("btkes,btd->ebsd", at, h)
    gate, up = (jnp.einsum("ebsd,edf->ebsf", rows, w["experts"][n]["kernel"]) for n in ("gate", "up"))
    rows = jnp.einsum("ebsf,efd->ebsd", jax.nn.silu(gate) * up, w["experts"]["down"]["kernel"])
    return jnp.einsum("btkes,btk,ebsd->btd", at, share.astype(h.dtype), rows)


def block(c, x, w):
    """One layer, as the body of a scan."""
    h = norm(x, w["attn_norm"])
    q, k, v = ((h @ w[n]["kernel"]).reshape(*x.shape[:2], -1, c.width // c.heads) for n in "qkv")
    x = x + attend(rotate(q), rotate(k), v, c.chunk) @ w["o"]["kernel"]
    h = norm(x, w["mlp_norm"])
    if c.experts:
        x = x + experts(c, h, w)
    else:
        x = x + (jax.nn.silu(h @ w["gate"]["kernel"]) * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]
    return jax.lax.with_sharding_constraint(x, STREAM), None


def mean_loss(c, params, tokens):
    """Next-token loss of ``[B, T]`` tokens: layers checkpointed and scanned, logits a chunk at a time."""
    x = jax.lax.with_sharding_constraint(params["embed"]["embedding"][tokens], STREAM)
    body = jax.checkpoint(functools.partial(block, c), prevent_cse=c.unroll == c.layers)
    x, _ = jax.lax.scan(body, x, params["layers"], unroll=c.unroll)
    x = norm(x, params["norm"])

    @jax.checkpoint
    def some(total, inputs):
        x, targets = inputs
        logits = (x @ params["lm_head"]["kernel"]).astype(jnp.float32)
        return total + optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(), None

    inputs = pieces(x, c.chunk), pieces(jnp.roll(tokens, -1, 1), c.chunk)
    return jax.lax.scan(some, jnp.zeros((), jnp.float32), inputs)[0] / tokens.size


# The ways to train. All are AdamW with float32 moments of what trains.


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: the model, the way to train it, and the chips."""

    way: str  # lora, merge (in the loss), full, qlora
    model: str = "7B"
    topology: str = "v5e:2x4"
    mesh: tuple[int, int] = (8, 1)  # fsdp, tensor
    batch: int = 8
    tokens: int = 2048
    rank: int = 16


def lowered(case: Case, c: Llama) -> Any:
    """The step of a case, for a model of these sizes, lowered for its topology."""
    chips = tpu.topology(case.topology)
    if math.prod(case.mesh) == 1:
        mesh = jax.sharding.Mesh([chips.devices[:1]], ("fsdp", "tensor"))
    else:
        mesh = topologies.make_mesh(chips, case.mesh, ("fsdp", "tensor"))
    params, tx = weights(c), optax.adamw(1e-4)
    batch = jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32)
    loss = functools.partial(mean_loss, c)
    if case.way == "full":
        return lowered_full(loss, tx, mesh, params, batch, rules_of(c))

    with jax.set_mesh(mesh):
        layout = lx.usage(loss, params, batch)
    if case.way == "qlora":
        params = lx.quantize(params, "nf4", layout=layout)
    params, lora = lx.split(params, rank=case.rank, layout=layout)
    apply = lx.adapt(loss, fallback="error")

    def loss_fn(params, lora, batch, key):
        return loss(lx.merge(params, lora), batch) if case.way == "merge" else apply(params, lora, batch)

    state = jax.eval_shape(lambda x: lx.TrainState.create(lora=x, tx=tx, key=jax.random.key(0)), lora)
    rules = rules_of(c) if mesh.size > 1 else {}
    return lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules=rules).lower(state, params, batch)


def lowered_full(loss: Callable, tx: Any, mesh: Any, params: dict, batch: Any, rules: dict) -> Any:
    """Every parameter trains: bfloat16, with float32 moments; each update is computed in float32."""

    def spec(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((s for pattern, s in rules.items() if fnmatch.fnmatch(name, pattern)), P())

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def step(params, moments, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, moments = tx.update(wide(grads), moments, wide(params))
        return jax.tree.map(lambda w, u: (w + u).astype(w.dtype), params, updates), moments, value

    moments = jax.eval_shape(lambda params: tx.init(wide(params)), params)
    specs = jax.tree_util.tree_map_with_path(spec, params)
    at = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), (specs, P("fsdp"), P()))
    where = at[0], (moments[0]._replace(count=at[2], mu=at[0], nu=at[0]), *moments[1:])
    with jax.set_mesh(mesh):
        run = jax.jit(
            step, donate_argnums=(0, 1), in_shardings=(*where, at[1]), out_shardings=(*where, at[2])
        )
        return run.lower(params, moments, batch)


# The compiler's results.

# A layer's weight is gathered at once, not piece by piece in a loop of products: `tera_flops` counts no loop.
PLAIN_GATHERS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiled(case: Case, c: Llama) -> Any:
    return lowered(case, c).compile(compiler_options=PLAIN_GATHERS)


def gibs(case: Case) -> list[float]:
    """GiB per chip of a step's arguments, of its temporaries, and of both."""
    memory = compiled(case, MODELS[case.model]).memory_analysis()
    arguments, temp = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    return [arguments, temp, arguments + temp]


def tera_flops(case: Case) -> list[float]:
    """How many 10^12 operations one chip does in a step.

    XLA counts the body of a loop once, however often it runs. So two programs without loops are compiled, of
    one and of two layers, and their difference is a layer.
    """
    plain = dataclasses.replace(MODELS[case.model], chunk=case.tokens)
    one, two = (
        compiled(case, dataclasses.replace(plain, layers=n, unroll=n)).cost_analysis()["flops"]
        for n in (1, 2)
    )
    return [(one + (MODELS[case.model].layers - 1) * (two - one)) / 1e12]


V5E_128 = {"model": "70B", "topology": "v5e:8x16", "mesh": (128, 1), "batch": 128}
ONE = {"mesh": (1, 1), "batch": 1}
RANKS = [Case("lora", rank=rank) for rank in (1, 4, 16, 64, 256)]
SHARDINGS = [Case("lora", mesh=mesh) for mesh in ((8, 1), (4, 2), (2, 4), (1, 8))]
MOE = {"model": "8x7B", "topology": "v5p:2x2x4", "mesh": (4, 4), "batch": 8}
TABLES: dict[str, list[Case]] = {
    "moe": [Case("lora", **MOE), Case("merge", **MOE), Case("full", **MOE)],
    "7b": [Case("lora"), Case("merge"), Case("full")],
    "ranks": RANKS,
    "sharding": SHARDINGS,
    "70b": [Case("lora", **V5E_128)],
    "qlora": [Case("qlora", topology="v5e:1x1", **ONE), Case("qlora", "65B", "v5p:1x1x1", **ONE)],
    "flops": [Case("lora"), Case("full"), Case("merge"), *RANKS[::4], SHARDINGS[-1], SHARDINGS[-2]],
}
FACTS = ("way", "model", "rank", "chips", "fsdp x tensor", "batch x tokens")
GIBS = ("arguments GiB", "temp GiB", "arguments + temp GiB")


def facts(case: Case) -> list[str]:
    mesh = f"{case.mesh[0]} x {case.mesh[1]}"
    rank = "-" if case.way == "full" else str(case.rank)
    return [case.way, case.model, rank, case.topology, mesh, f"{case.batch} x {case.tokens}"]


def row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def print_table(name: str, cases: list[Case], done: dict[tuple, list[str]]) -> None:
    """Prints row by row, as each takes minutes. Results of earlier tables are reused."""
    head, ask = (("TFLOP per chip",), tera_flops) if name == "flops" else (GIBS, gibs)
    head = [*FACTS, *head, "minutes"]
    print(f"\n{name}, per chip:\n\n{row(head)}\n{row('---' for _ in head)}", flush=True)
    for case in cases:
        if (ask, case) not in done:
            start = time.perf_counter()
            cells = [f"{x:.2f}" for x in ask(case)]
            done[ask, case] = [*cells, f"{(time.perf_counter() - start) / 60:.1f}"]
        print(row([*facts(case), *done[ask, case]]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a training step costs a TPU chip.")
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and compile nothing")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"unknown tables {sorted(unknown)}: choose from {', '.join(TABLES)}")
    chosen = args.tables or list(TABLES)
    if args.list:
        print("\n".join(row([name, *facts(case)]) for name in chosen for case in TABLES[name]))
        return 0
    import libtpu

    print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}, libtpu {libtpu.__version__}")
    done: dict[tuple, list[str]] = {}
    for name in chosen:
        print_table(name, TABLES[name], done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
