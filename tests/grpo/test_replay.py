"""The replay buffer: size, age, order, one use, state; and what the loss does with rollouts of an earlier policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.losses import LossSettings, Tokens, policy_loss
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.replay import ReplayBuffer
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import config, pronghorn_model


def group(token: int, n: int = 2) -> list[Rollout]:
    return [Rollout([7], [token, i + 8], [-1.0, -2.0], advantage=(-1.0) ** i) for i in range(n)]


def test_the_youngest_come_first_once_and_none_too_old() -> None:
    buffer = ReplayBuffer(size=3, max_age=2)
    for born in range(4):
        buffer.put([group(10 + born)], born)
    assert len(buffer) == 3  # generation 0 made room
    taken = buffer.take(2, generation=4)
    assert [g[0].completion_ids[0] for g in taken] == [13, 12] and [g[0].age for g in taken] == [1, 2]
    assert len(buffer) == 0  # generation 1 was three generations old
    assert buffer.take(5, generation=4) == []


def test_state_comes_back() -> None:
    buffer = ReplayBuffer(4, 9)
    buffer.put([group(10), group(11)], 0)
    buffer.put([group(12)], 2)
    again = ReplayBuffer(4, 9)
    again.load_state_dict(buffer.state_dict())
    assert again.take(3, 5) == buffer.take(3, 5) != []


@pytest.mark.parametrize("reuse", [1, 2])
def test_stale_rollouts_are_weighed_against_the_samplers_record(tmp_path: Path, reuse: int) -> None:
    """A fresh and a stale group in one batch: the loss is PPO's with each token's own old policy, by hand."""
    model = pronghorn_model(torch.float64).train()
    mode = {"vllm_importance_sampling_mode": "token_truncate"}
    step = LossStep(config(tmp_path, num_iterations=reuse, loss_type="dapo", **mode), model)
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for age in (0, 3, 1, 0):
        ids = torch.randint(6, 384, (5,), generator=generator).tolist()
        rollouts.append(Rollout([7, 8, 9], ids, [0.0] * 5, advantage=0.5 - age / 3, age=age))
    with torch.no_grad():
        now = score(model, pack(rollouts, "cpu", torch.float64))[0].split(5)
    for r, logps in zip(rollouts, now):  # the engine errs by a little, the earlier policy was another
        noise = torch.randn(5, generator=generator, dtype=torch.float64) * (0.3 if r.age else 0.01)
        r.sampler_logps = (logps + noise).tolist()
    rollouts[1].sampler_logps[2] = float("nan")
    step.annotate(rollouts, 4)
    metrics = Metrics()
    loss = step(step.pack(rollouts), window_of(rollouts), metrics)

    current = score(model, step.pack(rollouts))[0]
    recorded = torch.tensor([x for r in rollouts for x in r.sampler_logps], dtype=torch.float64)
    stale = torch.tensor([r.age > 0 for r in rollouts for _ in range(5)])
    same = current.detach()
    old = torch.where(stale & ~recorded.isnan(), recorded, same)
    tokens = Tokens(
        current,
        old,
        torch.tensor([r.advantage for r in rollouts]),
        torch.arange(4).repeat_interleave(5),
        correction_N=torch.where(stale, 1.0, (same - recorded).exp()),
    )
    wanted = policy_loss(tokens, window_of(rollouts), LossSettings("dapo"))
    assert loss.item() == pytest.approx(wanted.loss.item(), abs=1e-12)
    assert (wanted.ratio_N[stale] - 1).abs().max() > 0.2
    log = metrics.flush()
    # how far sampler and trainer drift apart is told by the fresh tokens alone
    assert log["sampling/sampling_logp_difference/max"] == pytest.approx((same - recorded)[~stale].abs().max().item())
