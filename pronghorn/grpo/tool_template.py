"""What a chat template must be able to do for tools, and the ids that it puts around what a tool answered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from trl.chat_template_utils import add_response_schema, parse_response, supports_tool_calling

from ..config.errors import ConfigError
from ..data.chat import encode_chat, render

Message = dict[str, Any]

_CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]
_TURNS: list[Message] = [
    {"role": "user", "content": "Look at it."},
    {"role": "assistant", "content": "<think>\nWhat is it?\n</think>\n\nI look.", "tool_calls": _CALL},
    {"role": "tool", "name": "look", "content": "It is small."},
    {"role": "assistant", "content": "Closer.", "tool_calls": _CALL},
    {"role": "tool", "name": "look", "content": "It is large."},
]


class ToolTemplate:
    """The tokenizer's chat template, proven fit for conversations with tools.

    Args:
        tokenizer: gets TRL's response template or schema for its chat template where it has none, so that tool calls
            can be parsed.
        kwargs: further variables of the template.

    Raises:
        ConfigError: the template drops tool calls or answers, tool calls cannot be parsed, or the template rewrites
            earlier turns: what was sampled would then not be what later turns are read after.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs)
        if not supports_tool_calling(tokenizer):
            raise ConfigError(
                "tools: the tokenizer's chat_template cannot render a tool call and its answer; set "
                "tokenizer.chat_template to one that can (user, assistant with tool_calls, tool)"
            )
        if not any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
            try:
                add_response_schema(tokenizer)
            except ValueError as error:
                raise ConfigError(
                    "tools: no parser of tool calls is known for the tokenizer's chat_template; set "
                    f"tokenizer.response_template (transformers' response parsing): {error}"
                ) from error
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        """Each turn more must leave the text of the turns before as it was, up to the end of the last turn."""
        texts = [self._text(_TURNS[: n + 1]) for n in range(len(_TURNS))]
        for n, (shorter, longer) in enumerate(zip(texts, texts[1:])):
            if not longer.startswith(shorter):
                raise ConfigError(
                    f"tools: the tokenizer's chat_template rewrites earlier turns once a {_TURNS[n + 1]['role']} "
                    "message follows, so what was sampled would not be what is read later; with trl.chat_template_utils"
                    ", call add_response_schema(tokenizer) and then set tokenizer.chat_template = "
                    "get_training_chat_template(tokenizer), or set a template that only appends"
                )

    def _text(self, messages: Sequence[Message]) -> str:
        """The conversation's text up to the end of its last turn; what a template writes after that may differ."""
        text = render(self.tokenizer, messages, add_generation_prompt=False, **self.kwargs)
        end: str | None = self.tokenizer.eos_token
        return text[: text.rindex(end) + len(end)] if end and end in text else text

    def suffix_ids(self, answers: Sequence[Message]) -> list[int]:
        """Ids from the end of the turn that called tools to the start of the next one, ``answers`` between them.

        They are what the template adds to a conversation of its own making: nothing that was sampled is rendered.
        """
        call = [{"type": "function", "function": {"name": answers[0]["name"], "arguments": {}}}]
        calling: Message = {"role": "assistant", "content": "", "tool_calls": call}
        before: list[Any] = [{"role": "user", "content": "dummy"}, calling]
        prefix = encode_chat(self.tokenizer, before, add_generation_prompt=False, **self.kwargs)
        whole = encode_chat(self.tokenizer, [*before, *answers], add_generation_prompt=True, **self.kwargs)
        ends = [i for i, token in enumerate(prefix) if token == self.tokenizer.eos_token_id]
        if ends:  # a template may write a line break after the turn's end, which the model does not
            prefix = prefix[: ends[-1] + 1]
        if whole[: len(prefix)] != prefix:
            raise ConfigError(
                f"tools: with the answer {answers[-1]['content']!r} the chat_template tokenizes earlier turns otherwise"
                "; use a template whose turns end in a special token"
            )
        return whole[len(prefix) :]

    def parse(self, ids: Sequence[int], prefix: Sequence[int], schemas: Sequence[dict[str, Any]]) -> Message:
        """The assistant's message of sampled ``ids``: content, and ``tool_calls`` where there are any.

        What cannot be parsed is plain content, as in TRL.
        """
        typed = {"tools": list(schemas)} if "tools" in inspect.signature(parse_response).parameters else {}
        message: Message = parse_response(self.tokenizer, list(ids), prefix=list(prefix), **typed)
        return message
