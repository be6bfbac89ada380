"""A generation on its way: being drawn, being scored, or ready for the optimizer steps that it is for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rollout.base import DrawingStopped
from .background import Background
from .drawing import Begun
from .generation import Generation


@dataclass
class Pending:
    """Generation number ``index``, by the policy of generation ``opened``, of the data set's rows ``picks``.

    Attributes:
        picks: empty where the data loader chose the rows.
        generation: None until it is drawn.
        start: begins to draw it beside training, behind the scoring that is given; None once it was called.
        begun, drawing: what is being drawn, and the thread that does; None where it is drawn.
        scoring: under way, or None when the rewards are in.
        waited: seconds that training has waited for the samples.
        told: what failed was raised.
    """

    index: int
    opened: int
    picks: list[int]
    generation: Generation | None = None
    start: Callable[[Background | None], None] | None = None
    begun: Begun | None = None
    drawing: Background | None = None
    scoring: Background | None = None
    waited: float = 0.0
    told: bool = False

    def drawn(self) -> Generation:
        """Wait for the samples; what failed in their thread is raised here."""
        if self.generation is None:
            assert self.drawing is not None
            started = time.perf_counter()
            self.generation = self._result_of(self.drawing)
            self.waited += time.perf_counter() - started
            self.begun = self.drawing = None
        return self.generation

    def wait(self) -> Generation:
        """Wait for samples and rewards; what failed in their threads is raised here."""
        generation = self.drawn()
        if self.scoring is not None:
            self._result_of(self.scoring)
            self.scoring = None
        return generation

    def _result_of(self, work: Background) -> Any:
        try:
            return work.result()
        except Exception:
            self.told = True
            raise

    def stop(self) -> None:
        """Nobody needs it any more: what is being drawn ends at the next look at its tokens."""
        self.start = None
        if self.begun is not None:
            self.begun.drawing.stop()

    def end(self) -> str | None:
        """Wait until its threads are gone; in words, what failed in them and was not raised."""
        failed = None if self.drawing is None else self.drawing.end()
        unscored = None if self.scoring is None else self.scoring.end()
        if self.told or isinstance(failed, DrawingStopped):
            return None
        of = f"of generation {self.index}, sampled ahead and not used"
        if failed is not None:
            return f"sampling {of}: {type(failed).__name__}: {failed}"
        return None if unscored is None else f"rewards {of}: {unscored}"
