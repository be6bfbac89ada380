"""How completions are drawn. Field names and defaults are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError, reject_unknown

# vLLM fields that change nothing for the native engine, whatever their value.
_VLLM_INERT = {
    "output_kind", "output_text_buffer_length", "_all_stop_token_ids", "_eos_token_id", "spaces_between_special_tokens",
    "skip_clone", "extra_args", "thinking_token_budget", "_bad_words_token_ids", "skip_reading_prefix_cache",
    "flat_logprobs", "truncate_prompt_tokens", "repetition_detection",
}  # fmt: skip
# vLLM fields that change the output, with the value that means "off": any other value is refused.
_VLLM_OFF: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None,), "allowed_token_ids": (None,), "bad_words": (None, []), "prompt_logprobs": (None,),
    "structured_outputs": (None,), "logits_processors": (None,), "logprob_token_ids": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    Attributes:
        n: completions per prompt.
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus mass in (0, 1] (Holtzman et al., 2020, arXiv:1904.09751).
        top_k: how many of the likeliest tokens stay; 0 or -1 keeps all.
        min_p: least probability relative to the likeliest token, in [0, 1] (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or completion
            (Keskar et al., 2019, arXiv:1909.05858); 1 is off.
        presence_penalty: taken from the logits of every token that the completion holds, in [-2, 2]; 0 is off.
        frequency_penalty: taken from them once for each time that it holds the token, in [-2, 2]; 0 is off.
        max_tokens: most new tokens; None runs to the model's maximum length.
        min_tokens: no end before so many new tokens.
        stop: strings that end a completion; they are left out of the text unless ``include_stop_str_in_output``.
        stop_token_ids: ids that end a completion, besides the model's own end-of-sequence ids.
        ignore_eos: go on past end-of-sequence ids.
        seed: makes the request's samples reproducible whatever else is in the batch; None draws a fresh one.
        logprobs: how many alternatives to report for each token; None reports none.
        skip_special_tokens, detokenize: how text is made from ids.

    Raises:
        ConfigError: a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        checks = {
            "n": self.n >= 1,
            "temperature": math.isfinite(self.temperature) and self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= -1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "max_tokens": self.max_tokens is None or self.max_tokens >= 1,
            "min_tokens": self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
            "stop": all(isinstance(s, str) and s for s in stop),
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"SamplingParams: {name}={getattr(self, name)!r} is out of range; {_RANGES[name]}")
        if any("\ufffd" in s for s in stop):
            raise ConfigError("SamplingParams: stop holds U+FFFD (undecodable bytes); use stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def tallied(self) -> bool:
        """Whether it matters how often the completion holds a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_any(cls, given: Any) -> SamplingParams:
        """Ours from ours, a mapping, None (defaults) or a ``vllm.SamplingParams``; what cannot be honoured raises."""
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        known = [f.name for f in fields(cls)]
        if isinstance(given, Mapping):
            reject_unknown("SamplingParams", given, known)
            return cls(**given)
        names = getattr(type(given), "__struct_fields__", None) or list(vars(given))
        if "temperature" not in names:
            raise ConfigError(
                f"sampling_params={given!r} is a {type(given).__name__}; pass pronghorn.SamplingParams, "
                "vllm.SamplingParams or a dict"
            )
        for name in names:
            if name in known or name in _VLLM_INERT:
                continue
            value = getattr(given, name)
            if name not in _VLLM_OFF or value not in _VLLM_OFF[name]:
                raise ConfigError(f"SamplingParams: {name}={value!r} has no effect in the native engine; leave it out")
        return cls(**{name: getattr(given, name) for name in known if name in names})


_RANGES = {
    "n": "give 1 or more",
    "temperature": "give 0 (greedy) or a positive number",
    "top_p": "give a mass in (0, 1]",
    "top_k": "give 0 or -1 (off) or a positive count",
    "min_p": "give a fraction in [0, 1]",
    "repetition_penalty": "give a positive number; 1 is off",
    "presence_penalty": "give a number in [-2, 2]; 0 is off",
    "frequency_penalty": "give a number in [-2, 2]; 0 is off",
    "max_tokens": "give 1 or more, or None for the model's maximum length",
    "min_tokens": "give 0 or more, at most max_tokens",
    "stop": "give non-empty strings",
    "logprobs": "give 0 or more, or None",
}
