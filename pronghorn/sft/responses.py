"""``train_on_responses_only``: a trainer's data sets with the loss on what the assistant says alone."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

import torch

from ..config.errors import ConfigError
from .masks import IGNORE, hidden_row, labels_of_row, mask_responses, resolve_parts

# Ways of packing that cut examples in two, so that a row may begin within a response that nothing announces.
_CUTTING = ("wrapped", "bfd_split")

_COLLATORS = "leave data_collator out with SFTTrainer, or use DataCollatorForSeq2Seq"


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    hidden: Literal["raise", "drop"] = "raise",
) -> Any:
    """Give the data sets of ``trainer`` labels on the assistant's turns only, each end of turn included.

    Args:
        trainer: ``trl.SFTTrainer``, or a ``transformers.Trainer`` whose data sets are tokenized and whose collator
            keeps labels. Its ``train_dataset`` and ``eval_dataset`` (one or a dict of them) are replaced.
        instruction_part: what the chat template writes before a user's content, e.g.
            ``"<|start_header_id|>user<|end_header_id|>\\n\\n"``; None takes both parts from the tokenizer's template.
        response_part: what it writes before the assistant's content.
        hidden: what becomes of a row that would be hidden whole: ``"raise"``, or ``"drop"`` it and log the count.

    Returns:
        ``trainer``. Labels that were -100 stay so; rows that TRL packed whole (``packing_strategy="bfd"``) are masked
        example by example.

    Raises:
        ConfigError: a mask that hides everything in a row (see ``hidden``) or in all rows, data that is not tokenized,
            packing that cuts examples in two, a collator that throws labels away, or parts that cannot be found.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise ConfigError("trainer.processing_class=None: give the trainer the tokenizer (processing_class=tokenizer)")
    args = trainer.args
    for field, name in (("packing", "train_dataset"), ("eval_packing", "eval_dataset")):
        packed = getattr(args, field, None)
        packed = getattr(args, "packing", False) if packed is None else packed
        strategy = getattr(args, "packing_strategy", None)
        if packed and strategy in _CUTTING and getattr(trainer, name, None) is not None:
            raise ConfigError(
                f"packing_strategy={strategy!r} cuts examples in two, and a row that begins within a response cannot "
                "be masked any more; use packing_strategy='bfd', or give the trainer data with labels (mask_responses)"
            )
    settings = (tokenizer, instruction_part, response_part, hidden)
    trainer.train_dataset = _masked("train_dataset", trainer.train_dataset, *settings)
    found = trainer.eval_dataset
    if isinstance(found, dict):
        trainer.eval_dataset = {key: _masked(f"eval_dataset[{key!r}]", data, *settings) for key, data in found.items()}
    elif found is not None:
        trainer.eval_dataset = _masked("eval_dataset", found, *settings)
    _check_collator(trainer)
    return trainer


def _masked(name: str, data: Any, tokenizer: Any, instruction: str | None, response: str | None, hidden: Any) -> Any:
    """One data set, with its name in what is raised."""
    from datasets import Dataset, IterableDataset

    if not isinstance(data, Dataset | IterableDataset):
        raise ConfigError(f"trainer.{name}={type(data).__name__} cannot be masked; give a datasets.Dataset")
    columns = data.column_names or list(next(iter(data)))
    if "input_ids" not in columns:
        raise ConfigError(
            f"trainer.{name} is not tokenized (its columns: {', '.join(columns)}); let SFTTrainer prepare it, or "
            "tokenize it first"
        )
    try:
        if isinstance(data, Dataset):
            return mask_responses(data, tokenizer, instruction, response, hidden)
        return _masked_stream(data, tokenizer, instruction, response, hidden)
    except ConfigError as error:
        raise ConfigError(f"trainer.{name}: {error}") from error


def _masked_stream(data: Any, tokenizer: Any, instruction: str | None, response: str | None, hidden: str) -> Any:
    """A stream, row by row as it is read; ``hidden="drop"`` leaves rows out without a count."""
    closes, opens = resolve_parts(tokenizer, instruction, response)

    def mask(row: dict[str, Any], number: int) -> dict[str, Any]:
        labels = labels_of_row(row, closes, opens)
        if labels is None and hidden == "raise":
            raise ConfigError(hidden_row(number, row, tokenizer, opens))
        return {"labels": labels or [IGNORE] * len(row["input_ids"])}

    masked = data.map(mask, with_indices=True)
    if hidden == "drop":
        masked = masked.filter(lambda row: any(label != IGNORE for label in row["labels"]))
    if not any(label != IGNORE for row in islice(masked, 1) for label in row["labels"]):
        raise ConfigError(f"response_part={tokenizer.decode(opens)!r} hides every token of every row")
    return masked


def _check_collator(trainer: Any) -> None:
    """The collator hands on the labels as they are: one that makes them anew from the ids would undo the mask."""
    columns = ("input_ids", "attention_mask", "labels", "seq_lengths")
    rows = [{name: row[name] for name in columns if name in row} for row in islice(trainer.train_dataset, 2)]
    name = type(trainer.data_collator).__name__
    try:
        labels = torch.as_tensor(trainer.data_collator(rows)["labels"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"data_collator={name} cannot take rows with labels ({error}); {_COLLATORS}") from error
    seen = int((labels != IGNORE).sum())
    wanted = sum(label != IGNORE for row in rows for label in row["labels"])
    if seen != wanted:
        raise ConfigError(
            f"data_collator={name} gives {seen} labels where the rows have {wanted}: it makes them anew; {_COLLATORS}"
        )
