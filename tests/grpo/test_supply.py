"""Refills, replay, curriculum and generations sampled ahead, through the trainer; and resumed to the last bit."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.prompt_stream import PromptStream
from pronghorn.rewards.errors import RewardError
from tests.grpo.support import FakeEngine, adapter_weights, config, letters, prompts, pronghorn_model, trainer
from tests.invariant.test_resume import history, run

TWO = {"per_device_train_batch_size": 8, "num_generations": 4}  # two prompts of four completions


def even(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Spread for the prompts about an even number only."""
    return [s if int(p.split()[2]) % 2 == 0 else 0.0 for p, s in zip(prompts, letters(completions))]


def never(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def trained(made: Any) -> list[list[Any]]:
    """The batches that reach the loss."""
    seen: list[list[Any]] = []
    pack = made.loss_step.pack
    made.loss_step.pack = lambda rollouts: (seen.append(list(rollouts)), pack(rollouts))[1]
    return seen


def number(rollout: Any, made: Any) -> int:
    return int(made.processing_class.decode(rollout.prompt_ids, skip_special_tokens=True).split()[2])


def test_off_by_default() -> None:
    args = config(Path("unused"))
    assert not args.dynamic_sampling and not args.curriculum
    assert args.replay_buffer_size == args.rollout_staleness == 0 and args.outcome_reward is None


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic_sampling_max_rounds": 0}, {"replay_buffer_size": -1}, {"replay_max_age": 0}, {"curriculum_floor": 0},
        {"curriculum_solved_at": float("nan")}, {"rollout_staleness": -1},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}=.* is out of range; give"):
        config(Path("unused"), **settings)


def test_an_unknown_outcome_reward_fails_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outcome_reward='leters' names no reward function; did you mean 'letters'"):
        trainer(tmp_path, outcome_reward="leters", curriculum=True)


def test_flat_groups_are_replaced_by_further_prompts(tmp_path: Path) -> None:
    made = trainer(tmp_path, rewards=even, dynamic_sampling=True, max_steps=3, log_completions=True, **TWO)
    batches = trained(made)
    made.train()
    assert [len(batch) for batch in batches] == [8, 8, 8]
    visited: list[int] = []
    for batch in batches:
        assert all(number(r, made) % 2 == 0 for r in batch)
        assert all(len({r.advantage for r in batch[g : g + 4]}) > 1 for g in (0, 4))
        visited += [number(batch[g], made) for g in (0, 4)]
    order = PromptStream(12, seed=3).take(made.supply.stream.cursor)
    remaining = iter(order)
    assert all(row in remaining for row in visited)  # in the data's order, each drawn once
    logs = made.state.log_history[:3]
    assert sum(made.sampling.engine.calls) == made.supply.stream.cursor == len(order)
    assert sum(log["sampling/refill_rounds"] for log in logs) == len(made.sampling.engine.calls) - 3 > 0
    assert all(log["sampling/flat_groups"] == 0 and 0 < log["sampling/kept_ratio"] <= 1 for log in logs)
    assert any(log["frac_reward_zero_std"] > 0 for log in logs)  # rewards are reported of all that was sampled
    samples = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert len(samples) == 4 * len(order)


def test_requests_of_a_refill_have_seeds_of_their_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, rewards=never, dynamic_sampling=True, max_steps=1, dynamic_sampling_max_rounds=3, **TWO)
    seeds: list[int] = []
    generate = made.sampling.engine.generate
    made.sampling.engine.generate = lambda ids, params, *rest: (
        seeds.extend(p.seed for p in params),
        generate(ids, params),
    )[1]
    made.train()
    assert len(seeds) == len(set(seeds)) == 8


def test_at_the_cap_flat_groups_stay_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, rewards=never, dynamic_sampling=True, dynamic_sampling_max_rounds=2, **TWO)
    batches = trained(made)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        made.train()
    assert [len(batch) for batch in batches] == [8, 8] and made.sampling.engine.calls == [2] * 6
    log = made.state.log_history[0]
    assert log["sampling/flat_groups"] == 2 and log["sampling/refill_rounds"] == 2 and log["sampling/kept_ratio"] == 0
    said = [r.getMessage() for r in caplog.records if "dynamic_sampling" in r.getMessage()]
    assert (
        len(said) == 1 and "of 6 groups sampled in 2 rounds" in said[0] and "2 of the 2 trained on are flat" in said[0]
    )


def test_the_named_outcome_decides(tmp_path: Path) -> None:
    """Style always has spread; the outcome has it for even prompts alone."""
    made = trainer(tmp_path, rewards=[even, letters], dynamic_sampling=True, outcome_reward="even", max_steps=2, **TWO)
    batches = trained(made)
    made.train()
    assert all(number(r, made) % 2 == 0 for batch in batches for r in batch)
    free = trainer(tmp_path / "sum", rewards=[even, letters], dynamic_sampling=True, max_steps=2, **TWO)
    free.train()
    assert all(log["sampling/refill_rounds"] == 0 for log in free.state.log_history[:2])


def test_earlier_groups_stand_in_for_flat_ones(tmp_path: Path) -> None:
    made = trainer(tmp_path, rewards=even, replay_buffer_size=4, replay_max_age=2, max_steps=5, **TWO)
    batches = trained(made)
    made.train()
    logs = made.state.log_history[:5]
    assert sum(log["sampling/replayed_groups"] for log in logs) > 0
    replayed = [r for batch in batches for r in batch if r.age]
    assert replayed and all(1 <= r.age <= 2 and number(r, made) % 2 == 0 for r in replayed)
    recorded = [(r.prompt_ids, r.completion_ids, r.sampler_logps) for batch in batches for r in batch if not r.age]
    assert all((r.prompt_ids, r.completion_ids, r.sampler_logps) in recorded for r in replayed)
    for batch, log in zip(batches, logs):
        flat = [g for g in (0, 4) if len({r.advantage for r in batch[g : g + 4]}) == 1]
        assert len(batch) == 8 and len(flat) == log["sampling/flat_groups"]


def test_the_curriculum_learns_where_spread_is(tmp_path: Path) -> None:
    """Odd prompts are never solved and even ones in half of the groups' completions: even ones come more often."""

    def half(prompts: list[str], **kwargs: Any) -> list[float]:
        return [float(i % 2) if int(p.split()[2]) % 2 == 0 else 0.0 for i, p in enumerate(prompts)]

    made = trainer(tmp_path, rewards=half, curriculum=True, curriculum_floor=0.05, **TWO)
    metrics = Metrics()
    batches = [made.supply.next([], i, metrics, made.state, lambda rollouts: None) for i in range(30)]
    late = [number(batch[g], made) % 2 == 0 for batch in batches[12:] for g in (0, 4)]
    assert sum(late) / len(late) > 0.7  # 0.5 without preference, 18 batches: over 2 standard errors away
    assert all(len({tuple(r.prompt_ids) for r in batch}) == 2 for batch in batches)
    rates = made.supply.curriculum.rates_R
    assert rates[::2].min() > 0.45 and rates[1::2].max() < 0.4
    assert 0.25 < metrics.flush()["sampling/solve_rate"] <= 0.5


def test_scoring_ahead_overlaps_training_and_is_the_same_every_run(tmp_path: Path) -> None:
    threads: set[str] = set()
    steps: list[int] = []

    def slow(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        threads.add(threading.current_thread().name)
        steps.append(trainer_state.global_step)
        time.sleep(0.05)
        return letters(completions)

    weights = []
    for name in ("a", "b"):
        made = trainer(tmp_path / name, rewards=slow, rollout_staleness=1, max_steps=4)
        batches = trained(made)
        made.train()
        weights.append(adapter_weights(made.model))
        assert [{r.age for r in batch} for batch in batches] == [{0}, {1}, {1}, {1}]
        assert [log["sampling/age"] for log in made.state.log_history[:4]] == [0, 1, 1, 1]
        assert made.state.log_history[1]["clip_ratio/region_mean"] > 0  # the policy has moved since these were sampled
    assert threads == {"pronghorn-scoring"} and steps[:5] == [0, 0, 1, 2, 3]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not [t for t in threading.enumerate() if t.name == "pronghorn-scoring" and t.is_alive()]


def test_training_goes_on_while_rewards_are_computed(tmp_path: Path) -> None:
    """The rewards of the second generation come only after a training step has begun: they would wait in vain."""
    begun = threading.Event()
    waited: list[bool] = []

    def waits(completions: list[str], **kwargs: Any) -> list[float]:
        if waited:
            assert begun.wait(60)
        waited.append(True)
        return letters(completions)

    made = trainer(tmp_path, rewards=waits, rollout_staleness=1, max_steps=2)
    pack = made.loss_step.pack

    def packing(rollouts: list[Any]) -> Any:
        begun.set()
        return pack(rollouts)

    made.loss_step.pack = packing
    made.train()
    assert len(waited) >= 2 and made.state.global_step == 2


def test_no_thread_outlives_training_and_an_unused_failure_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def slow_then_broken(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1:  # for the generation that this run no longer uses
            time.sleep(1)
            raise KeyError("answer")
        return letters(completions)

    made = trainer(tmp_path, rewards=slow_then_broken, rollout_staleness=1, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        made.train()
    assert made.state.global_step == 2 and "rewards of generation 2, sampled ahead and not used" in caplog.text
    assert not [t for t in threading.enumerate() if t.name == "pronghorn-scoring"]


def test_weights_stand_still_while_a_rollout_runs(tmp_path: Path) -> None:
    """Generations sampled ahead run between optimizer steps on the trainer's own thread."""
    model = pronghorn_model()
    seen: list[tuple[int, bool]] = []

    class Watching(FakeEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            before = adapter_weights(self.model)
            result = super().generate(*args, **kwargs)
            same = all(torch.equal(w, before[n]) for n, w in adapter_weights(self.model).items())
            seen.append((threading.get_ident(), same))
            return result

    made = trainer(tmp_path, model, engine=Watching(model, None), rollout_staleness=2, max_steps=3)
    made.sampling.engine.tokenizer = made.processing_class
    made.train()
    assert seen == [(threading.get_ident(), True)] * 5


def test_a_reward_that_fails_in_the_background_stops_the_run_where_it_is_needed(tmp_path: Path) -> None:
    def breaks(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step == 1:
            raise KeyError("answer")
        return letters(completions)

    made = trainer(tmp_path, rewards=breaks, rollout_staleness=1, max_steps=5)
    with pytest.raises(RewardError, match="breaks"):
        made.train()
    assert made.state.global_step == 2


ALL = {"dynamic_sampling": True, "curriculum": True, "replay_buffer_size": 3, "rollout_staleness": 1}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"dynamic_sampling": True, "curriculum": True}, marks=pytest.mark.slow),
        pytest.param({"replay_buffer_size": 4}, marks=pytest.mark.slow),
        pytest.param({"rollout_staleness": 2}, marks=pytest.mark.slow),
        {**ALL, "dynamic_sampling_max_rounds": 1, "steps_per_generation": 2, "logging_steps": 2},
    ],
    ids=str,
)  # fmt: skip
def test_resumed_is_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**TWO, "rewards": even, **settings}
    whole = run(tmp_path / "whole", settings)
    run(tmp_path / "cut", settings, stop=3)
    torch.manual_seed(99)
    resumed = run(tmp_path / "cut", settings, resume=True)
    expected = adapter_weights(whole.model)
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(resumed.model).items())
    logs = [history(tmp_path / name) for name in ("whole", "cut")]
    for log in logs:
        for record in log:
            record.pop("sampling/scoring_wait", None)
    assert logs[0] == logs[1]
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1] != ""


def test_reward_functions_see_the_history_of_the_time_of_sampling(tmp_path: Path) -> None:
    """Whatever has been logged while they run, or since."""
    seen: list[Any] = []

    def looking(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append(trainer_state)
        return letters(completions)

    trainer(tmp_path, rewards=looking, rollout_staleness=1, max_steps=4).train()
    assert [(state.global_step, len(state.log_history)) for state in seen] == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3)]


def test_an_option_that_moves_the_cursor_may_not_change_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ConfigError, match="written with dynamic_sampling=False, now it is True"):
        trainer(tmp_path, max_steps=2, dynamic_sampling=True).train(resume_from_checkpoint=True)


def test_reward_functions_are_never_called_from_two_threads_at_once(tmp_path: Path) -> None:
    running, most = [0], [0]

    def watched(completions: list[str], **kwargs: Any) -> list[float]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.03)
        running[0] -= 1
        return letters(completions)

    made = trainer(
        tmp_path, rewards=watched, rollout_staleness=1, max_steps=3, eval_dataset=prompts(2), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    made.train()
    assert most == [1]
