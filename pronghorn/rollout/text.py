"""Prompts as people write them (strings, chats, ids) to token ids, with one BOS at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config.errors import ConfigError
from ..data.chat import encode_chat, encode_text, is_chat


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(_is_int(x) for x in prompt)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from a list, or from a single string, chat or id list."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or is_chat(prompts):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise ConfigError(
            f"prompts={prompts!r} is a {type(prompts).__name__}; give a string, a chat (a list of role/content "
            "dicts), a list of token ids, or a list of these"
        )
    if len(prompts) and _is_ids(prompts):
        return [prompts]
    return list(prompts)


def encode_prompts(
    tokenizer: Any, prompts: Any, *, add_generation_prompt: bool = True, **template_kwargs: Any
) -> list[list[int]]:
    """Token ids of each prompt.

    A string gets the tokenizer's special tokens, but never a second BOS when it begins with one, as a rendered chat
    does. A chat goes through the tokenizer's template, which writes its own BOS; if its last message is the
    assistant's, that message is continued. Ids pass as they are.

    Args:
        prompts: one prompt or a list: strings, chats (lists of role/content dicts), lists of ids.
        add_generation_prompt: end chats with the header of the assistant's turn.
        template_kwargs: further variables of the template.

    Raises:
        ConfigError: a prompt of another type, a chat without a template, an id outside the vocabulary.
    """
    return [
        _encode(tokenizer, row, prompt, add_generation_prompt, template_kwargs)
        for row, prompt in enumerate(as_prompts(prompts))
    ]


def _encode(
    tokenizer: Any, row: int, prompt: Any, add_generation_prompt: bool, template_kwargs: dict[str, Any]
) -> list[int]:
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:  # vLLM's TokensPrompt
        prompt = list(prompt["prompt_token_ids"])
    elif isinstance(prompt, Mapping) and "prompt" in prompt:  # vLLM's TextPrompt
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    if _is_ids(prompt):
        _check_ids(tokenizer, row, prompt)
        return list(prompt)
    if is_chat(prompt):
        return encode_chat(tokenizer, prompt, add_generation_prompt, **template_kwargs)
    raise ConfigError(
        f"prompts[{row}]={prompt!r} is neither a string, nor a chat (a list of role/content dicts), nor a list of ids"
    )


def _check_ids(tokenizer: Any, row: int, ids: Sequence[int]) -> None:
    try:
        size = len(tokenizer)
    except TypeError:
        return
    if ids and not min(ids) >= 0:
        raise ConfigError(f"prompts[{row}] holds the token id {min(ids)}; ids are 0 to {size - 1} for this tokenizer")
