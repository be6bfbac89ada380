"""One generation: prompts to completions, completions to rewards, rewards to advantages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..config.sampling import SamplingParams
from ..data.chat import is_chat
from ..rewards.runner import RewardRunner
from ..rollout import base as rollout
from .advantages import Advantages, group_advantages
from .config import GRPOConfig
from .data import PromptEncoder
from .metrics import Metrics
from .rollouts import Rollout, Sample
from .seeds import request_seed as request_seed


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is put back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


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
        self.params = ParamsMaker(args)  # a bad setting raises now, not at the first step

    @property
    def engine(self) -> rollout.Engine:
        """The engine, made when first needed."""
        if self._engine is None:
            if self.args.rollout_engine == "native":
                self._engine = rollout.engine_of(self.model, self.tokenizer)
            else:
                self._engine = rollout.create(self.args.rollout_engine, self.model, self.tokenizer)
        return self._engine

    def make(
        self,
        rows: Sequence[dict[str, Any]],
        group: int,
        seed: int,
        metrics: Metrics,
        state: Any,
        mode: str = "train",
        meanwhile: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Rollouts of ``rows``, of which each run of ``group`` is one prompt, with their advantages.

        Args:
            seed: of this generation; request seeds derive from it.
            metrics: gets TRL's ``completions/*``, ``reward*`` and ``rewards/*``.
            state: the ``TrainerState`` that reward functions see.
            mode: ``"train"`` or ``"eval"``, for the samples that are kept in ``samples``.
            meanwhile: work on the rollouts that needs no rewards; isolated and async reward functions run beside it.
        """
        self.runner.prepare()
        prompt_ids, truncated = self.encoder([row["prompt"] for row in rows[::group]])
        metrics.mean("prompts/truncated_ratio", truncated / len(prompt_ids), len(prompt_ids))
        params = [self.params(group, request_seed(seed, p)) for p in range(len(prompt_ids))]
        self.engine.policy_changed()
        with inference(self.model):
            requests = self.engine.generate(prompt_ids, params)
        outputs = [output for request in requests for output in request.outputs]
        if len(outputs) != len(rows):
            raise RuntimeError(f"the rollout engine gave {len(outputs)} completions for {len(rows)} asked for")
        rollouts = []
        for i, output in enumerate(outputs):
            cut = output.finish_reason == "length"
            scored = not (cut and self.args.mask_truncated_completions)
            ids, logps = list(output.token_ids), list(output.policy_logprobs)
            rollouts.append(Rollout(prompt_ids[i // group], ids, logps, truncated=cut, scored=scored))
        _length_metrics(rollouts, metrics)
        self._score(rows, rollouts, group, metrics, state, mode, meanwhile)
        return rollouts

    def _score(
        self,
        rows: Sequence[dict[str, Any]],
        rollouts: list[Rollout],
        group: int,
        metrics: Metrics,
        state: Any,
        mode: str,
        meanwhile: Callable[[list[Rollout]], None] | None,
    ) -> None:
        """Fill in the advantages and keep the samples."""
        prompts = [row["prompt"] for row in rows]
        ids = [r.completion_ids for r in rollouts]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions: list[Any] = texts
        if is_chat(prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        extra: dict[str, list[Any]] = defaultdict(list)

        def log_extra(column: str, values: list[Any]) -> None:
            extra[column].extend(values)

        with self.runner.start(
            prompts, completions, ids, columns, state=state, log_extra=log_extra, log_metric=metrics.mean
        ) as pending:
            if meanwhile is not None:
                meanwhile(rollouts)
            rewards_BF = pending.result()
        result = group_advantages(
            rewards_BF,
            self.runner.weights_F,
            group,
            str(self.args.scale_rewards),
            self.args.multi_objective_aggregation,
        )
        _reward_metrics(rewards_BF, self.runner.names, result, metrics)
        scores = [[None if x != x else x for x in row] for row in rewards_BF.tolist()]
        self.samples = []
        for i, (r, advantage) in enumerate(zip(rollouts, result.advantages_B.tolist())):
            r.advantage = advantage
            named = dict(zip(self.runner.names, scores[i]))
            said = {column: values[i] for column, values in extra.items() if i < len(values)}
            step = state.global_step + (mode == "train")
            self.samples.append(Sample(step, mode, prompts[i], completions[i], named, advantage, said))


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

    def __call__(self, group: int, seed: int) -> SamplingParams:
        return SamplingParams.from_any({**self.fields, "n": group, "seed": seed})


def _length_metrics(rollouts: Sequence[Rollout], metrics: Metrics) -> None:
    """TRL's ``completions/*``; terminated means that the completion ended by itself."""
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts], dtype=torch.float32)
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
