"""What an adapter is: it changes or replaces one weight, and answers what other code asks of it."""

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
      a: ``[*s, *n, r]``; without ``*s`` where all stack entries share it.
      b: ``[*s, r, *m]``.
      layout: which axes of the weight are stack, inputs and outputs.
      scale: a number, or an array ``[]``, ``[*s]`` or ``[*s, r]``.
      column: ``[*s, *m]`` factor of the whole weight (DoRA), or None for 1.
      key: PRNG keys ``[*s]`` that drop inputs of A, or None.
      rate: the share of inputs dropped: a number, or a scalar array.
      tap: whether the factors only read what the weight contracts; see `transform/taps.py`.
      pick: where A, B and scale of many adapters lie side by side, ``[*s, k, ...]``: the integer number of
        the one to use (any outside of ``0 .. k-1`` adds nothing), or float weights ``[k]``; None for one.
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


def fact(**options: Any) -> Any:
    """A field of an adapter that is static, a part of the tree's structure: another value compiles anew."""
    return dataclasses.field(metadata={"static": True}, **options)


def number(**options: Any) -> Any:
    """A field that is static as a Python number or a tuple of them, and a leaf as an array.

    As a leaf it never trains, and other values of it compile nothing.
    """
    return dataclasses.field(metadata={"static": True, "number": True}, **options)


def is_number(x: object) -> bool:
    """Whether a `number` field with this value is static: a real number, or a tuple of real numbers."""
    if isinstance(x, tuple):
        return all(map(is_number, x))
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, fact, number)
)
def register(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree.

    Plain fields are leaves, `fact` fields are static, and `number` fields are either. Two adapters are equal
    where they are the same object, for arrays have no single truth value; compare them by value with
    ``jax.tree.all(jax.tree.map(jnp.array_equal, one, other))``.
    """
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(made)
    arrays = tuple(f.name for f in fields if not f.metadata.get("static"))
    either = tuple(f.name for f in fields if f.metadata.get("number"))
    facts = tuple(f.name for f in fields if f.metadata.get("static") and not f.metadata.get("number"))

    def parts(x):
        held = x.__dict__
        live = held.get("_live")
        if live is None:
            live = tuple(name for name in either if not is_number(held[name]))
        still = either if not live else tuple(name for name in either if name not in live)
        names = arrays + live
        return names, [held[name] for name in names], (live, tuple([held[name] for name in facts + still]))

    def flatten_with_keys(x):
        names, leaves, static = parts(x)
        return [
            (jax.tree_util.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)
        ], static

    def flatten(x):
        return parts(x)[1:]

    def unflatten(static, leaves):
        live, values = static
        still = either if not live else tuple(name for name in either if name not in live)
        x = object.__new__(made)
        x.__dict__.update(zip(arrays + live, leaves, strict=True))
        x.__dict__.update(zip(facts + still, values, strict=True))
        # A tree_map may put a Python number where an array was: it stays a leaf.
        x.__dict__["_live"] = live
        return x

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    serializing.register(made)
    return made


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What changes or replaces one weight: a frozen dataclass that is a pytree, made so by `register`.

    A method is a subclass with `weight` (the changed weight, always) and, where a fast path exists,
    `factors` (its low-rank form, which the transform contracts without building the weight). All that the
    rest of the package needs to know of a method, it asks by the members below.

    ``frozen`` names the array fields that never train: they get a zero gradient and ``mask`` False.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoRA, lx.Adapter), lx.LoRA.frozen
      (True, ())
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    up: ClassVar[tuple[str, ...]] = ()  # array fields on the side of the outputs: LoRA+ trains them faster
    adds: ClassVar[bool] = False  # W' = W + dW, with a dW that is known without W
    owns_factors: ClassVar[bool] = (
        False  # dW = scale * a @ b of its own fields a and b: it can be cut and resized
    )

    def weight(self, w: jax.Array) -> jax.Array:
        """The changed weight, summed in float32 or wider and returned in ``w``'s dtype, ``w``'s shape."""
        raise TypeError(f"{type(self).__name__} must define weight(w)")

    def factors(self, w: jax.Array) -> Factors | None:
        """The low-rank form of the change, or None where `weight` is the form to compute with."""
        del w
        return None

    def pair(self) -> Factors | None:
        """A, B and the scale of a low-rank change that is known without the weight, or None."""
        return None

    def delta(self) -> jax.Array:
        """``dW`` in float32 on the weight's own axes, where the class ``adds``."""
        raise TypeError(f"{type(self).__name__} has no dW that is known without its weight")

    def base(self, w: Any) -> Any:
        """What of the weight stands beside `factors`: all of it, unless the adapter replaces a part."""
        return w

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """Which axis of the weight each axis of each array field runs along, None for a rank.

        Shardings of the weight are handed down along it; a field left out is replicated.
        """
        return {}

    def problem(self, w: Any) -> str | None:
        """Why this adapter does not fit a weight of ``w``'s shape, or None where it fits."""
        del w
        return None

    @classmethod
    def trained(cls) -> tuple[str, ...]:
        """The array fields that train, where they hold floats."""
        fields = dataclasses.fields(cls)
        return tuple(f.name for f in fields if not f.metadata.get("static") and f.name not in cls.frozen)

    def count(self) -> int:
        """How many numbers train."""
        values = [getattr(self, name) for name in self.trained()]
        return sum(int(np.prod(value.shape)) for value in values if is_float(value))

    def numbers(self) -> dict[str, Any]:
        """The facts of one line of a table: rank, alpha and scale, those that the method has."""
        return {}

    def with_dropout(self, rate: Any, key: jax.Array) -> "Adapter":
        """A copy that drops a share of the inputs of A by a PRNG key, or a `LoraError` that says why not."""
        del rate, key
        raise error(
            "this method takes no dropout.",
            got=type(self).__name__,
            want="a method with inputs of A to drop",
            do="leave it out: lora | lx.dropout({path: a for path, a in lora.items() if ...}, rate, key).",
        )

    @property
    def under_dropout(self) -> bool:
        """Whether this adapter came out of `lorax_fn.dropout`: it then carries keys that drop inputs of A."""
        return getattr(self, "key", None) is not None

    @property
    def is_stacked(self) -> bool:
        """Whether its arrays have an axis more than its layout tells, as those for `jax.vmap` do."""
        return any(
            is_array(value := getattr(self, name)) and len(value.shape) != len(axes)
            for name, axes in self.axes().items()
            if name != "key"
        )

    def __repr__(self) -> str:
        """One line, whatever the fields hold: arrays by dtype and shape."""
        fields = dataclasses.fields(self)
        arrays = {f.name: getattr(self, f.name) for f in fields if not f.metadata.get("static")}
        told = {name: short(value) for name, value in arrays.items() if value is not None}
        for name, value in self.numbers().items():
            told[name] = f"{value:g}" if name == "scale" and isinstance(value, numbers.Real) else short(value)
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in told.items())})"


def short(x: Any) -> str:
    """An array as ``f32[16,8]``, a long tuple by its runs, ``2x0 78x8``, any other value by its ``repr``."""
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
