"""Networks and adapters in torch with PEFT and in JAX with this library, on the same arrays.

Weights stay as torch stores them, (out, in): only the `Layout` says so.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lx

torch = pytest.importorskip("torch", reason="torch is not installed: make test-peft", exc_type=ImportError)
peft = pytest.importorskip("peft", reason="peft is not installed: make test-peft", exc_type=ImportError)
optimizers = pytest.importorskip("peft.optimizers")
torch.set_num_threads(1)
RANK, ALPHA = 2, 6.0

# The networks, in torch and in JAX, on the same arrays -------------------------------------------------


class Dense(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def dense(params, x):
    h = jnp.tanh(x @ params["up.weight"].T + params["up.bias"][None])
    return h @ params["down.weight"].T + params["down.bias"][None]


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.tall = torch.nn.Conv2d(12, 8, (3, 2), padding=(0, 1))
        self.line = torch.nn.Conv1d(8, 6, 3)

    def forward(self, x):
        return self.line(torch.tanh(self.tall(torch.tanh(self.wide(x)))).flatten(2))


def conv(params, x):
    two, one = ("NCHW", "OIHW", "NCHW"), ("NCH", "OIH", "NCH")
    x = lax.conv_general_dilated(x, params["wide.weight"], (2, 2), [(1, 1)] * 2, dimension_numbers=two)
    x = jnp.tanh(x + params["wide.bias"][None, :, None, None])
    x = lax.conv_general_dilated(x, params["tall.weight"], (1, 1), [(0, 0), (1, 1)], dimension_numbers=two)
    x = jnp.tanh(x + params["tall.bias"][None, :, None, None]).reshape(*x.shape[:2], -1)
    x = lax.conv_general_dilated(x, params["line.weight"], (1,), "VALID", dimension_numbers=one)
    return x + params["line.bias"][None, :, None]


class Lookup(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 5)

    def forward(self, ids):
        return self.out(torch.tanh(self.table(ids)))


def lookup(params, ids):
    return jnp.tanh(params["table.weight"][ids]) @ params["out.weight"].T + params["out.bias"][None, None]


NETS = {"dense": (Dense, dense), "conv": (Conv, conv), "lookup": (Lookup, lookup)}


def inputs(net):
    rng = np.random.default_rng(1)
    shape = {"dense": (7, 12), "conv": (2, 6, 9, 11)}.get(net)
    return rng.integers(0, 13, (3, 4)) if shape is None else rng.normal(size=shape).astype(np.float32)


# PEFT's adapters as adapters of this library ------------------------------------------------------------
# Each takes PEFT's layer and `read`, which gives a parameter's value or its gradient as an array: so that a
# tree of PEFT's gradients is made in the very same way as the tree of its adapters.


def weight_layout(layer):
    if isinstance(layer.get_base_layer(), torch.nn.Embedding):
        return lx.Layout((), (0,), (1,))
    return lx.Layout((), tuple(range(1, layer.get_base_layer().weight.ndim)), (0,))


def lora(layer, read):
    if isinstance(layer.get_base_layer(), torch.nn.Embedding):
        a, b = read(layer.lora_embedding_A["default"]), read(layer.lora_embedding_B["default"])
    else:
        a, b = read(layer.lora_A["default"].weight), read(layer.lora_B["default"].weight)
    scaling = "rslora" if layer.use_rslora["default"] else "lora"
    b = b.reshape(b.shape[0], -1).T
    facts = (np.moveaxis(a, 0, -1), b, layer.lora_alpha["default"], b.shape[0], scaling, weight_layout(layer))
    if not layer.use_dora["default"]:
        return lx.LoRA(*facts)
    return lx.DoRA(*facts, magnitude=read(layer.lora_magnitude_vector["default"].weight).reshape(-1))


def vera(layer, read):
    out, n = layer.get_base_layer().weight.shape
    a, b = read(layer.vera_A["default"])[:, :n].T, read(layer.vera_B["default"])[:out].T
    d, gain = read(layer.vera_lambda_d["default"]), read(layer.vera_lambda_b["default"])
    return lx.VeRA(a, b, d, gain, len(d), weight_layout(layer))


def loha(layer, read):
    shape = layer.get_base_layer().weight.shape
    factors = []
    for up, down in (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
        a, b = (read(getattr(layer, name)["default"]) for name in (down, up))
        factors += [a.T.reshape(*shape[1:], -1), b.T]
    return lx.LoHa(*factors, layer.alpha["default"], layer.r["default"], "lora", weight_layout(layer))


def lokr(layer, read):
    w1, up, down = (read(getattr(layer, name)["default"]) for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))
    facts = (layer.alpha["default"], layer.r["default"], "lora", weight_layout(layer))
    return lx.LoKr(w1.T, down.T, up.T, *facts, sizes=tuple(layer.get_base_layer().weight.shape))


def lora_config(**options):
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options)


LYCORIS = dict(r=RANK, alpha=ALPHA)
CASES = {  # name: (network, its adapted modules, PEFT's configuration, how its layers are read)
    "lora": ("dense", ["up", "down"], lora_config, lora),
    "rslora": ("dense", ["up", "down"], functools.partial(lora_config, use_rslora=True), lora),
    "patterns": (
        "dense",
        ["up", "down"],
        functools.partial(lora_config, rank_pattern={"up": 3}, alpha_pattern={"down": 5.0}),
        lora,
    ),
    "dora": ("dense", ["up", "down"], functools.partial(lora_config, use_dora=True), lora),
    "lora_conv": ("conv", ["wide", "tall", "line"], lora_config, lora),
    "dora_conv": ("conv", ["wide", "tall", "line"], functools.partial(lora_config, use_dora=True), lora),
    "lora_embedding": ("lookup", ["table", "out"], lora_config, lora),
    "dora_embedding": ("lookup", ["table", "out"], functools.partial(lora_config, use_dora=True), lora),
    "vera": ("dense", ["up", "down"], functools.partial(peft.VeraConfig, r=9), vera),
    "loha": ("dense", ["up", "down"], functools.partial(peft.LoHaConfig, **LYCORIS), loha),
    "loha_conv": ("conv", ["wide", "tall", "line"], functools.partial(peft.LoHaConfig, **LYCORIS), loha),
    "lokr": ("dense", ["up", "down"], functools.partial(peft.LoKrConfig, **LYCORIS | {"r": 1}), lokr),
    "lokr_conv": ("conv", ["wide", "line"], functools.partial(peft.LoKrConfig, **LYCORIS | {"r": 1}), lokr),
}


def value(parameter):
    return parameter.detach().numpy().copy()


def gradient(parameter):
    return np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy().copy()


@dataclasses.dataclass
class Pair:
    """One case in both libraries; `read` makes adapters of PEFT's values or gradients."""

    model: torch.nn.Module
    modules: list[str]
    convert: object
    fn: object
    params: dict
    x: np.ndarray
    target: np.ndarray

    def layer(self, name):
        return getattr(self.model.base_model.model, name)

    def read(self, how):
        return {f"{name}.weight": self.convert(self.layer(name), how) for name in self.modules}

    def lora(self):
        return jax.tree.map(jnp.asarray, self.read(value))

    def loss(self, lora):
        y = lx.adapt(self.fn, fallback="error")(self.params, lora, self.x)
        return jnp.mean(jnp.square(y - self.target)), y

    def torch_loss(self):
        y = self.model(torch.tensor(self.x))
        return torch.mean(torch.square(y - torch.tensor(self.target))), y


def make(case):
    net, modules, config, convert = CASES[case]
    make_net, fn = NETS[net]
    torch.manual_seed(0)
    base = make_net()
    params = {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, config(target_modules=modules)).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # away from its start, where half of all gradients are zero
            magnitude = "magnitude" in name
            parameter.data = torch.randn(parameter.shape) * 0.5 + (parameter.data if magnitude else 0.0)
    x = inputs(net)
    shape = jax.eval_shape(fn, params, x).shape
    return Pair(
        model, modules, convert, fn, params, x, np.random.default_rng(2).normal(size=shape).astype("f4")
    )
