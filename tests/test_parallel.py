"""One device, pmap and meshes give the same training: losses, adapters, statistics, compilations, buffers."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled
from jax.sharding import NamedSharding
from many_devices import LAYOUT, RULES, STEPS, TX, P, make, mesh_of, model, rules_of

import lorax_fn as lx

ENGINES = ["pmap", "auto8", "explicit8", "auto222", "explicit222"]
FORMS = {
    f"accumulate{a}{'-checkpoint' * c}{'-extra' * e}": dict(accumulate=a, checkpoint=c, extra=e)
    for a, c, e in itertools.product((1, 2), (False, True), (False, True))
}
SHORT = ["accumulate1", "accumulate2-checkpoint-extra"]
DEFAULT, SLOW = SHORT, [pytest.param(name, marks=pytest.mark.slow) for name in FORMS if name not in SHORT]


def train(step, state, params, batch, read=lambda x: x):
    losses, names = [], []
    for _ in range(STEPS):
        with compiled(names):
            state, metrics = step(state, params, batch)
        losses.append(float(read(metrics["loss"])))
    assert len(names) == 1, names
    return losses, jax.device_get(read(state)), jax.device_get(read(metrics))


@functools.cache
def one_device(form):
    loss_fn, state, params, batch = make(**FORMS[form])
    step = jax.jit(lx.make_train_step(loss_fn, TX, accumulate=FORMS[form]["accumulate"]), donate_argnums=0)
    return train(step, state, params, batch)


def engine(name, form):
    """``(step, state, params, batch, read)``, everything in its place."""
    loss_fn, state, params, batch = make(**FORMS[form])
    accumulate = FORMS[form]["accumulate"]
    if name == "pmap":
        step = lx.pmap_train_step(loss_fn, TX, accumulate=accumulate)
        return step, lx.replicate(state), lx.replicate(params), lx.shard(batch), lx.unreplicate
    mesh = mesh_of((8,) if name.endswith("8") else (2, 2, 2), name.rstrip("82"))
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=rules_of(mesh), accumulate=accumulate)
    return step, *step.place(state, params), batch, lambda x: x


def close(got, want, tolerance=1e-5):
    """By the relative norm of each leaf, in float32."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", DEFAULT + SLOW)
@pytest.mark.parametrize("name", ENGINES)
def test_the_same_losses_and_adapters_as_one_device(name, form):
    want_losses, want, want_metrics = one_device(form)
    step, state, params, batch, read = engine(name, form)
    given = jax.tree.leaves((state.lora, state.opt_state))
    losses, got, metrics = train(step, state, params, batch, read)

    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    close(got.lora, want.lora)
    close(got.opt_state, want.opt_state, 1e-3)  # the mean of gradients that nearly cancel
    assert got.step == STEPS
    if FORMS[form]["extra"]:
        close(got.extra["mean"], want.extra["mean"])
        assert got.extra["n"] == want.extra["n"] == STEPS * FORMS[form]["accumulate"]
        close(metrics["aux"]["twice"], want_metrics["aux"]["twice"])
    assert all(x.is_deleted() for x in given)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


MIXED = {"up": "dora", "down": "loha", "layers": "lokr"}
OTHERS = {"up": "vera", "down": "lora_fa", "layers": "dora"}


@pytest.mark.parametrize(
    "methods", [pytest.param(MIXED, marks=pytest.mark.slow), OTHERS], ids=["mixed", "others"]
)
def test_every_method_trains_on_a_mesh_as_on_one_device(methods):
    """Each weight has another method, so that one program holds several."""
    loss_fn, state, params, batch = make(method=methods)
    want, wanted = jax.device_get(jax.jit(lx.make_train_step(loss_fn, TX))(state, params, batch))
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh_of((2, 2, 2), "auto"), rules=RULES)
    got, metrics = step(state, params, batch)
    np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=1e-5)
    close(jax.device_get(got.lora), want.lora)


def gathered(text):
    """How often a program gathers a shape from several devices."""
    return collections.Counter(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text))


def test_a_lora_step_gathers_no_weight_that_the_base_does_not():
    mesh = mesh_of((2, 2, 2), "auto")
    loss_fn, state, params, _ = make()
    batch = {"x": np.ones((32, 8), np.float32), "y": np.ones((32, 8), np.float32)}
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=RULES)
    state, params = step.place(state, params)

    def base_loss(params, batch):
        return jnp.mean((model(params, batch["x"]) - batch["y"]) ** 2)

    rows = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
    where = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh):
        base = jax.jit(jax.value_and_grad(base_loss), out_shardings=(None, where))
        base = gathered(base.lower(params, rows).compile().as_text())
    adapted = gathered(step.lower(state, params, batch).compile().as_text())
    assert base["8,8"] and not {"8,16", "16,8", "3,8,8"} & set(adapted)  # fsdp gathers halves, layer by layer
    more = [[int(size) for size in shape.split(",")] for shape in adapted - base]
    assert more and all(2 in shape and len(shape) == 2 for shape in more), more  # factors: rank 2
    assert max(map(np.prod, more)) <= 2 * 16


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("context", [False, True], ids=["arrays", "context"])
def test_tokens_that_are_sharded_along_both_axes_are_gathered_by_nothing(method, context):
    """Sequence parallelism: the gradients of the factors sum over both axes where the tokens are."""
    mesh = mesh_of((4, 2), "auto")

    def model(params, x):
        return jnp.sin(jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"])

    params = {"up": {"kernel": np.ones((16, 64))}, "down": {"kernel": np.ones((64, 16))}}
    params = jax.tree.map(lambda w: np.float32(0.1) * w.astype(np.float32), params)
    params, lora = lx.split(params, rank=2, method=method)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    x = np.linspace(-1.0, 1.0, 8 * 6 * 16, dtype=np.float32).reshape(8, 6, 16)
    adapted = lx.adapt(model, fallback="error")
    grad = jax.grad(lambda lora, params, x: jnp.mean(adapted(params, lora, x)))
    want = jax.jit(grad)(lora, params, x)
    rows = jax.device_put(x, NamedSharding(mesh, P("data", "fsdp")))
    whole = NamedSharding(mesh, P())
    step = jax.jit(grad, out_shardings=whole)
    if context:
        with jax.set_mesh(mesh):
            program = step.lower(lora, params, rows).compile()
            got = program(lora, params, rows)
    else:
        held = jax.device_put((lora, params), whole)
        program = step.lower(*held, rows).compile()
        got = program(*held, rows)
    assert not gathered(program.as_text())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_each_device_and_step_of_pmap_has_a_key_of_its_own_and_a_mesh_one_key_a_step():
    tx, lora = optax.sgd(0.1), {"b": lx.Full(jnp.zeros(4))}
    state = lx.TrainState.create(lora=lora, tx=tx, key=jax.random.key(7))

    def loss_fn(params, lora, batch, key):
        return jnp.sum(lora["b"].value ** 2) + jnp.mean(batch), jax.random.key_data(key)

    def key_data(*folds):
        return tuple(
            jax.random.key_data(functools.reduce(jax.random.fold_in, folds, jax.random.key(7))).tolist()
        )

    step = lx.pmap_train_step(loss_fn, tx, axis_name="d")
    states, batch = lx.replicate(state), np.ones(16, np.float32)
    for i in range(2):
        states, metrics = step(states, {}, lx.shard(batch))
        seen = [tuple(row) for row in metrics["aux"].tolist()]
        assert seen == [key_data(i, device) for device in range(8)]
        assert len(set(seen)) == 8
    step = lx.mesh_train_step(loss_fn, tx, mesh=mesh_of((8,), "auto"), rules={})
    assert tuple(step(state, {"b": jnp.zeros(4)}, batch)[1]["aux"].tolist()) == key_data(0)


def test_what_is_not_in_its_place_is_put_there_and_some_devices_are_enough():
    loss_fn, state, params, batch = make()
    four = jax.devices()[:4]
    mesh = jax.sharding.Mesh(np.array(four).reshape(2, 2), ("fsdp", "tensor"))
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=RULES, batch=P("fsdp"))
    copy = jax.tree.map(jnp.copy, state)
    first = step(*step.place(*jax.tree.map(jnp.copy, (state, params))), batch)
    direct = step(copy, params, batch)
    jax.tree.map(np.testing.assert_array_equal, first[0].lora, direct[0].lora)
    assert len(step.programs) == 1
    kernel = direct[0].lora["layers/kernel"]
    assert kernel.a.sharding.spec == P(None, "fsdp", None) and kernel.b.sharding.spec == P(
        None, None, "tensor"
    )
    mu = direct[0].opt_state[0].inner_state[0].mu["layers/kernel"]
    assert mu.b.sharding == kernel.b.sharding

    pmapped = lx.pmap_train_step(loss_fn, TX, devices=four)
    states = lx.replicate(state, four), lx.replicate(params, four)
    got = lx.unreplicate(pmapped(*states, lx.shard(batch, four))[0])
    close(jax.device_get(got.lora), jax.device_get(direct[0].lora))


def test_arguments_of_another_form_are_refused_with_the_remedy():
    loss_fn, state, params, batch = make()
    step = lx.pmap_train_step(loss_fn, TX)
    with pytest.raises(lx.LoraError, match=r"device axis(.|\n)*batch/x\n(.|\n)*\(8, \.\.\.\)(.|\n)*lx.rep"):
        step(lx.replicate(state), lx.replicate(params), batch)
    with pytest.raises(lx.LoraError, match=r"no device axis(.|\n)*params/down/kernel\n(.|\n)*state/lora/"):
        step(state, params, lx.shard(batch))
    mesh = mesh_of((2, 2, 2), "auto")
    for bad, text in [
        ([("up", P())], r"not a mapping(.|\n)*\{pattern: jax.P"),
        (
            {"up": P("fsdp", "model"), "down": "fsdp"},
            r"path: +up\n +down\n(.|\n)*axes \('data', 'fsdp', 'tensor'\)",
        ),
    ]:
        with pytest.raises(lx.LoraError, match=text):
            lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=bad)
    with pytest.raises(lx.LoraError, match=r"batch= has values that are not specs(.|\n)*path: +\['x'\]"):
        lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules={}, batch={"x": P("rows")})
    with pytest.raises(lx.LoraError, match=r"known name for data(.|\n)*batch=jax.P\('rows'\)"):
        lx.mesh_train_step(loss_fn, TX, mesh=jax.make_mesh((8,), ("rows",)), rules={})
    for rules, text in [
        ({"upp": P()}, r"rules= matches nothing(.|\n)*up/kernel"),
        (
            {"layers": P("data", "fsdp"), "down": P("fsdp", None)},
            r"layers/kernel\n +down/bias\n(.|\n)*size 3, over data=2",
        ),
    ]:
        with pytest.raises(lx.LoraError, match=text):
            lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=rules).place(state, params)
    odd = {"x": batch["x"][:12], "y": batch["y"][:12]}
    text = r"path: +x\n +y\n(.|\n)*size 12, over data=2 \* fsdp=2, each cut into 2(.|\n)*a multiple of 8"
    with pytest.raises(lx.LoraError, match=text):
        lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=RULES, accumulate=2)(state, params, odd)
    with pytest.raises(lx.LoraError, match=r"arrays only(.|\n)*name\n"):
        lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules={})(state, params | {"name": "mlp"}, batch)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_quantized_base_trains_on_a_mesh_as_on_one_device(kind):
    """Codes follow the rule of their weight; scales too few for all devices are on each."""
    loss_fn, state, params, batch = make()
    params = lx.quantize(
        params, "nf4", block=4, double=False, targets=("up", "down", "layers"), layout=LAYOUT
    )
    want, wanted = jax.device_get(jax.jit(lx.make_train_step(loss_fn, TX))(state, params, batch))
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh_of((2, 2, 2), kind), rules=RULES)
    state, params = step.place(state, params)
    assert params["up"]["kernel"].codes.sharding.spec == P("fsdp", "tensor")
    assert state.lora["up/kernel"].a.sharding.spec == P("fsdp", None)
    got, metrics = step(state, params, batch)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    close(jax.device_get(got.lora), want.lora)


def test_the_order_of_old_shows_the_new_call():
    loss_fn, state, params, batch = make()
    mesh = mesh_of((8,), "auto")
    for call in (
        lambda: lx.mesh_train_step(mesh, {}, loss_fn, TX),
        lambda: lx.mesh_train_step(mesh, {}),
        lambda: lx.mesh_train_step(loss_fn, TX, mesh, {}),
        lambda: lx.mesh_train_step(loss_fn, TX, rules={}),
    ):
        with pytest.raises(lx.LoraError, match=r"first(.|\n)*mesh_train_step\(loss_fn, tx, mesh=mesh, rules"):
            call()


def test_rules_without_effect_are_refused():
    loss_fn, state, params, _ = make()
    mesh = mesh_of((2, 2, 2), "auto")

    def place(rules):
        return lx.mesh_train_step(loss_fn, TX, mesh=mesh, rules=rules).place(state, params)

    text = r"without effect(.|\n)*path: +up: up/kernel\n +down: down/bias, and 1 more\n(.|\n)*'\*' last"
    with pytest.raises(lx.LoraError, match=text):
        place({"*": P(), "up": P("data", None), "down": P()})
    placed = place({"up": P("data", None), "down": P(), "layers": P(), "*": P()})[1]  # a last "*" may be idle
    assert placed["up"]["kernel"].sharding.spec == P("data", None)


def test_a_mesh_step_is_not_jitted_and_takes_no_consumed_state():
    loss_fn, state, params, batch = make()
    step = lx.mesh_train_step(loss_fn, TX, mesh=mesh_of((8,), "auto"), rules={})
    with pytest.raises(lx.LoraError, match=r"inside jax.jit(.|\n)*already compiled"):
        jax.jit(step)(state, params, batch)
    state, params = step.place(state, params)
    step(state, params, batch)
    with pytest.raises(lx.LoraError, match=r"consumed this state(.|\n)*lora"):
        step(state, params, batch)
    pmapped, state = lx.pmap_train_step(loss_fn, TX), lx.replicate(make()[1])
    given = lx.replicate(make()[2]), lx.shard(batch)
    pmapped(state, *given)
    with pytest.raises(lx.LoraError, match=r"consumed this state(.|\n)*lora"):
        pmapped(state, *given)
