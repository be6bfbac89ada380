"""Loss and every LoRA gradient against ``trl.GRPOTrainer``, from fixed completions through rewards to backward.

Everything is float64 on both sides, errors are relative to the largest entry of each tensor. Sums in another order
differ by some 1e-16 of their terms; over all losses and levels the largest error seen was 8e-15.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.logprobs import score
from pronghorn.grpo.losses import LEVELS, LOSSES
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.rollouts import Rollout
from pronghorn.kernels import glu, glu_triton, logits, logits_triton, rms_norm, rms_norm_triton, rope, rope_triton
from tests.grpo.trl_oracle import GROUP, case, our_trainer, trl_trainer
from tests.helpers import relative_error

TOLERANCE = 1e-12
FUSED = 2e-5
"""float32 through the Triton kernels of training against float64; over all losses and levels the largest error seen was
7.5e-6, some 100 times the rounding of one float32 number."""
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def move(model: Any, size: float, seed: int = 9) -> None:
    """What updates between generation and loss do: the policy is no longer the old one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name and p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def same_advantages(ours: Any, rollouts: list[Rollout], theirs: torch.Tensor) -> None:
    """Ours are TRL's, bit for bit; where each reward is scaled by itself, to some roundings of float32 numbers.

    There TRL adds the functions up in another order. A rounding would show in a loss that is compared in float64, so
    what is left then is TRL's.
    """
    mine = torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)
    bits = ours.args.multi_objective_aggregation == "sum_then_normalize"
    atol = 0.0 if bits else 4 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
    assert theirs.abs().max() > 0.5
    if not bits:
        for r, value in zip(rollouts, theirs.tolist()):
            r.advantage = value


def sampled(ours: Any, given: dict[str, list]) -> dict[str, list]:
    """Completions with the log-probabilities of a mismatched sampler: the policy's own with noise on them."""
    prompt_ids = [ids for ids in given["prompts"] for _ in range(GROUP)]
    clean = [Rollout(p, c, [0.0] * len(c)) for p, c in zip(prompt_ids, given["ids"])]
    with torch.no_grad():
        logps = score(ours.model, ours.loss_step.pack(clean), ours.args.temperature)[0]
    parts = logps.split([len(c) for c in given["ids"]])
    # as float32 numbers: TRL holds the sampler's in that
    noisy = [(part + torch.tensor(n)).float().tolist() for part, n in zip(parts, given["noise"])]
    return {"prompt_ids": prompt_ids, "completion_ids": given["ids"], "logprobs": noisy}


def _pair(tmp_path: Path, correct: bool, reference: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple:
    """Both trainers, and the completions as TRL and Pronghorn hold them, scored."""
    given = case()
    trl = trl_trainer(tmp_path, correct, reference, **settings)
    ours = our_trainer(tmp_path, reference, dtype, vllm_importance_sampling_correction=correct, **settings)
    if reference == "copy":  # the run has moved on from the reference
        move(trl.model, 0.03, seed=4)
        move(ours.model, 0.03, seed=4)
    fixed = sampled(ours, given)
    trl.fixed = ours.sampling._engine.fixed = fixed

    rows = [{"prompt": text} for text in ("a", "b") for _ in range(GROUP)]
    batch = trl._generate_and_score_completions([dict(row) for row in rows])
    ours.sampling.encoder = lambda prompts: (given["prompts"], 0)
    rollouts = ours._generate(rows, GROUP, "train", 0)
    same_advantages(ours, rollouts, batch["advantages"])
    return trl, ours, batch, rollouts


def _same(trl: Any, ours: Any, batch: Any, rollouts: list[Rollout], tolerance: float) -> Metrics:
    """One optimizer step's loss and gradients on both sides."""
    trl.model.zero_grad()
    ours.model.zero_grad()
    their_loss = trl._compute_loss(trl.model, batch)
    their_loss.backward()
    metrics = Metrics()
    window = ours.loss_step.open([rollouts])
    our_loss = ours.loss_step(ours.loss_step.pack(rollouts), window, metrics)
    our_loss.backward()
    ours.loss_step.close(metrics)
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=tolerance, abs=tolerance)
    theirs, mine = gradients(trl.model), gradients(ours.model)
    assert set(theirs) == set(mine) and len(mine) == 28
    for name, gradient in theirs.items():
        assert relative_error(mine[name].double(), gradient) < tolerance, name
    assert max(g.abs().max() for g in theirs.values()) > 1e-5  # the comparison is of something
    return metrics


def _compare(
    tmp_path: Path, correct: bool = True, drift: float = 0.0, reference: str = "base", fused: bool = False, **given: Any
) -> tuple[Any, Metrics]:
    """Run both from the same completions; ``drift`` moves the weights after old log-probabilities are known."""
    if given.get("loss_type") == "vespo" and correct:  # the two modes that it goes with
        given = {"vllm_importance_sampling_mode": "token_truncate", **given}
    dtype = torch.float32 if fused else torch.float64
    trl, ours, batch, rollouts = _pair(tmp_path, correct, reference, dtype, given)
    if drift:
        move(trl.model, drift)
        move(ours.model, drift)
    metrics = _same(trl, ours, batch, rollouts, FUSED if fused else TOLERANCE)
    return trl, metrics


def _same_metrics(trl: Any, metrics: Metrics) -> None:
    """Whatever TRL logged of the loss, under the same names."""
    ours, seen = metrics.flush(), 0
    for name, values in trl._metrics["train"].items():
        if name.startswith(("clip_ratio", "cispo", "vespo", "kl", "entropy", "sampling", "policy_loss")):
            assert ours[name] == pytest.approx(values[-1], abs=1e-6), name
            seen += 1
    assert seen


@pytest.mark.parametrize(
    "loss_type, level, beta, scale_rewards",
    list(itertools.product(LOSSES, LEVELS, (0.0, 0.04), ("group", "batch", "none"))),
)
def test_loss_and_gradients(tmp_path: Path, loss_type: str, level: str, beta: float, scale_rewards: str) -> None:
    """Every loss x importance level x scaling x beta, some updates after the generation, and the logged numbers."""
    trl, metrics = _compare(
        tmp_path, drift=0.03, num_iterations=2, loss_type=loss_type, importance_sampling_level=level, beta=beta,
        scale_rewards=scale_rewards, reward_weights=[1.0, 0.3],
    )  # fmt: skip
    _same_metrics(trl, metrics)


@pytest.mark.parametrize("loss_type", list(LOSSES))
@pytest.mark.parametrize("level", LEVELS)
def test_on_policy(tmp_path: Path, loss_type: str, level: str) -> None:
    _compare(tmp_path, loss_type=loss_type, importance_sampling_level=level, beta=0.04)


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_every_option_under_every_loss(tmp_path: Path, loss_type: str) -> None:
    """GDPO, the KL to a frozen copy, both masks, the entropy bonus and a temperature, all at once."""
    trl, metrics = _compare(
        tmp_path, drift=0.03, reference="copy", num_iterations=2, loss_type=loss_type, beta=0.1, temperature=0.7,
        multi_objective_aggregation="normalize_then_sum", off_policy_mask_threshold=0.05, top_entropy_quantile=0.5,
        entropy_coef=0.02, mask_truncated_completions=True,
    )  # fmt: skip
    _same_metrics(trl, metrics)


@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.7, 1.5)])
def test_sampler_correction(tmp_path: Path, mode: str, bounds: tuple[float | None, float], loss_type: str) -> None:
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL refuses it, and so does GRPOConfig: tests/grpo/test_combinations.py")
    if loss_type == "vespo" and bounds[0]:
        bounds = (0.4, 2.5)  # one masked token takes its whole sequence's weight: leave some
    _compare(
        tmp_path,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
        loss_type=loss_type,
    )


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_without_correction(tmp_path: Path, loss_type: str) -> None:
    _compare(tmp_path, correct=False, loss_type=loss_type, temperature=0.7)


OPTIONS: list[dict[str, Any]] = [
    {"importance_sampling_level": "token", "delta": 1.4, "beta": 0.04},
    {"importance_sampling_level": "sequence", "delta": 1.05, "epsilon": 0.02, "epsilon_high": 0.04},
    {"epsilon": 0.1, "epsilon_high": 0.28, "beta": 0.1, "use_bias_correction_kl": False},
    {"beta": 0.1, "reference": "copy"},
    {"mask_truncated_completions": True, "loss_type": "grpo"},
    {"mask_truncated_completions": True, "loss_type": "dr_grpo", "vllm_importance_sampling_mode": "token_mask"},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "cispo", "epsilon_high": 0.9, "importance_sampling_level": "sequence"},
    {"loss_type": "sapo", "sapo_temperature_pos": 1.3, "sapo_temperature_neg": 3.1},
    {"loss_type": "vespo", "vespo_k_pos": 1.3, "vespo_lambda_pos": 0.7, "vespo_k_neg": 1.7, "vespo_lambda_neg": 0.9},
    {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
    {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.4, 1.7]},
    {"top_entropy_quantile": 0.2},
    {"top_entropy_quantile": 0.0, "loss_type": "grpo", "beta": 0.04},
    {"top_entropy_quantile": 0.5, "entropy_coef": 0.05, "mask_truncated_completions": True},
    {"entropy_coef": 0.05},
    {"entropy_coef": -0.1, "loss_type": "luspo", "temperature": 1.7},
    {"off_policy_mask_threshold": 0.05, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"off_policy_mask_threshold": 0.2, "beta": 0.04},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_options(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Several updates of one generation: ratios away from 1, clipping on both sides, and the logged numbers."""
    trl, metrics = _compare(tmp_path, drift=0.03, num_iterations=2, **settings)
    _same_metrics(trl, metrics)


def test_the_masks_of_the_options_above_mask_some_and_not_all(tmp_path: Path) -> None:
    """Else the comparisons with them would be of nothing."""
    plain = {"vllm_importance_sampling_correction": False, "num_iterations": 2}
    losses = {}
    for name, settings in {"none": {}, "entropy": {"top_entropy_quantile": 0.2}, "off": {
        "off_policy_mask_threshold": 0.05}}.items():  # fmt: skip
        _, ours, _, rollouts = _pair(tmp_path / name, False, "base", torch.float64, {
            k: v for k, v in {**plain, **settings}.items() if k != "vllm_importance_sampling_correction"
        })  # fmt: skip
        move(ours.model, 0.03)
        window = ours.loss_step.open([rollouts])
        losses[name] = ours.loss_step(ours.loss_step.pack(rollouts), window, Metrics()).item()
    assert len({round(loss, 9) for loss in losses.values()}) == 3 and all(losses.values())


@pytest.mark.parametrize("target, loss_type", [(0.1, "dapo"), (50.0, "dapo"), (50.0, "grpo")])
def test_adaptive_entropy_over_steps(tmp_path: Path, target: float, loss_type: str) -> None:
    """Three steps: the coefficient walks as TRL's does, is applied from the second step on, and below target only."""
    trl, ours, batch, rollouts = _pair(tmp_path, True, "base", torch.float64, {
        "use_adaptive_entropy": True, "entropy_target": target, "entropy_coef": 0.3, "entropy_coef_delta": 0.11,
        "entropy_coef_max": 0.5, "entropy_coef_min": 0.25, "loss_type": loss_type, "num_iterations": 3,
    })  # fmt: skip
    walked = []
    for step in range(3):
        metrics = _same(trl, ours, batch, rollouts, TOLERANCE)
        _same_metrics(trl, metrics)
        assert ours.loss_step.bonus.coef == trl.entropy_coef
        assert ours.loss_step.bonus.last == pytest.approx(trl._last_world_entropy, rel=1e-9)
        walked.append(ours.loss_step.bonus.applied)
        move(trl.model, 0.02, seed=step)
        move(ours.model, 0.02, seed=step)
    assert walked == pytest.approx([0.41, 0.5, 0.5] if target == 50 else [0.0] * 3)


WHOLE = ((logits, logits_triton), (glu, glu_triton), (rms_norm, rms_norm_triton), (rope, rope_triton))
FUSED_CASES = [pytest.param(name, "token", WHOLE[:1], id=f"{name}-head") for name in LOSSES]
DEFAULT = (("dapo", "token"), ("vespo", "sequence"))
"""Those with every kernel that the default run takes: the interpreter needs some seconds for each."""
FUSED_CASES += [
    pytest.param(
        name, level, WHOLE, id=f"{name}-{level}-all", marks=() if (name, level) in DEFAULT else pytest.mark.slow
    )
    for name, level in itertools.product(LOSSES, LEVELS)
]


@pytest.mark.parametrize("loss_type, level, kernels", FUSED_CASES)
def test_fused_kernels(
    tmp_path: Path, loss_type: str, level: str, kernels: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in float32 through the head's kernel, or every kernel of a training step that has a Triton side (in the
    interpreter where there is no GPU), the entropy bonus's gradient included, against TRL in float64."""
    for module, fused in kernels:
        monkeypatch.setattr(module, "_path", lambda tensor, fused=fused: fused)
    _compare(
        tmp_path, drift=0.03, fused=True, num_iterations=2, loss_type=loss_type, importance_sampling_level=level,
        beta=0.04, entropy_coef=0.02,
    )  # fmt: skip
