"""`LoraError`, the one error of this package: what happened, then facts, then what to do."""

from collections.abc import Sequence


class LoraError(ValueError):
    """Any mistake that a user of this library can make and mend.

    The message has one form: what happened; then ``where``, ``got``, ``want`` and ``do`` lines.

    Args:
      message: the whole text.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraError, ValueError)
      True
    """


def error(what: str, *, do: str, **facts: object) -> LoraError:
    """Builds a `LoraError` with aligned fact lines: ``error("no match.", path=..., got=..., do=...)``."""
    lines = [what]
    for name, fact in {**facts, "do": do}.items():
        text = "\n".join(str(f) for f in fact) if isinstance(fact, list) else str(fact)
        first, *rest = text.split("\n")
        lines.append(f"  {name + ':':<9}{first}")
        lines.extend(f"  {'':<9}{line}" for line in rest)
    return LoraError("\n".join(lines))


def nearest(path: str, others: Sequence[str], n: int = 4) -> list[str]:
    """The paths most like ``path``, for error messages."""
    import difflib

    return difflib.get_close_matches(path, list(others), n=n, cutoff=0.0)
