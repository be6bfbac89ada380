"""Loss and every LoRA gradient against ``trl.GRPOTrainer``, from fixed completions through rewards to backward."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.logprobs import score
from pronghorn.grpo.loss_step import window_of
from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.trl_oracle import GROUP, case, our_trainer, trl_trainer

TOLERANCE = 1e-10
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _move(model: Any, size: float) -> None:
    """What updates between generation and loss do: the policy is no longer the old one."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def _compare(tmp_path: Path, correct: bool = True, drift: float = 0.0, **settings: Any) -> tuple[Any, Any]:
    """Run both from the same completions; ``drift`` moves the weights after old log-probabilities are known."""
    given = case()
    trl = trl_trainer(tmp_path, correct, **settings)
    ours = our_trainer(tmp_path, vllm_importance_sampling_correction=correct, **{
        k: v for k, v in settings.items() if k != "vllm_importance_sampling_correction"
    })  # fmt: skip
    prompt_ids = [ids for ids in given["prompts"] for _ in range(GROUP)]
    # the policy's own log-probabilities, then noise on them as a mismatched sampler would give
    clean = [Rollout(p, c, [0.0] * len(c)) for p, c in zip(prompt_ids, given["ids"])]
    with torch.no_grad():
        logps = score(ours.model, ours.loss_step.pack(clean), ours.args.temperature)[0]
    parts = logps.split([len(c) for c in given["ids"]])
    # as float32 numbers: TRL holds the sampler's in that
    sampled = [(part + torch.tensor(n)).float().tolist() for part, n in zip(parts, given["noise"])]
    fixed = {"prompt_ids": prompt_ids, "completion_ids": given["ids"], "logprobs": sampled}
    trl.fixed = ours.sampling._engine.fixed = fixed

    rows = [{"prompt": text} for text in ("a", "b") for _ in range(GROUP)]
    batch = trl._generate_and_score_completions([dict(row) for row in rows])
    ours.sampling.encoder = lambda prompts: (given["prompts"], 0)
    rollouts = ours._generate(rows, GROUP, "train", 0)
    for r, theirs in zip(rollouts, batch["advantages"].tolist()):
        assert r.advantage == pytest.approx(theirs, abs=1e-6)
        r.advantage = theirs
    if drift:
        _move(trl.model, drift)
        _move(ours.model, drift)
    their_loss = trl._compute_loss(trl.model, batch)
    their_loss.backward()
    metrics = Metrics()
    our_loss = ours.loss_step(ours.loss_step.pack(rollouts), window_of(rollouts), metrics)
    our_loss.backward()

    assert our_loss.dtype == torch.float64
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=TOLERANCE)
    theirs, mine = _gradients(trl.model), _gradients(ours.model)
    assert set(theirs) == set(mine) and len(mine) == 28
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=TOLERANCE, msg=name)
    assert max(g.abs().max() for g in theirs.values()) > 1e-5  # the comparison is of something
    return trl, metrics


@pytest.mark.parametrize(
    "loss_type, beta, scale_rewards", list(itertools.product(LOSSES, (0.0, 0.04), ("group", "batch", "none")))
)
def test_loss_and_gradients(tmp_path: Path, loss_type: str, beta: float, scale_rewards: str) -> None:
    _compare(tmp_path, loss_type=loss_type, beta=beta, scale_rewards=scale_rewards, reward_weights=[1.0, 0.3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.7, 1.5)])
def test_sampler_correction(tmp_path: Path, mode: str, bounds: tuple[float | None, float]) -> None:
    _compare(
        tmp_path,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
        loss_type="grpo",
    )


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_without_correction(tmp_path: Path, loss_type: str) -> None:
    _compare(tmp_path, correct=False, loss_type=loss_type, temperature=0.7)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "token", "delta": 1.4, "beta": 0.04},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.04},
        {"importance_sampling_level": "sequence", "delta": 1.05, "epsilon": 0.02, "epsilon_high": 0.04},
        {"epsilon": 0.1, "epsilon_high": 0.28, "beta": 0.1, "use_bias_correction_kl": False},
        {"mask_truncated_completions": True, "loss_type": "grpo"},
        {"mask_truncated_completions": True, "loss_type": "dr_grpo", "vllm_importance_sampling_mode": "token_mask"},
    ],
    ids=str,
)
def test_off_policy(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Several updates of one generation: ratios away from 1, clipping on both sides, and its metrics."""
    trl, metrics = _compare(tmp_path, drift=0.03, num_iterations=2, **settings)
    ours = metrics.flush()
    for name, values in trl._metrics["train"].items():
        if name.startswith(("clip_ratio", "kl", "entropy", "sampling")):
            assert ours[name] == pytest.approx(values[-1], abs=1e-6), name
