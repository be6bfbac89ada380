"""From packed rollouts to the loss of one micro-batch, and the log-probabilities that it needs beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from ..lora.active import adapter
from .batch import PackedRollouts, pack
from .config import GRPOConfig
from .correction import Correction, correct
from .logprobs import score
from .losses import LossResult, LossSettings, Tokens, Window, policy_loss
from .metrics import Metrics
from .rollouts import Rollout
from .sampling_loop import inference
from .segments import row_mean
from .setup import has_dropout


def window_of(rollouts: Sequence[Rollout]) -> Window:
    """What an optimizer step over ``rollouts`` spans."""
    return Window(rows=len(rollouts), tokens=sum(r.scored_tokens for r in rollouts))


def loss_settings(args: GRPOConfig) -> LossSettings:
    return LossSettings(
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        delta=args.delta,
        beta=args.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        max_completion_length=args.max_completion_length,
    )


class LossStep:
    """The loss of packed rollouts under ``model``'s live adapter, with metrics under TRL's names."""

    def __init__(self, args: GRPOConfig, model: nn.Module) -> None:
        self.args, self.model, self.settings = args, model, loss_settings(args)
        reuse = args.steps_per_generation * args.num_iterations
        # A generation that is used up within one optimizer step is on policy: the training forward's own
        # log-probabilities are the old ones. Dropout would make them differ from the sampler's by noise.
        self.on_policy = args.gradient_accumulation_steps % reuse == 0
        corrects = args.vllm_importance_sampling_correction
        self.needs_old = not self.on_policy or (corrects and has_dropout(model))

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
            self._annotate(rollouts, rows_at_once, "old_logps", reference=False)
        if self.settings.beta != 0.0:
            self._annotate(rollouts, rows_at_once, "ref_logps", reference=True)

    def _annotate(self, rollouts: Sequence[Rollout], rows_at_once: int, name: str, reference: bool) -> None:
        for start in range(0, len(rollouts), rows_at_once):
            part = rollouts[start : start + rows_at_once]
            if not any(r.scored_tokens for r in part):
                continue
            with inference(self.model), adapter(self.model, None) if reference else nullcontext():
                logps_N, _ = score(self.model, self.pack(part), self.args.temperature)
            scored = [r for r in part if r.scored]
            for r, logps in zip(scored, logps_N.cpu().split([r.scored_tokens for r in scored])):
                setattr(r, name, logps)

    def __call__(self, batch: PackedRollouts, window: Window, metrics: Metrics) -> torch.Tensor:
        """The share of ``window``'s loss that ``batch`` holds, with gradient where grad mode is on."""
        logps_N, entropy_N = score(self.model, batch, self.args.temperature, with_entropy=True)
        old_N = logps_N.detach()
        if batch.old_logps_N is not None and not self.on_policy:
            old_N = batch.old_logps_N
        correction = self._correction(batch, logps_N, metrics)
        tokens = Tokens(
            logps_N=logps_N,
            old_logps_N=old_N,
            advantages_B=batch.advantages_B,
            row_N=batch.row_N,
            ref_logps_N=batch.ref_logps_N,
            correction_N=None if correction is None else correction.weights_N,
        )
        result = policy_loss(tokens, window, self.settings)
        assert entropy_N is not None
        self._loss_metrics(tokens, result, entropy_N, metrics)
        return result.loss

    def _correction(self, batch: PackedRollouts, logps_N: torch.Tensor, metrics: Metrics) -> Correction | None:
        args = self.args
        trainer_N = logps_N.detach() if batch.old_logps_N is None else batch.old_logps_N
        correction = correct(
            trainer_N,
            batch.sampler_logps_N,
            batch.row_N,
            batch.rows,
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        )
        known = correction.gap_M.numel()
        if known:
            metrics.mean("sampling/sampling_logp_difference/mean", correction.gap_M.mean(), known)
            metrics.high("sampling/sampling_logp_difference/max", correction.gap_M.max())
            metrics.mean("sampling/kl", correction.kl, known)
        if not args.vllm_importance_sampling_correction:
            return None
        ratios = correction.ratios
        if ratios.numel():
            metrics.low("sampling/importance_sampling_ratio/min", ratios.min())
            metrics.mean("sampling/importance_sampling_ratio/mean", ratios.mean(), ratios.numel())
            metrics.high("sampling/importance_sampling_ratio/max", ratios.max())
        return correction

    def _loss_metrics(self, tokens: Tokens, result: LossResult, entropy_N: torch.Tensor, metrics: Metrics) -> None:
        """``entropy``, ``kl`` and ``clip_ratio/*``: means over tokens, or over rows for a ratio by sequence."""
        N, rows, settings = entropy_N.numel(), tokens.rows, self.settings
        if not N:
            return
        metrics.mean("entropy", entropy_N.mean(), N)
        if result.kl_N is not None:
            metrics.mean("kl", result.kl_N.mean(), N)
        sign_N = tokens.advantages_N
        low_N = ((result.ratio_N < settings.lower) & (sign_N < 0)).to(entropy_N.dtype)
        high_N = ((result.ratio_N > settings.upper) & (sign_N > 0)).to(entropy_N.dtype)
        by_row = settings.importance_sampling_level == "sequence"
        for name, clipped_N in (("low", low_N), ("high", high_N), ("region", low_N + high_N)):
            clipped_B = row_mean(clipped_N, tokens.row_N, rows)
            value, weight = (clipped_B.mean(), rows) if by_row else (clipped_N.mean(), N)
            metrics.mean(f"clip_ratio/{name}_mean", value, weight)
            if name == "low":
                metrics.low("clip_ratio/low_min", clipped_B.min())
            if name == "high":
                metrics.high("clip_ratio/high_max", clipped_B.max())
