"""`LoraError`, the one error class of this package: what happened, then facts, then what to do."""

from collections.abc import Sequence


class LoraError(ValueError):
    """A mistake that a user of this library can make and correct.

    Every message has the same form: what happened; then lines ``path``, ``got``, ``want`` and ``do``.

    Args:
      message: the complete text.

    Example:
      >>> import lorax_fn as lx
      >>> issubclass(lx.LoraError, ValueError)
      True
    """


SHOWN = 5  # how many lines of one fact are shown, and for how many paths nearest names are suggested


def error(what: str, *, do: str, **facts: object) -> LoraError:
    """Builds a `LoraError` with aligned fact lines: ``error("no match.", path=..., got=..., do=...)``.

    A fact that is a list gets one line per entry: the first five, then how many more there are. If all
    entries are the same, one line is shown.
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
    """The ``n`` paths most like ``path``, for error messages.

    Exact comparison is slow, so only the paths that share the most pairs of letters are compared.
    """
    import difflib

    wanted = _pairs(path)
    shared = sorted(((len(wanted & _pairs(other)), -len(other)), i) for i, other in enumerate(others))
    alike = [others[i] for _, i in shared[-8 * n :]]
    return difflib.get_close_matches(path, alike, n=n, cutoff=0.0)


def _pairs(path: str) -> set[str]:
    return {path[i : i + 2] for i in range(len(path) - 1)}
