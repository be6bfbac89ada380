"""Packing without padding: rows one behind the other, told apart by positions that start again at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..config.errors import ConfigError
from .masks import IGNORE

Example = Mapping[str, Sequence[int]]


def concatenate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """One packed row of T tokens from several examples.

    Each example has `input_ids` and may have `labels` of the same length (default: the ids). Returns int64 tensors
    `input_ids`, `position_ids` and `labels`, each [1, T]. `position_ids` start again at 0 with each example, from which
    the forward knows that they never attend across one another; the label of each example's first token is -100, so
    that the last token of one never predicts the next. A model that Pronghorn did not attach to must be called with
    `use_cache=False`: with a cache, transformers does not tell packed rows apart. Raises `ConfigError` for no or empty
    examples and for labels of another length.
    """
    if not examples:
        raise ConfigError("examples is empty: a packed row needs at least one")
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, example in enumerate(examples):
        own = list(example["input_ids"])
        own_labels = list(example["labels"]) if example.get("labels") is not None else list(own)
        if not own:
            raise ConfigError(f"example {number} has no tokens: leave it out")
        if len(own_labels) != len(own):
            raise ConfigError(f"example {number} has {len(own)} input_ids but {len(own_labels)} labels")
        ids += own
        positions += range(len(own))
        labels += [IGNORE, *own_labels[1:]]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples go into one packed row of at most `capacity` tokens: best-fit decreasing.

    Returns lists of indices; each index is in exactly one. Deterministic. Raises `ConfigError` for a length over the
    capacity: nothing is cut off here.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ConfigError(
                f"capacity={capacity} is less than the {length} tokens of example {index}: raise it, or cut"
            )
        fits = [row for row, free in enumerate(room) if free >= length]
        if fits:
            row = min(fits, key=lambda r: (room[r], r))
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows
