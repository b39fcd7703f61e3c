"""One small model for one device, pmap and meshes: the same state, batch and step, whatever runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import lorax_fn as lx

P = jax.P
STEPS = 20
RULES = {
    "bias": P(),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
    "layers": P(None, "fsdp", "tensor"),
}
TX = optax.adam(1e-2)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def normal(seed, shape, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dot(x, w):
    """``x @ w`` with rows left where they are, whole: what a model says of its activations on a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = P(tuple(name for name in ("data", "fsdp") if name in mesh.shape), None)
    if mesh.empty:
        return x @ w
    if mesh.are_all_axes_explicit:
        return jnp.einsum("bn,nm->bm", x, w, out_sharding=rows)
    return jax.lax.with_sharding_constraint(x @ w, rows)


def model(params, x, checkpoint=False):
    def body(x, w):
        return jnp.tanh(dot(x, w)), None

    x = dot(jax.nn.relu(x @ params["up"]["kernel"]), params["down"]["kernel"]) + params["down"]["bias"][None]
    return jax.lax.scan(jax.checkpoint(body) if checkpoint else body, x, params["layers"]["kernel"])[0]


LAYOUT = {
    "layers": lx.Layout((0,), (1,), (2,)),
    "up": lx.Layout((), (0,), (1,)),
    "down": lx.Layout((), (0,), (1,)),
}


def base():
    return {
        "up": {"kernel": normal(0, (8, 16), 0.3)},
        "down": {"kernel": normal(1, (16, 8), 0.3), "bias": np.zeros(8, np.float32)},
        "layers": {"kernel": normal(2, (3, 8, 8), 0.3)},
    }


def make(*, accumulate=1, checkpoint=False, extra=False, tx=TX, **options):
    """``(loss_fn, state, params, batch)``; with ``extra`` the loss keeps means of its inputs."""
    params, lora = lx.split(jax.tree.map(jnp.asarray, base()), rank=2, layout=LAYOUT, full="bias", **options)
    adapted = lx.adapt(model, fallback="error")

    def loss_fn(params, lora, batch, key, stats=None):
        out = adapted(params, lora, batch["x"], checkpoint=checkpoint)
        loss = jnp.mean((out - batch["y"]) ** 2)
        if stats is None:
            return loss
        stats = {"mean": 0.9 * stats["mean"] + 0.1 * jnp.mean(batch["x"], 0), "n": stats["n"] + 1}
        return loss, (stats, {"twice": 2 * loss, "noise": jax.random.normal(key)})

    stats = {"mean": jnp.zeros(8), "n": jnp.zeros((), jnp.int32)} if extra else None
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(7), extra=stats)
    batch = {"x": normal(3, (16, 8)), "y": normal(4, (16, 8))}
    return loss_fn, state, params, batch


def mesh_of(sizes, kind):
    names = ("data", "fsdp", "tensor")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(KINDS[kind],) * len(sizes))


def rules_of(mesh):
    """RULES without the axes that the mesh lacks."""
    return {
        pattern: P(*(axis if axis in mesh.shape else None for axis in spec))
        for pattern, spec in RULES.items()
    }
