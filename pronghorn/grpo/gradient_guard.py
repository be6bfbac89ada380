"""Gradients that are not finite: the optimizer does not see them, the batch is kept, and a run of them ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .disk import room_on_disk
from .skipped import SkippedBatch, save_batch

KEPT = 20
"""Most batches kept; a run that skips now and then for days must not fill the disk."""


class NonFiniteGradients(FloatingPointError):
    """So many optimizer steps in a row had gradients that are NaN or inf that the run ended.

    Weights, optimizer and checkpoints are those of the last step that was taken.
    """


class GradientGuard:
    """Counts skipped steps; a stateful part of the run.

    Args:
        limit: skipped steps in a row that end the run.
        folder: gets ``step-<n>/`` for the batch of each skipped step.

    Attributes:
        skipped: steps skipped so far, in the whole run.
        in_a_row: of these, since the last step that was taken.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self.skipped = self.in_a_row = 0
        self._norms: list[tuple[str, torch.Tensor]] = []

    def look(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Note which gradients are finite, before clipping by a norm that is not spreads NaN over all of them.

        Nothing waits for the GPU here.
        """
        named = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
        norms = torch._foreach_norm([gradient for _, gradient in named]) if named else ()
        self._norms = [(name, norm) for (name, _), norm in zip(named, norms)]

    def passes(self, norm: float) -> bool:
        """Whether the optimizer may step; a step that it may not is counted."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def broken(self) -> list[str]:
        """The parameters whose gradients were not finite when last looked at."""
        return [name for name, norm in self._norms if not bool(norm.isfinite())]

    def keep(self, step: int, batch: SkippedBatch) -> Path | None:
        """Save the batch of ``step``; None where enough are kept already.

        Raises:
            OSError: the disk is full.
        """
        target = self.folder / f"step-{step}"
        if not target.exists() and self.folder.is_dir() and sum(1 for _ in self.folder.glob("step-*")) >= KEPT:
            return None
        with room_on_disk(self.folder.parent, f"skipped/{target.name}", "free space, then resume from a checkpoint"):
            save_batch(target, batch)
        return target

    def stop_if_hopeless(self, step: int, norm: float, losses: list[float], kept: Path | None) -> None:
        """Raise :class:`NonFiniteGradients` when ``limit`` steps in a row were skipped."""
        if self.in_a_row < self.limit:
            return
        names = self.broken()
        raise NonFiniteGradients(
            f"the gradients of {self.in_a_row} optimizer steps in a row are not finite (max_consecutive_skipped_steps="
            f"{self.limit}); at step {step} the norm is {norm}, the losses are {losses}, and {len(names)} parameters "
            f"have NaN or inf{f', {names[0]} first' if names else ''}. None of these steps was taken. "
            f"{f'The batch is in {kept}: pronghorn.grpo.skipped.load_batch reads it. ' if kept else ''}"
            "Lower learning_rate or max_grad_norm, check the rewards for outliers, use bf16 in place of fp16, then go "
            "on with train(resume_from_checkpoint=True)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
