"""TRL's ``rollout_func``: completions that a user's function makes, with a mask of what its environment wrote."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError
from ..rollout.base import eos_ids
from .drawing import Seeds, in_words
from .generation import Generation
from .rollouts import Rollout

if TYPE_CHECKING:
    from .sampling_loop import SamplingLoop

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]

_REQUIRED = ("completion_ids", "logprobs", "prompt_ids")


class RolloutFuncDrawer:
    """Draws by ``rollout_func(prompts, trainer)``, with the contract of TRL 1.15 and 1.16.

    It gets the prompts as they are in the data set, each as often as it is to be completed, and returns lists with one
    entry for each of them: ``prompt_ids``, ``completion_ids``, ``logprobs`` (one number or None a completion token, or
    None for all), and optionally ``env_mask`` (1 for each token that the policy sampled, 0 for what its environment
    wrote). Further lists go to the reward functions, one value a completion.

    Args:
        loop: model, tokenizer and settings.
        func: the user's.
        trainer: what ``func`` gets beside the prompts.
    """

    def __init__(self, loop: SamplingLoop, func: RolloutFunc, trainer: Any) -> None:
        self.loop, self.func, self.trainer = loop, func, trainer
        pad = getattr(loop.tokenizer, "pad_token_id", None)
        self.ends = eos_ids(loop.model, loop.tokenizer) | ({pad} if pad is not None else set())

    def __call__(self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int) -> Generation:
        output = dict(self.func([copy.deepcopy(row["prompt"]) for row in rows], self.trainer))
        missing = [name for name in _REQUIRED if name not in output]
        if missing:
            raise ConfigError(f"rollout_func must return {', '.join(_REQUIRED)} in its dict; missing: {missing}")
        prompt_ids, completion_ids = output.pop("prompt_ids"), output.pop("completion_ids")
        logprobs, masks = self._logprobs(output.pop("logprobs"), completion_ids), output.pop("env_mask", None)
        given = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": masks}
        for name, values in given.items():
            if values is not None and len(values) != len(rows):
                raise ConfigError(
                    f"rollout_func: {name} has {len(values)} entries for {len(rows)} prompts; return one for each "
                    "prompt that it was given, repeats included"
                )
        rollouts = [
            self._rollout(i, prompt_ids[i], completion_ids[i], logprobs[i], None if masks is None else masks[i])
            for i in range(len(rows))
        ]
        columns = {name: self._column(values, len(rows)) for name, values in output.items()}
        words = in_words(self.loop.tokenizer, rows[0]["prompt"], [r.completion_ids for r in rollouts])
        return Generation(rows, rollouts, words, group, columns)

    def _logprobs(self, logprobs: Any, completion_ids: Sequence[Sequence[int]]) -> Sequence[Sequence[float | None]]:
        args = self.loop.args
        if logprobs is not None:
            return list(logprobs)
        if args.rollout_staleness or args.replay_buffer_size:
            raise ConfigError(
                "rollout_func: logprobs=None, but rollout_staleness and replay_buffer_size train on rollouts of an "
                "earlier policy, whose log-probabilities only the sampler knows; return them, or leave both at 0"
            )
        return [[None] * len(ids) for ids in completion_ids]

    def _rollout(
        self, i: int, prompt: Sequence[int], ids: Sequence[int], logps: Sequence[Any], mask: Sequence[Any] | None
    ) -> Rollout:
        for name, values in (("logprobs", logps), ("env_mask", mask)):
            if values is not None and len(values) != len(ids):
                raise ConfigError(
                    f"rollout_func: {name}[{i}] has {len(values)} entries, completion_ids[{i}] has {len(ids)}; give "
                    "one for each completion token"
                )
        if not len(ids):
            raise ConfigError(f"rollout_func: completion_ids[{i}] is empty; return at least one token")
        kept = [1] * len(ids) if mask is None else [int(bool(m)) for m in mask]
        sampled = [math.nan if logp is None else float(logp) for logp, m in zip(logps, kept) if m]
        truncated = int(ids[-1]) not in self.ends
        tool_mask = None if all(kept) else kept
        return Rollout(
            [int(x) for x in prompt], [int(x) for x in ids], sampled, truncated=truncated, tool_mask=tool_mask
        )

    @staticmethod
    def _column(values: Any, rows: int) -> list[Any]:
        """A list with a value for each completion as it is; anything else is every completion's, as in TRL."""
        return list(values) if isinstance(values, list) and len(values) == rows else [values] * rows
