"""From data set rows to sampled completions: the protocol, and the way that most runs go (one turn of the engine)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..data.chat import is_chat
from .generation import Generation
from .rollouts import Rollout

if TYPE_CHECKING:
    from .sampling_loop import SamplingLoop

Seeds = Callable[..., int]
"""``seeds(prompt, ...)``: the seed of one request of this generation, by where it stands."""


class Drawer(Protocol):
    """What makes completions of rows, each run of ``group`` rows being one prompt.

    ``first`` is how many prompts this generation has drawn before.
    """

    def __call__(self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int) -> Generation: ...


class SingleTurn:
    """One request a prompt, answered in one turn."""

    def __init__(self, loop: SamplingLoop) -> None:
        self.loop = loop

    def __call__(self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int) -> Generation:
        prompt_ids, truncated = self.loop.encoder([row["prompt"] for row in rows[::group]])
        params = [self.loop.params(group, seeds(first + p)) for p in range(len(prompt_ids))]
        outputs = self.loop.generate(prompt_ids, params)
        rollouts = [
            Rollout(
                prompt_ids[i // group],
                list(output.token_ids),
                list(output.policy_logprobs),
                truncated=output.finish_reason == "length",
            )
            for i, output in enumerate(outputs)
        ]
        made = Generation(rows, rollouts, self._in_words(rows, rollouts), group)
        made.note("prompts/truncated_ratio", truncated / len(prompt_ids), len(prompt_ids))
        return made

    def _in_words(self, rows: Sequence[dict[str, Any]], rollouts: Sequence[Rollout]) -> list[Any]:
        return in_words(self.loop.tokenizer, rows[0]["prompt"], [r.completion_ids for r in rollouts])


def in_words(tokenizer: Any, prompt: Any, ids: Sequence[Sequence[int]]) -> list[Any]:
    """Completions as reward functions get them: strings, or for a chat the assistant's message in a list."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if is_chat(prompt) else list(texts)
