"""Response-only labels: the loss sees what the assistant says, the end of its turn included, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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


def labels_of_row(
    row: Mapping[str, Any], instruction_ids: Sequence[int], response_ids: Sequence[int]
) -> list[int] | None:
    """Response-only labels of one row of a tokenized data set; None where they would hide it whole.

    A row that TRL packed (``seq_lengths``) is masked example by example, so that no turn goes on into the next one.
    Labels that the row has already stay -100 where they are.
    """
    ids = list(row["input_ids"])
    labels: list[int] = []
    for length in row.get("seq_lengths") or [len(ids)]:
        own = ids[len(labels) : len(labels) + length]
        try:
            labels += response_only_labels(own, instruction_ids, response_ids)
        except ConfigError:
            labels += [IGNORE] * len(own)
    if row.get("labels") is not None:
        labels = [IGNORE if had == IGNORE else label for label, had in zip(labels, row["labels"], strict=True)]
    return labels if any(label != IGNORE for label in labels) else None


def resolve_parts(
    tokenizer: Any, instruction_part: str | None, response_part: str | None
) -> tuple[list[int], list[int]]:
    """Ids of the two parts, which default to what the tokenizer's own template writes."""
    if (instruction_part is None) != (response_part is None):
        raise ConfigError("instruction_part and response_part go together: give both or neither")
    if instruction_part is None or response_part is None:
        instruction_part, response_part = template_parts(tokenizer)
    return part_ids(tokenizer, instruction_part), part_ids(tokenizer, response_part)


def mask_responses(
    data: Dataset,
    tokenizer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    hidden: Literal["raise", "drop"] = "raise",
) -> Dataset:
    """A tokenized data set (`input_ids`) with response-only `labels`.

    The parts default to the tokenizer's own template. Labels that are there already stay -100 where they are. A row
    that would be hidden whole (cut off before its response) raises `ConfigError` with its number, or with
    `hidden="drop"` is left out, and the count is logged; a data set where that is every row always raises.
    """
    if hidden not in ("raise", "drop"):
        raise ConfigError(f"hidden={hidden!r} is unknown; give 'raise' or 'drop'")
    closes, opens = resolve_parts(tokenizer, instruction_part, response_part)
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in data.column_names]
    labels, keep = [], []
    for number, row in enumerate(data.select_columns(columns)):
        own = labels_of_row(row, closes, opens)
        if own is not None:
            labels.append(own)
            keep.append(number)
        elif hidden == "raise":
            raise ConfigError(hidden_row(number, row, tokenizer, opens))
    if not keep:
        raise ConfigError(
            f"response_part={tokenizer.decode(opens)!r} hides every token of every row ({len(data)} rows); take the "
            "text from the tokenizer's own template (template_parts)"
        )
    if len(keep) < len(data):
        logger.warning(
            "response-only labels: %d of %d rows had no response and were left out", len(data) - len(keep), len(data)
        )
    if "labels" in data.column_names:
        data = data.remove_columns("labels")
    return data.select(keep).add_column("labels", labels)


def hidden_row(number: int, row: Mapping[str, Any], tokenizer: Any, response_ids: Sequence[int]) -> str:
    """The message for a row that response-only labels would hide whole."""
    return (
        f"row {number}: response_part={tokenizer.decode(response_ids)!r} hides all {len(row['input_ids'])} tokens: it "
        "is not in the row, or nothing that had a label follows it. Take the text from the tokenizer's own template "
        "(template_parts); if the row is cut off before its response, hidden='drop' leaves such rows out, or raise "
        "max_length"
    )
