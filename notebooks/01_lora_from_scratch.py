# %% [markdown]
# # 01 · LoRA from scratch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lorax-fn/lorax_fn/blob/main/notebooks/01_lora_from_scratch.ipynb)
#
# The heart of `lorax_fn`, rebuilt in 60 lines: a function is traced, and the traced program is run again with some weights replaced by
# three arrays. Then a look at the gradient: why the big one, `dW`, is never computed.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lorax_fn") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorax_fn"], check=True)

import jax

print(jax.default_backend(), jax.device_count())

# %%
import dataclasses

import jax.numpy as jnp
from jax.extend.core import Literal

import lorax_fn as lx

# %% [markdown]
# ## A model, and two thin matrices for each weight
#
# Nothing here knows of LoRA.


# %%
def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"])
    return h @ params["down"]["kernel"].T


N, M, R, T = 64, 256, 4, 128
keys = jax.random.split(jax.random.key(0), 4)
params = {
    "up": {"kernel": jax.random.normal(keys[0], (N, M)) / 8},
    "down": {"kernel": jax.random.normal(keys[1], (N, M)) / 16},  # used transposed
}
x = jax.random.normal(keys[2], (T, N))
y = jax.random.normal(keys[3], (T, N))

factors = {
    "up/kernel": (jax.random.normal(keys[2], (N, R)) / 8, jnp.zeros((R, M))),
    "down/kernel": (jax.random.normal(keys[3], (N, R)) / 8, jnp.zeros((R, M))),
}

# %% [markdown]
# ## The traced program
#
# `jax.make_jaxpr` gives what the model does, as a list of equations. Our weights are its first inputs.

# %%
jax.config.update("jax_pprint_use_color", False)
print(jax.make_jaxpr(model)(params, x))

# %% [markdown]
# ## The transform
#
# A weight in this program is a `Factored`: `W`, `A` and `B`, standing for `W + A @ B`. Two primitives get a rule. A product with `x`
# becomes `x @ W + (x @ A) @ B`; a transpose turns around all three parts, and A and B change places. Whatever has no rule gets the full
# matrix, which is right and slow.


# %%
@dataclasses.dataclass
class Factored:
    w: jax.Array  # [n, m]
    a: jax.Array  # [n, r]
    b: jax.Array  # [r, m]

    def full(self):
        return self.w + self.a @ self.b


def product(eqn, x, w):
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    if isinstance(x, Factored) or batch or contracted != (x.ndim - 1,):
        return None  # no rule
    ((_, w_axes), _) = eqn.params["dimension_numbers"]
    if w_axes != (0,):
        w = Factored(w.w.T, w.b.T, w.a.T)
    return [x @ w.w + (x @ w.a) @ w.b]


def transpose(eqn, w):
    return [Factored(w.w.T, w.b.T, w.a.T)]


RULES = {"dot_general": product, "transpose": transpose}


def evaluate(jaxpr, consts, arguments):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else known[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(variable) for variable in eqn.invars]
        outputs = None
        if eqn.primitive.name in RULES and any(isinstance(value, Factored) for value in inputs):
            outputs = RULES[eqn.primitive.name](eqn, *inputs)
        if outputs is None:
            inputs = [value.full() if isinstance(value, Factored) else value for value in inputs]
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def adapt(fn):
    def adapted(params, factors, *args):
        program, shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
        leaves = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            leaves.append(Factored(leaf, *factors[name]) if name in factors else leaf)
        outputs = evaluate(program.jaxpr, program.consts, [*leaves, *jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return adapted


# %% [markdown]
# With `B = 0` it is the model. With any other factors it is the model on merged weights: that is the oracle for every rule there is.

# %%
adapted = adapt(model)
assert jnp.allclose(adapted(params, factors, x), model(params, x), atol=1e-6)

trained = {
    name: (a, jax.random.normal(jax.random.key(i), b.shape) / 8)
    for i, (name, (a, b)) in enumerate(factors.items())
}
merged = {
    name: {"kernel": leaf["kernel"] + jnp.matmul(*trained[f"{name}/kernel"])} for name, leaf in params.items()
}
difference = jnp.abs(adapted(params, trained, x) - model(merged, x)).max()
print(f"adapted against merged: largest difference {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## Why dW is never computed
#
# For one layer `y = x W + (x A) B`, with `g` the gradient of the loss by `y`:
#
# | gradient | is | shape |
# |---|---|---|
# | by B | `(x A)^T g` | `[r, m]` |
# | by A | `x^T (g B^T)` | `[n, r]` |
# | by x | `g W^T + (g B^T) A^T` | `[T, n]` |
# | by W | `x^T g` | `[n, m]`: asked for by nobody |
#
# If the loss merged first, `x @ (W + A @ B)`, the chain rule would pass through the gradient by the sum, which is `x^T g`. Here
# are the shapes of all products in both gradients.


# %%
def loss(factors, forward):
    return jnp.mean((forward(params, factors, x) - y) ** 2)


def merge_first(params, factors, x):
    merged = {
        name: {"kernel": leaf["kernel"] + jnp.matmul(*factors[f"{name}/kernel"])}
        for name, leaf in params.items()
    }
    return model(merged, x)


def products(forward):
    program = jax.make_jaxpr(jax.grad(lambda factors: loss(factors, forward)))(trained).jaxpr
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn.outvars[0].aval.shape)
    return found


factored_shapes, merged_shapes = products(adapted), products(merge_first)
print("factored:   ", sorted(factored_shapes))
print("merge first:", sorted(merged_shapes))
large = {(N, M), (M, N)}
assert not large & set(factored_shapes)
assert len([shape for shape in merged_shapes if shape in large]) == 4  # two sums A @ B, two gradients dW


# %% [markdown]
# The compiler's count says the same: the gradient of the factored program has fewer operations.


# %%
def flops(forward):
    compiled = jax.jit(jax.grad(lambda factors, x: jnp.mean((forward(params, factors, x) - y) ** 2)))
    return compiled.lower(trained, x).compile().cost_analysis()["flops"]


print(f"factored {flops(adapted) / 1e6:.1f} MFLOP, merge first {flops(merge_first) / 1e6:.1f} MFLOP")
assert flops(adapted) < 0.85 * flops(merge_first)

# %% [markdown]
# ## The same by the library
#
# `lorax_fn` has the rules that are missing here (scan, reshape, gather, convolution, experts, ...), and keeps alpha, rank and
# layout in the adapter. Its result for these factors is ours.

# %%
frozen, lora = lx.split(params, rank=R, alpha=float(R), layout=lx.usage(model, params, x))
lora = {  # the layout of "down" says that axis 1 is its input, so A and B change names
    "up/kernel": dataclasses.replace(lora["up/kernel"], a=trained["up/kernel"][0], b=trained["up/kernel"][1]),
    "down/kernel": dataclasses.replace(
        lora["down/kernel"], a=trained["down/kernel"][1].T, b=trained["down/kernel"][0].T
    ),
}
library = lx.adapt(model, fallback="error")(frozen, lora, x)
difference = jnp.abs(library - adapted(params, trained, x)).max()
print(f"60 lines against the library: largest difference {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ## Training
#
# Gradient descent by the factors alone; the base stays where it is.

# %%
step = jax.jit(jax.value_and_grad(lambda factors: loss(factors, adapted)))
current, losses = factors, []
for _ in range(200):
    value, grads = step(current)
    losses.append(float(value))
    current = jax.tree.map(lambda p, g: p - 1.0 * g, current, grads)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.95 * losses[0]
