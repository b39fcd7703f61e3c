"""What a slot of a bank holds: the adapters of one weight side by side, padded to one form."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter, fact, register
from lorax_fn.core.errors import error, nearest
from lorax_fn.core.fitting import check_adapters, check_unstacked
from lorax_fn.core.frozen import frozen
from lorax_fn.core.layouts import Layout
from lorax_fn.core.trees import is_tracer
from lorax_fn.many.picking import KINDS, Picked, PickedWithColumn, extras_of
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.low_rank import scale_of


@register
class Slots(Adapter):
    """The adapters of one weight, side by side on an axis of ``k`` slots after the stack axes.

    Args:
      a: ``[*s, k, *n, r]`` down-projections, padded with zeros to one rank.
      b: ``[*s, k, r, *m]`` up-projections.
      extras: by name what a method trains beside them, ``[*s, k, *m]``; empty where no slot can need it.
      scale: ``[*s, k]`` float32, the number before each ``A @ B``; 0 in an empty slot.
      alpha: ``[*s, k]`` float32.
      ranks: ``[*s, k]`` float32; floats, as `jax.grad` by a tree that holds integers raises.
      kind: ``[k]`` float32, which method and scaling each slot holds; 0 for an empty slot.
      layout: which axes of the weight are stack, inputs and outputs.
      residual: as in `LoRA`, of all slots alike: adapters of a residual are of another base.
    """

    frozen: ClassVar[tuple[str, ...]] = ("scale", "alpha", "ranks", "kind")
    up: ClassVar[tuple[str, ...]] = ("b",)
    a: Any
    b: Any
    extras: Any
    scale: Any
    alpha: Any
    ranks: Any
    kind: Any
    layout: Layout = fact()
    residual: bool = fact(default=False)

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        stack, layout = self.layout.stack, self.layout
        return {"a": (*stack, None, *layout.inputs, None), "b": (*stack, None, None, *layout.outputs)}

    def numbers(self) -> dict[str, Any]:
        return {"slots": np.shape(self.kind)[-1], "rank": np.shape(self.a)[-1]}

    def problem(self, w: Any) -> str | None:
        del w
        return "one adapter of the bank: bank[i], or bank[weights]"

    def pick(self, which: Any) -> "Picked":
        """The adapter of slot ``which``, an integer array ``[]``, or the mixture by weights ``[k]``."""
        cls = PickedWithColumn if self.extras else Picked
        scale, kind = frozen((self.scale, self.kind), "Bank")
        arrays = self._trained("a"), self._trained("b"), self.extras, scale, kind
        return cls(*arrays, which=which, layout=self.layout)

    def _trained(self, name: str) -> Any:
        """A factor of all slots, without a gradient in those whose method freezes it."""
        array = getattr(self, name)
        if not is_tracer(array):
            return array
        frozen = np.array([False, *(name in cls.frozen for cls, _ in KINDS)])
        still = jnp.asarray(frozen)[jax.lax.stop_gradient(self.kind).astype(jnp.int32)]
        s = len(self.layout.stack)
        still = still.reshape(*(1,) * s, -1, *(1,) * (array.ndim - s - 1))
        # XLA makes of this the array itself, and of its transpose a mask of the gradient.
        return jnp.where(still, jax.lax.stop_gradient(array), array)


@dataclasses.dataclass(frozen=True)
class Form:
    """What fits a slot of one weight."""

    shape: tuple[int, ...]  # of the weight
    layout: Layout
    rank: int
    dtype: Any
    extras: dict[str, Any]  # dtype by name
    residual: bool


def kept(path: str, adapter: Any) -> Any:
    """The adapter itself where a slot holds its method, else the `LoRA` of its factors."""
    if type(adapter) in {cls for cls, _ in KINDS}:
        return adapter
    pair = adapter.pair()
    if pair is None:
        raise error(
            "a bank holds low-rank adapters only.",
            path=path,
            got=type(adapter).__name__,
            want="LoRA, LoRA-FA, DoRA, or a method with two factors",
            do="keep it beside the bank, stacked: jax.vmap(lambda i, x: apply(params, bank[i] | "
            "{path: lx.Full(values[i])}, x))(ids, x).",
        )
    stack, n, m = pair.layout.shapes(adapter.shape)
    a, b = jnp.asarray(pair.a), jnp.asarray(pair.b)
    r = a.shape[-1]
    scale = jnp.asarray(pair.scale, b.dtype)
    scale = scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim)) if scale.ndim else scale
    b = jnp.broadcast_to(b * scale, (*stack, r, *m))
    return LoRA(jnp.broadcast_to(a, (*stack, *n, r)), b, float(r), r, "lora", pair.layout)


def form(path: str, adapters: list[Any], rank: int | None) -> Form:
    first = adapters[0]
    facts = {f"{x.shape}, {x.layout}, residual={x.residual}" for x in adapters}
    if len(facts) > 1:
        raise error(
            "adapters of one bank must be of one base: the layouts or shapes of a weight differ.",
            path=path,
            got=sorted(facts),
            want="one shape and one layout",
            do="make one bank per base, or pass the same layout= to each lx.split.",
        )
    widest = max(x.a.shape[-1] for x in adapters)
    width = widest if rank is None else operator.index(rank)
    if width < widest:
        raise _too_wide([path], [widest], [width])
    dtype = jnp.result_type(*(y.dtype for x in adapters for y in (x.a, x.b)))
    names = {name for x in adapters for name in extras_of(type(x))}
    extras = {
        name: jnp.result_type(*(getattr(x, name).dtype for x in adapters if name in extras_of(type(x))))
        for name in sorted(names)
    }
    return Form(first.shape, first.layout, width, np.dtype(dtype), extras, first.residual)


def form_of(slots: Slots) -> Form:
    layout, s = slots.layout, len(slots.layout.stack)
    a, b = np.shape(slots.a), np.shape(slots.b)
    sizes = dict(zip((*layout.stack, *layout.inputs), (*a[:s], *a[s + 1 : -1]), strict=True))
    sizes |= dict(zip(layout.outputs, b[s + 2 :], strict=True))
    shape = tuple(sizes[i] for i in range(layout.ndim))
    return Form(
        shape, layout, a[-1], slots.a.dtype, {n: x.dtype for n, x in slots.extras.items()}, slots.residual
    )


def padded(forms: Mapping[str, Form], lora: Mapping[str, Any]) -> dict[str, Slots]:
    """One slot, ``k = 1``, of every weight of the bank; all misfits of ``lora`` are reported at once."""
    check_unstacked(lora)
    check_adapters(dict(lora))
    unknown = [path for path in lora if path not in forms]
    if unknown:
        raise error(
            "the bank has no place for adapters of these weights.",
            path=unknown,
            want=[f"one of {nearest(path, list(forms))}" for path in unknown],
            do="make a bank of all targets, lx.bank([*loras, lora]), or leave the path out of lora.",
        )
    lora = {path: kept(path, adapter) for path, adapter in lora.items()}
    wide = [path for path, x in lora.items() if x.a.shape[-1] > forms[path].rank]
    if wide:
        raise _too_wide(wide, [lora[p].a.shape[-1] for p in wide], [forms[p].rank for p in wide])
    bases = [path for path, x in lora.items() if x.residual != forms[path].residual]
    if bases:
        raise error(
            "an adapter belongs to another base than those of the bank.",
            path=bases,
            got=[f"residual={lora[path].residual}" for path in bases],
            want=[f"residual={forms[path].residual}: adapters of one base" for path in bases],
            do="make it one of the original weights: lx.ranks.to_plain(original, params, lora).",
        )
    wrong = {path: _misfit(forms[path], x) for path, x in lora.items()}
    wrong = {path: found for path, found in wrong.items() if found is not None}
    if wrong:
        raise error(
            "an adapter does not fit this bank.",
            path=list(wrong),
            got=[got for got, _ in wrong.values()],
            want=[want for _, want in wrong.values()],
            do="make a new bank that includes it: lx.bank([*loras, lora]).",
        )
    return {path: _single(form, lora.get(path)) for path, form in forms.items()}


def _misfit(form: Form, x: Any) -> tuple[str, str] | None:
    if x.shape != form.shape or x.layout != form.layout:
        return f"{x.shape}, {x.layout}", f"{form.shape}, {form.layout}"
    extras = extras_of(type(x))
    if set(extras) - set(form.extras):
        return type(x).__name__, "a method that the bank was made with"
    pairs = [(x.a, form.dtype), (x.b, form.dtype), *((getattr(x, n), form.extras[n]) for n in extras)]
    for array, dtype in pairs:
        if jnp.promote_types(array.dtype, dtype) != dtype:
            return f"{array.dtype}", f"{dtype}, or a narrower dtype that it holds exactly"
    return None


def _single(form: Form, adapter: Any) -> Slots:
    stack, n, m = form.layout.shapes(form.shape)
    shapes = {"a": (*stack, 1, *n, form.rank), "b": (*stack, 1, form.rank, *m)}
    if adapter is None:
        zero = np.zeros((*stack, 1), np.float32)
        extras = {name: np.zeros((*stack, 1, *m), dtype) for name, dtype in form.extras.items()}
        a, b = (np.zeros(shape, form.dtype) for shape in shapes.values())
        return Slots(a, b, extras, zero, zero, zero, np.zeros((1,), np.float32), form.layout, form.residual)
    s = len(stack)

    def number(x):
        x = jnp.asarray(x, jnp.float32) if is_tracer(x) else np.asarray(x, np.float32)
        x = x.reshape(stack) if x.ndim else x
        xp = jnp if is_tracer(x) else np
        return xp.broadcast_to(xp.expand_dims(xp.broadcast_to(x, stack), s), (*stack, 1))

    scale = scale_of(adapter.alpha, adapter.rank, adapter.scaling, stack)
    extras = {}
    for name, dtype in form.extras.items():
        held = name in extras_of(type(adapter))
        extras[name] = (
            _filled(getattr(adapter, name), (*stack, 1, *m), dtype, s)
            if held
            else np.zeros((*stack, 1, *m), dtype)
        )
    kind = KINDS.index((type(adapter), adapter.scaling)) + 1
    return Slots(
        _filled(adapter.a, shapes["a"], form.dtype, s),
        _filled(adapter.b, shapes["b"], form.dtype, s),
        extras,
        number(scale),
        number(adapter.alpha),
        number(adapter.rank),
        np.full((1,), kind, np.float32),
        form.layout,
        form.residual,
    )


def _filled(x: Any, shape: tuple[int, ...], dtype: Any, s: int) -> Any:
    """``x`` with an axis of one slot at ``s``, and zeros behind it along the rank, up to ``shape``."""
    if is_tracer(x):
        x = jnp.expand_dims(x.astype(dtype), s)
        return jnp.pad(x, [(0, size - had) for size, had in zip(shape, x.shape, strict=True)])
    # NumPy compiles nothing, whatever the rank.
    x = np.expand_dims(np.asarray(x), s)
    padded = np.zeros(shape, dtype)
    padded[tuple(slice(size) for size in x.shape)] = x
    return padded


def unpadded(slots: Slots) -> Any:
    kind = int(slots.kind)
    if kind == 0:
        return None
    cls, scaling = KINDS[kind - 1]
    s = len(slots.layout.stack)
    ranks = tuple(int(x) for x in np.ravel(slots.ranks))
    alphas = tuple(float(x) for x in np.ravel(slots.alpha))
    width = max(ranks)
    a, b = slots.a[..., :width], slots.b[(slice(None),) * s + (slice(width),)]
    extras: dict[str, Any] = {name: jnp.asarray(slots.extras[name]) for name in extras_of(cls)}
    rank, alpha = (x[0] if len(set(x)) == 1 else x for x in (ranks, alphas))
    return cls(
        jnp.asarray(a), jnp.asarray(b), alpha, rank, scaling, slots.layout, residual=slots.residual, **extras
    )


def _too_wide(paths: list[str], got: list[int], want: list[int]) -> Exception:
    return error(
        "an adapter's rank is larger than the bank's.",
        path=paths,
        got=[f"rank {r}" for r in got],
        want=[f"at most {r}" for r in want],
        do=f"lx.ranks.truncate(lora, {min(want)}) first, or lx.bank(loras, rank={max(got)}).",
    )
