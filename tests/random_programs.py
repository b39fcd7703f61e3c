"""Random programs of one adapted weight: views of it, one after another, then a use, inside of something."""

import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lorax_fn as lx

SHAPES = [(4, 6), (6, 4), (2, 4, 6), (3, 2, 4), (4, 2, 3), (2, 3, 2, 4), (1, 6, 4)]
METHODS = ["lora", "lora", "lora", "dora", "vera", "loha", "lokr", "lora_xs"]


def axis_of(dice: random.Random, v) -> int:
    return dice.randrange(v.ndim)


def numbers(dice: random.Random, shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(dice.randrange(2**31)).uniform(0.5, 1.5, shape), jnp.float32)


def along(dice: random.Random, v) -> jax.Array:
    i = axis_of(dice, v)
    return numbers(dice, [n if j == i else 1 for j, n in enumerate(v.shape)])


def transposed(dice, v, i):
    axes = list(range(v.ndim))
    dice.shuffle(axes)
    return jnp.transpose(v, axes)


def merged(dice, v, i):
    k = dice.randrange(v.ndim - 1)
    return v.reshape(*v.shape[:k], v.shape[k] * v.shape[k + 1], *v.shape[k + 2 :])


def halved(dice, v, i):
    even = [k for k, n in enumerate(v.shape) if n % 2 == 0]
    if not even or v.ndim > 4:
        return v
    k = dice.choice(even)
    return v.reshape(*v.shape[:k], 2, v.shape[k] // 2, *v.shape[k + 1 :])


def cut(dice, v, i):
    k = axis_of(dice, v)
    start = dice.randrange(v.shape[k])
    return lax.slice_in_dim(v, start, dice.randrange(start, v.shape[k]) + 1, axis=k)


def cut_by_number(dice, v, i):
    k = axis_of(dice, v)
    return lax.dynamic_slice_in_dim(v, i[0], dice.randrange(v.shape[k]) + 1, k)


def taken(dice, v, i):
    k = axis_of(dice, v)
    return jnp.take(v, i[:3] % v.shape[k], axis=k, mode=dice.choice(["clip", "fill"]))


def taken_along_two(dice, v, i):
    return jax.vmap(lambda row, j: row[j])(v, jnp.resize(i, (v.shape[0], 2)) % v.shape[1])


def padded(dice, v, i):
    edges = [(dice.choice([0, 1, 2]), dice.choice([0, 0, 1]), dice.choice([0, 0, 1])) for _ in v.shape]
    return lax.pad(v, jnp.float32(dice.choice([0, 0.5])), edges)


def beside(dice, v, i):
    pair = [v, dice.choice([-v, 2 * v, numbers(dice, v.shape)])]
    dice.shuffle(pair)
    return lax.concatenate(pair, axis_of(dice, v)) if dice.random() < 0.5 else jnp.stack(pair)


def overwritten(dice, v, i):
    rows = numbers(dice, (1, *v.shape[1:]))
    return lax.dynamic_update_slice_in_dim(v, rows, i[0], 0)


def standardized(dice, v, i):
    k = axis_of(dice, v)
    return (v - v.mean(k, keepdims=True)) / (1 + jnp.square(v).mean(k, keepdims=True))


VIEWS: list[Callable] = [
    transposed, merged, halved, cut, cut_by_number, taken, taken_along_two, padded, beside, overwritten,
    standardized,
    lambda dice, v, i: v * along(dice, v),
    lambda dice, v, i: v / along(dice, v),
    lambda dice, v, i: -v + numbers(dice, v.shape),
    lambda dice, v, i: v.sum(axis_of(dice, v)),
    lambda dice, v, i: jnp.where(numbers(dice, (v.shape[0], *(1,) * (v.ndim - 1))) > 1, v, 0.0),
    lambda dice, v, i: jnp.expand_dims(v, axis_of(dice, v)),
    lambda dice, v, i: jnp.broadcast_to(v, (2, *v.shape)),
    lambda dice, v, i: jnp.tile(v, [dice.choice([1, 2]) for _ in v.shape]),
    lambda dice, v, i: lax.rev(v, [axis_of(dice, v)]),
    lambda dice, v, i: jax.vmap(lambda k: v * k)(numbers(dice, (2,))),
    lambda dice, v, i: jax.vmap(lambda row, k: row * k)(v, numbers(dice, v.shape[:1])),
    lambda dice, v, i: jax.jit(lambda w: jnp.swapaxes(w, 0, -1) * 0.5)(v),
    lambda dice, v, i: jax.nn.relu(v),
    lambda dice, v, i: v[:0] if dice.random() < 0.2 else v,
]  # fmt: skip


def product(dice, v, x):
    names, out = "abcdefg"[: v.ndim], [c for c in "abcdefg"[: v.ndim] if dice.random() < 0.5]
    shared = [c for c in names if c not in out or dice.random() < 0.3]
    sizes = dict(zip(names, v.shape, strict=True))
    left = jnp.resize(x, (2, *(sizes[c] for c in shared))) * numbers(dice, (2, *(sizes[c] for c in shared)))
    return jnp.einsum(f"t{''.join(shared)},{names}->t{''.join(out)}", left, v)


def tied(dice, v, x):
    v = v.reshape(-1, v.shape[-1]) if v.ndim != 2 else v
    return jnp.tanh(jnp.resize(x, (3, v.shape[0])) @ v) @ v.T


USES: list[Callable] = [product, product, product, tied, lambda dice, v, x: jnp.tanh(v)]


def in_loop(fn, w, x, i):
    return lax.scan(lambda c, _: (c + fn(w, x + c[0], i)[0], None), jnp.zeros(6), None, length=2)[0]


INSIDE: list[Callable] = [
    lambda fn, w, x, i: fn(w, x, i),
    lambda fn, w, x, i: jax.jit(fn)(w, x, i),
    lambda fn, w, x, i: jax.checkpoint(fn)(w, x, i),
    lambda fn, w, x, i: jax.vmap(fn, (None, 0, None))(w, jnp.stack([x, x[::-1]]), i),
    lambda fn, w, x, i: jax.vmap(fn, (None, None, 0))(w, x, jnp.stack([i, i[::-1]])),
    lambda fn, w, x, i: lax.cond(i[0] >= 0, fn, lambda w, x, i: 2 * fn(w, x, i), w, x, i),
    lambda fn, w, x, i: jax.jvp(lambda x: fn(w, x, i), (x,), (x,))[1],
    lambda fn, w, x, i: jax.grad(lambda x: fn(w, x, i).sum())(x),
    in_loop,
]


def make(seed: int):
    """``(fn(w, x, i) -> array, params, lora)``, the same for each seed."""
    dice = random.Random(seed)
    shape = dice.choice(SHAPES)
    roles = ["inputs", "outputs", *(dice.choice(["stack", "inputs", "outputs"]) for _ in shape[2:])]
    dice.shuffle(roles)
    layout = lx.Layout(
        **{
            role: tuple(i for i, r in enumerate(roles) if r == role)
            for role in ("stack", "inputs", "outputs")
        }
    )
    method, inside = dice.choice(METHODS), dice.choice(INSIDE)
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)}
    rank = min(2, *(int(np.prod(sizes)) for sizes in layout.shapes(shape)[1:]))
    try:
        params, lora = lx.split(params, rank=rank, targets=["w"], layout={"w": layout}, method=method)
    except lx.LoraError:  # not every method serves every shape
        params, lora = lx.split(params, rank=rank, targets=["w"], layout={"w": layout})
    trains = lx.mask(lora)
    lora = jax.tree.map(
        lambda leaf, t: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) if t else leaf,
        lora, trains,
    )  # fmt: skip
    views = [dice.choice(VIEWS) for _ in range(dice.randrange(1, 4))]
    use, later = dice.choice(USES), dice.randrange(2**31)

    def body(w, x, i):
        again = random.Random(later)  # the same choices at every trace
        for view in views:
            if w.ndim >= 2 and w.size and w.size < 3000:
                w = view(again, w, i)
        w = w if w.ndim >= 2 else w.reshape(1, -1)
        y = use(again, w, x) if w.size else jnp.zeros((1,)) + w.sum()
        return jnp.tanh(jnp.resize(jnp.ravel(y), (6,)) + y.sum() / 7)

    return lambda w, x, i: inside(body, w, x, i), params, lora
