"""With the native engine: sampler and trainer score alike, and GRPO raises the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.grpo.support import prompts, pronghorn_model, trainer

pytest.importorskip("pronghorn.rollout.native.engine")


def _native(folder: Path, **settings: Any) -> Any:
    made = trainer(folder, pronghorn_model(), **settings)
    made.sampling._engine = None
    return made


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 20, "temperature": 1.3}, {"repetition_penalty": 1.2}],
    ids=str,
)
def test_sampler_logps_are_the_trainers(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """Full-vocabulary log-probabilities at the sampler, whatever truncates the draw, equal the trainer's."""
    made = _native(tmp_path, max_steps=3, per_device_train_batch_size=8, learning_rate=0.05, **sampling)
    made.train()
    for log in made.state.log_history[:3]:
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert log["completions/mean_length"] > 1


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
