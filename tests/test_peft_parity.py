"""Each method, init and optimizer against the real `peft`, run live; in an environment of its own.

Tiny torch modules are given PEFT adapters of random values, and the same arrays are put into adapters of
this library. Then changes of weights, merged weights, outputs, gradients by every adapter array and three
steps of AdamW must agree.

Where the two differ on purpose:

- PEFT's LoHa and LoKr know no rsLoRA scale, and start from other random values, as VeRA's shared factors do.
- PEFT's LoKr splits a side nearest to its root; ours takes a first factor of at most 8, but holds either.
  Where r is at least half of the second factor, PEFT makes that one full, which ours has no field for.
- A DoRA output of norm zero is NaN in PEFT and unscaled here.
- Under dropout PEFT's DoRA also drops inputs of the base product, ours only those of A.
- PEFT's LoRA of a dilated convolution fails (its A has no dilation), and one in groups holds B differently.
- PEFT's LoRA-FA projects B's gradient in bfloat16 where the machine can, ours in float32.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_pairs import (
    ALPHA,
    CASES,
    LYCORIS,
    RANK,
    Conv,
    Dense,
    gradient,
    lora,
    lora_config,
    make,
    optimizers,
    peft,
    torch,
    value,
    weight_layout,
)

import lorax_fn as lx

pytestmark = [
    pytest.mark.extra_env,
    pytest.mark.filterwarnings("ignore"),  # what torch, transformers and peft warn of is theirs
]


def close(got, want, tol, what=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max(), err_msg=what)


def trees_close(got, want, tol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        close(leaf, other, tol, jax.tree_util.keystr(path))


def run_both(pair, tx, optimizer, adapters, steps=3):
    """Adapters after some steps of `tx`; PEFT's model takes as many of its own optimizer."""
    state, grad = tx.init(adapters), jax.jit(jax.grad(lambda lora: pair.loss(lora)[0]))
    for _ in range(steps):
        updates, state = tx.update(grad(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        optimizer.zero_grad()
        pair.torch_loss()[0].backward()
        optimizer.step()
    return adapters


@pytest.mark.parametrize("case", CASES)
def test_weights_outputs_and_gradients_are_those_of_peft(case):
    pair = make(case)
    lora = pair.lora()
    changes = lx.delta(lora)
    assert ("dora" in case) == (not changes)
    for path, change in changes.items():
        want = pair.layer(path.removesuffix(".weight")).get_delta_weight("default")
        close(change, value(want), 1e-6, path)

    merged = copy.deepcopy(pair.model).merge_and_unload()
    for path, got in lx.merge(pair.params, lora).items():
        close(got, value(merged.get_parameter(path)), 1e-6, path)
        assert (path in lora) == (np.abs(np.asarray(got) - np.asarray(pair.params[path])).max() > 0.05), path

    (loss, y), grads = jax.jit(jax.value_and_grad(pair.loss, has_aux=True))(lora)
    torch_loss, torch_y = pair.torch_loss()
    torch_loss.backward()
    close(y, value(torch_y), 2e-6)
    close(loss, value(torch_loss), 2e-6)
    trees_close(grads, pair.read(gradient), 1e-5)
    for flag, leaf in zip(jax.tree.leaves(lx.mask(lora)), jax.tree.leaves(pair.read(gradient)), strict=True):
        assert flag == bool(np.any(leaf))


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "dora_conv", "dora_embedding", "vera", "lokr"])
def test_three_steps_of_adamw_end_where_peft_ends(case):
    """Learning rate 0.02, weight decay 0.1; a frozen factor stays as it is in both."""
    pair = make(case)
    start = pair.lora()
    tx = lx.train_only(optax.adamw(0.02, weight_decay=0.1))
    trained = [p for p in pair.model.parameters() if p.requires_grad]
    lora = run_both(pair, tx, torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1), start)
    trees_close(lora, pair.read(value), 1e-4)
    for flag, new, old in zip(*map(jax.tree.leaves, (lx.mask(start), lora, start)), strict=True):
        assert bool(np.abs(np.asarray(new) - np.asarray(old)).max() > 0.01) == flag


def test_loha_of_a_convolution_with_a_core_is_loha_with_the_core_multiplied_in():
    """PEFT's ``use_effective_conv2d`` factors A over the window once more; the change of W is of our form."""
    torch.manual_seed(0)
    config = peft.LoHaConfig(
        target_modules=["wide"], use_effective_conv2d=True, init_weights=False, **LYCORIS
    )
    layer = peft.get_peft_model(Conv(), config).base_model.model.wide
    factors = []
    for i in "12":
        core, up, down = (
            value(getattr(layer, f"hada_{n}")["default"]) for n in (f"t{i}", f"w{i}_a", f"w{i}_b")
        )
        factors += [np.einsum("ijhw,jn->nhwi", core, down), up]
    adapter = lx.LoHa(*factors, ALPHA, RANK, "lora", weight_layout(layer))
    close(adapter.delta(), value(layer.get_delta_weight("default")), 1e-6)


def test_a_dora_output_of_norm_zero_is_nan_in_peft_and_stays_zero_here():
    net = Dense()
    net.up.weight.data[3] = 0.0
    params = {"up.weight": jnp.asarray(value(net.up.weight))}
    layout = {"*": lx.Layout((), (1,), (0,))}
    frozen, adapters = lx.split(params, RANK, method="dora", layout=layout)
    np.testing.assert_array_equal(lx.merge(frozen, adapters)["up.weight"][3], np.zeros(12))
    model = peft.get_peft_model(net, lora_config(target_modules=["up"], use_dora=True))
    assert np.isnan(value(model(torch.ones(1, 12)))).any()


# Inits that take a part of W ----------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_inits_start_where_peft_starts(init, scaling):
    """Singular vectors and columns of Q have a sign each: residuals, products and subspaces do not."""
    torch.manual_seed(0)
    base = Dense()
    params0 = {f"{n}.weight": jnp.asarray(value(getattr(base, n).weight)) for n in ("up", "down")}
    layout = {"*": lx.Layout((), (1,), (0,))}
    params, adapters = lx.split(params0, RANK, alpha=ALPHA, scaling=scaling, init=init, layout=layout)
    config = lora_config(
        target_modules=["up", "down"], init_lora_weights=init, use_rslora=scaling == "rslora"
    )
    model = peft.get_peft_model(base, config)
    for path, adapter in adapters.items():
        layer = getattr(model.base_model.model, path.removesuffix(".weight"))
        want = lora(layer, value)
        assert adapter.scale == pytest.approx(want.scale)
        close(params[path], value(layer.get_base_layer().weight), 2e-6, path)
        close(lx.merge(params, adapters)[path], params0[path], 2e-6, path)
        close(adapter.delta(), value(layer.get_delta_weight("default")), 2e-6, path)
        for got, theirs in ((adapter.a, want.a), (adapter.b.T, want.b.T)):
            close(projector(got), projector(theirs), 1e-5, path)
            close(np.linalg.norm(got, axis=0), np.linalg.norm(theirs, axis=0), 1e-5, path)


def projector(columns):
    q, _ = np.linalg.qr(np.asarray(columns, np.float64))
    return q @ q.T


def test_to_plain_of_pissa_is_the_adapter_that_peft_converts_it_to(tmp_path):
    """PEFT's conversion at save: rank and alpha doubled, the same scale, the same change of the first W."""
    torch.manual_seed(0)
    base = Dense()
    params0 = {"up.weight": jnp.asarray(value(base.up.weight))}
    config = lora_config(target_modules=["up"], init_lora_weights="pissa")
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model.up
    start = lora(layer, value)
    model.peft_config["default"].init_lora_weights = True  # so that the starting adapter is saved as it is
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    frozen = {"up.weight": jnp.asarray(value(layer.get_base_layer().weight))}
    layer.lora_A["default"].weight.data += 0.3
    layer.lora_B["default"].weight.data -= 0.2
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    b, a = (saved[f"base_model.model.up.lora_{name}.weight"] for name in "BA")
    assert a.shape == (2 * RANK, 12) and start.rank == RANK
    plain = lx.ranks.to_plain(params0, frozen, {"up.weight": jax.tree.map(jnp.asarray, lora(layer, value))})
    assert plain["up.weight"].rank == 2 * RANK
    close(plain["up.weight"].delta(), start.scale * b @ a, 1e-5)


# Optimizers of the factors ------------------------------------------------------------------------------


def test_riemannian_steps_are_those_of_peft():
    pair = make("lora")
    optimizer = optimizers.create_riemannian_optimizer(pair.model, torch.optim.SGD, lr=0.05, reg=1e-2)
    tx = optax.chain(lx.optim.riemannian(damping=1e-2), optax.sgd(0.05))
    trees_close(run_both(pair, tx, optimizer, pair.lora()), pair.read(value), 1e-4)


def test_loraplus_steps_are_those_of_peft():
    pair = make("lora")
    optimizer = optimizers.create_loraplus_optimizer(
        pair.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    tx = lx.train_only(lx.optim.loraplus(optax.adamw(0.01, weight_decay=0.1), ratio=4.0))
    trees_close(run_both(pair, tx, optimizer, pair.lora()), pair.read(value), 1e-4)


def test_lora_fa_steps_are_those_of_peft(monkeypatch):
    """In float32, as this library projects B's gradient."""
    monkeypatch.setattr(optimizers.lorafa, "is_bf16_available", lambda: False)
    pair = make("lora")
    optimizer = optimizers.create_lorafa_optimizer(pair.model, r=RANK, lora_alpha=ALPHA, lr=0.02)
    optimizer.param_groups[0]["eps"] = 0.0  # the two Adams add it at different places
    fields = [field.name for field in dataclasses.fields(lx.LoRA)]
    start = {
        path: lx.LoRAFA(**{name: getattr(adapter, name) for name in fields})
        for path, adapter in pair.lora().items()
    }
    tx = lx.train_only(
        optax.chain(lx.optim.lora_fa_gradient(start), optax.adamw(0.02, eps=0.0, weight_decay=0.0))
    )
    got = run_both(pair, tx, optimizer, start)
    for path, want in pair.read(value).items():
        np.testing.assert_array_equal(got[path].a, want.a)
        close(got[path].b, want.b, 1e-4, path)
        assert np.abs(np.asarray(got[path].b) - np.asarray(start[path].b)).max() > 0.01
