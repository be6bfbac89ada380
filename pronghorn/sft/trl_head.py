"""TRL's ``SFTTrainer`` on a Pronghorn model: its question for token scores, answered by Pronghorn's own forward.

TRL (1.15, 1.16) gives the model it trains a forward around the one it had (``trl.trainer.utils.add_fused_lm_head``),
and then calls ``model(**inputs, labels=..., fused_lm_head=True)`` for log-probabilities, entropies and whether each
label was the likeliest token. That forward would walk transformers' padded layers and score with a head of its own. A
pre-hook on the model, PyTorch's way to change the arguments of a call, turns the question into the one that
``models/causal_lm.py`` answers (``token_scores=True``), which TRL's forward hands on to the model's own. Nothing of TRL
changes, and calls without ``fused_lm_head`` are not touched.

TRL's other trainers ask for other statistics, at other temperatures; what they asked for is bound in TRL's forward, and
only exactly what ``SFTTrainer`` asks for is answered here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models import unwrap
from ..models.causal_lm import not_packable, say_once

_QUESTION = "fused_lm_head"
_ANSWERED = {
    "temperature": 1.0,
    "cast_lm_head_to_fp32": False,
    "outputs": ("log_probs", "entropy", "is_top1"),
}


def install(model: nn.Module) -> None:
    """Register the hook on ``model`` (a Pronghorn model, or PEFT's around one), once."""
    if answer_trl not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(answer_trl, with_kwargs=True)


def answer_trl(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with ``token_scores=True`` for TRL's ``fused_lm_head=True``; None leaves them as they are.

    Where TRL's forward is not the one that is known, or an argument needs transformers' own walk, TRL's head scores
    transformers' hidden states as it would without Pronghorn, and one line says so.
    """
    if not kwargs.get(_QUESTION):
        return None
    reason = _unanswerable(unwrap(model), args, kwargs)
    if reason is not None:
        say_once(unwrap(model), f"TRL's own head and transformers' layers run, slower, because of {reason}")
        return None
    rest = {name: value for name, value in kwargs.items() if name != _QUESTION}
    return args, {**rest, "token_scores": True}


def _unanswerable(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if args:
        return "positional arguments"
    if kwargs.get("labels") is None:
        return "a call without labels"
    named = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    ids, mask, positions, cache = (kwargs.get(name) for name in named)
    rest = {name: value for name, value in kwargs.items() if name not in (*named, "labels", "use_cache", _QUESTION)}
    reason = not_packable(base, ids, mask, positions, cache, rest)
    if reason is not None:
        return reason
    asked = _bound_by_trl(base)
    if asked is None:
        return "a TRL whose fused_lm_head is not the one of 1.15 and 1.16"
    for name, value in _ANSWERED.items():
        given = tuple(asked[name]) if isinstance(asked[name], list) else asked[name]
        if given != value:
            return f"{name}={given!r}, which Pronghorn's token scores do not give"
    return None


def _bound_by_trl(base: Any) -> dict[str, Any] | None:
    """What was asked for when TRL wrapped the forward of ``base``: its closure's variables, or None."""
    # accelerate's mixed precision keeps the forward that it wrapped under the second name.
    for attribute in ("forward", "_original_forward"):
        function = getattr(base.__dict__.get(attribute), "__func__", None)
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
        if code is None or _QUESTION not in code.co_varnames:
            continue
        bound = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
        return bound if set(_ANSWERED) <= set(bound) else None
    return None
