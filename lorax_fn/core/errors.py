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


SHOWN = 5  # lines of one fact, and paths whose nearest names are looked for


def error(what: str, *, do: str, **facts: object) -> LoraError:
    """Builds a `LoraError` with aligned fact lines: ``error("no match.", path=..., got=..., do=...)``.

    A fact that is a list has one line per entry: the first five, and how many more there are. Where all
    entries of a list say the same, they are said once.
    """
    lines = [what]
    for name, fact in {**facts, "do": do}.items():
        text = "\n".join(_shown(fact)) if isinstance(fact, list) else str(fact)
        first, *rest = text.split("\n")
        lines.append(f"  {name + ':':<9}{first}")
        lines.extend(f"  {'':<9}{line}" for line in rest)
    return LoraError("\n".join(lines))


def _shown(fact: list) -> list[str]:
    entries = [str(entry) for entry in fact]
    if len(entries) > 1 and len(set(entries)) == 1:
        return [entries[0]]
    more = len(entries) - SHOWN
    return entries if more <= 1 else [*entries[:SHOWN], f"and {more} more"]


def nearest(path: str, others: Sequence[str], n: int = 4) -> list[str]:
    """The paths most like ``path``, for error messages.

    Comparing two paths letter by letter is slow, so only those that share most pairs of letters are compared.
    """
    import difflib

    wanted = _pairs(path)
    shared = sorted(((len(wanted & _pairs(other)), -len(other)), i) for i, other in enumerate(others))
    alike = [others[i] for _, i in shared[-8 * n :]]
    return difflib.get_close_matches(path, alike, n=n, cutoff=0.0)


def _pairs(path: str) -> set[str]:
    return {path[i : i + 2] for i in range(len(path) - 1)}
