"""A generation on its way: to be drawn, being drawn, being scored, or ready for the optimizer steps that it is for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rewards.state import PLAIN
from ..rollout.base import DrawingStopped, KeptPolicy
from .background import Background
from .drawing import Begun
from .generation import Generation


@dataclass
class Pending:
    """Generation number ``index``, by the policy of generation ``opened``, of the data set's rows ``picks``.

    Attributes:
        picks: empty where the data loader chose the rows.
        generation: None until it is drawn.
        waiting: it is to be drawn, and nothing has begun to.
        policy: draws it once it begins, where it was cut short before; None is the policy of then.
        seen: of the trainer's state that its reward functions see, numbers and strings; None is the state of then.
        logged: how many entries of the log history they see, which is only appended to; None is all of then.
        begun, drawing: what is being drawn, and the thread that does; None where it is drawn.
        scoring: under way, or None when the rewards are in.
        waited: seconds that training has waited for the samples.
        told: what failed was raised.
    """

    index: int
    opened: int
    picks: list[int]
    generation: Generation | None = None
    waiting: bool = False
    policy: KeptPolicy | None = None
    seen: dict[str, Any] | None = None
    logged: int | None = None
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

    def shown(self, state: Any) -> Any:
        """What its reward functions see of the trainer's ``state``: a copy, as the run's own moves on; as it was when
        the drawing first began, where that was cut short.
        """
        seen = copy.copy(state)
        seen.log_history = list(state.log_history[: self.logged])
        self.logged = len(seen.log_history)
        vars(seen).update(self.seen or {})
        self.seen = {name: value for name, value in vars(seen).items() if type(value) in PLAIN}
        return seen

    def noted(self) -> Callable[[], list[Any]]:
        """What gives its state, for a checkpoint, as of now; only calling it waits."""
        if not self.waiting:
            return lambda: [self.index, self.opened, self.picks, self._made()]
        assert self.policy is not None  # others begin within the step that chose them
        state = [self.index, self.opened, self.picks, self._to_draw(self.policy)]
        return lambda: state

    def _made(self) -> dict[str, Any]:
        try:
            return self.wait().to_state()
        except DrawingStopped as stopped:
            if stopped.policy is None:
                raise
            return self._to_draw(stopped.policy)

    def _to_draw(self, policy: KeptPolicy) -> dict[str, Any]:
        return {"policy": policy, "seen": self.seen, "logged": self.logged}

    @classmethod
    def from_state(cls, state: list[Any], rows: Callable[[list[int]], list[dict[str, Any]]]) -> Pending:
        """Of what :meth:`noted` gave; ``rows`` gives those of its picks."""
        index, opened, picks, made = state
        if "policy" in made:
            return cls(index, opened, picks, waiting=True, **made)
        return cls(index, opened, picks, Generation.from_state(made, rows(picks)))

    def hold(self) -> None:
        """Nobody waits for it any more, but a checkpoint may want it: it is drawn no further, and its state is what it
        takes to draw it again, to the last bit. A signal handler may call this.
        """
        begun = self.begun
        if begun is not None:
            begun.drawing.stop(keep=True)

    def stop(self) -> None:
        """Nobody needs it any more: what is being drawn ends at the next look at its tokens."""
        self.waiting = False
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
