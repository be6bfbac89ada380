"""From packed rollouts to the loss of one micro-batch, and what an optimizer step needs to know beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from ..models.modes import inference
from .batch import PackedRollouts, pack
from .config import GRPOConfig
from .correction import Correction, correct
from .entropy import EntropyBonus, mean_entropy
from .exact import check_device, require_equal
from .logprobs import score
from .loss_metrics import correction_metrics, loss_metrics
from .losses import LossSettings, Tokens, Window, policy_loss
from .masks import high_entropy_mask
from .metrics import Metrics
from .old_policy import comparable, old_policy
from .reference import Reference
from .rollouts import Rollout
from .setup import has_dropout


def window_of(rollouts: Sequence[Rollout]) -> Window:
    """What an optimizer step over ``rollouts`` spans."""
    return Window(rows=len(rollouts), tokens=sum(r.scored_tokens for r in rollouts))


def loss_settings(args: GRPOConfig) -> LossSettings:
    """The fields of the same names, ``epsilon`` as ``epsilon_low``."""
    same = {f.name: getattr(args, f.name) for f in fields(LossSettings) if f.name != "epsilon_low"}
    return LossSettings(epsilon_low=args.epsilon, **same)


class LossStep:
    """The loss of packed rollouts under ``model``'s live adapter, with metrics under TRL's names.

    For each optimizer step :meth:`open`, then a call for each micro-batch, then :meth:`close`.

    What spans the whole step, where TRL's span is one micro-batch: the denominators of every loss, the quantile of
    ``top_entropy_quantile``, and the mean of the entropy bonus. With one micro-batch a step the two are the same.

    Attributes:
        reference: the policy that beta holds this one to; None where beta is 0.
        bonus: the entropy bonus and its state.
    """

    def __init__(self, args: GRPOConfig, model: nn.Module) -> None:
        self.args, self.model, self.settings = args, model, loss_settings(args)
        reuse = args.steps_per_generation * args.num_iterations
        # A generation that is used up within one optimizer step is on policy: the training forward's own
        # log-probabilities are the old ones. Dropout would make them differ from the sampler's by noise.
        self.on_policy = args.gradient_accumulation_steps % reuse == 0
        self.exact = args.rollout_precision == "exact"
        check_device(args, self.device)
        corrects = args.vllm_importance_sampling_correction or self.exact
        self.needs_old = not self.on_policy or (corrects and has_dropout(model))
        self.bonus = EntropyBonus.of(args)
        self.reference = Reference(model, moves=args.sync_ref_model) if args.beta != 0.0 else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 model."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def pack(self, rollouts: Sequence[Rollout]) -> PackedRollouts:
        return pack(rollouts, self.device, self.dtype)

    def annotate(self, rollouts: Sequence[Rollout], rows_at_once: int) -> None:
        """Fill in the log-probabilities of the old and the reference policy, where the loss will need them."""
        if self.needs_old:
            self._annotate(rollouts, rows_at_once, "old_logps", reference=None)
        if self.reference is not None:
            self._annotate(rollouts, rows_at_once, "ref_logps", self.reference)

    def _annotate(self, rollouts: Sequence[Rollout], rows_at_once: int, name: str, reference: Reference | None) -> None:
        with inference(self.model), nullcontext() if reference is None else reference.acting():
            for start in range(0, len(rollouts), rows_at_once):
                part = rollouts[start : start + rows_at_once]
                if not any(r.scored_tokens for r in part):
                    continue
                logps_N, _ = score(self.model, self.pack(part), self.args.temperature)
                _spread(part, name, logps_N.cpu())

    def open(self, micro_batches: Sequence[Sequence[Rollout]]) -> Window:
        """What the optimizer step over ``micro_batches`` spans.

        With ``top_entropy_quantile`` and several micro-batches their entropies must be known before the first backward:
        one more forward pass, without dropout and gradients. A single micro-batch takes those of its own forward.
        """
        window = window_of([r for part in micro_batches for r in part])
        several = len(micro_batches) > 1 and self.args.top_entropy_quantile < 1.0
        if not several:
            for r in (r for part in micro_batches for r in part):
                r.kept = None
            return window
        parts = [part for part in micro_batches if any(r.scored_tokens for r in part)]
        with inference(self.model):
            found = [score(self.model, self.pack(p), self.args.temperature, with_entropy=True)[1] for p in parts]
        entropies = [entropy_N for entropy_N in found if entropy_N is not None]
        if not entropies:
            return window
        kept_N = high_entropy_mask(torch.cat(entropies), self.args.top_entropy_quantile).cpu()
        for part, kept in zip(parts, kept_N.split([e.numel() for e in entropies])):
            _spread(part, "kept", kept)
        return Window(window.rows, window.tokens, kept=int(kept_N.sum()))

    def close(self, metrics: Metrics) -> None:
        """The last micro-batch of the step has had its backward."""
        if self.bonus.on:
            self.bonus.close()
            metrics.add("policy_loss", 0.0, 1.0)
            metrics.mean("entropy_coef", self.bonus.coef)

    def resume(self, entropy: dict[str, float], checkpoint: Path | None) -> None:
        """Stand where the run that wrote ``checkpoint`` stood, or at the start."""
        self.bonus = EntropyBonus.of(self.args)
        self.bonus.load(entropy)
        if self.reference is not None and checkpoint is not None:
            self.reference.load(checkpoint)

    def __call__(self, batch: PackedRollouts, window: Window, metrics: Metrics) -> torch.Tensor:
        """The share of ``window``'s loss that ``batch`` holds, with gradient where grad mode is on."""
        training, bonus = torch.is_grad_enabled(), self.bonus
        logps_N, entropy_N = score(
            self.model, batch, self.args.temperature, with_entropy=True,
            entropy_gradient=training and bonus.applied != 0.0,
        )  # fmt: skip
        assert entropy_N is not None
        old_N = old_policy(batch, logps_N, self.on_policy)
        correction = self._correction(batch, logps_N, metrics)
        kept_N, counted = self._kept(batch, entropy_N.detach(), window)
        tokens = Tokens(
            logps_N=logps_N,
            old_logps_N=old_N,
            advantages_B=batch.advantages_B,
            row_N=batch.row_N,
            ref_logps_N=batch.ref_logps_N,
            correction_N=None if correction is None else correction.weights_N,
            sampler_logps_N=batch.sampler_logps_N,
            kept_N=kept_N,
        )
        result = policy_loss(tokens, window, self.settings)
        loss_metrics(tokens, result, self.settings, entropy_N.detach(), metrics)
        if not bonus.on:
            return result.loss
        metrics.add("policy_loss", result.loss.detach(), 0.0 if training else 1.0)
        loss = result.loss - bonus.applied * mean_entropy(entropy_N, kept_N, counted)
        if training and bonus.adaptive:
            bonus.observe(entropy_N, kept_N)
        return loss

    def _kept(
        self, batch: PackedRollouts, entropy_N: torch.Tensor, window: Window
    ) -> tuple[torch.Tensor | None, int | torch.Tensor]:
        """The tokens of high entropy (None for all), and how many count in the whole step."""
        if self.args.top_entropy_quantile >= 1.0:
            return None, window.tokens
        if batch.kept_N is not None and window.kept is not None:
            return batch.kept_N, window.kept
        kept_N = high_entropy_mask(entropy_N, self.args.top_entropy_quantile)
        return kept_N, kept_N.sum()

    def _correction(self, batch: PackedRollouts, logps_N: torch.Tensor, metrics: Metrics) -> Correction | None:
        args = self.args
        trainer_N = comparable(batch, logps_N.detach() if batch.old_logps_N is None else batch.old_logps_N)
        if self.exact:
            require_equal(trainer_N, batch)
        correction = correct(
            trainer_N,
            batch.sampler_logps_N,
            batch.row_N,
            batch.rows,
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
            batch.complete,
        )
        applied = bool(args.vllm_importance_sampling_correction)
        correction_metrics(correction, applied, metrics)
        return correction if applied else None


def _spread(rollouts: Sequence[Rollout], name: str, values_N: torch.Tensor) -> None:
    """Give each scored rollout its tokens' part of ``values_N``."""
    scored = [r for r in rollouts if r.scored]
    for r, values in zip(scored, values_N.split([r.scored_tokens for r in scored])):
        setattr(r, name, values)
