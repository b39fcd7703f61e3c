"""Packs token sequences into arrays of one shape, and masks prompts and packed examples, in plain numpy."""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_fn.core.errors import error


def pack(
    sequences: Sequence[Any], length: int, *, prompts: Sequence[int] | None = None, pad: int = 0
) -> dict[str, np.ndarray]:
    """Packs token sequences into rows of one length, for next-token prediction.

    A sequence of ``n`` tokens takes ``n - 1`` places: inputs are all tokens but the last, and targets all but
    the first, so nothing is predicted across sequences. Sequences are placed in order, each into the fullest
    row that has room for it. Pass ``positions`` and ``attention_mask(segments)`` to the model to keep the
    sequences of a row apart; otherwise tokens also attend to the preceding sequences.

    Args:
      sequences: 1-D token ids, each of 2 to ``length + 1`` tokens.
      length: ``T``, the number of places per row.
      prompts: for each sequence, the length of its prompt, whose tokens are not scored.
      pad: the token in empty places.

    Returns:
      ``[rows, T]`` arrays: int32 ``inputs``, ``targets``, ``segments`` (1, 2, ... in each row, and 0 in empty
      places) and ``positions`` (from 0 in each sequence), and bool ``mask``, True where a target is scored.

    Raises:
      LoraError: a sequence is too long or too short, or has no token to score; or there is not one prompt
        length per sequence.

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
            do="prompts=[0] * len(sequences), with the number of prompt tokens of each.",
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
            want=f"2 to {length + 1} tokens (length + 1), at least one of them after the prompt",
            do="cut the long ones or raise length; drop those without an answer.",
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), fullest first
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
    """A mask of the predictions to score in padded sequences: tokens that are neither prompt nor padding.

    Args:
      prompts: ``[B]`` ints, the number of prompt tokens of each sequence.
      lengths: ``[B]`` ints, the number of tokens of each sequence, including its prompt.
      size: ``T``, the number of predictions per row; place ``t`` predicts token ``t + 1``.

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
    """A causal mask that keeps packed sequences from attending to each other, for Flax's attention.

    Args:
      segments: ``[B, T]`` ints from `pack`; 0 is an empty place, which attends only to preceding empty ones.

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
