"""Chats and the tokenizer's template: rendering, and ids with BOS exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config.errors import ConfigError

Message = dict[str, str]


def is_chat(prompt: Any) -> bool:
    """Whether `prompt` is a list of messages with `role` and `content`."""
    return (
        isinstance(prompt, (list, tuple))
        and len(prompt) > 0
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
    )


def render(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
) -> str:
    """The chat as text, ended with the header of the assistant's turn unless ``add_generation_prompt`` is False.

    A chat whose last message is the assistant's is continued there instead. ``template_kwargs`` are further variables
    of the template. Raises ``ConfigError`` where the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "tokenizer.chat_template=None: a chat cannot be rendered; set tokenizer.chat_template, or pass a string"
        )
    goes_on = add_generation_prompt and messages[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt and not goes_on,
        continue_final_message=goes_on,
        **template_kwargs,
    )
    return text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with BOS added as the tokenizer does, but never a second one where the text starts with it."""
    bos: str | None = getattr(tokenizer, "bos_token", None)
    written = bos is not None and text.startswith(bos)
    return list(tokenizer(text, add_special_tokens=not written)["input_ids"])


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
) -> list[int]:
    """The chat's token ids; the template is the whole text: one that writes BOS, as Llama 3's does, gets no second."""
    text = render(tokenizer, messages, add_generation_prompt, **template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
