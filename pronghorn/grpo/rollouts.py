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
        sampler_logps: log-probability of each sampled token at the sampler, ``log softmax(logits / temperature)``
            over the whole vocabulary; none for what an environment wrote.
        truncated: the completion hit its length limit.
        scored: the completion enters the loss.
        advantage: set when the rewards are in.
        old_logps: the trainer's log-probabilities before any update of this generation, where they are needed.
        ref_logps: the reference policy's, where beta is not 0.
        kept: bool for each token, whether its entropy is among the highest of the optimizer step; None where each
            micro-batch finds that itself.
        tool_mask: one number a completion token, 1 where the policy sampled it and 0 where a tool or environment wrote
            it, which the policy reads and is not trained on; None where all was sampled.
        age: how many generations the policy has moved since it was sampled; above 0 the sampler's record is the old
            policy of its importance ratio.

    Raises:
        ValueError: a ``tool_mask`` that does not fit the completion, or another number of log-probabilities than of
            sampled tokens.
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
    tool_mask: list[int] | None = None
    age: int = 0

    def __post_init__(self) -> None:
        if self.tool_mask is not None and len(self.tool_mask) != len(self.completion_ids):
            raise ValueError(f"tool_mask has {len(self.tool_mask)} entries for {len(self.completion_ids)} tokens")
        if len(self.sampler_logps) != self.sampled_tokens:
            raise ValueError(f"sampler_logps has {len(self.sampler_logps)} entries, sampled were {self.sampled_tokens}")

    @property
    def sampled_tokens(self) -> int:
        """How many completion tokens the policy wrote itself."""
        return len(self.completion_ids) if self.tool_mask is None else sum(1 for m in self.tool_mask if m)

    @property
    def scored_tokens(self) -> int:
        return self.sampled_tokens if self.scored else 0

    @property
    def sampled_at(self) -> list[int]:
        """Where in the completion the sampled tokens stand."""
        mask = self.tool_mask
        return [i for i in range(len(self.completion_ids)) if mask is None or mask[i]]

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
