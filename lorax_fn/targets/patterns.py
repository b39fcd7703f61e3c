"""Patterns that name leaves: globs over path components, regexes, and functions."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_fn.core.errors import error, nearest

Pattern = str | re.Pattern | Callable[[str, Any], bool]
Patterns = Pattern | Sequence[Pattern] | set[Pattern] | frozenset[Pattern] | None


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether a pattern names a leaf.

    Args:
      pattern: a glob over any run of whole components (``*`` crosses everything), a compiled regex
        (``fullmatch`` on the path), or ``f(path, leaf) -> bool``.
      path: the leaf's path.
      leaf: the leaf, for callables.

    Returns:
      True or False.

    Raises:
      LoraError: the pattern is of another type.

    Example:
      >>> from lorax_fn.targets.patterns import matches
      >>> matches("layer_1", "layer_1/attn/q/kernel"), matches("layer_1", "layer_10/attn/q/kernel")
      (True, False)
    """
    if isinstance(pattern, str):
        parts, glob = components(path), "/".join(components(pattern))
        ends = range(1, len(parts) + 1)
        return any(fnmatch.fnmatchcase("/".join(parts[i:j]), glob) for j in ends for i in range(j))
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if callable(pattern):
        return bool(pattern(path, leaf))
    raise error(
        "a pattern of an unknown type.",
        got=repr(pattern),
        want="a glob, a compiled regex, or f(path, leaf) -> bool",
        do="write it as a string such as 'attn/q'.",
    )


def find(patterns: Any, leaves: Mapping[str, Any], argument: str) -> list[tuple[str, list[str]]]:
    """The leaves that each pattern names, as ``[(label, [path])]``; none for None.

    Raises:
      LoraError: a pattern names no leaf; the message has the nearest paths.
    """
    if patterns is None:
        return []
    several = isinstance(patterns, Sequence | set | frozenset) and not isinstance(patterns, str)
    listed: list[Any] = list(patterns) if several else [patterns]
    found = [
        (label_of(pattern), [path for path, leaf in leaves.items() if matches(pattern, path, leaf)])
        for pattern in listed
    ]
    lost = [label for label, hits in found if not hits]
    if lost:
        raise error(
            f"a pattern in {argument}= matches nothing.",
            got=lost,
            nearest=[path for label in lost for path in nearest(label, list(leaves))] or "none",
            do="correct the pattern; a glob names whole components: 'attn/q', 'layer_*'.",
        )
    return found


def union(found: list) -> list[str]:
    return list(dict.fromkeys(path for _, hits in found for path in hits))


def label_of(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


def components(path: str) -> list[str]:
    """The parts of a path between ``/`` and ``.``."""
    return [part for part in re.split(r"[/.]", path) if part] or [""]
