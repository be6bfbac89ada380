"""One generation: prompts to completions, completions to rewards, rewards to advantages."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..config.sampling import SamplingParams
from ..rewards.runner import RewardRunner
from ..rollout import base as rollout
from .advantages import Advantages, group_advantages
from .config import GRPOConfig
from .data import PromptEncoder
from .drawing import Begun, Drawer, SingleTurn
from .generation import Generation
from .metrics import Metrics
from .rollouts import Rollout, Sample
from .seeds import request_seed as request_seed

Meanwhile = Callable[[list[Rollout]], None]
"""Work on fresh rollouts that needs no rewards."""


class SamplingLoop:
    """Makes scored rollouts of data set rows.

    Args:
        args: sampling, reward and metric settings.
        model: the policy, whose live adapter samples.
        tokenizer: decodes completions.
        encoder: encodes and truncates prompts.
        runner: the reward functions.
    """

    def __init__(
        self, args: GRPOConfig, model: nn.Module, tokenizer: Any, encoder: PromptEncoder, runner: RewardRunner
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.encoder, self.runner = encoder, runner
        self.samples: list[Sample] = []
        self._engine: rollout.Engine | None = None
        self._scoring = threading.Lock()
        self.params = ParamsMaker(args)  # a bad setting raises now, not at the first step
        self.drawer: Drawer = SingleTurn(self)

    @property
    def engine(self) -> rollout.Engine:
        """The engine, made when first needed."""
        if self._engine is None:
            if self.args.rollout_engine == "native":
                self._engine = rollout.engine_of(self.model, self.tokenizer, oom_retry=self.args.rollout_oom_retry)
            else:
                self._engine = rollout.create(self.args.rollout_engine, self.model, self.tokenizer)
            if self.args.rollout_precision == "exact":
                self._engine.check_exact()
        return self._engine

    def make(
        self,
        rows: Sequence[dict[str, Any]],
        group: int,
        seed: int,
        metrics: Metrics,
        state: Any,
        mode: str = "train",
        meanwhile: Meanwhile | None = None,
    ) -> list[Rollout]:
        """Rollouts of ``rows``, of which each run of ``group`` is one prompt, with their advantages.

        Args:
            seed: of this generation; request seeds derive from it.
            metrics: gets TRL's ``completions/*``, ``reward*`` and ``rewards/*``.
            state: the ``TrainerState`` that reward functions see.
            mode: ``"train"`` or ``"eval"``, for the samples that are kept in ``samples``.
            meanwhile: work on the rollouts that needs no rewards; isolated and async reward functions run beside it.
        """
        generation = self.draw(rows, group, seed)
        self.score(generation, state, meanwhile)
        return self.finish(generation, range(generation.groups), metrics, state.global_step, mode)

    def draw(self, rows: Sequence[dict[str, Any]], group: int, seed: int, first: int = 0) -> Generation:
        """Sample completions of ``rows``; nothing is scored yet.

        Args:
            first: prompts that this generation has drawn before: request seeds go on from there.
        """
        self._before_drawing()
        return self._drawn(self.drawer(list(rows), group, lambda *path: request_seed(seed, *path), first))

    def begin(
        self,
        rows: Sequence[dict[str, Any]],
        group: int,
        seed: int,
        first: int = 0,
        policy: rollout.KeptPolicy | None = None,
    ) -> Begun:
        """As :meth:`draw` by the policy as it is now, or by ``policy``, drawn when ``finish`` is called, on whatever
        thread. What trains may move meanwhile.

        Raises:
            ConfigError: completions are not made in one turn.
        """
        if not isinstance(self.drawer, SingleTurn):
            raise ConfigError(
                "a generation that SIGTERM cut short is to be drawn again, which tools or a rollout_func cannot do; "
                "resume without them, as in the run that began it"
            )
        self._before_drawing()
        begun = self.drawer.begin(list(rows), group, lambda *path: request_seed(seed, *path), first, policy)
        return Begun(begun.drawing, lambda: self._drawn(begun.finish()))

    def _before_drawing(self) -> None:
        self.runner.prepare()
        self.engine.policy_changed()

    def _drawn(self, drawn: Generation) -> Generation:
        for r in drawn.rollouts:
            r.scored = not (r.truncated and self.args.mask_truncated_completions)
        return drawn

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[rollout.CompletionOutput]:
        """The engine's completions of all prompts, one prompt's behind the other's."""
        requests = self.engine.generate(prompts, params)
        if not self.args.rollout_overlap:  # what draws beside training stays
            self.rest()
        outputs = [output for request in requests for output in request.outputs]
        if len(outputs) != sum(p.n for p in params):
            raise RuntimeError(
                f"the rollout engine gave {len(outputs)} completions for {sum(p.n for p in params)} asked for"
            )
        return outputs

    def rest(self) -> None:
        """No more is sampled for now: see :meth:`pronghorn.rollout.base.Engine.rest`."""
        if self._engine is not None:
            self._engine.rest(self.args.rollout_keep_share)

    def score(self, generation: Generation, state: Any, meanwhile: Meanwhile | None = None) -> None:
        """Call the reward functions, ``meanwhile`` beside those that run elsewhere (see :meth:`make`).

        From whatever thread: they are never called from two at once.
        """
        rows = generation.rows
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        extra: dict[str, list[Any]] = defaultdict(list)

        def log_extra(column: str, values: list[Any]) -> None:
            extra[column].extend(values)

        asked = [row["prompt"] for row in rows]
        ids, columns = [r.completion_ids for r in generation.rollouts], {**columns, **generation.columns}
        logs: dict[str, Any] = {"state": state, "log_extra": log_extra, "log_metric": generation.note}
        with self._scoring, self.runner.start(asked, generation.completions, ids, columns, **logs) as pending:
            if meanwhile is not None:
                meanwhile(generation.rollouts)
            generation.rewards_BF = pending.result()
        generation.extra = dict(extra)

    def finish(
        self, generation: Generation, kept: Sequence[int], metrics: Metrics, step: int, mode: str = "train"
    ) -> list[Rollout]:
        """The rollouts of the groups ``kept``, with advantages among them; samples and metrics of all that was sampled.

        Args:
            kept: groups to train on, in their order. The others were sampled in vain: no advantage, not returned.
            step: optimizer steps done.
        """
        for name, value, weight in generation.logged:
            metrics.mean(name, value, weight)
        _length_metrics(generation.rollouts, metrics)
        chosen = generation.indices(kept)
        result = self._advantages(generation.rewards, generation.group)
        _reward_metrics(generation.rewards, self.runner.names, result, metrics)
        if len(chosen) != len(generation.rollouts):
            result = self._advantages(generation.rewards[chosen], generation.group)
        advantages = dict(zip(chosen, result.advantages_B.tolist()))
        scores = [[None if x != x else x for x in row] for row in generation.rewards.tolist()]
        self.samples = []
        for i, r in enumerate(generation.rollouts):
            r.advantage = advantages.get(i, 0.0)
            named = dict(zip(self.runner.names, scores[i]))
            said = {name: values[i] for name, values in generation.extra.items() if i < len(values)}
            at, prompt = step + (mode == "train"), generation.rows[i]["prompt"]
            self.samples.append(Sample(at, mode, prompt, generation.completions[i], named, r.advantage, said))
        return [generation.rollouts[i] for i in chosen]

    def _advantages(self, rewards_BF: torch.Tensor, group: int) -> Advantages:
        scale, aggregation = str(self.args.scale_rewards), self.args.multi_objective_aggregation
        return group_advantages(rewards_BF, self.runner.weights_F, group, scale, aggregation)


class ParamsMaker:
    """``(group, seed) -> SamplingParams`` from the config's fields; ``generation_kwargs`` override them."""

    def __init__(self, args: GRPOConfig) -> None:
        given = args.generation_kwargs or {}
        if not isinstance(given, dict):
            raise ConfigError(f"GRPOConfig: generation_kwargs={given!r} is a {type(given).__name__}; give a dict")
        self.fields: dict[str, Any] = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            **given,
        }
        self(args.num_generations or 1, 0)

    def __call__(self, group: int, seed: int, max_tokens: int | None = None) -> SamplingParams:
        """``max_tokens`` is what is left of a completion of several turns; None leaves the config's."""
        fields = dict(self.fields)
        if max_tokens is not None:
            fields.update(max_tokens=max_tokens, min_tokens=min(fields.get("min_tokens", 0), max_tokens))
        return SamplingParams.from_any({**fields, "n": group, "seed": seed})


def _length_metrics(rollouts: Sequence[Rollout], metrics: Metrics) -> None:
    """TRL's ``completions/*`` in sampled tokens; terminated means that the completion ended by itself."""
    lengths = torch.tensor([r.sampled_tokens for r in rollouts], dtype=torch.float32)
    ended = lengths[[not r.truncated for r in rollouts]]
    ended = ended if ended.numel() else torch.zeros(1)
    for kind, values in (("", lengths), ("terminated_", ended)):
        metrics.mean(f"completions/mean_{kind}length", values.mean())
        metrics.mean(f"completions/min_{kind}length", values.min())
        metrics.mean(f"completions/max_{kind}length", values.max())
    metrics.mean("completions/clipped_ratio", sum(r.truncated for r in rollouts) / len(rollouts))


def _reward_metrics(rewards_BF: torch.Tensor, names: Sequence[str], result: Advantages, metrics: Metrics) -> None:
    """TRL's ``reward``, ``reward_std``, ``frac_reward_zero_std`` and ``rewards/<name>/*``."""
    for f, name in enumerate(names):
        metrics.mean(f"rewards/{name}/mean", rewards_BF[:, f].nanmean())
        metrics.mean(f"rewards/{name}/std", _std(rewards_BF[:, f]))
    metrics.mean("reward", result.rewards_B.nanmean())
    metrics.mean("reward_std", _std(result.rewards_B))
    metrics.mean("frac_reward_zero_std", result.flat_B.float().mean())


def _std(values: torch.Tensor) -> torch.Tensor:
    known = values[~torch.isnan(values)]
    return known.std() if known.numel() > 1 else torch.tensor(torch.nan)
