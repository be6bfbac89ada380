"""Where an optimizer step's rollouts come from: prompts chosen, sampled ahead, refilled, replayed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .background import Background
from .config import GRPOConfig
from .curriculum import Curriculum
from .generation import Generation
from .metrics import Metrics
from .pending import Pending
from .prompt_stream import PromptStream
from .replay import ReplayBuffer
from .rollouts import Rollout
from .sampling_loop import Meanwhile, SamplingLoop
from .seeds import request_seed
from .spread import Outcome, refill_size

logger = logging.getLogger("pronghorn")

Row = dict[str, Any]


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
        """As at the start of a run. What is under way is stopped, or where it is scored goes on: see :meth:`settle`."""
        for pending in self.pending:
            pending.stop()
        self._left += self.pending
        rows, seed = len(self.dataset), self.args.seed
        self.stream = PromptStream(rows, bool(self.args.shuffle_dataset), seed)
        self.curriculum = Curriculum(rows, seed, self.args.curriculum_floor) if self.args.curriculum else None
        self.replay = ReplayBuffer(self.args.replay_buffer_size, self.args.replay_max_age)
        self.pending = []
        self._said = False

    def settle(self) -> None:
        """A run is over: generations sampled ahead are thrown away, once nothing is drawn and no reward function runs
        for them any more.
        """
        self._left, self.pending = [*self._left, *self.pending], []
        for pending in self._left:
            pending.stop()
        while self._left:
            failed = self._left[0].end()
            self._left.pop(0)  # only now: whatever interrupts this, the next one waits for it
            if failed is not None:
                logger.warning("%s", failed)
        if self.args.rollout_overlap:
            self.sampling.rest()

    def hold(self) -> None:
        """Nobody waits any more for what is being drawn; see :meth:`Pending.hold`. A signal handler may call this."""
        for pending in self.pending:
            pending.hold()

    def next(self, rows: Sequence[Row], index: int, metrics: Metrics, state: Any, annotate: Meanwhile) -> list[Rollout]:
        """The rollouts of generation ``index``, with advantages.

        Args:
            rows: what the data loader would have it be about; heeded where no option chooses prompts.
            index: generations begun before this one in the whole run.
            annotate: gives rollouts the log-probabilities that the loss needs, by the policy as it is now.
        """
        ahead = self.args.rollout_staleness
        waited = self._start(state)  # what a stop has cut short
        while len(self.pending) <= ahead:
            self._begin(rows, index + len(self.pending), index, state, annotate)
        if not self.args.dynamic_sampling:
            waited += self._start(state)
        current = self.pending[0]
        current.drawn()
        waited += current.waited
        started = time.perf_counter()
        generation = current.wait()
        if ahead:
            metrics.mean("sampling/scoring_wait", time.perf_counter() - started)
        self.pending.pop(0)
        for r in generation.rollouts:
            r.age = index - current.opened
        spread = self.outcome.spread(generation.rewards, self.group)
        if self.args.dynamic_sampling:  # on a copy: a stop within this step goes back to what was noted at its start
            generation = generation.copy()
            current = replace(current, picks=[*current.picks], generation=generation)
            spread = self._refill(generation, current, spread, metrics, state, annotate)
            waited += self._start(state)
        if self.args.rollout_overlap:
            metrics.mean("sampling/generation_wait", waited)
        self._measure(generation, current.picks, metrics)
        rollouts = self._choose(generation, spread, index, metrics, state)
        aged = [r for r in rollouts if r.age]
        if aged:  # fresh ones got theirs while they were scored
            annotate(aged)
        tokens = sum(len(r.prompt_ids) + r.sampled_tokens for r in generation.rollouts)
        state.num_input_tokens_seen += tokens
        return rollouts

    def _begin(self, rows: Sequence[Row], index: int, opened: int, state: Any, annotate: Meanwhile) -> None:
        """Sample generation ``index`` now, or where that overlaps with training choose its prompts and leave it to
        :meth:`_start`. Its scoring goes on in the background where it is sampled ahead.
        """
        picks: list[int] = []
        if self.args.chooses_prompts:
            picks = self._pick(self.prompts, [row for other in self.pending for row in other.picks])
            rows = self._rows(picks)
        made = Pending(index, opened, picks)
        if self.args.rollout_overlap and index != opened:
            made.waiting = True
            self.pending.append(made)
            return
        started = time.perf_counter()
        generation = made.generation = self._draw(rows, index)
        made.waited = time.perf_counter() - started
        before = self.pending[-1].scoring if self.pending else None  # generations are scored in their order
        self.pending.append(made)
        if not self.args.rollout_staleness:
            self.sampling.score(generation, state, annotate)
            return
        self._score(made, generation, state, before)
        if index == opened:
            annotate(generation.rollouts)

    def _draw(self, rows: Sequence[Row], index: int, first: int = 0) -> Generation:
        """Sample now, on this thread: with ``rollout_overlap`` by the snapshot, whose graphs then serve all."""
        if self.args.rollout_overlap:
            return self.sampling.begin(rows, self.group, self._seed(index), first).finish()
        return self.sampling.draw(rows, self.group, self._seed(index), first=first)

    def _score(self, made: Pending, generation: Generation, state: Any, before: Background | None) -> None:
        seen = made.shown(state)
        made.scoring = Background(lambda: self.sampling.score(generation, seen), after=before)
        made.scoring.start()

    def _start(self, state: Any) -> float:
        """Begin to draw what is to be drawn beside training; seconds that it had to wait for what is being drawn. The
        policy is still that of the step's start.

        With ``dynamic_sampling`` that is behind the refills, which need the engine first.
        """
        waited, before = 0.0, None
        for pending in self.pending:
            if pending.waiting:
                started = time.perf_counter()
                if before is not None and before.drawing is not None:
                    before.drawing.over()
                waited += time.perf_counter() - started
                pending.waiting = False
                self._launch(pending, state, None if before is None else before.scoring)
            before = pending
        return waited

    def _launch(self, made: Pending, state: Any, before: Background | None) -> None:
        """Draw and score ``made`` on threads of its own. It has the engine when this returns: whoever asks next waits.

        Everything is noted in ``made`` before a thread starts, so that whatever interrupts this leaves none unknown.
        """
        policy, made.policy = made.policy, None
        made.begun = self.sampling.begin(self._rows(made.picks), self.group, self._seed(made.index), policy=policy)
        if not self.args.rollout_overlap:  # cut short in a run that had it
            made.generation, made.begun = made.begun.finish(), None
            self.sampling.rest()
            self._score(made, made.generation, state, before)
            return
        seen = made.shown(state)
        drawing = made.drawing = Background(made.begun.finish, kind="sampling")
        made.scoring = Background(lambda: self.sampling.score(drawing.result(), seen), after=before)
        drawing.start()
        made.scoring.start()
        made.begun.drawing.wait_begun()

    def _seed(self, index: int) -> int:
        return request_seed(self.args.seed, False, index)

    def _pick(self, count: int, exclude: Sequence[int]) -> list[int]:
        source = self.stream if self.curriculum is None else self.curriculum
        return source.take(count, frozenset(exclude))

    def _rows(self, picks: Sequence[int]) -> list[Row]:
        return [row for pick in picks for row in [self.dataset[pick]] * self.group]

    def _refill(
        self,
        generation: Generation,
        current: Pending,
        spread: list[bool],
        metrics: Metrics,
        state: Any,
        annotate: Meanwhile,
    ) -> list[bool]:
        """Draw further prompts until enough groups have spread, or the rounds are used up (dynamic sampling, DAPO,
        arXiv:2503.14476, section 3.2).
        """
        rounds = 0
        while sum(spread) < self.prompts and rounds < self.args.dynamic_sampling_max_rounds:
            count = refill_size(self.prompts - sum(spread), sum(spread), len(spread), self.prompts)
            picks = self._pick(count, current.picks)
            more = self._draw(self._rows(picks), current.index, first=len(spread))
            self.sampling.score(more, state, annotate)
            spread = spread + self.outcome.spread(more.rewards, self.group)
            generation.extend(more)
            current.picks += picks
            rounds += 1
        metrics.mean("sampling/refill_rounds", rounds)
        return spread

    def _measure(self, generation: Generation, picks: Sequence[int], metrics: Metrics) -> None:
        """Tell the curriculum how often each prompt was solved."""
        if self.curriculum is None:
            return
        solved = self.outcome.solved(generation.rewards, self.group, self.args.curriculum_solved_at)
        self.curriculum.record(picks, solved, self.group)
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
        """For a checkpoint; waits for what is being drawn and scored, but for what is held."""
        return self.noted()()

    def noted(self) -> Callable[[], dict[str, Any]]:
        """What gives the state as of now; only calling it waits for what is being drawn and scored."""
        now = {
            "stream": self.stream.state_dict(),
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
            "replay": self.replay.state_dict(),
        }
        pending = [p.noted() for p in self.pending]
        return lambda: {**now, "pending": [give() for give in pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.stream.load_state_dict(state["stream"])
        if self.curriculum is not None and state["curriculum"] is not None:
            self.curriculum.load_state_dict(state["curriculum"])
        self.replay.load_state_dict(state["replay"])
        self.pending = [Pending.from_state(pending, self._rows) for pending in state["pending"]]
