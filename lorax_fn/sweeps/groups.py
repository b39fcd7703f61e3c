"""Decides which lanes share a program: same base, same kind, an optimizer that padding does not affect."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import is_real
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree
from lorax_fn.splitting.split import split as split_params
from lorax_fn.sweeps.grid import OWN, SPLIT, Reader
from lorax_fn.training.masks import train_only, trainable
from lorax_fn.training.state import TrainState
from lorax_fn.training.step import apply_gradients

Lora = dict[str, Any]  # adapters by path; not `Adapter`, because the fields differ by method
OTHER = "a weight that the lane does not adapt"


@dataclasses.dataclass(frozen=True)
class Member:
    """One lane after `split`: its base, its initial adapters and its key."""

    index: int
    lane: dict[str, Any]
    params: PyTree
    lora: Lora
    key: jax.Array


@dataclasses.dataclass
class Group:
    """The lanes of one program, in order: a run of ``sizes[i]`` lanes shares the optimizer of ``fixed[i]``.

    ``traced`` names the entries that `tx` gets as traced numbers; ``fixed`` holds the entries that it gets as
    they are.
    """

    params: PyTree
    members: list[Member]
    traced: tuple[str, ...]
    fixed: list[dict[str, Any]]
    sizes: list[int]


def members(params: PyTree, lanes: Sequence[dict], split: Mapping[str, Any], key: jax.Array) -> list[Member]:
    """Each lane's params and adapters: those of ``split(params, key=fold_in(key, seed))``.

    Lanes with the same seed and arguments of `split` share the same arrays.
    """
    done: dict[Any, tuple[PyTree, Lora]] = {}
    made = []
    for i, lane in enumerate(lanes):
        asked = {**split, **{name: lane[name] for name in SPLIT if name in lane}}
        seed = lane.get("seed", 0)
        own_key = jax.random.fold_in(key, seed)
        told = (seed, hashable(asked))
        if told not in done:
            done[told] = split_params(params, key=own_key, **asked)
        made.append(Member(i, lane, *done[told], own_key))
    return made


def hashable(value: Any) -> Any:
    """A hashable stand-in for a value. Objects that are not plain data are distinguished by identity."""
    if value is None or isinstance(value, str | bool) or is_real(value):
        return value
    if isinstance(value, Mapping):
        return tuple((hashable(name), hashable(x)) for name, x in value.items())
    if isinstance(value, Sequence):
        return tuple(map(hashable, value))
    return type(value).__name__, id(value)


def group(params: PyTree, made: list[Member], tx: Callable) -> list[Group]:
    """Groups the lanes that can share a program."""
    sets: list[tuple[Any, dict, list[Member]]] = []
    for member in made:
        base = _base(params, member)
        kind = _kind(member)
        for at, union, found in sets:
            if at == base and _fits(union, kind):
                union.update(kind)
                found.append(member)
                break
        else:
            sets.append((base, dict(kind), [member]))
    groups = []
    for _, _, found in sets:
        for same in _by_rank(found, tx):
            groups.append(_ordered(same, tx))
    _check_read(made, tx)
    return groups


def _base(params: PyTree, member: Member) -> Any:
    """None if the lane uses the given base; otherwise the ids of its own, such as PiSSA's residuals."""
    theirs, given = jax.tree.leaves(member.params), jax.tree.leaves(params)
    if len(theirs) == len(given) and all(x is y for x, y in zip(theirs, given, strict=True)):
        return None
    return tuple(map(id, theirs))


def _kind(member: Member) -> dict[str, tuple[Any, bool]]:
    """For each path: what adapters must have in common to share a program, and whether it may be missing."""
    kinds = {}
    for path, x in member.lora.items():
        # These fields may differ between lanes, so they are blanked out before adapters are compared.
        told: dict[str, Any] = {}
        lackable = False
        if x.owns_factors:
            own: Any = x
            told = {"a": None, "b": None, "alpha": 0.0, "rank": 1, "scaling": "lora"}
            lackable = set(type(x).trained()) - {"a", "b", "key"} == set()
            facts = (own.shape, str(own.a.dtype), str(own.b.dtype))
        else:
            facts = ()
            if "alpha" in x.numbers():
                told = {"alpha": 0.0}
        rest = dataclasses.replace(x, **told)  # pyright: ignore[reportArgumentType]
        shapes = [(np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(rest)]
        kinds[path] = ((type(x).__name__, str(jax.tree.structure(rest)), str(shapes), facts), lackable)
    return kinds


def _fits(union: dict, kind: dict) -> bool:
    return all(
        union[path] == kind[path] if path in union and path in kind else (union.get(path) or kind[path])[1]
        for path in union.keys() | kind.keys()
    )


def ranks_of(lora: Lora) -> tuple:
    """What padding would change: the width of each pair of factors."""
    return tuple((path, x.a.shape[-1]) for path, x in sorted(lora.items()) if x.owns_factors)


def _by_rank(found: list[Member], tx: Callable) -> list[list[Member]]:
    """All members in one list, or one list per rank if the optimizer looks at whole matrices."""
    kinds: dict[Any, list[Member]] = {}
    for member in found:
        kinds.setdefault(ranks_of(member.lora), []).append(member)
    if len(kinds) == 1 or padding_is_exact(
        tx(Reader(found[0].lane)), [same[0].lora for same in kinds.values()]
    ):
        return [found]
    return list(kinds.values())


def padding_is_exact(tx: Any, loras: Sequence[Lora]) -> bool:
    """Whether two updates of padded factors equal those of the unpadded ones, and leave the padding zero.

    This holds for every elementwise optimizer and for norms over the whole tree. It does not hold for Muon,
    Adafactor and noise, which depend on the shape of a matrix. The optimizer is tried on random gradients of
    the largest weight.
    """
    factors = {path: x for lora in loras for path, x in lora.items() if x.owns_factors}
    path = max(factors, key=lambda path: factors[path].a.size + factors[path].b.size)
    widths = [x.a.shape[-1] for lora in loras for x in lora.values() if x.owns_factors]
    own: Any = min((lora[path] for lora in loras if path in lora), key=lambda x: x.a.shape[-1])
    r = own.a.shape[-1]
    own = numbered(own)
    # At least one rank is added, so that there is padding to look at.
    wide, absent = padded(own, max(max(widths), r + 1)), lacking(own)
    none = trainable({OTHER: absent})[OTHER]

    def run(lora, grads):
        state = TrainState.create(lora=lora, tx=tx, key=jax.random.key(0))
        for g in grads:
            state = apply_gradients(state, g, tx, value=jnp.float32(1.0))
        return state.lora

    source = np.random.default_rng(0)  # NumPy's, for which nothing is compiled

    def draws():
        return jax.tree.map(lambda x: source.normal(size=x.shape).astype(x.dtype), trainable({path: own}))

    def both(*grads):
        small = run({path: own}, grads)[path]
        wider = [
            {path: padded(g[path], wide.a.shape[-1]), OTHER: jax.tree.map(jnp.zeros_like, none)}
            for g in grads
        ]
        after = run({path: wide, OTHER: absent}, wider)
        pairs = [(after[path], padded(small, wide.a.shape[-1])), (after[OTHER], absent)]
        close = [
            jnp.all(jnp.abs(x - y) <= 1e-5 * jnp.max(jnp.abs(y)))
            for one, other in pairs
            for x, y in zip(
                jax.tree.leaves(trainable({"": one})), jax.tree.leaves(trainable({"": other})), strict=True
            )
        ]
        return jnp.all(jnp.stack(close))

    with jax.numpy_dtype_promotion("standard"):
        return bool(jax.jit(both)(draws(), draws()))


def padded(x: Any, width: int, lanes: int = 0) -> Any:
    """An adapter or its gradients, A ``[*s, *n, r]`` and B ``[*s, r, *m]``, zero-padded to rank ``width``.

    ``lanes`` is 1 if both have a leading axis of lanes.
    """
    s = len(x.layout.stack) + lanes

    def pad(leaf, axis):
        if leaf is None:
            return None
        edges = [(0, 0)] * leaf.ndim
        edges[axis] = (0, width - leaf.shape[axis])
        return numpy_of(leaf).pad(leaf, edges)

    return dataclasses.replace(x, a=pad(x.a, -1), b=pad(x.b, s))


def numpy_of(x: Any) -> Any:
    """NumPy for its own arrays, which stay on the host; JAX's for all others."""
    return np if isinstance(x, np.ndarray) else jnp


def numbered(x: Any) -> Any:
    """An adapter with a single alpha and rank, even if each entry of its stack has its own."""
    return dataclasses.replace(x, alpha=1.0, rank=x.a.shape[-1])


def lacking(x: Any) -> Any:
    """The placeholder for a weight that a lane does not adapt: zero factors of rank 1, with scale zero."""
    s = len(x.layout.stack)
    zeros = numpy_of(x.a).zeros
    a = zeros((*x.a.shape[:-1], 1), x.a.dtype)
    b = zeros((*x.b.shape[:s], 1, *x.b.shape[s + 1 :]), x.b.dtype)
    return dataclasses.replace(x, a=a, b=b, alpha=0.0, rank=1, scaling="lora")


def _ordered(found: list[Member], tx: Callable) -> Group:
    """The group of these lanes. Lanes with the same optimizer are neighbors, sorted by rank."""
    read = _read(found, tx)
    varying = [name for name in sorted(read) if _varies(found, name)]
    traced = _traceable(found, tx, varying)

    def fixed(member):
        return {name: member.lane[name] for name in sorted(read - set(traced)) if name in member.lane}

    def rank(member):
        return max((x.a.shape[-1] for x in member.lora.values() if x.owns_factors), default=0)

    kinds: dict[Any, list[Member]] = {}
    for member in found:
        kinds.setdefault(hashable(fixed(member)), []).append(member)
    parts = [sorted(part, key=rank) for part in kinds.values()]
    return Group(
        found[0].params,
        [member for part in parts for member in part],
        traced,
        [fixed(part[0]) for part in parts],
        [len(part) for part in parts],
    )


def _read(found: Sequence[Member], tx: Callable) -> set[str]:
    """The entries of the lanes that ``tx`` reads."""
    names: set[str] = set()
    for member in found:
        reader = Reader(member.lane)
        train_only(optimizer(tx, reader))
        names |= reader.read
    return names


def _varies(found: Sequence[Member], name: str) -> bool:
    values = [member.lane.get(name) for member in found]
    return all(map(is_real, values)) and len(set(values)) > 1


def _traceable(found: Sequence[Member], tx: Callable, names: Sequence[str]) -> tuple[str, ...]:
    """Which of these entries ``tx`` accepts as traced arrays: all, or those that it accepts one by one."""

    def takes(some):
        def run(values):
            made = optimizer(tx, {**found[0].lane, **values})
            state = train_only(made).init(trained)
            return train_only(made).update(trained, state, trained, value=jnp.float32(1.0))

        values = {name: traced_value([found[0].lane[name]])[0] for name in some}
        try:
            jax.eval_shape(run, values)
        except Exception:  # tx may fail on a tracer in any way; such an entry stays a Python number
            return False
        return True

    trained: Any = trainable(found[0].lora)
    if not names or takes(names):
        return tuple(names)
    single = [name for name in names if takes([name])]
    return tuple(single) if takes(single) else ()


def traced_value(values: Sequence[Any]) -> jax.Array:
    """One number per lane as an array, int32 if all of them are ints, otherwise float32."""
    whole = all(isinstance(x, int) for x in values)
    return jnp.asarray(values, jnp.int32 if whole else jnp.float32)


def optimizer(tx: Callable, lane: Mapping[str, Any]) -> Any:
    """``tx(lane)`` under JAX's standard dtype promotion, under which its updates run too."""
    with jax.numpy_dtype_promotion("standard"):
        return tx(lane)


def _check_read(made: Sequence[Member], tx: Callable) -> None:
    known = {*SPLIT, *OWN} | _read(made, tx)
    idle = sorted({name for member in made for name in member.lane} - known)
    if idle:
        raise error(
            "the lanes have entries that nothing reads.",
            got=idle,
            want=f"entries that tx(lane) reads, or some of {', '.join((*SPLIT, *OWN))}",
            do=f"read them, tx=lambda lane: optax.adamw(lane[{idle[0]!r}]), or leave them out.",
        )
