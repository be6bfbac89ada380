"""The marks that a chat template writes where a user's turn and where the assistant's turn begins."""

from __future__ import annotations

from typing import Any

from ..config.errors import ConfigError

_REMEDY = "pass instruction_part and response_part yourself"


def template_parts(tokenizer: Any) -> tuple[str, str]:
    """(instruction_part, response_part): what stands right before a user's content and before the assistant's.

    For Llama 3: `<|start_header_id|>user<|end_header_id|>\\n\\n`, and the same with `assistant`. The end of the turn
    before (`<|eot_id|>`) is in neither, so that it stays part of the response and is learned. Found by rendering a
    probe chat. Raises `ConfigError` for a template without contents as they are, or without special tokens to cut at.
    """
    user, reply, again = "PROBEUSER", "PROBEREPLY", "PROBEAGAIN"
    chat = [(("user"), user), ("assistant", reply), ("user", again)]
    text: str = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in chat], tokenize=False)
    if any(text.count(probe) != 1 for probe in (user, reply, again)):
        raise ConfigError(f"tokenizer.chat_template does not write each content once, as it is: {_REMEDY}")
    response = text[text.index(user) + len(user) : text.index(reply)]
    instruction = text[text.index(reply) + len(reply) : text.index(again)]
    specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    cut = 0
    for at in range(1, min(len(response), len(instruction))):
        if response[:at] != instruction[:at]:
            break
        if _starts(response, at, specials) and _starts(instruction, at, specials):
            cut = at
    if cut == 0:
        raise ConfigError(f"tokenizer.chat_template ends and begins its turns without two special tokens: {_REMEDY}")
    return instruction[cut:], response[cut:]


def _starts(text: str, at: int, specials: list[str]) -> bool:
    return any(text.startswith(special, at) for special in specials)
