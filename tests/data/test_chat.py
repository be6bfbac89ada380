"""Chats become ids with BOS once, whoever writes it."""

from __future__ import annotations

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.data.chat import encode_chat, encode_text, is_chat, render
from tests.helpers import tiny_tokenizer

CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]


def test_bos_is_written_once() -> None:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id
    ids = encode_chat(tokenizer, CHAT)
    assert ids.count(bos) == 1 and ids[0] == bos
    text = render(tokenizer, CHAT)
    # The trap: the tokenizer adds BOS to a text that has it already.
    assert tokenizer(text)["input_ids"].count(bos) == 2
    assert encode_text(tokenizer, text) == ids
    plain = encode_text(tokenizer, "1 + 1")
    assert plain[0] == bos and plain.count(bos) == 1


def test_a_template_without_bos_and_a_tokenizer_without_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.bos_token_id not in encode_chat(tokenizer, CHAT)
    tokenizer.bos_token = None
    assert len(encode_text(tokenizer, "1 + 1")) > 0


def test_render_with_and_without_the_assistants_turn() -> None:
    tokenizer = tiny_tokenizer()
    asked, told = render(tokenizer, CHAT), render(tokenizer, CHAT, add_generation_prompt=False)
    assert asked.startswith(told) and asked.removeprefix(told) == "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_no_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat_template"):
        render(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("prompt", "chat"),
    [(CHAT, True), ("text", False), ([1, 2], False), ([], False), ([{"role": "user"}], False), (["a"], False)],
)
def test_is_chat(prompt: object, chat: bool) -> None:
    assert is_chat(prompt) is chat
