"""What the trainer asks of a data set: a ``prompt`` column, and prompts that leave room for the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ..config.errors import ConfigError, nearest
from ..rollout.base import encode_prompts

CHECKED_ROWS = 50_000
"""Prompts measured before training starts; the rest are measured when they are drawn."""


def as_dataset(given: Any, name: str) -> Dataset:
    """``given`` as a map-style data set with prompts.

    Raises:
        ConfigError: None, a stream, another type, no rows, or no ``prompt`` column (naming the columns there are).
    """
    if isinstance(given, list | tuple) and given and all(isinstance(row, dict) for row in given):
        given = Dataset.from_list(list(given))
    if isinstance(given, IterableDataset):
        raise ConfigError(
            f"{name} is an IterableDataset, whose rows cannot be revisited as resuming and the curriculum do; pass a "
            "datasets.Dataset (load_dataset(..., streaming=False), or Dataset.from_list(list(stream.take(n))))"
        )
    if not isinstance(given, Dataset):
        raise ConfigError(f"{name} is a {type(given).__name__}; pass a datasets.Dataset with a 'prompt' column")
    if "prompt" not in given.column_names:
        close = nearest("prompt", given.column_names)
        hint = f"rename {close!r} to 'prompt'" if close else "add one holding strings or chats"
        raise ConfigError(f"{name} has no 'prompt' column, only {given.column_names}; {hint}")
    if len(given) == 0:
        raise ConfigError(f"{name} has no rows; pass at least one prompt")
    return given


def as_datasets(train: Any, evaluation: Any, prompts: int) -> tuple[Dataset, Any]:
    """The data sets of a run: one to train on, of at least ``prompts`` rows, and none, one or several by name.

    Raises:
        ConfigError: see :func:`as_dataset`; also too few rows.
    """
    train = as_dataset(train, "train_dataset")
    if isinstance(evaluation, dict):
        evaluation = {name: as_dataset(ds, f"eval_dataset[{name!r}]") for name, ds in evaluation.items()}
    elif evaluation is not None:
        evaluation = as_dataset(evaluation, "eval_dataset")
    if len(train) < prompts:
        raise ConfigError(
            f"train_dataset has {len(train)} rows, fewer than the {prompts} prompts of one generation; add rows or "
            "lower the batch size"
        )
    return train, evaluation


class PromptEncoder:
    """Token ids of prompts, truncated from the left to ``max_prompt_length``, within the model's length.

    Args:
        tokenizer: encodes strings and chats.
        max_prompt_length: most tokens of a prompt, or None.
        room: tokens that a prompt may have at most, so that the completion still fits ``max_seq_length``.
        template_kwargs: further variables of the chat template.
    """

    def __init__(
        self, tokenizer: Any, max_prompt_length: int | None, room: int, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.max_prompt_length, self.room = tokenizer, max_prompt_length, room
        self.template_kwargs = template_kwargs or {}

    def lengths(self, prompts: Sequence[Any]) -> list[int]:
        """Tokens of each prompt before truncation."""
        return [len(ids) for ids in encode_prompts(self.tokenizer, list(prompts), **self.template_kwargs)]

    def __call__(self, prompts: Sequence[Any]) -> tuple[list[list[int]], int]:
        """Ids of each prompt and how many were truncated.

        Raises:
            ConfigError: a prompt leaves no room for the completion and no ``max_prompt_length`` says to cut it.
        """
        encoded = encode_prompts(self.tokenizer, list(prompts), **self.template_kwargs)
        limit, truncated = self.max_prompt_length, 0
        for row, ids in enumerate(encoded):
            if limit is not None and len(ids) > limit:
                encoded[row] = ids[-limit:]
                truncated += 1
            elif len(ids) > self.room:
                raise ConfigError(self.too_long(len(ids)))
        return encoded, truncated

    def too_long(self, tokens: int) -> str:
        return (
            f"a prompt of {tokens} tokens leaves no room for the completion: at most {self.room} fit "
            "(max_seq_length - max_completion_length); load the model with a larger max_seq_length, or set "
            "max_prompt_length to truncate prompts from the left"
        )

    def check(self, dataset: Dataset, name: str) -> None:
        """Measure the prompts before any work: raise for one that cannot fit, print how many will be truncated."""
        lengths = self.lengths(dataset[: min(len(dataset), CHECKED_ROWS)]["prompt"])
        if self.max_prompt_length is None:
            if max(lengths) > self.room:
                raise ConfigError(f"{name}: {self.too_long(max(lengths))}")
            return
        over = sum(n > self.max_prompt_length for n in lengths)
        if over:
            print(
                f"Pronghorn: {over} of {len(lengths)} prompts in {name} are over "
                f"max_prompt_length={self.max_prompt_length} and lose their first tokens (longest: {max(lengths)})"
            )
