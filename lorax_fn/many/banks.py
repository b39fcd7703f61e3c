"""A bank of adapters over one base: swapped, mixed in one batch and trained together by their slots."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters, check_unstacked
from lorax_fn.core.trees import is_abstract, is_concrete, is_tracer
from lorax_fn.many.slots import Slots, form, form_of, kept, padded, unpadded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Bank:
    """Many adapters over one base, in slots of one size; a pytree of arrays, made by `bank`.

    ``bank[i]`` is all there is to routing: an ordinary ``lora`` whose arrays are picked where a weight's
    product contracts them. ``i`` may be traced, so that `jax.vmap` over it gives each row of a batch its own
    adapter, while base products stay single products over the whole batch. Slot -1 is the bare base.
    ``bank[weights]`` with float weights ``[k]`` is the mixture ``sum_k w_k dW_k``, exact, at rank ``k * r``.

    The bank holds arrays only, so that another adapter in a slot compiles nothing; which adapter sits in
    which slot is for the caller to remember. A gradient with respect to a bank trains the adapters in it, and
    is exactly zero in a slot that no row uses. Scales are constants, and the A of LoRA-FA gets no gradient;
    weight decay would shrink it all the same, so such a bank should train without decay.

    Args:
      slots: for each path the adapters of its weight side by side, ``[*s, k, ...]``.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> loras = [lx.split(params, rank=r)[1] for r in (1, 4)]
      >>> bank = lx.bank(loras, capacity=3)
      >>> apply = lx.adapt(lambda params, x: x @ params["kernel"])
      >>> ids = jnp.array([1, -1, 0, 1])  # one adapter per row; -1 is the base
      >>> jax.vmap(lambda i, x: apply(params, bank[i], x))(ids, jnp.ones((4, 8))).shape
      (4, 6)
    """

    slots: dict[str, Slots]

    def __len__(self) -> int:
        """How many slots there are, used or not."""
        return _width(self.slots)

    def __repr__(self) -> str:
        ranks = sorted({np.shape(slots.a)[-1] for slots in self.slots.values()})
        return f"Bank({len(self)} slots, {len(self.slots)} weights, rank {'/'.join(map(str, ranks))})"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the bank."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.slots))

    def __getitem__(self, i: Any) -> dict[str, Adapter]:
        """The adapter of slot ``i``, or the mixture by float weights ``i``, picked inside each contraction.

        Args:
          i: a slot, or -1 for the bare base; an integer, or an integer array ``[]``, which may be traced (a
            traced number that is no slot is the bare base). Or float weights ``[k]``, one per slot.

        Returns:
          A ``lora`` for `adapt`, `merge` and `delta`; for many rows at once call it under `jax.vmap`.

        Raises:
          LoraError: ``i`` is not one number or ``[k]`` weights, or is a slot that the bank does not have.
        """
        which = self._which(i)
        return {path: slots.pick(which) for path, slots in self.slots.items()}

    def set(self, i: Any, lora: dict[str, Adapter], *, donate: bool = False) -> "Bank":
        """A bank with another adapter in slot ``i``; weights that ``lora`` does not adapt get none there.

        Nothing is compiled after the first call on a bank of this size. ``donate=True`` writes the one slot
        in place, and the old bank can no longer be used; otherwise the other slots are copied. Inside a
        jitted function, use its ``donate_argnums`` instead.

        Args:
          i: the slot; an integer or an integer array ``[]``.
          lora: an adapter of the same base, of this bank's ranks or less.
          donate: whether to reuse the memory of this bank.

        Returns:
          The new bank.

        Raises:
          LoraError: the adapter does not fit (its rank, paths, layouts, shapes or method, or a dtype wider
            than the bank's), or the slot does not exist.

        Example:
          >>> import jax.numpy as jnp, lorax_fn as lx
          >>> params = {"kernel": jnp.ones((8, 6))}
          >>> bank = lx.bank([lx.split(params, rank=4)[1]], capacity=2)
          >>> bank = bank.set(1, lx.split(params, rank=2, alpha=6.0)[1])
          >>> bank.get(1)["kernel"]
          LoRA(a=f32[8,2], b=f32[2,6], rank=2, alpha=6.0, scale=3)
        """
        forms = {path: form_of(slots) for path, slots in self.slots.items()}
        return self._write(i, padded(forms, lora), donate)

    def clear(self, i: Any, *, donate: bool = False) -> "Bank":
        """A bank whose slot ``i`` is empty, so that it adds nothing to the base.

        Args:
          i: the slot.
          donate: as in `set`.

        Returns:
          The new bank.

        Raises:
          LoraError: the slot does not exist.

        Example:
          >>> import jax.numpy as jnp, lorax_fn as lx
          >>> bank = lx.bank([lx.split({"kernel": jnp.ones((8, 6))}, rank=4)[1]])
          >>> bank.clear(0).get(0)
          {}
        """
        forms = {path: form_of(slots) for path, slots in self.slots.items()}
        return self._write(i, padded(forms, {}), donate)

    def get(self, i: Any) -> dict[str, Adapter]:
        """The adapter of slot ``i`` as it was set, or as it trained since: of its own rank and method.

        Methods that are not kept as they are (see `bank`) come back as `LoRA`.

        Args:
          i: the slot, a concrete integer.

        Returns:
          A ``lora`` without the padding; ``{}`` of an empty slot.

        Raises:
          LoraError: the slot does not exist, or the bank's numbers are not known (under a trace).

        Example:
          >>> import jax.numpy as jnp, lorax_fn as lx
          >>> bank = lx.bank([lx.split({"kernel": jnp.ones((8, 6))}, rank=r)[1] for r in (2, 4)])
          >>> bank.get(0)["kernel"].rank
          2
        """
        if not is_concrete((i, self.slots)):
            raise error(
                "what a slot holds is not known here: its rank is a number in the bank.",
                got="a bank or a slot under a trace, or of shapes alone",
                want="arrays that hold numbers",
                do="use bank[i] under a trace; bank.get(i) outside of it.",
            )
        one = jax.device_get(_read(self.slots, jnp.int32(self._slot(i))))
        held = {path: unpadded(slots) for path, slots in one.items()}
        return {path: adapter for path, adapter in held.items() if adapter is not None}

    def _which(self, i: Any) -> jax.Array:
        dtype = getattr(i, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and np.shape(i) == (len(self),):
            return jnp.asarray(i)
        if dtype is None and not isinstance(i, bool) and hasattr(type(i), "__index__"):
            dtype, i = np.dtype(np.int32), operator.index(i)
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or np.shape(i) != ():
            raise error(
                "this is neither a slot nor a mixture.",
                got=f"{dtype}{list(np.shape(i))}" if dtype is not None else repr(i),
                want=f"one integer, or float weights [{len(self)}]",
                do="map over many: jax.vmap(lambda i, x: apply(params, bank[i], x))(ids, x).",
            )
        if not is_tracer(i) and not -1 <= int(i) < len(self):
            raise _no_slot(i, len(self), "-1 (the base) or ")
        return jnp.asarray(i, jnp.int32)

    def _slot(self, i: Any) -> Any:
        if np.shape(i) != () or not jnp.issubdtype(jnp.asarray(i).dtype, jnp.integer):
            raise _no_slot(i, len(self))
        if not is_tracer(i) and not 0 <= int(i) < len(self):
            raise _no_slot(i, len(self))
        return i

    def _write(self, i: Any, one: dict[str, Slots], donate: bool) -> "Bank":
        slot = self._slot(i)
        slot = slot if is_tracer(slot) else np.int32(slot)
        return Bank((_write_in_place if donate else _write)(self.slots, slot, one))


def bank(
    loras: Iterable[dict[str, Adapter]], *, capacity: int | None = None, rank: int | None = None
) -> Bank:
    """Puts adapters of one base into slots of one size, to be picked by number: see `Bank`.

    Ranks are padded with zeros, and so is a weight that an adapter leaves alone: both add exactly nothing.
    Padding takes the memory and the products of the full rank. Where few adapters have a high rank, two banks
    take less memory: ``adapt(adapt(fn))(params, small[i], large[j], x)`` serves both in one call, with -1 in
    the bank that a row does not use.

    Args:
      loras: adapters, one per slot; ``{}`` leaves a slot empty. They may differ in rank, alpha, scaling,
        method and targets. LoRA, LoRA-FA and DoRA are kept as they are, with DoRA only where one of
        ``loras`` has it. Other low-rank methods (VeRA, LoHa, LoKr, LoRA-XS) are kept as the `LoRA` that
        their factors make: the same change of the weight, but not what they would train.
      capacity: how many slots; None is one per adapter.
      rank: the largest rank that fits a slot; None is each weight's largest among ``loras``.

    Returns:
      The bank, in the dtype that holds all adapters of a weight exactly. It takes ``capacity`` times the
      memory of one adapter of that rank.

    Raises:
      LoraError: no adapter names a weight, the slots are too few or the rank is too small, layouts or shapes
        of one path differ, or an adapter has no low-rank form (`Full`, `Rows`).

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"up": jnp.ones((8, 6)), "down": jnp.ones((6, 8))}
      >>> layout = {"*": lx.Layout(inputs=(0,), outputs=(1,))}
      >>> loras = [lx.split(params, 2, targets="up", layout=layout)[1], lx.split(params, 4, layout=layout)[1]]
      >>> lx.bank(loras, capacity=8)
      Bank(8 slots, 2 weights, rank 4)
    """
    loras = list(loras)
    for lora in loras:
        check_unstacked(lora)
        check_adapters(lora)
    count = len(loras) if capacity is None else capacity
    if count < len(loras) or not any(loras):
        raise error(
            "there are more adapters than slots." if any(loras) else "no adapter says what a slot holds.",
            got=f"{len(loras)} adapters, capacity={capacity}",
            want="at least one adapter of some weight, and a slot for each",
            do=f"lx.bank(loras, capacity={max(len(loras), 1)})." if any(loras) else "lx.bank([lora]).",
        )
    if is_abstract(loras):
        return jax.eval_shape(partial(_bank, count=count, rank=rank), loras)
    return _bank(loras, count, rank)


def _bank(loras: list[Any], count: int, rank: int | None) -> Bank:
    loras = [{path: kept(path, adapter) for path, adapter in lora.items()} for lora in loras]
    paths = dict.fromkeys(path for lora in loras for path in lora)
    forms = {path: form(path, [lora[path] for lora in loras if path in lora], rank) for path in paths}
    singles = [padded(forms, lora) for lora in [*loras, *[{}] * (count - len(loras))]]
    slots = {}
    for path, found in forms.items():
        s = len(found.layout.stack)

        def joined(*arrays, s=s):
            at = 0 if arrays[0].ndim == 1 else s  # kind is [k]
            if any(map(is_tracer, arrays)):
                return jnp.concatenate(arrays, at)
            return jnp.asarray(np.concatenate(arrays, at))

        slots[path] = jax.tree.map(joined, *(single[path] for single in singles))
    return Bank(slots)


def _width(slots: Mapping[str, Slots]) -> int:
    return math.prod(np.shape(next(iter(slots.values())).kind))


def _written(slots: Any, i: Any, one: Any) -> Any:
    """All arrays of the bank with one slot replaced."""

    def write(path, s):
        def into(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, i, 0 if old.ndim == 1 else s)

        return jax.tree.map(into, slots[path], one[path])

    return {path: write(path, len(held.layout.stack)) for path, held in slots.items()}


_write = jax.jit(_written)
_write_in_place = jax.jit(_written, donate_argnums=0)


@jax.jit
def _read(slots: Any, i: Any) -> Any:
    def one(held):
        s = len(held.layout.stack)
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, 0 if x.ndim == 1 else s, keepdims=False), held
        )

    return {path: one(held) for path, held in slots.items()}


def _no_slot(i: Any, count: int, also: str = "") -> Exception:
    return error(
        "the bank has no such slot.",
        got=repr(i),
        want=f"{also}0 to {count - 1}",
        do="make a larger bank, lx.bank(loras, capacity=...), for which programs compile once more.",
    )
