"""A way to train on JAX: a jitted step, its compilation and the compiler's own counts."""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

LEARNING_RATE = 1e-4  # of every library's AdamW


def leaves(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if hasattr(x, "size"))


def mse(output: jax.Array, batch: dict) -> jax.Array:
    return jnp.mean(jnp.square((output - batch["target"]).astype(jnp.float32)))


def loss_of(output: jax.Array, batch: dict) -> jax.Array:
    """The mean square error, or for logits of tokens the cross-entropy."""
    if not jnp.issubdtype(batch["target"].dtype, jnp.integer):
        return mse(output, batch)
    logits = output.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()


class JaxPeer:
    """``step(carried, fixed) -> (carried, loss)``, compiled ahead of time; what is carried is donated.

    ``exact`` says that the losses of later steps too must equal those of LoRA by hand: a library without
    alpha, whose B holds the scale, and full fine-tuning share the first loss alone.
    """

    def __init__(
        self,
        name: str,
        make_step: Callable[[], Callable],
        carried: Any,
        fixed: Any,
        trainable: int,
        *,
        exact: bool = True,
        kind: str = "lora",
    ):
        self.name, self.make_step, self.trainable = name, make_step, trainable
        self.start, self.fixed = carried, jax.tree.map(jnp.asarray, fixed)
        self.exact, self.kind = exact, kind
        self.program: Any = None
        self.carried: Any = None

    def compile(self) -> tuple[float, float]:
        """Seconds to trace and to compile, with cleared caches."""
        carried = jax.block_until_ready(self.fresh())
        jax.clear_caches()
        gc.collect()  # or what the way before left behind is collected here, in this one's time
        jitted = jax.jit(self.make_step(), donate_argnums=0)
        start = time.perf_counter()
        lowered = jitted.lower(carried, self.fixed)
        middle = time.perf_counter()
        self.program = lowered.compile()
        return middle - start, time.perf_counter() - middle

    def fresh(self) -> Any:
        return jax.tree.map(jnp.array, self.start)

    def reset(self) -> None:
        self.carried = jax.block_until_ready(self.fresh())

    def step(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        start = time.perf_counter()
        self.carried, loss, *others = jax.block_until_ready(self.program(self.carried, self.fixed))
        seconds = time.perf_counter() - start
        del others
        return seconds, float(loss)

    def costs(self) -> dict[str, float]:
        return counts(self.program)

    def close(self) -> None:
        self.carried = None


def counts(program: Any) -> dict[str, float]:
    """FLOPs, bytes accessed and bytes of temporaries, as counted by the compiler."""
    analysis = program.cost_analysis()
    return {
        **{of: analysis[of] for of in ("flops", "bytes accessed") if of in analysis},
        "temp bytes": program.memory_analysis().temp_size_in_bytes,
    }


def training(
    name: str, make_loss: Callable, trainable: Any, frozen: Any, batch: dict, **facts: Any
) -> JaxPeer:
    """One AdamW step of ``loss(trainable, frozen, batch)``."""
    trainable = jax.tree.map(jnp.asarray, trainable)

    def make_step():
        loss, tx = make_loss(), optax.adamw(LEARNING_RATE)

        def step(carried, fixed):
            trainable, state = carried
            value, grads = jax.value_and_grad(loss)(trainable, *fixed)
            updates, state = tx.update(grads, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        return step

    carried = trainable, optax.adamw(LEARNING_RATE).init(trainable)
    return JaxPeer(name, make_step, carried, (frozen, batch), leaves(trainable), **facts)


def decoding(
    name: str, make_run: Callable, trainable: Any, frozen: Any, batch: dict, **facts: Any
) -> JaxPeer:
    """One token through ``run(trainable, frozen, x, keys, values) -> (y, new keys and values)``."""

    def make_step():
        run = make_run()

        def step(x, fixed):
            trainable, frozen, keys, values = fixed
            y, new = run(trainable, frozen, x, keys, values)
            return y, jnp.mean(jnp.square(y)), new

        return step

    fixed = trainable, frozen, batch["keys"], batch["values"]
    return JaxPeer(name, make_step, jnp.asarray(batch["x"]), fixed, leaves(trainable), **facts)
