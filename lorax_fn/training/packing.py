"""Token sequences as arrays of one shape: packing, masks of prompts and of packed examples; plain numpy."""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_fn.core.errors import error


def pack(
    sequences: Sequence[Any], length: int, *, prompts: Sequence[int] | None = None, pad: int = 0
) -> dict[str, np.ndarray]:
    """Lays token sequences side by side in rows of one length, for next-token prediction.

    A sequence of ``n`` tokens takes ``n - 1`` places: inputs are its tokens but the last, targets those but
    the first, so nothing is predicted across two sequences. Each goes, in the order given, into the fullest
    row that has room for it. ``positions`` and ``attention_mask(segments)`` keep the sequences of a row apart
    where the model takes them; without, a token sees the sequences before its own.

    Args:
      sequences: token ids, 1-D each, of 2 to ``length + 1`` tokens.
      length: ``T``, places a row.
      prompts: for each sequence, how many of its first tokens are a prompt: their prediction is not scored.
      pad: the token in empty places.

    Returns:
      ``[rows, T]`` arrays: int32 ``inputs``, ``targets``, ``segments`` (0 where empty, then 1, 2, ... in each
      row) and ``positions`` (from 0 in each sequence), and bool ``mask``, True where a target is scored.

    Raises:
      LoraError: a sequence is too long or too short, or has no token that is scored.

    Example:
      >>> import lorax_fn as lx
      >>> rows = lx.data.pack([[5, 6, 7], [8, 9], [1, 2, 3, 4]], 3, prompts=[2, 0, 0])
      >>> rows["inputs"].tolist(), rows["targets"].tolist()
      ([[5, 6, 8], [1, 2, 3]], [[6, 7, 9], [2, 3, 4]])
      >>> rows["segments"].tolist(), rows["mask"].tolist()
      ([[1, 1, 2], [1, 1, 1]], [[False, True, True], [True, True, True]])
    """
    tokens = [np.asarray(sequence, np.int32) for sequence in sequences]
    starts = [0] * len(tokens) if prompts is None else [int(n) for n in prompts]
    if len(starts) != len(tokens):
        raise error(
            "there is not one prompt per sequence.",
            got=f"{len(starts)} prompts, {len(tokens)} sequences",
            do="prompts=[number of prompt tokens of each sequence].",
        )
    wrong = [
        (i, len(ids), start)
        for i, (ids, start) in enumerate(zip(tokens, starts, strict=True))
        if not 2 <= len(ids) <= length + 1 or not 0 <= start < len(ids)
    ]
    if wrong:
        raise error(
            "sequences can't be packed.",
            path=[f"sequences[{i}]" for i, _, _ in wrong],
            got=[f"{size} tokens, {start} of them prompt" for _, size, start in wrong],
            want=f"2 to {length + 1} tokens (length + 1), and one that is no prompt",
            do="cut the long ones, or raise length; drop those without an answer.",
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), the fullest first
    for i, ids in enumerate(tokens):
        at = bisect.bisect_left(room, (len(ids) - 1, -1))
        if at == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        if left - len(ids) + 1:
            bisect.insort(room, (left - len(ids) + 1, row))

    out = {name: np.zeros((len(rows), length), np.int32) for name in ("segments", "positions")}
    out = {name: np.full((len(rows), length), pad, np.int32) for name in ("inputs", "targets")} | out
    out["mask"] = np.zeros((len(rows), length), bool)
    for row, members in enumerate(rows):
        begin = 0
        for segment, i in enumerate(members, 1):
            ids, place = tokens[i], slice(begin, begin + len(tokens[i]) - 1)
            out["inputs"][row, place], out["targets"][row, place] = ids[:-1], ids[1:]
            out["segments"][row, place] = segment
            out["positions"][row, place] = np.arange(len(ids) - 1)
            out["mask"][row, place] = np.arange(1, len(ids)) >= starts[i]
            begin = place.stop
    return out


def prompt_mask(prompts: Any, lengths: Any, size: int) -> np.ndarray:
    """Which predictions of padded sequences are scored: those of tokens that are neither prompt nor padding.

    Args:
      prompts: ``[B]`` ints, how many first tokens of each sequence are its prompt.
      lengths: ``[B]`` ints, how many tokens each sequence has, prompt included.
      size: ``T``, predictions a row: place ``t`` predicts token ``t + 1``.

    Returns:
      ``[B, T]`` bool.

    Example:
      >>> import lorax_fn as lx
      >>> lx.data.prompt_mask([2, 0], [4, 3], 4).astype(int).tolist()
      [[0, 1, 1, 0], [1, 1, 0, 0]]
    """
    token = np.arange(1, size + 1)[None]
    return (token >= np.asarray(prompts)[:, None]) & (token < np.asarray(lengths)[:, None])


def attention_mask(segments: Any) -> np.ndarray:
    """A causal mask in which packed sequences do not see each other, as Flax's attention takes it.

    Args:
      segments: ``[B, T]`` ints of `pack`; 0 is an empty place, which sees the empty places before it alone.

    Returns:
      ``[B, 1, T, T]`` bool: query, then key.

    Example:
      >>> import lorax_fn as lx
      >>> lx.data.attention_mask([[1, 1, 2]]).astype(int).tolist()
      [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    ids = np.asarray(segments)
    same = ids[:, :, None] == ids[:, None, :]
    return (same & np.tri(ids.shape[1], dtype=bool)[None])[:, None]
