"""Losses as functions: additivity over micro-batches, clipping by hand, the registry."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pronghorn.grpo.correction import MODES, correct
from pronghorn.grpo.losses import LEVELS, LOSSES, LossSettings, Tokens, Window, policy_loss
from pronghorn.grpo.masks import high_entropy_mask, off_policy_mask
from pronghorn.grpo.objectives import gamma_weights


def _tokens(lengths: list[int], seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64) * scale

    logps = (draw() - 2).requires_grad_()
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    old, ref, correction = logps.detach() + draw(0.3), logps.detach() + draw(0.2), draw(0.1).exp()
    return Tokens(logps, old, advantages, row, ref, correction, logps.detach() + draw(0.5), draw() > 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_micro_batches_add_up_to_the_batch(loss_type: str, level: str) -> None:
    """Rows one at a time, an empty row among them, give the loss and gradient of all at once, to rounding."""
    lengths = [3, 1, 0, 7, 4]
    whole = _tokens(lengths)
    settings = LossSettings(
        loss_type=loss_type, importance_sampling_level=level, beta=0.1, max_completion_length=8,
        off_policy_mask_threshold=0.1,
    )  # fmt: skip
    window = Window(rows=len(lengths), tokens=sum(lengths))
    loss = policy_loss(whole, window, settings).loss
    (gradient,) = torch.autograd.grad(loss, whole.logps_N)
    parts, gradients = 0.0, []
    for row in range(len(lengths)):
        mine = whole.row_N == row
        logps = whole.logps_N.detach()[mine].requires_grad_()
        part = dataclasses.replace(
            whole,
            logps_N=logps,
            old_logps_N=whole.old_logps_N[mine],
            advantages_B=whole.advantages_B[row : row + 1],
            row_N=torch.zeros(int(mine.sum()), dtype=torch.int64),
            ref_logps_N=whole.ref_logps_N[mine],
            correction_N=whole.correction_N[mine],
            sampler_logps_N=whole.sampler_logps_N[mine],
            kept_N=whole.kept_N[mine],
        )
        share = policy_loss(part, window, settings).loss
        gradients.append(torch.autograd.grad(share, logps)[0])
        parts += share.item()
    assert parts == pytest.approx(loss.item(), abs=1e-14)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-15)


def _one(ratio: float, advantage: float, **settings: float) -> float:
    """Term of a single token at the given ratio."""
    tokens = Tokens(torch.tensor([ratio]).log(), torch.zeros(1), torch.tensor([advantage]), torch.tensor([0]))
    return policy_loss(tokens, Window(1, 1), LossSettings(**settings)).loss.item()


@pytest.mark.parametrize(
    "ratio, advantage, settings, term",
    [
        (1.1, 2.0, {}, -2.2),
        (1.5, 2.0, {}, -2.4),
        (1.5, 2.0, {"epsilon_high": 0.28}, -2.56),
        (0.5, -1.0, {}, 0.8),
        (5.0, -1.0, {}, 5.0),
        (5.0, -1.0, {"delta": 2.0}, 2.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, settings: dict[str, float], term: float) -> None:
    assert _one(ratio, advantage, **settings) == pytest.approx(term, rel=1e-6)


def test_beta_without_reference_is_named() -> None:
    tokens = Tokens(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="ref_logps_N=None"):
        policy_loss(tokens, Window(1, 1), LossSettings(beta=0.1))


@pytest.mark.parametrize(
    "loss_type, ratio, advantage, settings, term, slope",
    [
        ("cispo", 4.0, 2.0, {"epsilon_high": 3.0}, -3 * 2 * math.log(4), -6.0),
        ("cispo", 0.1, -1.0, {"epsilon_high": 3.0}, 0.1 * math.log(0.1), 0.1),
        ("sapo", 1.0, 3.0, {"sapo_temperature_pos": 1.0}, -6.0, -3.0),
        ("sapo", 1.0, -1.0, {"sapo_temperature_neg": 4.0}, 0.5, 1.0),
        ("luspo", 1.5, 2.0, {}, -2.4, 0.0),
        ("vespo", 1.0, 2.0, {}, 0.0, -2.0),
        ("vespo", 2.0, -1.0, {"vespo_k_neg": 2.0, "vespo_lambda_neg": 0.5}, math.log(2) * 4 * math.exp(-0.5), None),
    ],
)
def test_terms_by_hand(
    loss_type: str, ratio: float, advantage: float, settings: dict[str, float], term: float, slope: float | None
) -> None:
    """Term of one token and its slope to the log-probability; the old policy's is 0, so ``log p = log ratio``."""
    logps = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    tokens = Tokens(logps, torch.zeros(1), torch.tensor([advantage]), torch.tensor([0]))
    loss = policy_loss(tokens, Window(1, 1), LossSettings(loss_type=loss_type, **settings)).loss
    assert loss.item() == pytest.approx(term, abs=1e-6)
    if slope is not None:
        assert torch.autograd.grad(loss, logps)[0].item() == pytest.approx(slope, abs=1e-6)


def test_gamma_weights_count_the_whole_row_and_the_correction() -> None:
    """Two tokens of ratio 2 and a correction of 0.5: w = 2 * 2 * 0.5 = 2; the correction is not applied again."""
    logps = torch.full((2,), math.log(2.0))
    tokens = Tokens(logps, torch.zeros(2), torch.ones(1), torch.tensor([0, 0]), None, torch.tensor([0.5, 1.0]))
    settings = LossSettings(loss_type="vespo", vespo_k_pos=2.0, vespo_lambda_pos=1.0)
    phi = math.e * 2**2 * math.exp(-2.0)
    assert gamma_weights(tokens, settings).tolist() == pytest.approx([phi])
    assert policy_loss(tokens, Window(1, 2), settings).loss.item() == pytest.approx(-phi * math.log(2.0))


@pytest.mark.parametrize(
    "entropies, top, kept",
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 0.2, [0.9, 1.0]),
        ([0.1, 0.2, 0.3, 1.4, 0.5, 0.6, 0.7, 0.8], 0.2, [0.8, 1.4]),
        ([0.1, 0.2, 0.3, 0.4], 0.0, [0.4]),
        ([0.1, 0.2, 0.3, 0.4], 1.0, [0.1, 0.2, 0.3, 0.4]),
        ([], 0.5, []),
    ],
)
def test_high_entropy_tokens(entropies: list[float], top: float, kept: list[float]) -> None:
    mask = high_entropy_mask(torch.tensor(entropies), top)
    assert sorted(e for e, keep in zip(entropies, mask.tolist()) if keep) == kept


def test_off_policy_rows() -> None:
    """Kept: a gain whatever its drift, a loss near the sampler, and tokens that the sampler could not score."""
    row = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    logps = torch.tensor([-2.0, -2, -0.5, -0.5, -3, -1, -9])
    sampler = torch.tensor([0.0, 0, 0, 0, 0, 0, math.nan])
    tokens = Tokens(logps, logps, torch.tensor([1.0, -1, -1, -1]), row, sampler_logps_N=sampler)
    assert off_policy_mask(tokens, 1.0).tolist() == [True, True, False, True]
    assert off_policy_mask(tokens, 2.0).tolist() == [True] * 4
    with pytest.raises(ValueError, match="sampler_logps_N=None"):
        off_policy_mask(dataclasses.replace(tokens, sampler_logps_N=None), 1.0)


def test_correction_by_hand() -> None:
    row = torch.tensor([0, 0, 1])
    trainer = torch.log(torch.tensor([0.8, 0.4, 0.9]))
    sampler = torch.log(torch.tensor([0.4, 0.1, 0.9]))
    expected = {
        "token_truncate": [2.0, 3.0, 1.0],
        "token_mask": [2.0, 0.0, 1.0],
        "sequence_truncate": [3.0, 3.0, 1.0],
        "sequence_mask": [0.0, 0.0, 1.0],
    }
    assert set(expected) == set(MODES)
    for mode, weights in expected.items():
        torch.testing.assert_close(correct(trainer, sampler, row, 2, mode, None, 3.0).weights_N, torch.tensor(weights))
        found, same = (correct(trainer, sampler, row, 2, mode, None, 3.0, complete) for complete in (False, True))
        assert all(torch.equal(getattr(found, f.name), getattr(same, f.name)) for f in dataclasses.fields(found))
    unknown = correct(trainer, torch.tensor([torch.nan] * 3), row, 2, "token_mask", None, 3.0)
    assert unknown.weights_N.tolist() == [1, 1, 1] and unknown.gap_M.numel() == 0 and unknown.kl == 0
