"""Stacks adapters along a leading axis for `jax.vmap`, and unstacks them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, is_number
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_lora
from lorax_fn.core.trees import is_abstract, is_tracer, run

Lora = dict[str, Adapter]


def stack(loras: Sequence[dict[str, Adapter]], *, rank: int | None = None) -> dict[str, Adapter]:
    """Stacks adapters along axis 0, for `jax.vmap` to map over, one adapter per lane.

    Adapters of several ranks are padded with zeros to the largest rank. Padding adds nothing, and stays zero
    in A and B under every elementwise optimizer. Alpha and rank become arrays: each lane keeps its scale.

    Args:
      loras: adapters of the same paths, methods and layouts. `LoRA`, `DoRA` and `LoRAFA` may differ in rank,
        alpha and scaling; other methods only in alpha.
      rank: the rank to pad to; None is the largest.

    Returns:
      One ``lora`` whose arrays have a leading axis of ``len(loras)``, for use under `jax.vmap`; functions
      that see the leading axis raise. If scalings differ, all lanes get ``scaling="lora"`` and an alpha that
      gives the same scale.

    Raises:
      LoraError: there are no adapters; paths, methods, layouts or shapes differ; or ``rank`` is too small.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> loras = [lx.split(params, rank=r)[1] for r in (1, 4)]
      >>> lanes = lx.stack(loras)
      >>> lanes["kernel"]
      LoRA(a=f32[2,8,4], b=f32[2,4,6], rank=f32[2], alpha=f32[2], scale=f32[2])
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> jax.vmap(apply, in_axes=(None, 0, None))(params, lanes, jnp.ones((3, 8))).shape
      (2, 3, 6)
      >>> [lora["kernel"].rank for lora in lx.unstack(lanes)]
      [1, 4]
    """
    loras = list(loras)
    if not loras:
        raise error("there are no adapters to stack.", got="[]", do="lx.stack([lora, other]).")
    for lora in loras:
        check_lora(lora)
    _check_same("paths", [str(sorted(lora)) for lora in loras], "all")
    return {path: _side_by_side(path, [lora[path] for lora in loras], rank) for path in loras[0]}


def unstack(lora: dict[str, Adapter]) -> list[dict[str, Adapter]]:
    """Undoes `stack`: each adapter has its own rank again, without padding.

    Args:
      lora: adapters whose arrays have a leading axis, as from `stack`, trained or not.

    Returns:
      One ``lora`` per lane; alpha and rank are numbers if the arrays are concrete.

    Raises:
      LoraError: an adapter has no leading axis, or the leading axes differ in size.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> loras = [lx.split({"kernel": jnp.ones((8, 6))}, rank=r, alpha=3.0)[1] for r in (1, 4)]
      >>> [lora["kernel"] for lora in lx.unstack(lx.stack(loras))]
      [LoRA(a=f32[8,1], b=f32[1,6], rank=1, alpha=3.0, scale=3), LoRA(a=f32[8,4], b=f32[4,6], rank=4,
      alpha=3.0, scale=0.75)]
    """
    check_lora(lora)
    flat = [path for path, adapter in lora.items() if not adapter.is_stacked]
    counts = {
        path: {leaf.shape[0] if leaf.shape else 1 for leaf in jax.tree.leaves(x)} for path, x in lora.items()
    }
    if flat or len(set().union(*counts.values())) != 1:
        raise error(
            "these adapters are not stacked alike.",
            path=flat or [path for path, sizes in counts.items() if sizes != counts[next(iter(counts))]],
            got="no leading axis" if flat else [str(sorted(sizes)) for sizes in counts.values()],
            want="arrays with one leading axis of the same size, as lx.stack makes them",
            do="lx.unstack(lx.stack([lora, other])).",
        )
    (count,) = set().union(*counts.values())
    return [{path: _lane(adapter, i) for path, adapter in lora.items()} for i in range(count)]


def _side_by_side(path: str, adapters: list[Any], rank: int | None) -> Adapter:
    _check_same("methods", [type(x).__name__ for x in adapters], path)
    _check_same("layouts", [str(getattr(x, "layout", None)) for x in adapters], path)
    if adapters[0].owns_factors:
        adapters = _alike(path, adapters, rank)
    elif "alpha" in adapters[0].numbers():
        adapters = [dataclasses.replace(x, alpha=_array(x.alpha, (), jnp.float32)) for x in adapters]
    _check_same("ranks or other facts", [str(jax.tree.structure(x)) for x in adapters], path)
    _check_same("shapes", [str([np.shape(leaf) for leaf in jax.tree.leaves(x)]) for x in adapters], path)
    return run(lambda adapters: jax.tree.map(lambda *leaves: _stacked(leaves), *adapters), adapters)


def _stacked(leaves: Sequence[Any]) -> jax.Array:
    if all(isinstance(x, np.ndarray) for x in leaves):  # on the host, which compiles nothing
        return jnp.asarray(np.stack(leaves))
    return jnp.stack(leaves)


def _alike(path: str, adapters: list[Any], rank: int | None) -> list[Any]:
    """The adapters with factors padded to one rank, and with alpha and rank as arrays."""
    widest = max(x.a.shape[-1] for x in adapters)
    width = widest if rank is None else rank
    if width < widest:
        raise error(
            "rank= is smaller than an adapter's rank.",
            path=path,
            got=f"rank={rank}",
            want=f"{widest} or more",
            do=f"rank={widest}, or lx.ranks.truncate(lora, {rank}) first.",
        )
    mixed = len({x.scaling for x in adapters}) > 1
    several = any(isinstance(fact, tuple) for x in adapters for fact in (x.rank, x.alpha))
    made = []
    for x in adapters:
        stack = x.layout.shapes(x.shape)[0]
        alpha, ranks = (_array(value, stack if several else (), jnp.float32) for value in (x.alpha, x.rank))
        if mixed and x.scaling != "lora":
            alpha = run(lambda scale, ranks: jnp.asarray(scale) * ranks, x.scale, ranks)
        # Ranks are floats here, because jax.grad with respect to a lora with integers would raise.
        facts = {"alpha": alpha, "rank": ranks}
        facts |= {"scaling": "lora"} if mixed else {}
        pad = width - x.a.shape[-1]
        made.append(
            run(lambda x, facts, pad=pad: _padded(x, pad, facts), x, facts)
            if is_abstract(x)
            else _padded(x, pad, facts)
        )
    return made


def _padded(x: Any, pad: int, facts: dict[str, Any]) -> Any:
    """Pads A ``[*s, *n, r]`` and B ``[*s, r, *m]`` with ``pad`` ranks of zeros."""
    a, b, s = x.a, x.b, len(x.layout.stack)
    if pad:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)])
        b = jnp.pad(b, [(0, pad if i == s else 0) for i in range(b.ndim)])
    return dataclasses.replace(x, a=a, b=b, **facts)


def _array(value: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A `number` field as an array of ``shape``; a NumPy array if the value is static."""

    def made(value, xp: Any = jnp):
        held = xp.asarray(value, dtype)
        return xp.broadcast_to(held.reshape(shape) if isinstance(value, tuple) else held, shape)

    return made(value, np) if is_number(value) else run(made, value)


def _lane(adapter: Any, i: int) -> Adapter:
    one = run(lambda adapter: jax.tree.map(lambda x: x[i], adapter), adapter)
    if not adapter.owns_factors or is_abstract(one) or any(map(is_tracer, jax.tree.leaves(one))):
        return one
    facts = {name: _number(getattr(one, name), whole=name == "rank") for name in ("rank", "alpha")}
    ranks = facts["rank"]
    width = max(ranks) if isinstance(ranks, tuple) else ranks
    stack = len(one.layout.stack)
    b = jax.lax.slice_in_dim(one.b, 0, width, axis=stack)
    return dataclasses.replace(one, a=one.a[..., :width], b=b, **facts)


def _number(value: Any, whole: bool) -> Any:
    """A concrete array as a Python number, or as a tuple if its values differ along the stack."""
    if is_number(value):
        return value
    kind = int if whole else float
    listed = [kind(x) for x in np.asarray(value).reshape(-1)]
    if not np.ndim(value) or len(set(listed)) == 1:
        return listed[0]
    return tuple(listed)


def _check_same(what: str, facts: list[str], path: str) -> None:
    if len(set(facts)) > 1:
        raise error(
            f"adapters whose {what} differ cannot be stacked.",
            path=path,
            got=sorted(set(facts)),
            want=f"the same {what} in each of them",
            do="keep them in a list; lx.bank fills in missing targets and takes several ranks.",
        )
