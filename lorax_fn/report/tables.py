"""`summary`, a table of what is adapted and what is not, fast enough for an abstract 70B tree."""

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.fitting import check_fits
from lorax_fn.core.stored import is_stored
from lorax_fn.core.trees import PyTree, arrays, is_float
from lorax_fn.methods.stuck import stuck
from lorax_fn.targets.conventions import Role
from lorax_fn.targets.patterns import Index
from lorax_fn.targets.roles import roles_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Args:
      path: its path.
      shape: the weight's shape.
      method: the adapter's class.
      rank: ``r``, or one per stack entry, or None for a leaf trained whole.
      alpha: numerator of the scale, or None.
      scale: factor before ``A @ B``, one number or one per stack entry, or None.
      trainable: how many numbers train, without padding.
      format: the format of a quantized weight, such as ``"nf4"``; empty for an array.
      nbytes: bytes of the weight as stored.
      stuck: why the adapter can never move; empty if it can, or if its values are not known.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    rank: int | tuple[int, ...] | None
    alpha: float | tuple[float, ...] | None
    scale: float | tuple[float, ...] | None
    trainable: int
    format: str = ""
    nbytes: int = 0
    stuck: str = ""

    @property
    def total(self) -> int:
        """The number of elements of the weight."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """One leaf of two or more axes without an adapter, and why.

    Args:
      path: its path.
      shape: its shape.
      reason: why it is not adapted.
      format: its format if it is quantized, else empty.
      nbytes: its bytes if it is quantized, else 0.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    format: str = ""
    nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of `summary`, which prints as a table, and as HTML in notebooks.

    Args:
      rows: the adapted leaves, in the order of params.
      skipped: the leaves of two or more axes that are not adapted.
      trainable: how many numbers train.
      total: how many numbers the float leaves of params hold, without adapters.
      nbytes: bytes of all leaves of params as stored, shown if any leaf is quantized.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params, lora = lx.split({"q": {"kernel": jnp.ones((8, 6))}}, rank=2)
      >>> print(lx.summary(params, lora))
      path           shape   method  rank  alpha  scale  trainable  total  percent
      q/kernel       (8, 6)  LoRA    2     32     16            28     48   58.333
      all of params                                             28     48   58.333
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    trainable: int
    total: int
    nbytes: int = 0

    @property
    def quantized(self) -> bool:
        """Whether any leaf listed is quantized."""
        return any(x.format for x in (*self.rows, *self.skipped))

    @property
    def percent(self) -> float:
        """Trainable numbers as a percentage of the base model's."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = _aligned(self._table(), numbers=3 + self.quantized)
        if self.skipped:
            lines.append("not adapted:")
            cells = [(s.path, str(s.shape), _reason(s)) for s in self.skipped]
            lines.extend("  " + line for line in _aligned(cells))
        stuck = [(row.path, str(row.shape), row.stuck) for row in self.rows if row.stuck]
        if stuck:
            lines.append("can never move:")
            lines.extend("  " + line for line in _aligned(stuck))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *lines = self._table()
        tables = [_html_table(head, lines)]
        if self.skipped:
            cells = [(s.path, str(s.shape), _reason(s)) for s in self.skipped]
            tables.append(_html_table(("not adapted", "shape", "reason"), cells))
        stuck = [(row.path, str(row.shape), row.stuck) for row in self.rows if row.stuck]
        if stuck:
            tables.append(_html_table(("can never move", "shape", "reason"), stuck))
        return "".join(tables)

    def _table(self) -> list[tuple[str, ...]]:
        total = ("all of params", "", "", "", "", "", *_share(self.trainable, self.total))
        table = [_HEAD, *map(_cells, self.rows), total]
        if not self.quantized:
            return table
        last = [
            ("bytes", "stored"),
            *((f"{x.nbytes:,}", x.format) for x in self.rows),
            (f"{self.nbytes:,}", ""),
        ]
        return [
            (*line[:6], stored, *line[6:], size) for line, (size, stored) in zip(table, last, strict=True)
        ]


def summary(params: PyTree, lora: dict[str, Adapter], *, layout: Mapping[Any, Any] | None = None) -> Summary:
    """Lists the adapted leaves and their costs, and every other leaf of two or more axes with the reason.

    Args:
      params: the frozen tree; leaves may be abstract.
      lora: its adapters.
      layout: as given to `split`, so that the reasons are the ones that it used; None is conventions.

    Returns:
      A `Summary` to ``print``. If adapters are concrete, it also lists those that can never move.

    Raises:
      LoraError: ``lora`` is not a dict of adapters or does not fit ``params``; or ``layout`` is that of other
        params.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"q": {"kernel": jnp.ones((8, 6))}, "lm_head": {"kernel": jnp.ones((8, 9))}}
      >>> lx.summary(*lx.split(params, rank=2)).skipped[0].reason
      'output head by name'
    """
    leaves = arrays(params)
    check_fits(leaves, lora)
    rows = tuple(_row(path, leaf, lora[path]) for path, leaf in leaves.items() if path in lora)
    roles = roles_of(params, Index(leaves), layout)
    least = _least_rank(lora)
    skipped = tuple(
        Skipped(
            path,
            tuple(leaf.shape),
            _why(roles[path], leaf, least),
            *(_stored(leaf) if is_stored(leaf) else ("", 0)),
        )
        for path, leaf in leaves.items()
        if path not in lora and len(leaf.shape) > 1
    )
    total = sum(math.prod(leaf.shape) for leaf in leaves.values() if is_float(leaf))
    nbytes = sum(_stored(leaf)[1] for leaf in leaves.values())
    return Summary(rows, skipped, sum(row.trainable for row in rows), total, nbytes)


def _stored(leaf: Any) -> tuple[str, int]:
    if is_stored(leaf):
        return leaf.format, leaf.nbytes
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return "", math.prod(leaf.shape) * leaf.dtype.itemsize


def _reason(skipped: Skipped) -> str:
    return (
        f"{skipped.reason} ({skipped.format}, {skipped.nbytes:,} bytes)" if skipped.format else skipped.reason
    )


def _least_rank(lora: Mapping[str, Adapter]) -> int:
    """The smallest rank of any adapter, or 0 if none has a single rank."""
    ranks = [adapter.numbers().get("rank") for adapter in lora.values() if adapter.pair() is not None]
    return min((rank for rank in ranks if isinstance(rank, int)), default=0)


def _why(role: Role, leaf: Any, least: int) -> str:
    if role.kind == "open":
        return f"not among targets, or left open by conventions: {role.reason}"
    if role.kind == "linear" and role.layout is not None:
        _, n, m = role.layout.shapes(leaf.shape)
        limit = min(math.prod(n), math.prod(m))
        if limit < least:
            return f"too small for the rank of the others: at most {limit}; or excluded"
    return role.reason or "a weight, but not among targets, or excluded"


def _row(path: str, leaf: Any, adapter: Adapter) -> Row:
    told = adapter.numbers()
    scale: Any = told.get("scale")
    if getattr(scale, "ndim", 0):
        scale = tuple(float(x) for x in scale.ravel())
    shape, method = tuple(leaf.shape), type(adapter).__name__
    numbers = told.get("rank"), told.get("alpha"), scale
    return Row(path, shape, method, *numbers, adapter.count(), *_stored(leaf), stuck(adapter) or "")


_HEAD = ("path", "shape", "method", "rank", "alpha", "scale", "trainable", "total", "percent")


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (_runs(row.rank), _runs(row.alpha), _runs(row.scale))
    return (row.path, str(row.shape), row.method, *numbers, *_share(row.trainable, row.total))


def _share(trainable: int, total: int) -> tuple[str, str, str]:
    return f"{trainable:,}", f"{total:,}", f"{100.0 * trainable / total if total else 0.0:.3f}"


def _runs(value: Any) -> str:
    """``(0, 0, 8, 8)`` as ``2x0 2x8``, so that a stack of 80 layers fits on a line."""
    if value is None:
        return "-"
    if not isinstance(value, tuple):
        return f"{value:g}"
    groups = [(len(list(same)), number) for number, same in itertools.groupby(value)]
    return " ".join(f"{count}x{number:g}" for count, number in groups)


def _aligned(cells: Sequence[Sequence[str]], numbers: int = 0) -> list[str]:
    """Lines of padded cells, the last ``numbers`` columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        for i in range(len(row) - numbers, len(row)):
            padded[i] = row[i].rjust(widths[i])
        lines.append("  ".join(padded).rstrip())
    return lines


def _html_table(head: Sequence[str], rows: Any) -> str:
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
