"""Where an optimizer step's rollouts come from: prompts chosen, sampled ahead, refilled, replayed."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .background import Background
from .config import GRPOConfig
from .curriculum import Curriculum
from .generation import Generation
from .metrics import Metrics
from .prompt_stream import PromptStream
from .replay import ReplayBuffer
from .rollouts import Rollout
from .sampling_loop import Meanwhile, SamplingLoop
from .seeds import request_seed
from .spread import Outcome, refill_size

logger = logging.getLogger("pronghorn")

Row = dict[str, Any]


@dataclass
class Pending:
    """A sampled generation: number ``index``, by the policy of generation ``opened``, of the data set's rows ``picks``.

    ``scoring`` is under way, or None when the rewards are in; ``picks`` is empty where the data loader chose the rows.
    """

    index: int
    opened: int
    picks: list[int]
    generation: Generation
    scoring: Background | None = None

    def wait(self) -> Generation:
        if self.scoring is not None:
            self.scoring.result()
            self.scoring = None
        return self.generation


class Supply:
    """Makes the generations of a training run, one after another; with every option off, of the rows that it is given.

    Args:
        args: the settings; see :class:`pronghorn.grpo.sampling_config.SamplingFields`.
        sampling: samples and scores.
        dataset: training rows by number, for the options that choose prompts themselves.

    All that it will do next is a function of ``state_dict()``, the seed and the policy.

    Raises:
        ConfigError: ``outcome_reward`` names no reward function.
    """

    def __init__(self, args: GRPOConfig, sampling: SamplingLoop, dataset: Any) -> None:
        self.args, self.sampling, self.dataset = args, sampling, dataset
        self.outcome = Outcome(args.outcome_reward, sampling.runner.names, sampling.runner.weights_F)
        self.group = args.num_generations
        self.prompts = args.generation_batch_size // self.group
        self.pending: list[Pending] = []
        self._left: list[Pending] = []  # begun in a step that was stopped
        self.reset()

    def reset(self) -> None:
        """As at the start of a run. Scoring that is under way goes on, and :meth:`settle` waits for it."""
        self._left += [pending for pending in self.pending if pending.scoring is not None]
        rows, seed = len(self.dataset), self.args.seed
        self.stream = PromptStream(rows, bool(self.args.shuffle_dataset), seed)
        self.curriculum = Curriculum(rows, seed, self.args.curriculum_floor) if self.args.curriculum else None
        self.replay = ReplayBuffer(self.args.replay_buffer_size, self.args.replay_max_age)
        self.pending = []
        self._said = False

    def settle(self) -> None:
        """A run is over: wait until no reward function runs any more for generations that were sampled ahead."""
        left, self._left = [*self._left, *self.pending], []
        for pending in left:
            error = None if pending.scoring is None else pending.scoring.end()
            if error is not None:
                logger.warning("rewards of generation %d, sampled ahead and not used: %s", pending.index, error)

    def next(self, rows: Sequence[Row], index: int, metrics: Metrics, state: Any, annotate: Meanwhile) -> list[Rollout]:
        """The rollouts of generation ``index``, with advantages.

        Args:
            rows: what the data loader would have it be about; heeded where no option chooses prompts.
            index: generations begun before this one in the whole run.
            annotate: gives rollouts the log-probabilities that the loss needs, by the policy as it is now.
        """
        ahead = self.args.rollout_staleness
        while len(self.pending) <= ahead:
            self.pending.append(self._begin(rows, index + len(self.pending), index, state, annotate))
        current = self.pending.pop(0)
        started = time.perf_counter()
        generation = current.wait()
        if ahead:
            metrics.mean("sampling/scoring_wait", time.perf_counter() - started)
        for r in generation.rollouts:
            r.age = index - current.opened
        spread = self.outcome.spread(generation.rewards, self.group)
        if self.args.dynamic_sampling:  # on a copy: a stop within this step goes back to what was noted at its start
            generation = generation.copy()
            current = replace(current, picks=[*current.picks], generation=generation)
            spread = self._refill(current, spread, metrics, state, annotate)
        self._measure(current, metrics)
        rollouts = self._choose(generation, spread, index, metrics, state)
        aged = [r for r in rollouts if r.age]
        if aged:  # fresh ones got theirs while they were scored
            annotate(aged)
        tokens = sum(len(r.prompt_ids) + r.sampled_tokens for r in generation.rollouts)
        state.num_input_tokens_seen += tokens
        return rollouts

    def _begin(self, rows: Sequence[Row], index: int, opened: int, state: Any, annotate: Meanwhile) -> Pending:
        """Sample generation ``index`` now. Its scoring goes on in the background where it is sampled ahead."""
        picks: list[int] = []
        if self.args.chooses_prompts:
            picks = self._pick(self.prompts, [row for other in self.pending for row in other.picks])
            rows = self._rows(picks)
        generation = self.sampling.draw(rows, self.group, self._seed(index))
        made = Pending(index, opened, picks, generation)
        if self.args.rollout_staleness:
            seen = copy.copy(state)  # the run's own moves on while the reward functions look at it
            before = self.pending[-1].scoring if self.pending else None  # generations are scored in their order
            made.scoring = Background(lambda: self.sampling.score(generation, seen), after=before)
            if index == opened:
                annotate(generation.rollouts)
        else:
            self.sampling.score(generation, state, annotate)
        return made

    def _seed(self, index: int) -> int:
        return request_seed(self.args.seed, False, index)

    def _pick(self, count: int, exclude: Sequence[int]) -> list[int]:
        source = self.stream if self.curriculum is None else self.curriculum
        return source.take(count, frozenset(exclude))

    def _rows(self, picks: Sequence[int]) -> list[Row]:
        return [row for pick in picks for row in [self.dataset[pick]] * self.group]

    def _refill(
        self, current: Pending, spread: list[bool], metrics: Metrics, state: Any, annotate: Meanwhile
    ) -> list[bool]:
        """Draw further prompts until enough groups have spread, or the rounds are used up (DAPO, section 3.2)."""
        generation, rounds = current.generation, 0
        while sum(spread) < self.prompts and rounds < self.args.dynamic_sampling_max_rounds:
            count = refill_size(self.prompts - sum(spread), sum(spread), len(spread), self.prompts)
            picks = self._pick(count, current.picks)
            more = self.sampling.draw(self._rows(picks), self.group, self._seed(current.index), first=len(spread))
            self.sampling.score(more, state, annotate)
            spread = spread + self.outcome.spread(more.rewards, self.group)
            generation.extend(more)
            current.picks += picks
            rounds += 1
        metrics.mean("sampling/refill_rounds", rounds)
        return spread

    def _measure(self, current: Pending, metrics: Metrics) -> None:
        """Tell the curriculum how often each prompt was solved."""
        if self.curriculum is None:
            return
        solved = self.outcome.solved(current.generation.rewards, self.group, self.args.curriculum_solved_at)
        self.curriculum.record(current.picks, solved, self.group)
        metrics.mean("sampling/solve_rate", sum(solved) / (len(solved) * self.group))

    def _choose(
        self, generation: Generation, spread: list[bool], index: int, metrics: Metrics, state: Any
    ) -> list[Rollout]:
        """As many groups as a generation has: those with spread, then replayed ones, then flat ones."""
        args = self.args
        good, flat = [g for g, s in enumerate(spread) if s][: self.prompts], [g for g, s in enumerate(spread) if not s]
        replayed = self.replay.take(self.prompts - len(good), index) if args.replay_buffer_size else []
        padding = flat[: self.prompts - len(good) - len(replayed)]
        rollouts = self.sampling.finish(generation, sorted(good + padding), metrics, state.global_step)
        if args.dynamic_sampling or args.replay_buffer_size:
            metrics.mean("sampling/kept_ratio", sum(spread) / len(spread))
            metrics.mean("sampling/flat_groups", len(padding))
        if args.dynamic_sampling and padding:
            self._say_padded(len(padding), len(spread))
        if args.replay_buffer_size:
            metrics.mean("sampling/replayed_groups", len(replayed))
            for g in good:
                group = [generation.rollouts[i] for i in generation.indices([g])]
                self.replay.put([group], index - group[0].age)
            rollouts = rollouts + [r for group in replayed for r in group]
        if args.rollout_staleness or args.replay_buffer_size:
            metrics.mean("sampling/age", sum(r.age for r in rollouts) / len(rollouts))
        return rollouts

    def _say_padded(self, padding: int, sampled: int) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "dynamic_sampling: of %d groups sampled in %d rounds of refills too few have spread; %d of the %d "
                "trained on are flat and teach nothing (sampling/flat_groups counts them, this line comes once)",
                sampled, self.args.dynamic_sampling_max_rounds, padding, self.prompts,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; waits for the scoring that is under way."""
        return self.noted()()

    def noted(self) -> Callable[[], dict[str, Any]]:
        """What gives the state as of now; only calling it waits for the scoring that is under way."""
        now = {
            "stream": self.stream.state_dict(),
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
            "replay": self.replay.state_dict(),
        }
        pending = list(self.pending)
        return lambda: {**now, "pending": [[p.index, p.opened, p.picks, p.wait().to_state()] for p in pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.stream.load_state_dict(state["stream"])
        if self.curriculum is not None and state["curriculum"] is not None:
            self.curriculum.load_state_dict(state["curriculum"])
        self.replay.load_state_dict(state["replay"])
        for index, opened, picks, generation in state["pending"]:
            made = Generation.from_state(generation, self._rows(picks))
            self.pending.append(Pending(index, opened, picks, made))
