"""The collator that gives `transformers.Trainer` packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config.errors import ConfigError
from .packing import Example, concatenate


@dataclass(frozen=True)
class PackingCollator:
    """A batch of examples as one packed row [1, T] (see `packing.concatenate`); set `remove_unused_columns=False`.

    The loss weighs tokens, not rows: the trainer counts the labels of all micro-batches, and the model's forward
    divides by that count. `max_tokens` refuses a batch over so many tokens, for a memory bound.
    """

    max_tokens: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        tokens = sum(len(example["input_ids"]) for example in examples)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ConfigError(
                f"max_tokens={self.max_tokens} is less than the {tokens} tokens of a batch of {len(examples)}: "
                "lower per_device_train_batch_size or raise max_tokens"
            )
        return concatenate(examples)
