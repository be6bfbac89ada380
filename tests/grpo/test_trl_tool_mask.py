"""Completions with stretches that the policy did not write: loss and LoRA gradients against TRL's, in float64.

The same ``rollout_func`` output goes into TRL's trainer and into Pronghorn's, through rewards, advantages, old and
reference log-probabilities and sampler correction to the backward pass.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.loss_step import window_of
from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.rollout_func import RolloutFuncDrawer
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import pronghorn_model
from tests.grpo.test_trl_loss import gradients, move
from tests.grpo.trl_oracle import GROUP, case, our_trainer, trl_trainer

TOLERANCE = 1e-10


def masks(ids: list[list[int]]) -> list[list[int]]:
    """A stretch in the middle, at the start, at the end, several, none, and all but the first token."""
    made = []
    for i, completion in enumerate(ids):
        n = len(completion)
        mask = [1] * n
        for at in ([n // 2], [0], [n - 1], range(1, n, 2), [], range(1, n))[i]:
            mask[at] = 0
        made.append(mask)
    return made


def compare(tmp_path: Path, correct: bool = True, drift: float = 0.0, **settings: Any) -> None:
    given = case(seed=5)
    trl = trl_trainer(tmp_path, correct, **settings)
    ours = our_trainer(tmp_path, vllm_importance_sampling_correction=correct, **settings)
    prompt_ids = [ids for ids in given["prompts"] for _ in range(GROUP)]
    clean = [Rollout(p, c, [0.0] * len(c)) for p, c in zip(prompt_ids, given["ids"])]
    with torch.no_grad():
        logps = score(ours.model, ours.loss_step.pack(clean), ours.args.temperature)[0]
    mask = masks(given["ids"])
    assert {sum(m) == len(m) for m in mask} == {True, False}
    sampled = [
        [x if m else 0.0 for x, m in zip((part + torch.tensor(noise)).float().tolist(), row)]
        for part, noise, row in zip(logps.split([len(c) for c in given["ids"]]), given["noise"], mask)
    ]
    fixed = {"prompt_ids": prompt_ids, "completion_ids": given["ids"], "logprobs": sampled, "env_mask": mask}
    seen: list[list[Any]] = []

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen.append(prompts)
        assert trainer in (trl, ours)
        return {name: [list(row) for row in rows] for name, rows in fixed.items()}

    trl.rollout_func = rollout_func
    ours.sampling.drawer = RolloutFuncDrawer(ours.sampling, rollout_func, ours)
    rows = [{"prompt": text} for text in ("a", "b") for _ in range(GROUP)]
    batch = trl._generate_and_score_completions([dict(row) for row in rows])
    rollouts = ours._generate(rows, GROUP, "train", 0)
    assert seen[0] == seen[1] == ["a"] * GROUP + ["b"] * GROUP  # both give every prompt as often as it is answered
    assert "tool_mask" in batch
    for r, theirs in zip(rollouts, batch["advantages"].tolist()):
        assert r.advantage == pytest.approx(theirs, abs=1e-6)
        r.advantage = theirs
    if drift:
        move(trl.model, drift)
        move(ours.model, drift)
    their_loss = trl._compute_loss(trl.model, batch)
    their_loss.backward()
    our_loss = ours.loss_step(ours.loss_step.pack(rollouts), window_of(rollouts), Metrics())
    our_loss.backward()
    assert our_loss.dtype == torch.float64
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=TOLERANCE)
    theirs, mine = gradients(trl.model), gradients(ours.model)
    assert set(theirs) == set(mine) and len(mine) == 28
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=TOLERANCE, msg=name)
    assert max(g.abs().max() for g in theirs.values()) > 1e-5
    ours_log = ours.metrics["train"].flush()
    for name, values in trl._metrics["train"].items():
        if name.startswith(("completions/", "num_tokens", "reward")):
            assert ours_log[name] == pytest.approx(values[-1], abs=1e-6), name


@pytest.mark.parametrize("loss_type, beta", list(itertools.product(LOSSES, (0.0, 0.04))))
def test_loss_and_gradients(tmp_path: Path, loss_type: str, beta: float) -> None:
    mode = "token_mask" if loss_type == "vespo" else "sequence_mask"  # vespo goes with token modes alone
    compare(tmp_path, loss_type=loss_type, beta=beta, vllm_importance_sampling_mode=mode)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.04},
        {"importance_sampling_level": "token", "delta": 1.4, "vllm_importance_sampling_mode": "token_truncate"},
        {"mask_truncated_completions": True, "vllm_importance_sampling_mode": "token_mask", "beta": 0.04},
    ],
    ids=str,
)
def test_off_policy(tmp_path: Path, settings: dict[str, Any]) -> None:
    compare(tmp_path, drift=0.03, num_iterations=2, **settings)


def test_without_correction(tmp_path: Path) -> None:
    compare(tmp_path, correct=False, temperature=0.7)


@pytest.mark.parametrize("shared", [True, False])
def test_packed_tokens_score_as_the_whole_completion_does(shared: bool) -> None:
    """Masked scoring is whole scoring with the environment's tokens left out: they are read, and not scored."""
    model = pronghorn_model(torch.float64)
    given = case(seed=5)
    ids, prompt = given["ids"], given["prompts"][0]
    plain = [Rollout(prompt, c, [0.0] * len(c)) for c in ids]
    masked = [Rollout(prompt, c, [0.0] * sum(m), tool_mask=m) for c, m in zip(ids, masks(ids))]
    batch = pack(masked, "cpu", torch.float64, shared_prefix=shared)
    with torch.no_grad():
        whole = score(model, pack(plain, "cpu", torch.float64, shared_prefix=shared))[0]
        got = score(model, batch)[0]
    kept = torch.tensor([bool(m) for row in masks(ids) for m in row])
    torch.testing.assert_close(got, whole[kept], rtol=0, atol=1e-12)
    assert batch.tokens == sum(r.scored_tokens for r in masked) < len(kept)
    # what stands behind the last scored token is no input, nor is that token
    last = [max(i for i, m in enumerate(row) if m) for row in masks(ids)]
    assert sum(last) < sum(len(c) - 1 for c in ids)
    assert sum(batch.row_lengths) == sum(last) + len(prompt) * (1 if shared else len(ids))


def test_rows_without_any_sampled_token_stay_out_of_the_loss() -> None:
    batch = pack([Rollout([7, 8], [9, 10], [], tool_mask=[0, 0]), Rollout([7, 8], [9], [-1.0])], "cpu")
    assert batch.rows == 2 and batch.tokens == 1 and batch.row_N.tolist() == [1]


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="tool_mask has 1 entries for 2 tokens"):
        Rollout([1], [2, 3], [0.0], tool_mask=[1])
    with pytest.raises(ValueError, match="sampler_logps has 2 entries, sampled were 1"):
        Rollout([1], [2, 3], [0.0, 0.0], tool_mask=[1, 0])
