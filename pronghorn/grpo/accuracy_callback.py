"""Held-out accuracy before, during and after training, under any trainer of transformers with a Pronghorn model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback

from .evaluation import AccuracyEval


class AccuracyCallback(TrainerCallback):
    """Runs an :class:`AccuracyEval` before the first step, every so many steps, and after the last.

    A resumed run does not measure anew what its checkpoint's log holds.

    Args:
        evaluation: what is asked, and how often.
        log: takes the metrics; a trainer's ``log``.
        hold: lets go of generations that are being drawn for steps to come, so that the last measurement does not wait
            for them. Not called where a save is due, which needs them.
    """

    def __init__(
        self,
        evaluation: AccuracyEval,
        log: Callable[[dict[str, Any]], None],
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        self.evaluation, self._log, self._hold = evaluation, log, hold
        self.latest: dict[str, float] = {}
        self.measured_at: int | None = None

    @classmethod
    def attach(cls, trainer: Any, evaluation: AccuracyEval) -> AccuracyCallback:
        """Add it to a trainer, TRL's ``SFTTrainer`` for one. Its metrics are a log of their own: trainers that gather
        numbers between logs keep theirs."""
        made = cls(evaluation, partial(Trainer.log, trainer))
        trainer.add_callback(made)
        return made

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measured_at, name = None, f"{self.evaluation.prefix}accuracy"
        for record in state.log_history:
            if name in record:
                self.measured_at = record["step"]
        if state.global_step == 0:
            self._measure(model, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.evaluation.every or (None if args.eval_steps is None else state.eval_steps)
        if every is not None and state.global_step % every == 0:
            if control.should_training_stop and not control.should_save:
                self._hold()
            self._measure(model, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._hold()
        self._measure(model, state, control)

    def _measure(self, model: Any, state: Any, control: Any) -> None:
        if self.measured_at == state.global_step:
            return
        self.measured_at = state.global_step
        self.latest = self.evaluation.metrics(self.evaluation(model))
        due = control.should_log  # a log takes it back, and the trainer's own of this step is still to come
        self._log(dict(self.latest))
        control.should_log = due
