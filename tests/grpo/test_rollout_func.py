"""TRL's ``rollout_func``: what it gets, what it must return, what reaches the rewards, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.history import History
from pronghorn.grpo.rollout_func import RolloutFuncDrawer
from pronghorn.grpo.trainer import GRPOTrainer
from tests.grpo.support import FakeEngine, adapter_weights, config, letters, prompts, pronghorn_model, trainer
from tests.helpers import tiny_tokenizer


def fixed(**overrides: Any) -> Any:
    """A function of two-token completions, ended by the end-of-turn id but for the first."""

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        B = len(prompts)
        made = {
            "prompt_ids": [[7, 8]] * B,
            "completion_ids": [[9, 10], *[[9, 5]] * (B - 1)],
            "logprobs": [[-1.0, None]] * B,
            "depth": list(range(B)),
            "game": "chess",
        }
        return {**made, **{name: value for name, value in overrides.items() if value is not ...}}

    return rollout_func


def drawer(tmp_path: Path, func: Any, **settings: Any) -> RolloutFuncDrawer:
    made = trainer(tmp_path, **settings)
    return RolloutFuncDrawer(made.sampling, func, made)


def draw(of: RolloutFuncDrawer) -> Any:
    return of([{"prompt": "a"}] * 4, 4, lambda *path: 0, 0)


def test_rollouts_columns_and_truncation(tmp_path: Path) -> None:
    made = draw(drawer(tmp_path, fixed()))
    assert [r.truncated for r in made.rollouts] == [True, False, False, False]
    assert made.rollouts[0].sampler_logps[0] == -1.0 and made.rollouts[0].sampler_logps[1] != -1.0  # NaN: not known
    assert made.columns == {"depth": [0, 1, 2, 3], "game": ["chess"] * 4}
    masked = draw(drawer(tmp_path, fixed(env_mask=[[1, 1], [0, 1], [1, 0], [1, 1]])))
    assert [r.tool_mask for r in masked.rollouts] == [None, [0, 1], [1, 0], None]
    assert [len(r.sampler_logps) for r in masked.rollouts] == [2, 1, 1, 2]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"logprobs": [[-1.0, -1.0]] * 3}, "logprobs has 3 entries for 4 prompts; return one for each"),
        ({"completion_ids": [[9]] * 5, "logprobs": [[0.0]] * 5}, "completion_ids has 5 entries for 4 prompts"),
        ({"logprobs": [[-1.0]] * 4}, r"logprobs\[0\] has 1 entries, completion_ids\[0\] has 2"),
        ({"env_mask": [[1]] * 4}, r"env_mask\[0\] has 1 entries, completion_ids\[0\] has 2"),
        ({"completion_ids": [[]] * 4, "logprobs": [[]] * 4}, r"completion_ids\[0\] is empty"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(drawer(tmp_path, fixed(**overrides)))


def test_missing_keys_and_unknown_log_probabilities(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must return completion_ids, logprobs, prompt_ids .* missing: \['logprobs'"):
        draw(drawer(tmp_path, lambda prompts, trainer: {"prompt_ids": [], "completion_ids": []}))
    known = draw(drawer(tmp_path, fixed(logprobs=None)))
    assert all(x != x for r in known.rollouts for x in r.sampler_logps)
    with pytest.raises(ConfigError, match="logprobs=None, but rollout_staleness and replay_buffer_size"):
        draw(drawer(tmp_path, fixed(logprobs=None), replay_buffer_size=2))


def test_a_multi_turn_run_by_hand(tmp_path: Path) -> None:
    """Two turns of the trainer's own engine with a word of the environment between them, in training and evaluation."""
    seen: dict[str, Any] = {}

    def rollout_func(asked: list[Any], made: Any) -> dict[str, Any]:
        tokenizer, G = made.processing_class, made.num_generations if made.model.training else made.num_generations_eval
        seen["prompts"], seen["group"] = list(asked), G
        histories = [History(tokenizer(text)["input_ids"]) for text in asked]
        for turn in range(2):
            params = [
                SamplingParams(max_tokens=5, seed=100 * made.state.global_step + 10 * turn + i)
                for i in range(len(histories))
            ]
            for history, result in zip(histories, made.sampling.engine.generate([h.ids for h in histories], params)):
                out = result.outputs[0]
                history.sampled(out.token_ids, out.policy_logprobs, out.finish_reason == "length")
                if turn == 0:
                    history.wrote(tokenizer(" go on", add_special_tokens=False)["input_ids"])
        rollouts = [h.rollout() for h in histories]
        logps = []
        for r in rollouts:
            given = iter(r.sampler_logps)
            logps.append([next(given) if m else 0.0 for m in r.tool_mask])
        return {
            "prompt_ids": [r.prompt_ids for r in rollouts],
            "completion_ids": [r.completion_ids for r in rollouts],
            "logprobs": logps,
            "env_mask": [r.tool_mask for r in rollouts],
            "turns": [2] * len(rollouts),
        }

    def reward(completions: list[str], turns: list[int], **kwargs: Any) -> list[float]:
        assert turns == [2] * len(completions) and all(" go on" in text for text in completions)
        return letters(completions)

    model = pronghorn_model()
    args = config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=2)
    made = GRPOTrainer(
        model, reward, args, prompts(), prompts(1), processing_class=tiny_tokenizer(), rollout_func=rollout_func
    )
    made.sampling._engine = FakeEngine(model, made.processing_class)
    before = adapter_weights(model)
    made.train()
    assert len(seen["prompts"]) == 4 and len(set(seen["prompts"])) == 1 and seen["group"] == 4  # in training mode
    log = made.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] < 1e-5  # each turn's record meets its own tokens
    assert 2 <= log["completions/mean_length"] <= 10
    assert any((w != before[n]).any() for n, w in adapter_weights(model).items())
    assert "eval_reward" in made.evaluate() and len(seen["prompts"]) == 2


def test_prompts_reach_the_function_as_they_are_in_the_data(tmp_path: Path) -> None:
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(4)])
    seen: list[Any] = []

    def rollout_func(asked: list[Any], made: Any) -> dict[str, Any]:
        seen.extend(asked)
        asked[0][0]["content"] = "changed"  # a copy: the data set's row stays
        return {**fixed()(asked, made)}

    def reward(prompts: list[Any], completions: list[Any], game: list[str], **kwargs: Any) -> list[float]:
        assert prompts[0][0]["content"].endswith("?") and game == ["chess"] * len(prompts)
        assert completions[0][0]["role"] == "assistant"
        return [float(i) for i in range(len(prompts))]

    args = config(tmp_path, max_steps=1)
    made = GRPOTrainer(
        pronghorn_model(), reward, args, chats, processing_class=tiny_tokenizer(), rollout_func=rollout_func
    )
    made.train()
    assert len(seen) == 4 and seen[1][0]["role"] == "user"
