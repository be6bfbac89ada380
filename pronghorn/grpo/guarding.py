"""Where the trainer looks at gradients before the optimizer does."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn

from ..models.modes import inference
from .gradient_guard import GradientGuard
from .logprobs import score
from .loss_step import LossStep
from .metrics import Metrics
from .rollouts import Rollout
from .skipped import SkippedBatch


class Trained:
    """The parameters that may have gradients, found once: walking all modules of a large model takes milliseconds in
    which the GPU has nothing to do, and a step would do it three times. It stands in for the model where transformers
    asks one for its parameters.
    """

    def __init__(self, model: nn.Module, optimized: list[nn.Parameter]) -> None:
        own = {id(p) for p in optimized}
        self.optimized = tuple(id(p) for p in optimized)
        self.named: list[tuple[str, nn.Parameter]] = []
        self._frozen: list[weakref.ref[nn.Parameter]] = []  # weak: a weight that is replaced must not stay in memory
        for name, p in model.named_parameters():
            if p.requires_grad or id(p) in own:
                self.named.append((name, p))
            else:
                self._frozen.append(weakref.ref(p))

    def serves(self, optimized: list[nn.Parameter]) -> bool:
        """Whether nothing else may have gradients: the optimizer has what it had, and what was frozen is so still.

        Modules that are added later are not seen: only a walk would find them.
        """
        if self.optimized != tuple(id(p) for p in optimized):
            return False
        return not any(p is None or p.requires_grad for p in (ref() for ref in self._frozen))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.named

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named]


class GuardMixin:
    """Overrides of transformers' Trainer; ``GRPOTrainer`` brings the attributes.

    A step whose gradient norm is not finite is not taken: weights, moments and step counts of the optimizer stay. It
    counts as a step of the run all the same, so data and learning rate go on by the step number.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any
    metrics: dict[str, Metrics]
    loss_step: LossStep
    guard: GradientGuard
    optimizer: Any
    _trained: Trained | None = None
    _step_parts: list[list[Rollout]]
    _step_losses: list[torch.Tensor]

    def _trained_of(self, model: nn.Module) -> Trained:
        """What may have gradients; looked for again when the optimizer has other parameters, or one was unfrozen."""
        optimized = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._trained is None or not self._trained.serves(optimized):
            self._trained = Trained(model, optimized)
        return self._trained

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        trained = self._trained_of(model)
        self.guard.look(trained.named_parameters())
        return super()._clip_grad_norm(trained)  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm=0: nothing was clipped
            self.guard.look(self._trained_of(model).named_parameters())
        norm = super()._get_grad_norm(self._trained_of(model), grad_norm)  # type: ignore[misc]
        if self._scaler_overflowed(float(norm)):
            return norm
        if not self.guard.passes(float(norm)):
            self._skip_step(model, float(norm))
        if self.guard.skipped:
            self.metrics["train"].last("skipped_steps", self.guard.skipped)
        return norm

    def _scaler_overflowed(self, norm: float) -> bool:
        """Whether a norm that is not finite comes of fp16's loss scaler, which skips the step itself and scales less.

        It does not where a loss was broken before it was scaled, nor where the scale has come down to 1.
        """
        scaler = self.accelerator.scaler
        if math.isfinite(norm) or scaler is None or not scaler.is_enabled():
            return False
        return scaler.get_scale() > 1 and all(bool(loss.isfinite()) for loss in self._step_losses)

    def _skip_step(self, model: nn.Module, norm: float) -> None:
        model.zero_grad(set_to_none=True)  # what an optimizer without gradients does: nothing
        if self.accelerator.scaler is None:
            # It is not called either: some count their calls. With a scaler it must be, or unscaling twice raises.
            self.accelerator.gradient_state._set_sync_gradients(False)
        step = self.state.global_step + 1
        losses = [float(loss) for loss in self._step_losses]
        facts = {
            "step": step,
            "grad_norm": norm,
            "losses": losses,
            "parameters": self.guard.broken(),
            "metrics": self.metrics["train"].state(),
        }
        kept = self.guard.keep(step, SkippedBatch(self._step_parts, self._logps_now(), facts))
        print(
            f"Pronghorn: step {step} is skipped: its gradient norm is {norm} (losses {losses}); "
            f"{f'its batch is in {kept}' if kept else 'enough batches of skipped steps are kept already'}"
        )
        self.guard.stop_if_hopeless(step, norm, losses, kept)

    def _logps_now(self) -> list[list[torch.Tensor | None]]:
        """The step's rollouts under the weights as they are, one micro-batch at a time."""
        found: list[list[torch.Tensor | None]] = []
        for part in self._step_parts:
            scored = [r for r in part if r.scored_tokens]
            pieces: list[torch.Tensor] = []
            if scored:
                with inference(self.model):
                    logps_N, _ = score(self.model, self.loss_step.pack(part), self.args.temperature)
                pieces = list(logps_N.cpu().split([r.scored_tokens for r in scored]))
            known = iter(pieces)
            found.append([next(known) if r.scored_tokens else None for r in part])
        return found
