"""With the native engine: sampler and trainer score alike, and GRPO raises the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.rollouts import Rollout
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from pronghorn.rollout import base
from tests.grpo.support import prompts, pronghorn_model, trainer

pytest.importorskip("pronghorn.rollout.native.engine")


MOST_KL, MOST_MEAN_DIFFERENCE = 2e-4, 0.005  # nats a token: what sampler and trainer may differ by


def _native(folder: Path, **settings: Any) -> Any:
    made = trainer(folder, pronghorn_model(), **settings)
    made.sampling._engine = None
    return made


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.8, "top_k": 20, "temperature": 1.3},
        {"repetition_penalty": 1.2},
        {"generation_kwargs": {"presence_penalty": 0.5, "frequency_penalty": 0.3}},
    ],
    ids=str,
)
def test_sampler_logps_are_the_trainers(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """Full-vocabulary log-probabilities at the sampler, whatever truncates the draw, equal the trainer's."""
    made = _native(tmp_path, max_steps=3, per_device_train_batch_size=8, learning_rate=0.05, **sampling)
    made.train()
    for log in made.state.log_history[:3]:
        assert log["sampling/kl"] <= MOST_KL and log["sampling/logp_diff_mean"] <= MOST_MEAN_DIFFERENCE
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert log["completions/mean_length"] > 1


def _support(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens top-k, and then top-p over what it kept, leave: by sorting, as they are defined."""
    probs_V, order_V = logits_V.double().div(params.temperature).softmax(-1).sort(descending=True)
    probs_V = probs_V[: params.top_k or None]
    probs_V = probs_V / probs_V.sum()
    kept_V = torch.zeros(len(logits_V), dtype=torch.bool)
    kept_V[order_V[: len(probs_V)][probs_V.cumsum(-1) - probs_V < params.top_p]] = True
    return kept_V


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "stepwise"])
@pytest.mark.parametrize(
    "cuts", [{"top_k": 20}, {"top_p": 0.8}, {"top_p": 0.7, "top_k": 30, "temperature": 1.3}], ids=str
)
def test_logps_of_the_draw_are_the_trainers_over_what_was_kept(cuts: dict[str, Any], ahead: bool) -> None:
    """``token_logprobs`` against the trainer's own log-prob of the token, less that of the kept tokens together."""
    model = pronghorn_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    engine = base.create("native", model, model.get_base_model().pronghorn_state.tokenizer, ahead=ahead)
    params = SamplingParams(n=4, max_tokens=24, seed=5, ignore_eos=True, **cuts)
    prompt = [0, *range(40, 61)]
    far = 0.0
    for c in engine.generate([prompt], params)[0].outputs:
        with torch.no_grad():
            batch = pack([Rollout(prompt, c.token_ids, [0.0] * len(c.token_ids))], "cpu")
            own_N = score(model, batch, params.temperature)[0]
            row = torch.tensor([*prompt, *c.token_ids])
            hidden = hidden_states(model, row, torch.arange(len(row)), PackedAttention([len(row)], "cpu"))
            logits_NV = logits(model, hidden)[len(prompt) - 1 : -1]
        kept_NV = torch.stack([_support(logits_V, params) for logits_V in logits_NV])
        assert kept_NV.gather(1, torch.tensor(c.token_ids)[:, None]).all(), "only what was kept is drawn"
        policy_NV = logits_NV.div(params.temperature).log_softmax(-1)
        expected_N = own_N - policy_NV.masked_fill(~kept_NV, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(torch.tensor(c.token_logprobs), expected_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(c.policy_logprobs), own_N, rtol=0, atol=1e-5)
        far = max(far, (expected_N - own_N).max().item())
    assert (engine._decoder is not None) == ahead
    assert far > 0.1, "the two are different numbers"


def test_reward_rises(tmp_path: Path) -> None:
    """A reward that is easy to find: the share of completion tokens from one half of the vocabulary."""

    def low_half(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(token < 192 for token in ids) / len(ids) for ids in completion_ids]

    made = _native(
        tmp_path, rewards=low_half, data=prompts(16), max_steps=25, per_device_train_batch_size=64, num_generations=8,
        learning_rate=2e-2, lr_scheduler_type="constant", loss_type="dr_grpo", max_completion_length=8,
    )  # fmt: skip
    made.train()
    rewards = [log["reward"] for log in made.state.log_history if "reward" in log]
    assert len(rewards) == 25
    assert sum(rewards[-5:]) / 5 > rewards[0] + 0.15, rewards
