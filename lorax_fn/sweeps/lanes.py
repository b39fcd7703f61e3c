"""The program of a sweep: one train step that is a `jax.vmap` over lanes, and the states that go through it.

Lanes are stacked along axis 0 of every array. The frozen base has no such axis: ``x @ W`` of all lanes is
one product of ``[lanes * tokens, n]`` with ``W``, which is read once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_fn.core.adapters import Factors, fact, is_real, register
from lorax_fn.core.errors import error
from lorax_fn.core.trees import PyTree
from lorax_fn.many.stacking import stack
from lorax_fn.methods.dropout import dropout
from lorax_fn.methods.lora import LoRA
from lorax_fn.sweeps.groups import Group, Member, lacking, optimizer, padded, ranks_of, traced_value
from lorax_fn.training.masks import trainable, with_trainable
from lorax_fn.training.state import TrainState
from lorax_fn.training.step import apply_gradients
from lorax_fn.transform.lanes import Lanes

Lora = dict[str, Any]  # adapters by path; not `Adapter`, because the fields differ by method
AXIS = "lanes"  # the mesh axis over which lanes are spread
DROPOUT = 0x5EED  # folded into the key of a step to derive the key of dropout
STEP = 8  # ranks that round up to the same multiple of this are multiplied together
BESIDE = 256  # the most columns of factors side by side, because each lane multiplies those of all lanes


@dataclasses.dataclass
class Chunk:
    """Lanes that one call of a program trains: ``real`` of them, then copies of the last to fill ``slots``.

    ``parts`` are runs of lanes whose optimizers differ only in traced entries, each given as ``(the entries
    that are not traced, number of lanes)``. With ``own``, the lanes of a part also have about the same rank,
    and their factors are padded only to the largest of these ranks.
    """

    group: Group
    slots: list[Member]
    real: int
    parts: list[tuple[dict[str, Any], int]]
    own: bool = False

    @property
    def lanes(self) -> list[int]:
        return [member.index for member in self.slots[: self.real]]

    def values(self) -> tuple[dict[str, jax.Array], ...]:
        """The traced entries of each part, as arrays ``[lanes of the part]``."""
        made, at = [], 0
        for _, size in self.parts:
            some = self.slots[at : at + size]
            made.append({n: traced_value([m.lane[n] for m in some]) for n in self.group.traced})
            at += size
        return tuple(made)

    def rates(self) -> jax.Array | None:
        """The dropout rates ``[lanes]``, or None if no lane of the group has dropout."""
        if not any(member.lane.get("dropout", 0.0) for member in self.group.members):
            return None
        return jnp.asarray([member.lane.get("dropout", 0.0) for member in self.slots], jnp.float32)


def chunks(group: Group, count: int, multiple: int = 1, *, own: bool = False) -> list[Chunk]:
    """Cuts a group into chunks of one size: at most ``count``, rounded up to a multiple of ``multiple``."""
    total = len(group.members)
    pieces = -(-total // max(count, 1))
    size = -(-total // pieces)
    size = -(-size // multiple) * multiple
    made = []
    for start in range(0, total, size):
        made.append(chunk(group, group.members[start : start + size], size, own=own))
    return made


def chunk(group: Group, slots: Sequence[Member], size: int, *, own: bool = False) -> Chunk:
    """A chunk of these lanes of a group, filled up to ``size`` with copies of the last one.

    With ``own``, lanes whose ranks round up to different widths are put into different parts.
    """
    filled = [*slots, *[slots[-1]] * (size - len(slots))]
    which = [i for i, n in enumerate(group.sizes) for _ in range(n)]
    optimizer_of = {member.index: i for member, i in zip(group.members, which, strict=True)}
    own = own and _one_scale_each(group)
    keys = [(optimizer_of[m.index], rounded(m.lora) if own else None) for m in filled]
    runs = [(key, len(list(same))) for key, same in itertools.groupby(keys)]
    return Chunk(group, filled, len(slots), [(group.fixed[key[0]], count) for key, count in runs], own)


def _one_scale_each(group: Group) -> bool:
    """Whether each adapter has a single alpha and a single rank, rather than one per stack entry."""
    adapters: list[Any] = [x for member in group.members for x in member.lora.values() if x.owns_factors]
    return all(is_real(x.alpha) and is_real(x.rank) for x in adapters)


def rounded(lora: Lora) -> tuple:
    """For each path, the rank rounded up to a multiple of `STEP`, in units of `STEP`."""
    return tuple((path, -(-rank // STEP)) for path, rank in ranks_of(lora))


def parts_of(chunk: Chunk) -> list[list[Member]]:
    at = offsets(chunk.parts)
    return [chunk.slots[i : i + size] for i, (_, size) in zip(at, chunk.parts, strict=True)]


def stacked(chunk: Chunk) -> list[Lora]:
    """Each part's adapters, stacked and padded to the widest of the part, or of the group without ``own``."""
    examples: dict[str, Any] = {}
    for member in chunk.group.members:
        for path, x in member.lora.items():
            if path not in examples:
                examples[path] = on_host(x)
    made = []
    scalings = {x.scaling for m in chunk.group.members for x in m.lora.values() if x.owns_factors}
    owned = [pair for member in chunk.group.members for pair in member.lora.items() if pair[1].owns_factors]
    several = {path for path, x in owned if isinstance(x.alpha, tuple) or isinstance(x.rank, tuple)}
    for part in parts_of(chunk):
        widths: dict[str, int] = {path: 1 for path, x in examples.items() if x.owns_factors}
        for member in part if chunk.own else chunk.group.members:
            for path, rank in ranks_of(member.lora):
                widths[path] = max(widths[path], rank)
        loras = []
        for member in part:
            own = on_host(member.lora)
            lora = {path: own.get(path) or lacking(x) for path, x in examples.items()}
            lora = {path: per_entry(x) if path in several else x for path, x in lora.items()}
            if len(scalings) > 1:  # parts are joined in the step, so all have the same scaling
                lora = {path: in_alpha(x) if path in widths else x for path, x in lora.items()}
            loras.append({path: padded(x, widths[path]) if path in widths else x for path, x in lora.items()})
        made.append(stack(loras))
    return made


def on_host(x: PyTree) -> PyTree:
    """The tree with NumPy arrays, which are padded and stacked without compiling anything.

    Keys, and arrays of which other processes hold a part, stay as they are.
    """

    def moved(leaf):
        local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        return leaf if not local or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)

    return jax.tree.map(moved, x)


def per_entry(x: Any) -> Any:
    """The same adapter with one alpha and one rank per stack entry, as another lane or part has them."""
    count = int(np.prod(x.layout.shapes(x.shape)[0]))
    facts = {name: getattr(x, name) for name in ("alpha", "rank")}
    return dataclasses.replace(
        x, **{n: v if isinstance(v, tuple) else (v,) * count for n, v in facts.items()}
    )


def in_alpha(x: Any) -> Any:
    """The same adapter with ``scaling="lora"`` and an alpha of the same scale."""
    alpha = x.scale * x.rank if is_real(x.rank) else tuple((np.ravel(x.scale) * np.asarray(x.rank)).tolist())
    return dataclasses.replace(x, alpha=alpha, scaling="lora")


def start(chunk: Chunk, tx: Callable, extra: PyTree) -> tuple[TrainState, ...]:
    """One train state per part, with the lanes on axis 0 of each array."""
    extra = jax.tree.map(jnp.asarray, extra)
    states = []
    for part, lora, (fixed, size), values in zip(
        parts_of(chunk), stacked(chunk), chunk.parts, chunk.values(), strict=True
    ):

        def create(lora, key, values, fixed=fixed):
            return TrainState.create(lora=lora, tx=optimizer(tx, {**fixed, **values}), key=key, extra=extra)

        keys = jnp.stack([member.key for member in part])
        states.append(jax.vmap(create, axis_size=size)(lora, keys, values))
    return tuple(states)


def offsets(parts: Sequence[tuple[Any, int]]) -> list[int]:
    return [sum(size for _, size in parts[:i]) for i in range(len(parts))]


def joined(trees: Sequence[PyTree]) -> PyTree:
    """The arrays of all parts, concatenated along axis 0, the lanes."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)


def joined_loras(loras: Sequence[Lora]) -> Lora:
    """The adapters of all parts, padded to the widest and concatenated along the lanes."""
    made = {}
    for path in loras[0]:
        parts: list[Any] = [lora[path] for lora in loras]
        if parts[0].owns_factors:
            width = max(x.a.shape[-1] for x in parts)
            parts = [padded(x, width, lanes=1) if x.a.shape[-1] < width else x for x in parts]
        made[path] = joined(parts)
    return made


@register
class LaneLoRA(LoRA):
    """`LoRA` of many lanes inside the step, whose products leave out the padding of each lane's rank.

    Args:
      lanes: the `Lanes` of `transform/lanes.py`.
    """

    lanes: Any = fact(default=None)

    def factors(self, w: jax.Array) -> Factors:
        return dataclasses.replace(super().factors(w), lanes=self.lanes)


Widths = dict[str, Lanes]


def own_widths(chunk: Chunk, *, side_by_side: bool | None = None) -> Widths:
    """For each `LoRA` whose lanes have several ranks: how many neighbors are multiplied at which width.

    ``side_by_side`` is the form of their products. By default, they have it on a TPU, up to `BESIDE` columns.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    kinds = {path: type(x) for member in chunk.group.members for path, x in member.lora.items()}
    for path in (path for path, kind in kinds.items() if kind is LoRA):
        ranks = [m.lora[path].a.shape[-1] if path in m.lora else 1 for m in chunk.slots]
        for _, same in itertools.groupby(ranks, key=lambda rank: -(-rank // STEP)):
            run = list(same)
            found.setdefault(path, []).append((len(run), max(run)))

    def beside(runs):
        if side_by_side is not None:
            return side_by_side
        return jax.default_backend() == "tpu" and sum(count * rank for count, rank in runs) <= BESIDE

    return {path: Lanes(tuple(runs), beside(runs)) for path, runs in found.items() if len(runs) > 1}


def make_step(
    loss_fn: Callable,
    tx: Callable,
    parts: Sequence[tuple[Mapping, int]],
    *,
    seeded: bool,
    widths: Widths | None = None,
) -> Callable:
    """Builds ``step(states, params, batch, values, rates, which) -> (states, metrics)`` for all lanes.

    For each lane, it is the step of `make_train_step`, with dropout if ``rates`` are given. With ``seeded``,
    the leaves of ``batch`` have a leading axis of seeds, and ``which [lanes]`` is the index of each lane's
    batch. Weights in ``widths`` are multiplied at each lane's own rank.
    """

    def in_lanes(path, x):
        held = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        return LaneLoRA(**held, lanes=widths[path]) if widths and path in widths else x

    def lane_loss(lora: Lora, key, extra, rate, batch, params):
        given = () if extra is None else (extra,)
        if widths:
            lora = {path: in_lanes(path, x) for path, x in lora.items()}
        if rate is not None:
            lora = dropout(lora, rate, jax.random.fold_in(key, DROPOUT))
        value = loss_fn(params, lora, batch, key, *given)
        loss, new = (value[0], value[1][0]) if extra is not None else (value, None)
        return check_loss(loss[0] if isinstance(loss, tuple) else loss), new

    def norm(grads):
        return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))

    def step(states, params, batch, values, rates, which):
        keys, steps, extra = joined([(s.key, s.step, s.extra) for s in states])
        keys = jax.vmap(jax.random.fold_in)(keys, steps)
        if seeded:
            batch = jax.tree.map(lambda x: x[which], batch)

        # The gradient is by the adapters of each part, because joined ones have padding, and so do gradients.
        def total(trained):
            lora = joined_loras([with_trainable(s.lora, x) for s, x in zip(states, trained, strict=True)])
            axes = (0, 0, 0, 0, 0 if seeded else None, None)
            losses, new = jax.vmap(lane_loss, in_axes=axes)(lora, keys, extra, rates, batch, params)
            # losses: [lanes]. With their sum, each lane's adapters get the gradient of that lane's own loss.
            return losses.sum(), (losses, new)

        (_, (losses, extra)), grads = jax.value_and_grad(total, has_aux=True)(
            [trainable(s.lora) for s in states]
        )
        metrics = {"loss": losses, "grad_norm": joined([jax.vmap(norm)(part) for part in grads])}
        after = []
        runs = zip(offsets(parts), parts, states, grads, values, strict=True)
        for at, (fixed, size), state, part, numbers in runs:

            def update(state, grads, loss, values, extra, fixed=fixed):
                new = apply_gradients(state, grads, optimizer(tx, {**fixed, **values}), value=loss)
                return dataclasses.replace(new, extra=extra)

            loss, new = jax.tree.map(lambda x, at=at, size=size: x[at : at + size], (losses, extra))
            after.append(jax.vmap(update)(state, part, loss, numbers, new))
        return tuple(after), metrics

    return step


def check_loss(loss: Any) -> jax.Array:
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise error(
            "the loss is not a float scalar.",
            got=f"shape {jnp.shape(loss)}, dtype {jnp.result_type(loss)}",
            want="a scalar: shape (), float",
            do="return jnp.mean(...) of it.",
        )
    return loss


def whole(states: Sequence[TrainState]) -> TrainState:
    """The states of all parts as one, without the optimizer states, whose structures may differ."""
    rest = joined([(s.step, s.key, s.extra) for s in states])
    return TrainState(joined_loras([s.lora for s in states]), (), *rest)


def own_lora(member: Member, lora: Lora, slot: int) -> Lora:
    """The adapters of one lane, without padding and without the placeholders of weights it does not adapt."""

    def cut(old, new):
        at = (slot, *(slice(n) for n in np.shape(old)))
        return new[at]

    made = {}
    for path, x in member.lora.items():
        side = lora[path]
        names = [f.name for f in dataclasses.fields(x) if not f.metadata.get("static")]
        arrays = {n: cut(getattr(x, n), getattr(side, n)) for n in names if getattr(x, n) is not None}
        made[path] = dataclasses.replace(x, **arrays)
    return made
