"""Tables of how adapters interfere, against the dW themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lx

PARAMS = {"up": jnp.ones((12, 9)), "down": jnp.ones((9, 12))}
LAYOUT = {"*": lx.Layout((), (0,), (1,))}


def drawn(seed, rank, **options):
    _, lora = lx.split(PARAMS, rank, layout=LAYOUT, **options)
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), lora)


def test_cosine_and_overlap_are_those_of_the_dw():
    loras = {"one": drawn(0, 2), "two": drawn(1, 3, method="loha"), "part": {"up": drawn(2, 1)["up"]}}
    found = lx.report.interference(loras)
    deltas = [{p: np.asarray(d, np.float64) for p, d in lx.delta(lora).items()} for lora in loras.values()]
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas):
            both = one.keys() & other.keys()
            sizes = [np.sqrt(sum((x**2).sum() for x in d.values())) for d in (one, other)]
            want = sum((one[p] * other[p]).sum() for p in both) / np.prod(sizes)
            np.testing.assert_allclose(found.cosine[i, j], want, atol=1e-5)
            shares = []
            for p in both:
                rows = [np.linalg.svd(d[p])[2][: np.linalg.matrix_rank(d[p], tol=1e-4)] for d in (one, other)]
                shares.append(((rows[0] @ rows[1].T) ** 2).sum() / min(map(len, rows)))
            np.testing.assert_allclose(found.overlap[i, j], np.mean(shares), atol=1e-4)
    assert "part" in str(found) and np.allclose(np.diag(found.overlap), 1)


def test_a_heat_map_is_drawn():
    pytest.importorskip("matplotlib")
    figure = lx.report.interference({"one": drawn(0, 2), "two": drawn(1, 2)}).plot()
    assert [axes.get_title() for axes in figure.axes[:2]] == ["cosine", "overlap"]


def test_mistakes_are_told():
    with pytest.raises(lx.LoraError, match="two adapters or more"):
        lx.report.interference({"one": drawn(0, 2)})
    with pytest.raises(lx.LoraError, match="without a low-rank dW"):
        lx.report.interference({"one": drawn(0, 2), "two": {"up": lx.Full(jnp.ones((12, 9)))}})
