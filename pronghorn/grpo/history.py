"""A conversation as token ids: what the policy sampled and what its environment wrote, in order."""

from __future__ import annotations

from collections.abc import Sequence

from .rollouts import Rollout


class History:
    """One prompt and all that followed. Ids are only ever appended, so what was sampled is what is trained on.

    Args:
        prompt_ids: token ids of the prompt.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.prompt_ids = list(prompt_ids)
        self.completion_ids: list[int] = []
        self.mask: list[int] = []
        self.logps: list[float] = []
        self.truncated = False

    @property
    def ids(self) -> list[int]:
        """Everything so far: the next turn's prompt."""
        return self.prompt_ids + self.completion_ids

    def sampled(self, ids: Sequence[int], logps: Sequence[float], truncated: bool) -> None:
        """A turn of the policy, with the log-probability of each token at the sampler.

        Args:
            truncated: it hit the length limit.
        """
        if len(ids) != len(logps):
            raise ValueError(f"a turn of {len(ids)} tokens has {len(logps)} log-probabilities; give one for each")
        self.completion_ids += ids
        self.mask += [1] * len(ids)
        self.logps += logps
        self.truncated = truncated

    def wrote(self, ids: Sequence[int]) -> None:
        """What a tool or the environment wrote: read by the policy, not trained on."""
        self.completion_ids += ids
        self.mask += [0] * len(ids)

    def rollout(self) -> Rollout:
        mask = None if all(self.mask) else list(self.mask)
        ids, logps = list(self.completion_ids), list(self.logps)
        return Rollout(self.prompt_ids, ids, logps, truncated=self.truncated, tool_mask=mask)
