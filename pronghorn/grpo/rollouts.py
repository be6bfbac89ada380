"""What a generation leaves behind: prompts, completions and all that the loss needs to know of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch


@dataclass
class Rollout:
    """One completion of one prompt.

    Attributes:
        prompt_ids, completion_ids: token ids as they went into and came out of the engine (never re-tokenized).
        sampler_logps: log-probability of each completion token at the sampler, ``log softmax(logits / temperature)``
            over the whole vocabulary.
        truncated: the completion hit its length limit.
        scored: the completion enters the loss.
        advantage: set when the rewards are in.
        old_logps: the trainer's log-probabilities before any update of this generation, where they are needed.
        ref_logps: the reference policy's, where beta is not 0.
        kept: bool for each token, whether its entropy is among the highest of the optimizer step; None where each
            micro-batch finds that itself.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_logps: list[float]
    truncated: bool = False
    scored: bool = True
    advantage: float = 0.0
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @property
    def scored_tokens(self) -> int:
        return len(self.completion_ids) if self.scored else 0

    def to_state(self) -> dict[str, Any]:
        """Lists, numbers and tensors only, so that ``torch.load(weights_only=True)`` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        return cls(**state)


@dataclass
class Sample:
    """One completion in words, for the table, ``completions.jsonl`` and reports.

    ``step`` is the optimizer step that it was sampled for (evaluation: the one after which), ``mode`` train or eval.
    """

    step: int
    mode: str
    prompt: Any
    completion: Any
    rewards: dict[str, float | None]
    advantage: float
    extra: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
