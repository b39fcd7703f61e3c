"""Flax NNX: `nnx.LoRA` around each linear layer, and the trainer of google-tunix, whose LoRA is qwix's."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from libraries.linen import peer
from libraries.measured import LEARNING_RATE, JaxPeer, counts, leaves, mse
from libraries.problem import LINEAR, Problem, arranged, factors, inputs, weights


class Block(nnx.Module):
    def __init__(self, problem: Problem, rngs: nnx.Rngs):
        self.problem = problem
        made = {"param_dtype": problem.dtype, "rngs": rngs}
        self.norm_1, self.norm_2 = (nnx.LayerNorm(problem.width, **made) for _ in range(2))
        for name, shape in problem.shapes.items():
            setattr(self, name, nnx.Linear(*shape, **made))

    def __call__(self, x, past=None):
        split = (*x.shape[:2], self.problem.heads, self.problem.width // self.problem.heads)
        h = self.norm_1(x)
        q, k, v = (layer(h).reshape(split) for layer in (self.q, self.k, self.v))
        new = k, v
        if past is not None:
            k, v = (jnp.concatenate([old, own], 1) for old, own in zip(past, new, strict=True))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        if past is None:
            causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            scores = jnp.where(causal, scores, -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), v)
        x = x + self.o(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x)))), new


class LoRABlock(Block):
    """The block with `nnx.LoRA` around each of its linear layers."""

    def __init__(self, problem: Problem, rngs: nnx.Rngs):
        super().__init__(problem, rngs)
        for name, (n, m) in problem.shapes.items():
            base = getattr(self, name)
            made = {"param_dtype": problem.dtype, "rngs": rngs}
            setattr(self, name, nnx.LoRA(n, problem.rank, m, base_module=base, **made))


class Transformer(nnx.Module):
    def __init__(self, problem: Problem, rngs: nnx.Rngs, block: type[Block] = Block):
        self.problem = problem
        if problem.scanned:
            make = nnx.vmap(lambda rngs: block(problem, rngs), in_axes=0, out_axes=0)
            self.layers = make(rngs.fork(split=problem.layers))
        else:
            for i in range(problem.layers):
                setattr(self, f"layers_{i}", block(problem, rngs))
        self.norm = nnx.LayerNorm(problem.width, param_dtype=problem.dtype, rngs=rngs)

    def __call__(self, x, past=None):
        if self.problem.scanned:
            body = nnx.remat(lambda x, block: block(x)[0], prevent_cse=False)
            return self.norm(nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))
        news = []
        for i in range(self.problem.layers):
            x, new = getattr(self, f"layers_{i}")(x, past and tuple(part[i] for part in past))
            news.append(new)
        return (self.norm(x), news) if past else self.norm(x)


def filled(model: nnx.Module, held: dict[str, Any]) -> None:
    """Writes arrays by path into the model's variables; every variable must be given."""
    state = nnx.state(model, nnx.Param)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if set(flat) != set(held):
        raise SystemExit(f"variables and arrays differ by {sorted(set(flat) ^ set(held))}")
    for path, variable in flat.items():
        variable[...] = jnp.asarray(held[path])
    nnx.update(model, state)


def nnx_lora(problem: Problem) -> JaxPeer:
    model = Transformer(problem, nnx.Rngs(0), LoRABlock)
    held = {
        path.replace("/kernel", "/base_module/kernel") if "kernel" in path else path: value
        for path, value in arranged(problem, weights(problem)).items()
    }
    held = {
        path.replace("/bias", "/base_module/bias") if path.split("/")[-2] in LINEAR else path: value
        for path, value in held.items()
    }
    for path, (a, b) in arranged(problem, factors(problem)).items():  # without alpha: B holds the scale
        held = {**held, f"{path}/lora_a": a, f"{path}/lora_b": problem.scale * b}
    filled(model, held)
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
    apply = lambda trainable, frozen, *x: nnx.merge(graph, trainable, frozen, copy=True)(*x)  # noqa: E731
    return peer("nnx.LoRA", problem, lambda: apply, trainable, frozen, exact=False)


class TunixPeer(JaxPeer):
    """`PeftTrainer`'s own training step, jitted and called as its `train` does."""

    def __init__(self, problem: Problem):
        import qwix
        from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

        self.name, self.exact, self.kind = "tunix PeftTrainer", True, "lora"
        self.batch = {name: jnp.asarray(x) for name, x in inputs(problem).items()}
        provider = qwix.LoraProvider(
            module_path=r".*([qkvo]|up|down)", rank=problem.rank, alpha=problem.alpha
        )
        model = Transformer(problem, nnx.Rngs(0))
        model = qwix.apply_lora_to_model(model, provider, self.batch["x"], rngs=nnx.Rngs(1))
        held = dict(arranged(problem, weights(problem)))
        for path, pair in arranged(problem, factors(problem)).items():
            held = {**held, f"{path}/kernel_lora_a": pair[0], f"{path}/kernel_lora_b": pair[1]}
        filled(model, held)
        config = TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
        self.trainer = PeftTrainer(model, optax.adamw(LEARNING_RATE), config)
        self.trainer.with_loss_fn(lambda model, x, target: mse(model(x), {"target": target}))
        self.trainer.with_gen_model_input_fn(lambda batch: batch)
        self.trainable = leaves(nnx.state(model, nnx.LoRAParam))
        self.start = jax.tree.map(jnp.array, nnx.state((model, self.trainer.optimizer)))

    def jitted(self) -> Any:
        return nnx.jit(self.trainer.create_train_step_fn(), donate_argnames=("optimizer",))

    def compile(self) -> tuple[float, float]:
        jax.clear_caches()
        start = time.perf_counter()
        lowered = self.jitted().lower(self.trainer.model, self.trainer.optimizer, self.batch)
        middle = time.perf_counter()
        self.program = lowered.compile()
        return middle - start, time.perf_counter() - middle

    def reset(self) -> None:
        nnx.update((self.trainer.model, self.trainer.optimizer), jax.tree.map(jnp.array, self.start))
        self.call = nnx.cached_partial(self.jitted(), self.trainer.model, self.trainer.optimizer)

    def step(self) -> tuple[float, float]:
        start = time.perf_counter()
        loss, _, norm = self.call(self.batch)
        jax.block_until_ready((loss, norm, nnx.state(self.trainer.model, nnx.LoRAParam)))
        return time.perf_counter() - start, float(loss)

    def costs(self) -> dict[str, float]:
        return counts(getattr(self.program, "compiled", self.program))


def tunix(problem: Problem) -> JaxPeer:
    if problem.decode:
        raise ValueError("a trainer does not decode")
    return TunixPeer(problem)
