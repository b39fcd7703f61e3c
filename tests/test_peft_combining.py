"""`lx.combine` against `add_weighted_adapter` of the real `peft`, run live; in an environment of its own.

PEFT 0.21 multiplies in the root of the new rank where the first adapter is an rsLoRA one; here the result has
scale 1, as it documents. DARE drops at random, so both draw the same masks here.
"""

import numpy as np
import pytest
from peft_pairs import Dense, peft, torch

import lorax_fn as lx
from lorax_fn.many import combining

pytestmark = [
    pytest.mark.extra_env,
    pytest.mark.filterwarnings("ignore"),  # what torch, transformers and peft warn of is theirs
]

WEIGHTS, RANKS = [0.7, -1.3, 0.4], {"equal": [3, 3, 3], "unequal": [2, 3, 1]}
OURS = {"linear": "peft_linear"}
NAMES = ["up", "down"]


def model(ranks):
    """A torch net with an adapter of random values for each rank, and the same adapters here."""
    torch.manual_seed(0)
    net = Dense()
    for i, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=4 + i, target_modules=NAMES, init_lora_weights=False)
        net = peft.get_peft_model(net, config, str(i)) if i == 0 else net
        if i:
            net.add_adapter(str(i), config)
    layout = lx.Layout((), (1,), (0,))  # weights are (out, in)
    loras = []
    for i, rank in enumerate(ranks):
        layers = {name: getattr(net.base_model.model, name) for name in NAMES}
        loras.append(
            {
                name: lx.LoRA(
                    layer.lora_A[str(i)].weight.detach().numpy().T,
                    layer.lora_B[str(i)].weight.detach().numpy().T,
                    4.0 + i,
                    rank,
                    "lora",
                    layout,
                )
                for name, layer in layers.items()
            }
        )
    return net, loras


def check(method, ranks, **options):
    net, loras = model(RANKS[ranks])
    theirs = {"density": options.get("density"), "majority_sign_method": options.get("sign", "total")}
    theirs["svd_rank"] = options.get("rank")
    net.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "new", combination_type=method, **theirs)
    ours = lx.combine(list(zip(WEIGHTS, loras, strict=True)), OURS.get(method, method), **options)
    for name in NAMES:
        want = getattr(net.base_model.model, name).get_delta_weight("new").detach().numpy()
        got = np.asarray(lx.delta(ours)[name])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("svd", ["", "_svd"])
def test_ties_is_that_of_peft(svd, sign):
    check("ties" + svd, "equal", density=0.4, sign=sign)


@pytest.mark.parametrize("method", ["magnitude_prune", "magnitude_prune_svd"])
def test_magnitude_prune_is_that_of_peft(method):
    check(method, "equal", density=0.6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_that_of_peft_where_both_drop_the_same(method, monkeypatch):
    def torch_masked(tensor, density, rescale):
        pattern = torch.tensor(mask(tensor.shape).T if not method.endswith("_svd") else mask(tensor.shape))
        return tensor * pattern / density

    def mask(shape):  # a function of a place in our (n, r), (r, m) and (n, m), which torch has transposed
        flipped = method.endswith("_svd")
        n, m = shape[::-1]
        grid = (np.arange(n)[:, None] * 7 + np.arange(m)[None] * 3) % 2
        return (grid.T if flipped else grid).astype(np.float32)

    def dropped(x, density, key):
        n, m = x.shape[1:]
        grid = ((np.arange(n)[:, None] * 7 + np.arange(m)[None] * 3) % 2).astype(np.float32)
        return x * grid[None] / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", torch_masked)
    monkeypatch.setattr(combining, "_dropped", dropped)
    combining._combined.clear_cache()
    try:
        check(method, "equal", density=0.5)
    finally:
        combining._combined.clear_cache()


@pytest.mark.parametrize(
    "method, ranks, options",
    [
        ("cat", "unequal", {}),
        ("svd", "unequal", {}),
        ("svd", "unequal", {"rank": 2}),
        ("linear", "equal", {}),
    ],
)
def test_sums_are_those_of_peft(method, ranks, options):
    check(method, ranks, **options)
