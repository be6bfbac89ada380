"""Gradient accumulation is exact by tokens, and packing equals padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import adapter_weights, llama, pronghorn_model, trainer
from tests.grpo.trl_oracle import in_float64
from tests.helpers import perturb


def _first_step(folder: Path, batch: int, accumulation: int, **settings: Any) -> tuple[dict, dict, list]:
    """Gradients, logged metrics and completions of the first optimizer step."""
    gradients: dict[str, torch.Tensor] = {}
    # transformers' norm goes through float32, where the last bits of two layouts of the same prompt would show
    model = in_float64(pronghorn_model(torch.float64))
    made = trainer(
        folder, model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
        max_grad_norm=0.0, **settings,
    )  # fmt: skip

    perturb(model)  # away from the reference policy, which is the one that the trainer was made with

    def keep(*args: object, **kwargs: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    made.callback_handler.callbacks[0].on_pre_optimizer_step = keep  # type: ignore[method-assign]
    made.train()
    return gradients, made.state.log_history[0], [len(s.completion) for s in made.sampling.samples]


OPTIONS: list[dict[str, Any]] = [
    {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"top_entropy_quantile": 0.3},
    {"entropy_coef": 0.05, "loss_type": "grpo"},
    {"entropy_coef": 0.05, "top_entropy_quantile": 0.3, "loss_type": "luspo", "beta": 0.04},
    {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
    {"off_policy_mask_threshold": 1e-9, "mask_truncated_completions": True},
    {"multi_objective_aggregation": "normalize_then_sum", "mask_truncated_completions": True, "loss_type": "sapo"},
]
CASES = [{"loss_type": loss_type, "beta": beta} for loss_type in LOSSES for beta in (0.0, 0.04)]


@pytest.mark.parametrize("settings", [*CASES, *OPTIONS], ids=str)
def test_eight_times_one_is_one_times_eight(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, whole_log, sampled = _first_step(tmp_path / "1x8", 8, 1, **settings)
    parts, parts_log, again = _first_step(tmp_path / "8x1", 1, 8, **settings)
    assert sampled == again and len(set(sampled)) > 1  # the same completions, of unlike length
    assert parts_log["loss"] == pytest.approx(whole_log["loss"], abs=1e-12)
    assert set(whole) == set(parts) and len(whole) == 28
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12, msg=name)
    assert max(g.abs().max() for g in whole.values()) > 1e-5
    for name, value in whole_log.items():
        if name not in ("step_time", "epoch"):
            assert parts_log[name] == pytest.approx(value, abs=1e-9), name


def test_generations_shorter_than_the_step_are_exact_too(tmp_path: Path) -> None:
    """Two generations within one optimizer step: its denominators span both."""
    made = trainer(
        tmp_path, pronghorn_model(torch.float64), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        steps_per_generation=1, max_steps=1, loss_type="dapo",
    )  # fmt: skip
    made.train()
    assert made.sampling.engine.calls == [1, 1]
    assert made._window.rows == 8


def test_packed_rows_score_as_padded_ones(tmp_path: Path) -> None:
    """Log-probabilities and gradients of packed completions equal transformers' padded forward."""
    generator = torch.Generator().manual_seed(4)
    rollouts = [
        Rollout(
            torch.randint(6, 384, (p,), generator=generator).tolist(),
            torch.randint(6, 384, (c,), generator=generator).tolist(),
            [0.0] * c,
        )
        for p, c in ((3, 5), (9, 1), (1, 11))
    ]
    model = pronghorn_model()
    logps, entropy = score(model, pack(rollouts, "cpu"), temperature=0.8, with_entropy=True, chunk=3)
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    packed_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    longest = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    padded, mask = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest, dtype=torch.int64)
    for row, r in enumerate(rollouts):
        ids = torch.tensor(r.prompt_ids + r.completion_ids)
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    log_softmax = torch.log_softmax(model(input_ids=padded, attention_mask=mask).logits.float() / 0.8, dim=-1)
    expected, entropies = [], []
    for row, r in enumerate(rollouts):
        for j, token in enumerate(r.completion_ids):
            at = log_softmax[row, len(r.prompt_ids) - 1 + j]
            expected.append(at[token])
            entropies.append(-(at.exp() * at).sum())
    torch.testing.assert_close(logps, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.stack(entropies).detach(), rtol=1e-5, atol=1e-5)
    (torch.stack(expected) * weights).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(packed_gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_moves_adapters_only(tmp_path: Path) -> None:
    model = pronghorn_model()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    before = adapter_weights(model)
    trainer(tmp_path, model, max_steps=1).train()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(not torch.equal(p, before[n]) for n, p in adapter_weights(model).items())
    assert llama().lm_head.weight.equal(model.get_base_model().lm_head.weight)
