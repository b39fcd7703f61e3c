"""Files of the real `peft`, in and out, run live; in an environment of its own.

What PEFT saved is loaded here and gives its merged weights; what is saved here is loaded by PEFT, with equal
outputs, and PEFT saves the very same keys, numbers and fields again.
"""

import copy
import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from peft_pairs import ALPHA, CASES, NETS, RANK, inputs, lora_config, make, peft, torch, value

import lorax_fn as lx

pytestmark = [pytest.mark.extra_env, pytest.mark.filterwarnings("ignore")]

MORE = {  # name: (network, PEFT's configuration)
    "bias_all": ("dense", functools.partial(lora_config, target_modules=["up"], bias="all")),
    "bias_lora_only": ("dense", functools.partial(lora_config, target_modules=["up"], bias="lora_only")),
    "lora_bias": ("dense", functools.partial(lora_config, target_modules=["up"], lora_bias=True)),
    "saved": ("dense", functools.partial(lora_config, target_modules=["up"], modules_to_save=["down"])),
    "tokens": (
        "lookup",
        functools.partial(lora_config, target_modules=["out"], trainable_token_indices={"table": [3, 1, 7]}),
    ),
    "regex": (
        "dense",
        functools.partial(
            lora_config, target_modules="up|down", rank_pattern={"u.": 4}, alpha_pattern={"^up": 3}
        ),
    ),
    "lokr_whole": ("dense", functools.partial(peft.LoKrConfig, r=4, alpha=6, target_modules=["up", "down"])),
    "lokr_both": (
        "dense",
        functools.partial(peft.LoKrConfig, r=1, alpha=6, target_modules=["up"], decompose_both=True),
    ),
    "lokr_core": (
        "conv",
        functools.partial(peft.LoKrConfig, r=1, alpha=6, target_modules=["wide"], use_effective_conv2d=True),
    ),
    "loha_core": (
        "conv",
        functools.partial(peft.LoHaConfig, r=2, alpha=6, target_modules=["wide"], use_effective_conv2d=True),
    ),
    "adalora": (
        "dense",
        functools.partial(
            peft.AdaLoraConfig, init_r=3, lora_alpha=6, total_step=10, target_modules=["up", "down"]
        ),
    ),
}
SAME_FILE = {*CASES, "bias_lora_only", "saved", "tokens"} - {"lokr", "lokr_conv"}


def model_of(name):
    if name in CASES:
        pair = make(name)
        return pair.model, NETS[CASES[name][0]]
    net, config = MORE[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(NETS[net][0](), config()).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.4
    return model, NETS[net]


def base_of(net):
    torch.manual_seed(0)
    base = net()
    return base, {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_a_file_of_peft_gives_its_merged_weights_and_goes_back(name, tmp_path):
    model, (net, fn) = model_of(name)
    base, params = base_of(net)
    model.save_pretrained(tmp_path / "theirs")
    lora = lx.peft.load(tmp_path / "theirs", params)
    merged = copy.deepcopy(model).merge_and_unload()
    got = lx.merge(params, lora)
    for path, want in merged.named_parameters():
        path = path.replace("token_adapter.base_layer.", "")
        np.testing.assert_allclose(got[path], value(want), atol=2e-6, err_msg=path)
    x = inputs(next(key for key, pair in NETS.items() if pair[0] is net))
    want = model.eval()(torch.tensor(x)).detach().numpy()
    if lora:
        np.testing.assert_allclose(
            lx.adapt(fn)(params, lora, x), want, rtol=0, atol=1e-5 * np.abs(want).max()
        )

    mapping = {"table^E": "table.weight", "out": "out.weight"} if net is NETS["lookup"][0] else None
    named = lx.peft.load(tmp_path / "theirs", params, mapping=mapping)
    for path in lora:
        np.testing.assert_array_equal(got[path], lx.merge(params, named)[path])
    config = lx.peft.config(tmp_path / "theirs")
    lx.peft.save(tmp_path / "ours", lora, params=params, mapping=mapping, config=config)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(
        again(torch.tensor(x)).detach().numpy(), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )
    if name in SAME_FILE:
        again.save_pretrained(tmp_path / "again")
        same_files(tmp_path / "ours", tmp_path / "again")
        if not name.startswith("lokr"):
            same_files(tmp_path / "theirs", tmp_path / "ours")


def same_files(one, other):
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    a, b = (json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other))
    for key in a.keys() & b.keys():
        x, y = (sorted(z) if isinstance(z, list) else z for z in (a[key], b[key]))
        assert x == y or {key} <= {"modules_to_save", "peft_version", "auto_mapping"}, key


class Experts(torch.nn.Module):
    """Two 3-D parameters, registered in the order that is asked for."""

    def __init__(self, order):
        super().__init__()
        shapes = {"gate_up_proj": (3, 8, 6), "down_proj": (3, 6, 4), "even_a": (3, 5, 5), "even_b": (3, 5, 5)}
        for name in order:
            self.register_parameter(name, torch.nn.Parameter(torch.randn(*shapes[name])))


class Moe(torch.nn.Module):
    def __init__(self, order):
        super().__init__()
        self.experts, self.lin = Experts(order), torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize(
    "order",
    [
        ("gate_up_proj", "down_proj"),
        ("even_b", "even_a"),
        ("even_a", "even_b"),
        ("down_proj", "gate_up_proj"),
    ],
)
def test_expert_parameters_nest_by_registration(order, tmp_path):
    torch.manual_seed(0)
    base = Moe(order)
    params = {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}
    config = lora_config(target_modules=["lin"], target_parameters=sorted(f"experts.{n}" for n in order))
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    mapping = {"lin": "lin.weight"} | {f"experts.{n}=": f"experts.{n}" for n in order}
    layout = {f"experts.{n}": lx.Layout((0,), (2,), (1,)) for n in order}
    lora = lx.peft.load(tmp_path / "theirs", params, mapping=mapping, layout=layout)
    lx.peft.save(tmp_path / "ours", lora, params=params, mapping=mapping)
    same_files(tmp_path / "theirs", tmp_path / "ours")
    merged = model.merge_and_unload()
    got = lx.merge(params, lora)
    for path, want in merged.named_parameters():
        np.testing.assert_allclose(got[path], value(want), atol=1e-5, err_msg=path)
        assert np.abs(got[path] - params[path]).max() > 0.1 or path == "lin.bias"


def test_pissa_goes_through_to_plain(tmp_path):
    torch.manual_seed(0)
    base = NETS["dense"][0]()
    params0 = {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}
    params, lora = lx.split(params0, RANK, alpha=ALPHA, init="pissa")
    lora = {path: dataclasses.replace(x, a=x.a * 1.1) for path, x in lora.items()}
    with pytest.raises(lx.LoraError, match="to_plain"):
        lx.peft.save(tmp_path, lora)
    lx.peft.save(tmp_path, lx.ranks.to_plain(params0, params, lora))
    model = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for path, want in lx.merge(params, lora).items():
        np.testing.assert_allclose(want, value(model.get_parameter(path)), atol=1e-5)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.h = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(12, 20)}) for _ in range(3))

    def forward(self, x):
        return sum(layer["up"](x) for layer in self.h)


@pytest.mark.parametrize(
    "config",
    [
        functools.partial(peft.LoHaConfig, r=2, alpha=6),
        functools.partial(peft.LoKrConfig, r=2, alpha=6),
        functools.partial(peft.VeraConfig, r=5),
    ],
)
def test_layers_of_peft_fill_one_leaf(config, tmp_path):
    """LoHa, LoKr and VeRA: one module per layer there, one stacked weight here, and back."""
    torch.manual_seed(0)
    base = Layers()
    kernel = np.stack([value(layer["up"].weight).T for layer in base.h])
    params = {"up": {"kernel": jnp.asarray(kernel)}}
    model = peft.get_peft_model(base, config(target_modules=["up"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    mapping, layout = {"h.{i}.up": "up/kernel"}, {"up": lx.Layout((0,), (1,), (2,))}
    lora = lx.peft.load(tmp_path / "theirs", params, mapping=mapping, layout=layout)
    lx.peft.save(tmp_path / "ours", lora, mapping=mapping)
    torch.manual_seed(0)
    for merged in (model, peft.PeftModel.from_pretrained(Layers(), tmp_path / "ours")):
        want = np.stack([value(layer["up"].weight).T for layer in merged.merge_and_unload().h])
        np.testing.assert_allclose(lx.merge(params, lora)["up"]["kernel"], want, atol=1e-5)
        assert np.abs(want - kernel).max() > 0.1


class Grouped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        return self.conv(x)


def test_a_convolution_in_groups_is_refused_as_peft_refuses_to_merge_it(tmp_path):
    """PEFT's A acts on all channels, W on its own group's: the two are no one weight."""
    base = Grouped()
    params = {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, lora_config(target_modules=["conv"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(lx.LoraError, match="in 2 groups: A acts on all channels"):
        lx.peft.load(tmp_path, params)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()


def test_vera_of_ours_shares_its_factors_in_peft(tmp_path):
    """Our A of fewer inputs is a corner of the largest but for one factor, which goes into d."""
    torch.manual_seed(0)
    base = NETS["dense"][0]()
    params = {name: jnp.asarray(value(p)) for name, p in base.named_parameters()}
    _, lora = lx.split(params, 5, method="vera")
    rng = np.random.default_rng(0)
    lora = {
        p: dataclasses.replace(
            x, gain=jnp.asarray(rng.normal(size=x.gain.shape), "float32"), d=x.d * rng.normal()
        )
        for p, x in lora.items()
    }
    lx.peft.save(tmp_path, lora)
    model = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for path, want in lx.merge(params, lora).items():
        np.testing.assert_allclose(value(model.get_parameter(path)), want, atol=1e-5)
        np.testing.assert_allclose(lx.merge(params, lx.peft.load(tmp_path, params))[path], want, atol=1e-5)
