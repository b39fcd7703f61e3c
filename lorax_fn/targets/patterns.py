"""Patterns that name leaves: globs over path components, regexes, and functions."""

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_fn.core.errors import SHOWN, error, nearest
from lorax_fn.targets.synonyms import meant

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
Patterns = Pattern | Sequence[Pattern] | set[Pattern] | frozenset[Pattern] | None


class Index(dict[str, Any]):
    """Leaves by path, with tables to look up which of them a pattern names.

    A literal pattern is looked up in a table of all runs of that many components, which is built once per
    length. A glob is compiled once, and each result is cached. For literal patterns, the time thus grows with
    the number of leaves plus patterns, not with their product.
    """

    def __init__(self, leaves: Mapping[str, Any]):
        super().__init__(leaves)
        self._runs: dict[int, dict[str, list[str]]] = {}
        self._answers: dict[Any, list[str]] = {}

    def hits(self, pattern: Pattern) -> list[str]:
        """The paths of the leaves that a pattern names, in the tree's order.

        Raises:
          LoraError: the pattern has an unknown type.
        """
        if pattern not in self._answers:
            self._answers[pattern] = self._find(pattern)
        return self._answers[pattern]

    def parts(self) -> list[str]:
        """All components of all paths, without repeats."""
        return list(dict.fromkeys(part for path in self for part in components(path)))

    def _find(self, pattern: Pattern) -> list[str]:
        if isinstance(pattern, str):
            parts = components(pattern)
            if not _is_glob(pattern):
                return self._runs_of(len(parts)).get("/".join(parts), [])
            search = _compiled(pattern).search
            return [path for path in self if search("/".join(components(path)))]
        return [path for path, leaf in self.items() if matches(pattern, path, leaf)]

    def _runs_of(self, length: int) -> dict[str, list[str]]:
        if length not in self._runs:
            table: dict[str, list[str]] = {}
            for path in self:
                parts = components(path)
                for run in {"/".join(parts[i : i + length]) for i in range(len(parts) - length + 1)}:
                    table.setdefault(run, []).append(path)
            self._runs[length] = table
        return self._runs[length]


def indexed(leaves: Mapping[str, Any]) -> Index:
    """The leaves as an `Index`; one that is an `Index` already is shared."""
    return leaves if isinstance(leaves, Index) else Index(leaves)


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether a pattern names a leaf.

    Args:
      pattern: a glob over any run of whole components (``*`` also matches across components), a compiled
        regex (``fullmatch`` on the path), or ``f(path, leaf) -> bool``.
      path: the leaf's path.
      leaf: the leaf, for callables.

    Returns:
      True or False.

    Raises:
      LoraError: the pattern has an unknown type.

    Example:
      >>> from lorax_fn.targets.patterns import matches
      >>> matches("layer_1", "layer_1/attn/q/kernel"), matches("layer_1", "layer_10/attn/q/kernel")
      (True, False)
    """
    if isinstance(pattern, str):
        return _compiled(pattern).search("/".join(components(path))) is not None
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if callable(pattern):
        return bool(pattern(path, leaf))
    raise error(
        "a pattern has an unknown type.",
        got=repr(pattern),
        want="a glob, a compiled regex, or f(path, leaf) -> bool",
        do="write it as a string such as 'attn/q'.",
    )


def find(patterns: Any, leaves: Mapping[str, Any], argument: str) -> list[tuple[str, list[str]]]:
    """The leaves that each pattern names, as ``[(label, [path])]``; empty for None.

    Raises:
      LoraError: a pattern names no leaf; the message suggests the nearest paths.
    """
    listed, index = as_list(patterns), indexed(leaves)
    found = [(pattern, index.hits(pattern)) for pattern in listed]
    lost = [pattern for pattern, hits in found if not hits]
    if lost:
        advice = list(dict.fromkeys(filter(None, (_advice(pattern, index) for pattern in lost[:SHOWN]))))
        paths = list(index)
        raise error(
            f"a pattern in {argument}= matches nothing.",
            got=[label_of(pattern) for pattern in lost],
            nearest=[path for x in lost[:SHOWN] for path in nearest(label_of(x), paths)] or "none",
            do="\n".join(
                [*advice, "correct the pattern; a glob names whole components: 'attn/q', 'layer_*'."]
            ),
        )
    return [(label_of(pattern), hits) for pattern, hits in found]


def first_match(
    values: Mapping[Any, Any],
    leaves: Mapping[str, Any],
    argument: str,
    among: Mapping[str, Any] | None = None,
    why_not: Callable[[str], str] = lambda path: "not among the targets",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of ``{pattern: value}`` for each leaf, where the first match wins.

    Args:
      values: the mapping.
      leaves: all leaves by path.
      argument: the name of the argument, for messages.
      among: the leaves that need a value; None is all of them.
      why_not: explains why a leaf is not ``among`` them.

    Returns:
      ``({path: value}, {path: deciding pattern})`` for the leaves that a pattern names.

    Raises:
      LoraError: a pattern names no leaf, or decides nothing because it names only leaves that need no value,
        or only leaves that earlier patterns decide. A last ``"*"`` is a default and may decide nothing.
    """
    decided: dict[str, Any] = {}
    idle: list[tuple[str, str]] = []
    for i, (pattern, (_, named)) in enumerate(zip(values, find(list(values), leaves, argument), strict=True)):
        wanted = named if among is None else [path for path in named if path in among]
        fresh = [path for path in wanted if path not in decided]
        decided.update(dict.fromkeys(fresh, pattern))
        if fresh or (pattern == "*" and i == len(values) - 1):
            continue
        if wanted:
            before = dict.fromkeys(label_of(decided[path]) for path in wanted)
            idle.append(
                (label_of(pattern), f"what it names is decided by {', '.join(map(repr, before))} before it")
            )
        else:
            more = f", and {len(named) - 1} more" if len(named) > 1 else ""
            idle.append((label_of(pattern), f"it names {named[0]}{more}: {why_not(named[0])}"))
    if idle:
        raise error(
            f"a key of {argument}= decides nothing.",
            got=[label for label, _ in idle],
            why=[why for _, why in idle],
            want="keys that decide at least one weight; the first match wins",
            do="put the narrower key first, name its weight in targets=, or delete the key.",
        )
    return {path: values[pattern] for path, pattern in decided.items()}, decided


def as_list(patterns: Any) -> list[Any]:
    """None, one pattern or several as a list."""
    if patterns is None:
        return []
    several = isinstance(patterns, Sequence | set | frozenset) and not isinstance(patterns, str)
    return list(patterns) if several else [patterns]


def union(found: list) -> list[str]:
    return list(dict.fromkeys(path for _, hits in found for path in hits))


def label_of(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return getattr(pattern, "__name__", repr(pattern))


@functools.lru_cache(1 << 16)
def components(path: str) -> tuple[str, ...]:
    """The parts of a path between ``/`` and ``.``."""
    return tuple(part for part in path.replace(".", "/").split("/") if part) or ("",)


def _is_glob(pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[")


def _compiled(pattern: str) -> re.Pattern:
    """A glob over any run of whole components, as a regex to search for in the joined components."""
    glob = fnmatch.translate("/".join(components(pattern))).removesuffix(r"\Z").removesuffix(r"\z")
    return re.compile(rf"(?:\A|(?<=/)){glob}(?=/|\Z)")


def _advice(pattern: Pattern, index: Index) -> str:
    """A hint for a pattern that names nothing, or an empty string."""
    if isinstance(pattern, str):
        found = [guess for guess in meant(components(pattern), index.parts()) if index.hits(guess)]
        return f"did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
    if not isinstance(pattern, re.Pattern):
        return ""
    for text in (f".*{pattern.pattern}", f".*(?:{pattern.pattern}).*"):
        try:
            count = sum(re.compile(text, pattern.flags).fullmatch(path) is not None for path in index)
        except re.error:  # flags inside the pattern must stand at its start
            continue
        if count:
            return f"a regex must match the whole path: re.compile({text!r}) matches {count}."
    return ""
