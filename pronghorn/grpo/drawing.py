"""From data set rows to sampled completions: the protocol, and the way that most runs go (one turn of the engine)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..config.sampling import SamplingParams
from ..data.chat import is_chat
from ..rollout.base import CompletionOutput, Drawing, KeptPolicy
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


@dataclass(frozen=True)
class Begun:
    """A generation that is ready to be drawn by whatever thread calls ``finish``, once."""

    drawing: Drawing
    finish: Callable[[], Generation]


class SingleTurn:
    """One request a prompt, answered in one turn."""

    def __init__(self, loop: SamplingLoop) -> None:
        self.loop = loop

    def __call__(self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int) -> Generation:
        prompt_ids, params, truncated = self._requests(rows, group, seeds, first)
        return self._made(rows, group, prompt_ids, truncated, self.loop.generate(prompt_ids, params))

    def begin(
        self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int, policy: KeptPolicy | None = None
    ) -> Begun:
        """The same by the policy as it is now, or by ``policy``, drawn later and elsewhere: prompts are encoded here,
        on the caller's thread."""
        prompt_ids, params, truncated = self._requests(rows, group, seeds, first)
        drawing = self.loop.engine.ready(prompt_ids, params, self.loop.args.rollout_keep_share, policy)

        def finish() -> Generation:
            outputs = [output for request in drawing() for output in request.outputs]
            return self._made(rows, group, prompt_ids, truncated, outputs)

        return Begun(drawing, finish)

    def _requests(
        self, rows: Sequence[dict[str, Any]], group: int, seeds: Seeds, first: int
    ) -> tuple[list[list[int]], list[SamplingParams], int]:
        """Prompts as ids, how each is answered, and how many lost tokens."""
        prompt_ids, truncated = self.loop.encoder([row["prompt"] for row in rows[::group]])
        return prompt_ids, [self.loop.params(group, seeds(first + p)) for p in range(len(prompt_ids))], truncated

    def _made(
        self,
        rows: list[dict[str, Any]],
        group: int,
        prompt_ids: Sequence[list[int]],
        truncated: int,
        outputs: Sequence[CompletionOutput],
    ) -> Generation:
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
