"""Response-only labels: the loss sees what the assistant says, the end of its turn included, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..config.errors import ConfigError
from .parts import template_parts

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE = -100

logger = logging.getLogger("pronghorn")


def part_ids(tokenizer: Any, part: str) -> list[int]:
    """The ids of a part of the template, without BOS or EOS. Raises `ConfigError` for an empty part."""
    ids = list(tokenizer(part, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError(f"part={part!r} has no tokens: give the text that the chat template writes before a turn")
    return ids


def response_only_labels(
    input_ids: Sequence[int], instruction_ids: Sequence[int], response_ids: Sequence[int]
) -> list[int]:
    """Labels for one row: its ids where the assistant speaks, -100 elsewhere.

    A response goes from after `response_ids` to before the next `instruction_ids`, or to the end; its end-of-turn
    token is in it. The first label is always -100: nothing predicts the first token of a row.
    Raises `ConfigError` where that would hide every token.
    """
    ids, opens, closes = list(input_ids), list(response_ids), list(instruction_ids)
    if not opens or not closes:
        raise ConfigError("instruction_ids and response_ids must not be empty: see part_ids")
    labels = [IGNORE] * len(ids)
    speaking = False
    at = 0
    while at < len(ids):
        if ids[at] == opens[0] and ids[at : at + len(opens)] == opens:
            speaking = True
            at += len(opens)
            continue
        if ids[at] == closes[0] and ids[at : at + len(closes)] == closes:
            speaking = False
            at += len(closes)
            continue
        if speaking and at > 0:
            labels[at] = ids[at]
        at += 1
    if all(label == IGNORE for label in labels):
        raise ConfigError(
            f"response_part hides all {len(ids)} tokens of a row: its ids {opens} are not in it, or nothing follows "
            "them. Take the text from the tokenizer's own template (template_parts); or is the row cut off before it?"
        )
    return labels


def mask_responses(
    data: Dataset,
    tokenizer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    hidden: Literal["raise", "drop"] = "raise",
) -> Dataset:
    """A tokenized data set (`input_ids`) with response-only `labels` added.

    The parts default to the tokenizer's own template. A row that would be hidden whole (cut off before its response)
    raises `ConfigError` with its number, or with `hidden="drop"` is left out, and the count is logged; a data set
    where that is every row always raises.
    """
    if (instruction_part is None) != (response_part is None):
        raise ConfigError("instruction_part and response_part go together: give both or neither")
    if instruction_part is None or response_part is None:
        instruction_part, response_part = template_parts(tokenizer)
    closes, opens = part_ids(tokenizer, instruction_part), part_ids(tokenizer, response_part)
    labels, keep = [], []
    for row, ids in enumerate(data["input_ids"]):
        try:
            labels.append(response_only_labels(ids, closes, opens))
        except ConfigError as error:
            if hidden == "raise":
                raise ConfigError(f"row {row}: {error}; hidden='drop' leaves such rows out") from error
            continue
        keep.append(row)
    if not keep:
        raise ConfigError(f"response_part={response_part!r} hides every token of every row ({len(data)} rows)")
    if len(keep) < len(data):
        logger.warning(
            "response-only labels: %d of %d rows had no response and were left out", len(data) - len(keep), len(data)
        )
    return data.select(keep).add_column("labels", labels)
