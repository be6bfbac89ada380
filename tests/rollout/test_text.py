"""Prompts to ids: strings, chats, ids; one BOS."""

from __future__ import annotations

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.rollout.text import encode_prompts
from tests.helpers import tiny_tokenizer

CHAT = [{"role": "system", "content": "You add."}, {"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_a_string_gets_one_bos(tokenizer):
    ids = encode_prompts(tokenizer, "Tom has 12")
    assert ids == encode_prompts(tokenizer, ["Tom has 12"]) == [tokenizer("Tom has 12")["input_ids"]]
    assert ids[0].count(tokenizer.bos_token_id) == 1


def test_a_chat_equals_the_template_whether_rendered_or_not(tokenizer):
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert expected[0] == tokenizer.bos_token_id and expected.count(tokenizer.bos_token_id) == 1
    assert encode_prompts(tokenizer, CHAT) == [expected]
    assert encode_prompts(tokenizer, [CHAT, CHAT]) == [expected, expected]
    assert encode_prompts(tokenizer, rendered) == [expected], "a rendered chat brings its own BOS"


def test_a_chat_that_ends_with_the_assistant_goes_on(tokenizer):
    chat = [*CHAT, {"role": "assistant", "content": "It is"}]
    (ids,) = encode_prompts(tokenizer, chat)
    assert tokenizer.decode(ids).endswith("It is")


def test_ids_pass_as_they_are(tokenizer):
    assert encode_prompts(tokenizer, [5, 6, 7]) == [[5, 6, 7]]
    assert encode_prompts(tokenizer, [[5], [6, 7]]) == [[5], [6, 7]]
    assert encode_prompts(tokenizer, torch.tensor([[5, 6], [7, 8]])) == [[5, 6], [7, 8]]
    assert encode_prompts(tokenizer, [torch.tensor([5, 6]), "Tom"])[0] == [5, 6]
    assert encode_prompts(tokenizer, [{"prompt_token_ids": [9]}, {"prompt": "Tom"}])[0] == [9]
    assert encode_prompts(tokenizer, []) == []


def test_what_is_no_prompt_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"prompts\[1\]=3.5"):
        encode_prompts(tokenizer, ["a", 3.5])
    with pytest.raises(ConfigError, match="prompts=7 is a int"):
        encode_prompts(tokenizer, 7)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="chat_template=None"):
        encode_prompts(bare, CHAT)
