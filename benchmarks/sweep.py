"""A sweep over ranks beside separate runs: steady, end to end, its memory, and its bytes on a TPU chip.

    python benchmarks/sweep.py                # every table: about half an hour on two idle cores
    python benchmarks/sweep.py steady         # some of them: steady, ends, ends64, memory, tpu
    python benchmarks/sweep.py --rounds 5 --json benchmarks/results/sweep.json  # into a file
    python benchmarks/sweep.py ends --torch-python .venv-peft/bin/python  # and a loop over PEFT on torch

The model is the transformer of step.py, six layers of width 384, and the lanes are its ranks 1 to 64.
Separate runs and sweeps take turns within a round, and ratios are formed within rounds, of seconds by the
clock and of the processor's own seconds (all threads of this process), which what else the machine does
moves less. "The base alone" is the gradient by the inputs without any adapter, all lanes' tokens in one
product beside one product per lane: what reading the frozen weights once can gain.
The table for the TPU needs libtpu, its compiler, but no TPU.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from libraries import tpu as tpu_chips
from libraries.torch_lora import Process
from step import Sizes, Transformer, in_turn, mse, spread, table

import lorax_fn as lx
from lorax_fn.sweeps import groups, lanes
from lorax_fn.sweeps.programs import memory_of

RANKS = (1, 2, 4, 8, 16, 32, 48, 64)
KEY = jax.random.key(1)
SEPARATE, OWN, PADDED = "separate runs", "lanes at their own ranks", "lanes padded to rank 64"
BESIDE = "lanes at their own ranks, side by side"
FORMS = {OWN: {"side_by_side": False}, BESIDE: {"side_by_side": True}, PADDED: None}
TOGETHER, APART = "the base alone", "the base alone, lane by lane"


def tx(lane: Any) -> Any:
    return optax.adamw(lane.get("lr", 1e-3))


def model_of(batch: int, tokens: int, width: int = 384, layers: int = 6) -> Transformer:
    sizes = Sizes(width, 4 * width, heads=width // 64, layers=layers, batch=batch, tokens=tokens)
    return Transformer(sizes)


def setting(batch: int, tokens: int, width: int = 384, layers: int = 6) -> tuple[Any, Callable, dict]:
    model = model_of(batch, tokens, width, layers)
    x = np.random.default_rng(0).normal(size=(batch, tokens, model.sizes.width)).astype("f4")
    params = jax.jit(model.init)(jax.random.key(0), x)
    apply = lx.adapt(model.apply, fallback="error")

    def loss_fn(params, lora, batch, key):
        return mse(apply(params, lora, batch["x"]), batch)

    return params, loss_fn, jax.device_put({"x": x, "target": x[:, ::-1].copy()})


def chunk_of(params: Any, some: list[dict], own: bool = False) -> tuple[Any, list]:
    made = groups.members(params, some, {}, KEY)
    (group,) = groups.group(params, made, tx)
    (chunk,) = lanes.chunks(group, len(some), own=own)
    return chunk, made


def in_form(params: Any, form: dict | None) -> tuple[Any, list, Any]:
    """The chunk of all ranks in one of `FORMS`, its members, and the widths of its products."""
    chunk, made = chunk_of(params, [{"rank": r} for r in RANKS], form is not None)
    return chunk, made, lanes.own_widths(chunk, **form) if form else None


def programs_of(params: Any, loss_fn: Callable, batch: dict) -> dict[str, tuple[Callable, Any]]:
    """Of each form: a function that takes one step of all ranks, and the state that it starts from."""
    found: dict[str, tuple[Callable, Any]] = {}
    for name, form in FORMS.items():
        chunk, made, widths = in_form(params, form)
        given = (params, batch, chunk.values(), chunk.rates(), None)
        state = lanes.start(chunk, tx, None)
        step = lanes.make_step(loss_fn, tx, chunk.parts, seeded=False, widths=widths)
        program = jax.jit(step, donate_argnums=0).lower(state, *given).compile()
        found[name] = (lambda state, program=program, given=given: program(state, *given)[0]), state
    steps, states = [], []
    for member in made:
        state = jax.tree.map(jnp.copy, lx.TrainState.create(lora=member.lora, tx=tx({}), key=KEY))
        step = jax.jit(lx.make_train_step(loss_fn, tx({})), donate_argnums=0)
        steps.append(step.lower(state, params, batch).compile())
        states.append(state)

    def all_of_them(states):
        return [step(state, params, batch)[0] for step, state in zip(steps, states, strict=True)]

    found[SEPARATE] = all_of_them, states
    return found


def base_alone(model: Transformer, params: Any, batch: dict) -> dict[str, tuple[Callable, Any]]:
    """The gradient by the inputs of the plain model, for the tokens of all lanes at once and lane by lane."""

    def gradient(x, params):
        return jax.grad(lambda x: jnp.mean(jnp.square(model.apply(params, x))))(x)

    one = batch["x"]
    every = jnp.concatenate([one] * len(RANKS))
    together, apart = (jax.jit(gradient).lower(x, params).compile() for x in (every, one))
    return {
        TOGETHER: (lambda x: together(x, params), every),
        APART: (lambda xs: [apart(x, params) for x in xs], [one] * len(RANKS)),
    }


def timed(run: Callable, *args: Any) -> tuple[Any, np.ndarray]:
    """What it gave, and seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run(*args))
    return result, np.array([time.perf_counter() - clock, time.process_time() - processor])


Title = str
Rows = list[list[str]]


def steady(rounds: int) -> tuple[Title, Rows]:
    rows = [["width", "layers", "tokens per lane", "form", "per lane / separate run, clock", "processor"]]
    for batch, tokens, *sizes in ((4, 128, 384, 6), (1, 32, 384, 6), (1, 32, 1024, 2)):
        params, loss_fn, data = setting(batch, tokens, *sizes)
        model = model_of(batch, tokens, *sizes)
        found = programs_of(params, loss_fn, data) | base_alone(model, params, data)
        states = {name: state for name, (_, state) in found.items()}
        taken: dict[str, list] = {name: [] for name in found}
        for i in range(-1, rounds):
            for name in in_turn(found, i + 1):
                states[name], seconds = timed(found[name][0], states[name])
                if i >= 0:
                    taken[name].append(seconds)
        base, apart = np.array(taken.pop(SEPARATE)), np.array(taken.pop(APART))
        for name, values in taken.items():
            ratio = np.array(values) / (apart if name == TOGETHER else base)
            rows.append([*map(str, (*sizes, batch * tokens)), name, spread(ratio[:, 0]), spread(ratio[:, 1])])
    return f"Steady time per lane of {len(RANKS)}, {rounds} rounds: median [quartiles]", rows


def torch_loop(python: str, params: Any, some: list[dict], batch: dict, steps: int) -> Process:
    """PEFT on torch in its own process: the same base, batch and first factors, one lane after another."""
    held: dict[str, Any] = {"x": batch["x"], "target": batch["target"]}
    for path, leaf in flax.traverse_util.flatten_dict(params["params"], sep="/").items():
        held[layer_path(path)] = leaf
    rows = []
    for number, lane in enumerate(some):
        _, lora = first_adapters(params, lane)
        places = {}
        for path, adapter in lora.items():
            place = layer_path(path.removeprefix("params/")).removesuffix("/kernel")
            places[place.replace("_", ".").replace("/", ".")] = f"{number}/{place}"
            held |= {f"{number}/{place}/a": adapter.a, f"{number}/{place}/b": adapter.b}
        rows.append({"rank": lane["rank"], "lr": lane["lr"], "alpha": adapter.alpha, "factors": places})
    problem = dataclasses.asdict(model_of(1, 1).sizes) | {"scanned": False}
    held = {name: np.asarray(x) for name, x in held.items()}
    return Process(python, "torch_sweep.py", held, {"problem": problem, "lanes": rows, "steps": steps}, 1)


def layer_path(path: str) -> str:
    """``attention_0/q/kernel`` or ``up_0/kernel`` as the torch model has it: ``layers_0/q/kernel``."""
    found = re.fullmatch(r"(attention|norm_attention|norm_mlp|up|down)_(\d+)/(.*)", path)
    if found is None:
        return path
    name, number, rest = found.groups()
    inner = {"attention": "", "norm_attention": "norm_1/", "norm_mlp": "norm_2/"}.get(name, f"{name}/")
    return f"layers_{number}/{inner}{rest}"


def first_adapters(params: Any, lane: dict) -> tuple[Any, dict]:
    return lx.split(params, rank=lane["rank"], key=jax.random.fold_in(KEY, 0))


def ends(rounds: int, tokens: int, torch_python: str | None = None, steps: int = 20) -> tuple[Title, Rows]:
    """From params to trained adapters, compilation and all."""
    params, loss_fn, batch = setting(1, tokens)

    def swept(some):
        result = lx.sweep(loss_fn, params, some, [batch], steps=steps, tx=tx, key=KEY, progress=False)
        return result.curves["loss"][:, -1]

    def separately(some):
        losses = []
        for lane in some:
            _, lora = first_adapters(params, lane)
            state = lx.TrainState.create(lora=lora, tx=tx(lane), key=KEY)
            step = jax.jit(lx.make_train_step(loss_fn, tx(lane)), donate_argnums=0)
            for _ in range(steps):
                state, metrics = step(state, params, batch)
            losses.append(metrics["loss"])
        return losses

    rows = [["lanes", "beside", "its time / the sweep's, clock", "processor"]]
    for rates in ((1e-3,), (3e-4, 1e-3, 3e-3)):
        some = lx.grid(rank=RANKS, lr=rates)
        runs = {"sweep": swept, "separate runs": separately}
        loop = torch_loop(torch_python, params, some, batch, steps) if torch_python else None
        ratios: dict[str, list] = {"separate runs": []} | ({"PEFT on torch, a loop": []} if loop else {})
        for i in range(rounds):
            took, losses = {}, {}
            for name, run in in_turn_pairs(runs, i):
                jax.clear_caches()
                losses[name], took[name] = timed(run, some)
            if loop:
                answer = loop.ask("go")
                losses["PEFT on torch, a loop"] = answer["losses"]
                took["PEFT on torch, a loop"] = np.array(answer["seconds"])
            for name, found in ratios.items():
                # At the highest rate, 20 steps enlarge what another library rounds otherwise.
                room = 100 if "PEFT" in name else 10
                tolerance = room * results.TOLERANCES[results.products()]
                np.testing.assert_allclose(losses["sweep"], losses[name], rtol=tolerance)
                found.append(took[name] / took["sweep"])
        print(f"{len(some)} lanes: seconds by the clock and of the processor: {took}", flush=True)
        if loop:
            loop.close()
        for name, found in ratios.items():
            both = np.array(found)
            rows.append([str(len(some)), name, spread(both[:, 0]), spread(both[:, 1])])
    return f"{steps} steps end to end at {tokens} tokens per lane, {rounds} rounds: median [quartiles]", rows


def in_turn_pairs(runs: dict, i: int) -> list:
    return [(name, runs[name]) for name in in_turn(runs, i)]


def memory() -> tuple[Title, Rows]:
    """Bytes of the compiled step, with 1 to 8 lanes of one rank."""
    params, loss_fn, batch = setting(4, 128)
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    rows = [["lanes of rank 16", "MB", "base MB", "per lane MB"]]
    for count in (1, 2, 4, 8):
        chunk, _ = chunk_of(params, [{"rank": 16, "seed": i} for i in range(count)])
        state = lanes.start(chunk, tx, None)
        step = lanes.make_step(loss_fn, tx, chunk.parts, seeded=False)
        lowered = jax.jit(step, donate_argnums=0).lower(state, params, batch, chunk.values(), None, None)
        used = memory_of(lowered.compile())
        rows.append(
            [str(count), f"{used / 1e6:.1f}", f"{base / 1e6:.1f}", f"{(used - base) / count / 1e6:.1f}"]
        )
    return "Arguments, results and temporaries of one step at 512 tokens per lane", rows


def tpu() -> tuple[Title, Rows]:
    """Bytes accessed by a step, as the TPU's compiler counts them, of eight ranks together and one by one."""
    where = jax.sharding.SingleDeviceSharding(tpu_chips.one_chip())

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), tree)

    def accessed(step, *args):
        lowered = jax.jit(step, donate_argnums=0).lower(*placed(args))
        return lowered.compile().cost_analysis()["bytes accessed"]

    rows = [["width", "layers", "form", "MB per lane", "/ separate run"]]
    for width, layers in ((384, 6), (2048, 2)):
        params, loss_fn, batch = setting(1, 64, width, layers)
        params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch))
        _, made = chunk_of(params, [{"rank": r} for r in RANKS])
        model = model_of(1, 64, width, layers)

        def base(x, params, target, model=model):
            return jax.value_and_grad(lambda x: mse(model.apply(params, x), {"target": target}))(x)

        each = {"the base alone, one lane": accessed(base, batch["x"], params, batch["target"])}
        separate = [
            accessed(
                lx.make_train_step(loss_fn, tx({})),
                lx.TrainState.create(lora=member.lora, tx=tx({}), key=KEY),
                params,
                batch,
            )
            for member in made
        ]
        each[SEPARATE] = float(np.mean(separate))
        for name, form in FORMS.items():
            chunk, _, widths = in_form(params, form)
            step = lanes.make_step(loss_fn, tx, chunk.parts, seeded=False, widths=widths)
            state = lanes.start(chunk, tx, None)
            each[name] = accessed(step, state, params, batch, chunk.values(), None, None) / len(RANKS)
        for name, bytes_ in each.items():
            row = [str(width), str(layers), name, f"{bytes_ / 1e6:.1f}", f"{bytes_ / each[SEPARATE]:.3f}"]
            rows.append(row)
            print(table([rows[0], row]), flush=True)
    return "Bytes accessed on a v5e chip, bfloat16, 64 tokens per lane", rows


def record(path: pathlib.Path, name: str, title: Title, rows: Rows) -> None:
    """Puts a table into a JSON file, with what made it."""
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    asked = re.sub(r"--torch-python \S+", "--torch-python .venv-peft/bin/python", " ".join(sys.argv[1:]))
    held[name] = {
        "command": f"python benchmarks/sweep.py {asked}",
        **results.facts(),
        "title": title,
        "rows": rows,
    }
    path.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Times a sweep over ranks beside separate runs.")
    parser.add_argument("tables", nargs="*", help="steady, ends, ends64, memory, tpu; default: all")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of the steady table")
    parser.add_argument("--ends", type=int, default=3, help="timed rounds of the table end to end")
    parser.add_argument("--torch-python", help="an interpreter with torch and peft, for the table end to end")
    parser.add_argument("--json", type=pathlib.Path, help="a file to put the tables into as well")
    args = parser.parse_args()
    runs = {
        "steady": lambda: steady(args.rounds),
        "ends": lambda: ends(args.ends, 32, args.torch_python),
        "ends64": lambda: ends(args.ends, 64, args.torch_python),
        "memory": memory,
        "tpu": tpu,
    }
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{os.cpu_count()} cores{load}; JAX {jax.__version__}\n")
    for name in args.tables or runs:
        title, rows = runs[name]()
        print(f"{title}\n\n{table(rows)}\n", flush=True)
        if args.json:
            record(args.json, name, title, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
