"""The state of a prompt and of each sequence that continues it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...config.sampling import SamplingParams
from ..base import Logprob


@dataclass(eq=False)
class Prompt:
    """A prompt, one object for all sequences that start with it.

    ``residents`` are the sequences whose table holds its keys and values now: any of them can lend the blocks. ``text``
    is there once somebody has asked for it.
    """

    tokens: list[int]
    text: str | None = None
    residents: list[Sequence] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def decoded(self, tokenizer: Any) -> str:
        """Its text, decoded once."""
        if self.text is None:
            self.text = tokenizer.decode(self.tokens)
        return self.text


@dataclass(eq=False)
class Sequence:
    """One completion in the making.

    Attributes:
        order: place in the queue over all sequences; smaller is served first.
        request: index of the request that it belongs to.
        index: which of the request's samples.
        prompt: what it continues.
        params: its sampling settings.
        max_new: most new tokens, after clipping to the model's maximum length.
        seed: unsigned 64-bit seed of the request.
        stop_ids: ids that end it (none before ``min_tokens``).
        table: its KV blocks, empty while it waits.
        computed: leading tokens whose keys and values are in the cache, once what was planned has run.
        output: generated ids.
        unseen: most tokens that were drawn and that the host has not taken in; it may have ended before them.
    """

    order: int
    request: int
    index: int
    prompt: Prompt
    params: SamplingParams
    max_new: int
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    table: list[int] = field(default_factory=list)
    computed: int = 0
    output: list[int] = field(default_factory=list)
    unseen: int = 0
    token_logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stopped_text: str | None = None
    preemptions: int = 0

    def __len__(self) -> int:
        """Tokens so far, prompt and output, unseen ones too."""
        return len(self.prompt.tokens) + len(self.output) + self.unseen

    @property
    def longest(self) -> int:
        """Most tokens that it can come to."""
        return len(self.prompt.tokens) + self.max_new

    @property
    def full(self) -> bool:
        """Whether it has ended for certain, by its length if by nothing else."""
        return len(self) >= self.longest

    @property
    def last(self) -> int:
        """The newest token."""
        if self.unseen:
            raise RuntimeError(f"request {self.request} drew tokens that nobody has looked at yet: a fault of the loop")
        return self.output[-1] if self.output else self.prompt.tokens[-1]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids of positions ``start`` to ``stop``."""
        edge = len(self.prompt.tokens)
        if stop <= edge:
            return self.prompt.tokens[start:stop]
        return self.prompt.tokens[start:] + self.output[max(start - edge, 0) : stop - edge]

    def anew(self) -> Sequence:
        """The same request's sample before anything was generated; with its seed it says the same again."""
        return Sequence(
            self.order, self.request, self.index, self.prompt, self.params, self.max_new, self.seed, self.stop_ids
        )
