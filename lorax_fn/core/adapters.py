"""The adapter: a pytree that changes or replaces one weight, and the interface that methods implement."""

import dataclasses
import itertools
import numbers
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import numpy as np

from lorax_fn.core import serializing
from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.trees import is_array, is_float

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank form ``W' = column * (W + scale * A @ B)`` that the transform contracts.

    Args:
      a: ``[*s, *n, r]``, or ``[*n, r]`` if all stack entries share it.
      b: ``[*s, r, *m]``.
      layout: which axes of the weight are stack, inputs and outputs.
      scale: a number, or an array ``[]``, ``[*s]`` or ``[*s, r]``.
      column: ``[*s, *m]`` factor of the whole weight (DoRA), or None for 1.
      key: PRNG keys ``[*s]`` for dropout on the inputs of A, or None.
      rate: the fraction of inputs to drop: a number, or a scalar array.
      tap: True if the factors only observe what the weight contracts; see `transform/taps.py`.
      pick: None for one adapter. If A, B and scale are those of many, ``[*s, k, ...]``: the integer index of
        the one to use (any other than ``0 .. k-1`` adds nothing), or float weights ``[k]``.
      lanes: under a `jax.vmap` over adapters padded to one rank, the ranks of all lanes, so that products
        leave the padding out; a `Lanes` of `transform/lanes.py`.
    """

    a: jax.Array
    b: jax.Array
    layout: Layout
    scale: Any
    column: jax.Array | None = None
    key: jax.Array | None = None
    rate: Any = 0.0
    tap: bool = False
    pick: Any = None
    lanes: Any = None


def fact(**options: Any) -> Any:
    """A static field of an adapter: it is part of the tree's structure, so a new value recompiles."""
    return dataclasses.field(metadata={"static": True}, **options)


def number(**options: Any) -> Any:
    """A field that is static if it holds a Python number or a tuple of them, and a leaf if it holds an array.

    As a leaf it is never trained, and a new value does not recompile.
    """
    return dataclasses.field(metadata={"static": True, "number": True}, **options)


def is_number(x: object) -> bool:
    """Whether a `number` field with this value is static: a real number, or a tuple of real numbers."""
    if type(x) in (int, float):  # almost always, and quicker than asking an abstract class
        return True
    if isinstance(x, tuple):
        return all(map(is_number, x))
    return is_real(x)


def is_real(x: object) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, fact, number)
)
def register(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree.

    Plain fields are leaves, `fact` fields are static, and `number` fields are either. Two adapters are equal
    only if they are the same object, because comparing arrays does not give one truth value. To compare by
    value, use ``jax.tree.all(jax.tree.map(jnp.array_equal, one, other))``. As arrays, they have no hash, so
    that `jax.jit` refuses one as a static argument.
    """
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    made.__hash__ = None
    fields = dataclasses.fields(made)
    arrays = tuple(f.name for f in fields if not f.metadata.get("static"))
    either = tuple(f.name for f in fields if f.metadata.get("number"))
    facts = tuple(f.name for f in fields if f.metadata.get("static") and not f.metadata.get("number"))

    def in_order(live, still):
        return (*arrays, *live, *facts, *still, "_static", "_flat")

    usual = in_order((), either)

    def structure(x):
        """Which `number` fields are leaves, and the values of all static fields: ``(live, values)``.

        An adapter never changes, so this is found once and kept: a jitted call flattens all its adapters.
        """
        held = x.__dict__
        static = held.get("_static")
        if static is None:
            live = tuple(name for name in either if not is_number(held[name]))
            still = tuple(name for name in either if name not in live)
            static = held["_static"] = live, tuple([held[name] for name in facts + still])
        return static

    def flatten_with_keys(x):
        static = structure(x)
        names = arrays + static[0]
        return [(jax.tree_util.GetAttrKey(name), x.__dict__[name]) for name in names], static

    def flatten(x):
        flat = x.__dict__.get("_flat")
        if flat is None:
            static, held = structure(x), x.__dict__
            flat = held["_flat"] = tuple([held[name] for name in arrays + static[0]]), static
        return flat

    def unflatten(static, leaves):
        live, values = static
        names = usual if not live else in_order(live, tuple(name for name in either if name not in live))
        x = object.__new__(made)
        # tree_map may put a Python number where an array was. It stays a leaf, so that structures agree.
        x.__dict__.update(zip(names, (*leaves, *values, static, (tuple(leaves), static)), strict=True))
        return x

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    serializing.register(made)
    return made


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What changes or replaces one weight: a class that `register` makes a frozen dataclass and a pytree.

    A method is a subclass that defines `weight` (the changed weight) and, if it has a fast path, `factors`
    (the low-rank form, which the transform contracts without building the weight). The rest of the package
    knows a method only through the members below.

    ``frozen`` names the array fields that are never trained: their gradient is zero, and `lorax_fn.mask` is
    False on them.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoRA, lx.Adapter), lx.LoRA.frozen
      (True, ())
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    up: ClassVar[tuple[str, ...]] = ()  # array fields on the output side, which LoRA+ trains faster
    adds: ClassVar[bool] = False  # True if W' = W + dW and dW does not depend on W
    # True if dW = scale * a @ b with the fields a and b themselves, so that the rank can be changed.
    owns_factors: ClassVar[bool] = False

    def weight(self, w: jax.Array) -> jax.Array:
        """The changed weight, accumulated in float32 or wider, in the shape and dtype of ``w``."""
        raise TypeError(f"{type(self).__name__} must define weight(w)")

    def factors(self, w: jax.Array) -> Factors | None:
        """The low-rank form of the changed weight, or None if only `weight` can be used."""
        del w
        return None

    def pair(self) -> Factors | None:
        """A, B and the scale of a low-rank change that does not depend on the weight, or None."""
        return None

    def delta(self) -> jax.Array:
        """``dW`` in float32 on the weight's own axes; defined if the class ``adds``."""
        raise TypeError(f"{type(self).__name__} has no dW that is independent of its weight")

    def base(self, w: Any) -> Any:
        """The part of the weight that `factors` adds to: all of it, unless the adapter replaces a part."""
        return w

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """For each array field, the axis of the weight that each of its axes runs along; None for the rank.

        `lorax_fn.shardings` uses it. A field that is left out is replicated.
        """
        return {}

    def problem(self, w: Any) -> str | None:
        """What this adapter would fit instead of ``w``, as the ``want`` of an error; None if it fits."""
        del w
        return None

    @classmethod
    def trained(cls) -> tuple[str, ...]:
        """The array fields that are trained if they hold floats."""
        fields = dataclasses.fields(cls)
        return tuple(f.name for f in fields if not f.metadata.get("static") and f.name not in cls.frozen)

    def count(self) -> int:
        """How many numbers are trained."""
        values = [getattr(self, name) for name in self.trained()]
        return sum(int(np.prod(value.shape)) for value in values if is_float(value))

    def numbers(self) -> dict[str, Any]:
        """What a table shows about this adapter: rank, alpha and scale, as far as the method has them."""
        return {}

    def with_dropout(self, rate: Any, key: jax.Array) -> "Adapter":
        """A copy that drops a fraction ``rate`` of the inputs of A.

        Raises:
          LoraError: the method does not support dropout.
        """
        del rate, key
        raise error(
            "this method does not support dropout.",
            got=type(self).__name__,
            want="a method that multiplies inputs by a factor A",
            do="leave it out: lora | lx.dropout({path: a for path, a in lora.items() if ...}, rate, key).",
        )

    @property
    def under_dropout(self) -> bool:
        """Whether this adapter came out of `lorax_fn.dropout`, so that it carries dropout keys."""
        return getattr(self, "key", None) is not None

    @property
    def is_stacked(self) -> bool:
        """Whether its arrays have one more axis than its layout does, for `jax.vmap` to map over."""
        return any(
            is_array(value := getattr(self, name)) and len(value.shape) != len(axes)
            for name, axes in self.axes().items()
            if name != "key"
        )

    def __repr__(self) -> str:
        """One line, in which arrays show as dtype and shape."""
        fields = dataclasses.fields(self)
        arrays = {f.name: getattr(self, f.name) for f in fields if not f.metadata.get("static")}
        told = {name: short(value) for name, value in arrays.items() if value is not None}
        for name, value in self.numbers().items():
            told[name] = f"{value:g}" if name == "scale" and isinstance(value, numbers.Real) else short(value)
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in told.items())})"


def short(x: Any) -> str:
    """An array as ``f32[16,8]``, a long tuple by its runs (``2x0 78x8``), other values by their ``repr``."""
    if isinstance(x, tuple) and len(x) > 4:
        return " ".join(f"{len(list(same))}x{value}" for value, same in itertools.groupby(x))
    if not is_array(x) or isinstance(x, np.generic):
        return repr(x)
    array: Any = x
    shape = ",".join(map(str, array.shape))
    if not isinstance(array.dtype, np.dtype):  # PRNG keys
        return f"{array.dtype}[{shape}]"
    name = array.dtype.name.rstrip("0123456789")
    kind = {"float": "f", "int": "i", "uint": "u", "bfloat": "bf", "complex": "c"}.get(name, name)
    return f"{kind}{array.dtype.name[len(name) :]}[{shape}]"


def is_adapter(x: object) -> bool:
    return isinstance(x, Adapter)
