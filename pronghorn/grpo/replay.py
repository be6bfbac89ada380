"""A replay buffer: groups with spread of earlier generations, for the place of groups that have none.

The policy has moved since they were sampled, so their importance ratios are taken against the sampler's log-probs of
then (``grpo/old_policy.py``) and clipped as always. Age and size are bounded, and a group is replayed once at most: a
clipped ratio bounds how wrong one use can be, not many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .rollouts import Rollout


class ReplayBuffer:
    """Up to ``size`` groups, none older than ``max_age`` generations.

    As Selective Sample Replay (VL-Rethinker, Wang et al. 2025, arXiv:2504.08837) it keeps what has an advantage for the
    place of what has none; that one draws by the size of the advantage, this one takes the youngest, each once.
    Advantages stay what they were: a group's rewards do not change.
    """

    def __init__(self, size: int, max_age: int) -> None:
        self.size, self.max_age = size, max_age
        self._kept: list[tuple[int, list[Rollout]]] = []  # (generation, group), oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, count: int, generation: int) -> list[list[Rollout]]:
        """Up to ``count`` groups for generation number ``generation``, the youngest first; they leave the buffer."""
        self._kept = [(born, group) for born, group in self._kept if generation - born <= self.max_age]
        taken = [self._kept.pop() for _ in range(min(count, len(self._kept)))]
        for born, group in taken:
            for r in group:
                r.age = generation - born
        return [group for _, group in taken]

    def put(self, groups: Sequence[list[Rollout]], born: int) -> None:
        """Keep ``groups``, sampled by the policy of generation ``born``; the oldest make room."""
        fresh = [(born, [replace(r, old_logps=None, ref_logps=None, kept=None) for r in group]) for group in groups]
        self._kept = sorted([*self._kept, *fresh], key=lambda kept: kept[0])
        self._kept = self._kept[max(0, len(self._kept) - self.size) :]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[born, [r.to_state() for r in group]] for born, group in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = [(born, [Rollout.from_state(r) for r in group]) for born, group in state["kept"]]
        self._kept = kept[max(0, len(kept) - self.size) :]
