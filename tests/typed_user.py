"""What a user writes, one call of each public name: pyright's strict mode must find nothing to say.

Never run: test_packaging.py hands it to pyright.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]

import lorax_fn as lx

Params = dict[str, dict[str, jax.Array]]


def model(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def split_and_look(params: Params, x: jax.Array) -> None:
    usage: lx.Usage = lx.usage(model, params, x)
    layout: lx.Layout | None = usage["up/kernel"].layout
    base, lora = lx.split(
        params,
        rank={"up": 8, "*": 4},
        alpha=lambda rank: 2.0 * rank,
        method="dora",
        targets=["up", "down"],
        full=["bias"],
        layout=usage,
        key=jax.random.key(0),
    )
    adapted = lx.adapt(model, fallback="error")
    print(adapted(base, lora, x), str(lx.summary(base, lora)), layout)
    merged = lx.merge(base, lora, dtype=jnp.bfloat16)
    added: dict[str, jax.Array] = lx.delta(lora)
    kept: dict[str, float] = lx.surviving(base, lora, merged)
    print(added, kept)


def adapters(lora: dict[str, lx.Adapter], w: jax.Array) -> list[jax.Array]:
    kinds = (lx.LoRA, lx.DoRA, lx.LoRAFA, lx.LoRAXS, lx.LoHa, lx.LoKr, lx.VeRA)
    chosen = [adapter for adapter in lora.values() if isinstance(adapter, kinds)]
    extra: list[lx.Adapter] = [lx.Full(w), lx.Rows(w[:2], ids=(0, 1))]
    return [adapter.weight(w) for adapter in [*chosen, *extra]]


def train(params: Params, lora: dict[str, lx.Adapter], x: jax.Array) -> dict[str, lx.Adapter]:
    adapted = lx.adapt(model)

    def loss_fn(params: Params, lora: dict[str, lx.Adapter], batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(adapted(params, lx.dropout(lora, 0.1, key), batch) ** 2)

    tx = lx.train_only(optax.chain(lx.optim.lora_fa_gradient(lora), lx.optim.riemannian(), optax.adam(1e-3)))
    other = lx.optim.loraplus(1e-3, ratio=16.0)
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    step = lx.make_train_step(loss_fn, tx, accumulate=2, weight=lambda batch: batch.shape[0])
    state, metrics = step(state, params, x)
    print(metrics["loss"], other)
    loss, grads = lx.value_and_grad(loss_fn)(params, state.lora, x, jax.random.key(1))
    state = lx.apply_gradients(state, grads, tx, value=loss)
    trained = lx.trainable(state.lora)
    state = dataclasses.replace(state, lora=lx.with_trainable(state.lora, trained))
    masked: Any = lx.mask(state.lora)
    print(masked)

    def batches(start: int) -> Iterator[jax.Array]:
        for _ in range(start, 100):
            yield x

    try:
        state = lx.fit(step, state, params, batches, steps=20, checkpoint_dir="run", progress=False)
    except lx.FitError as failure:
        print(failure.step, failure.state)
    return state.lora


def many_devices(params: Params, lora: dict[str, lx.Adapter], x: jax.Array, mesh: jax.sharding.Mesh) -> None:
    def loss_fn(params: Params, lora: dict[str, lx.Adapter], batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(lx.adapt(model)(params, lora, batch) ** 2)

    tx = optax.adam(1e-3)
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
    pmapped = lx.pmap_train_step(loss_fn, tx)
    copies, _ = pmapped(lx.replicate(state), lx.replicate(params), lx.shard(x))
    print(lx.unreplicate(copies))
    meshed = lx.mesh_train_step(loss_fn, tx, mesh=mesh, rules={"*": jax.P()})
    state, params = meshed.place(state, params)
    state, _ = meshed(state, params, x)
    placed = lx.shardings(lora, {"up": {"kernel": jax.NamedSharding(mesh, jax.P())}})
    print(placed)


def rows_of_text() -> Mapping[str, np.ndarray]:
    rows = lx.data.pack([[1, 2, 3], [4, 5]], 8, prompts=[1, 1])
    rows["attend"] = lx.data.attention_mask(rows["segments"])
    rows["scored"] = lx.data.prompt_mask([1, 1], [3, 2], 8)
    return rows


def files(params: Params, lora: dict[str, lx.Adapter], path: pathlib.Path) -> None:
    lx.checkpoint.save(path, lora, params=params, extra={"step": 3})
    lora = lx.checkpoint.load(path, params=params)
    print(lx.checkpoint.load_extra(path))
    mapping = {"model.up": "up/kernel"}
    lx.peft.save(path, lora, params=params, mapping=mapping, target="vllm", max_lora_rank=16)
    lora = lx.peft.load(path, params, mapping=mapping)
    print(lx.peft.config(path)["r"], lx.peft.push(path, "org/name"))
    lx.huggingface.save(path, params, mapping=mapping)
    loaded: Any = lx.huggingface.load(path, params, mapping=mapping, dtype=jnp.bfloat16)
    lx.kohya.save(path, lora, params=loaded)
    lora = lx.kohya.load(path, params)


def squares(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum(model(params, x) ** 2)


def numbers(params: Params, lora: dict[str, lx.Adapter], x: jax.Array) -> None:
    quantized = lx.quantize(params, "nf4", targets=["up"])
    leaf = quantized["up"]["kernel"]
    assert isinstance(leaf, lx.Quantized) and isinstance(leaf, lx.quantization.Quantized)
    dense = lx.dequantize(quantized)
    dense = lx.quantization.dequantize(lx.quantization.quantize(dense))
    better = lx.quantization.gptq(model, params, [x], "int4")
    aware, lora = lx.quantization.merge_aware(better, lora)
    inits: list[lx.inits.Init] = [
        lx.inits.eva(model, [x]),
        lx.inits.corda(model, [x]),
        lx.inits.loftq(iterations=2),
        lx.inits.pissa(4),
        lx.inits.lora_ga(squares, [x]),
    ]
    residual, started = lx.split(aware, init=inits[0])
    spectra: dict[str, lx.ranks.Spectrum] = lx.ranks.effective_rank(started)
    scores = lx.ranks.sensitivity(lora, lora)
    lora = lx.ranks.reallocate(lora, scores, budget=32)
    lora = lx.ranks.resize(lx.ranks.truncate(lora, energy=0.9), {"up/kernel": 4})
    print(spectra, lx.ranks.to_plain(params, residual, started), lora)


def many(
    params: Params, one: dict[str, lx.Adapter], two: dict[str, lx.Adapter], ids: jax.Array, x: jax.Array
) -> jax.Array:
    bank: lx.Bank = lx.bank([one, two], capacity=4)
    bank = bank.set(2, one).clear(0)
    print(len(bank), bank.get(2))
    mean = lx.combine([(0.5, one), (0.5, two)], method="svd", rank=4)
    mean = lx.subtract(lx.interpolate(mean, one, 0.5), lx.scale(two, 0.1))
    stacked = lx.stack([one, two, mean])
    print(lx.unstack(stacked), lx.report.interference({"one": one, "two": two}).plot())
    found: lx.report.Interference = lx.report.interference({"one": one, "two": two})
    print(found.cosine)
    apply = lx.adapt(model)

    def one_of_them(i: jax.Array, x: jax.Array) -> jax.Array:
        return apply(params, bank[i], x)

    return jax.vmap(one_of_them)(ids, x)


def sweeps(params: Params, x: jax.Array) -> dict[str, lx.Adapter]:
    def loss_fn(params: Params, lora: dict[str, lx.Adapter], batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(lx.adapt(model)(params, lora, batch) ** 2)

    lanes = lx.grid(rank=[1, 2], lr=[1e-3, 1e-2])
    result: lx.sweeps.SweepResult = lx.sweep(
        loss_fn, params, lanes, [x], steps=10, tx=lambda lane: optax.adam(lane["lr"]), key=jax.random.key(0)
    )
    result = lx.sweeps.read("sweep.jsonl")
    best: lx.sweeps.Optimum = lx.sweeps.optimum([1e-3, 1e-2, 1e-1], [[1.0, 0.5, 1.0]])
    print(lx.sweeps.slope([1, 2], [best, best]), result.means("loss"), result.to_pandas())
    figures = [
        lx.report.plot_curves(result),
        lx.report.plot_metric(result, x="rank", hue="lr"),
        lx.report.plot_heatmap(result),
        lx.report.plot_spectra(result.lora(0)),
    ]
    lx.report.page(result, "sweep.html", title=f"{len(figures)} figures")
    return result.lora(result.best("loss")["lane"])


def errors(params: Params) -> str:
    warnings = (
        lx.LoraCheckpointWarning,
        lx.LoraFallbackWarning,
        lx.LoraFileWarning,
        lx.LoraMergeWarning,
        lx.LoraStuckWarning,
    )
    try:
        lx.split(params, rank=10**6)
    except lx.LoraError as problem:
        return str(problem) + str(warnings)
    return ""
