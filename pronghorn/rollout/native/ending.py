"""What happens when a sequence ends, whichever loop it ran in."""

from __future__ import annotations

from typing import Any

from ..base import Progress
from .request import Sequence
from .scheduler import Scheduler
from .stopping import Stopper


class Ending:
    """Finds ended sequences where the host looks, lets them leave, and reports progress."""

    def __init__(self, scheduler: Scheduler, tokenizer: Any, total: int, progress: Progress | None) -> None:
        self.scheduler, self.total, self.progress = scheduler, total, progress
        self.stopper = Stopper(tokenizer)
        self.finished = self.tokens = 0

    def check(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` ends with its newest token; then it is finished, and its text is known."""
        if not self.stopper.check(sequence):
            return False
        self.scheduler.finish(sequence)
        self.finished += 1
        sequence.stopped_text = self.stopper.text(sequence)
        return True

    def meanwhile(self, sequences: list[Sequence]) -> None:
        """What results hold and no device has to be waited for: the prompts' texts, while one works."""
        for sequence in sequences:
            if sequence.params.detokenize:
                sequence.prompt.decoded(self.stopper.tokenizer)

    def report(self, tokens: int) -> None:
        """So many more tokens were generated."""
        self.tokens += tokens
        if self.progress is not None:
            self.progress(self.finished, self.total, self.tokens)
