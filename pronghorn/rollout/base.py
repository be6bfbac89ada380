"""The rollout protocol: what an engine takes and gives, and the lazy registry of engines.

The result types have vLLM's names and shapes, with two additions: every token carries the log-prob of the distribution
that it was drawn from, and the policy's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..config.adapters import LIVE, AdapterChoice
from ..config.errors import ConfigError, nearest
from ..config.sampling import SamplingParams
from .ends import eos_ids as eos_ids  # which ids end a completion belongs to the protocol,
from .text import encode_prompts as encode_prompts  # and so does what makes ids of prompts

Progress = Callable[[int, int, int], None]
"""``progress(finished, total, tokens)``: completions done, completions asked for, tokens generated so far."""

KeptPolicy = Sequence[Any]
"""The tensors, on the host, that say which policy a generation is drawn by."""


@dataclass
class Logprob:
    """One alternative at one step: natural-log probability under softmax(raw logits), its rank (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One completion.

    Attributes:
        index: which of the request's ``n`` samples.
        text: decoded completion, without the stop string or stop token unless ``include_stop_str_in_output``.
        token_ids: every generated id, the ending one included.
        logprobs: with ``SamplingParams.logprobs=k``, for each token the k likeliest ids and the drawn one, under
            softmax of the raw logits (vLLM's default); else None.
        token_logprobs: for each token, its log-prob under the distribution it was drawn from: penalties, minimum
            length, temperature, and top-k, top-p and min-p renormalised over what they keep. At temperature 0
            nothing is drawn, and it is log softmax of the penalised logits at temperature 1.
        policy_logprobs: for each token, log softmax(raw logits / temperature) over the full vocabulary, from the same
            decode logits (temperature 0: log softmax(raw logits)). What an importance ratio compares with.
        cumulative_logprob: sum of ``token_logprobs``.
        finish_reason: ``"stop"`` or ``"length"``.
        stop_reason: the stop string or the id of ``stop_token_ids`` that ended it; None for an end-of-sequence id.
    """

    index: int
    text: str
    token_ids: list[int]
    token_logprobs: list[float]
    policy_logprobs: list[float]
    cumulative_logprob: float
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    """One prompt with its completions, in vLLM's shape."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class DrawingStopped(Exception):
    """A :class:`Drawing` was stopped before its end.

    Attributes:
        policy: what it was drawn by, for :meth:`Engine.ready` to draw it again; None where nobody asked to keep it.
    """

    def __init__(self, message: str, policy: KeptPolicy | None = None) -> None:
        super().__init__(message)
        self.policy = policy


class Drawing(Protocol):
    """A generation that is ready: called once, from any thread, it is drawn by the policy of when it was made ready.

    The engine draws one generation at a time, so whatever else is asked of it meanwhile waits.
    """

    def __call__(self) -> list[RequestOutput]:
        """Draw it.

        Raises:
            DrawingStopped: :meth:`stop` came first.
        """
        ...

    def wait_begun(self) -> None:
        """Wait until the thread that draws has the engine, or has failed: only then may others ask for it."""
        ...

    def stop(self, keep: bool = False) -> None:
        """End it at its next report: a look at its tokens, or a chunk of a prefill.

        It takes no lock: a signal handler may call it.

        Args:
            keep: let :class:`DrawingStopped` bring what it was drawn by.
        """
        ...


class Engine(Protocol):
    """What generates, without dropout and gradients and in whatever mode the model is, which it is in afterwards too.

    Results come in the order of the prompts, whatever order they finish in.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapter: AdapterChoice = LIVE,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (token ids) ``params.n`` times; one ``params`` for all, or one for each prompt.

        Raises:
            ConfigError: an empty prompt, one without room for a new token, or a request that the cache cannot hold.
        """
        ...

    def ready(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        keep_share: float,
        policy: KeptPolicy | None = None,
    ) -> Drawing:
        """Make all ready to draw ``params.n`` completions of each prompt by the live policy as it is now, while the
        policy goes on training. To be called between optimizer steps, on the thread that trains.

        Args:
            keep_share: share of the device's memory up to which weights may be kept a second time for it.
            policy: of a :class:`DrawingStopped`: draw by that one in place of the live one.

        Raises:
            ConfigError: as ``generate``; or the engine, or this model, cannot be drawn from while it trains; or
                ``policy`` is none of this model.
            torch.OutOfMemoryError: with the remedy; nothing is tried again.
        """
        ...

    def release(self) -> None:
        """Give the KV cache's memory back; the next ``generate`` takes it again."""
        ...

    def rest(self, keep_share: float) -> bool:
        """Generation is over for now: :meth:`release` if more than this share of the device's memory is held by what
        the next ``generate`` can make again. Whether it was released.
        """
        ...

    def check_exact(self) -> None:
        """Make sure that log-probs will be the trainer's, bit for bit.

        Raises:
            ConfigError: they will not, or that cannot be known; it says why.
        """
        ...

    def policy_changed(self) -> None:
        """The weights changed: forget keys and values computed under the old ones."""
        ...


def why_no_overlap(model: Any) -> str:
    """In words, what of ``model`` keeps the native engine from drawing while it trains; empty where it can."""
    from .native.snapshot import why_no_snapshot  # torch

    return why_no_snapshot(model)


# name -> (module in this package, class). Imported when first asked for.
_ENGINES = {"native": ("native.engine", "NativeEngine"), "vllm": ("vllm", "VLLMEngine")}


def known_engines() -> list[str]:
    """The names that :func:`create` takes."""
    return sorted(_ENGINES)


def create(name: str, model: Any, tokenizer: Any, **options: Any) -> Engine:
    """Make the engine ``name`` over ``model``.

    Args:
        name: ``"native"`` (the model's own weights) or ``"vllm"`` (an installed vLLM, with its own copy of them).
        model: a Pronghorn model, with or without PEFT around it.
        tokenizer: decodes completions, and names the end-of-sequence id.
        options: keyword arguments of the engine's class.

    Raises:
        ConfigError: no such engine.
    """
    if name not in _ENGINES:
        close = nearest(name, _ENGINES)
        hint = f"did you mean {close!r}?" if close else f"known engines: {', '.join(known_engines())}"
        raise ConfigError(f"rollout engine {name!r} is unknown; {hint}")
    module, class_name = _ENGINES[name]
    engine: Engine = getattr(importlib.import_module(f".{module}", __package__), class_name)(
        model, tokenizer, **options
    )
    return engine


def engine_of(model: Any, tokenizer: Any, oom_retry: bool | None = None) -> Engine:
    """The native engine that serves ``model``: made at the first call, then kept with the model's state.

    ``model`` may since have been wrapped by PEFT; the engine goes on with the wrapper given here. ``oom_retry`` says
    whether a rollout that runs out of memory is run again with fewer rows; None leaves that as it is.
    """
    from ..models import is_classifier, state_of  # torch: the results above are also read where there is none

    if is_classifier(model):
        raise ConfigError(
            f"model={type(model).__name__} scores sequences and generates none; load it without num_labels"
        )
    state = state_of(model)
    if state.engine is None:
        state.engine = create("native", model, tokenizer)
    state.engine.model = model
    if oom_retry is not None:
        state.engine.oom_retry = oom_retry
    engine: Engine = state.engine
    return engine
