"""Response-only labels: exactly the assistant's tokens, on real templates, and never nothing."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from pronghorn.config.errors import ConfigError
from pronghorn.sft.masks import IGNORE, mask_responses, part_ids, response_only_labels
from pronghorn.sft.parts import template_parts
from tests.helpers import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One special token a role, so that the markers differ in their first token.
ROLES = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}\n"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def tokenizer_with(template: str | None):  # type: ignore[no-untyped-def]
    tokenizer = tiny_tokenizer(extra=("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "parts", "shown"),
    [
        (
            None,
            ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
            "It is 2.<|eot_id|>4<|eot_id|>",
        ),
        (CHATML, ("<|im_start|>user\n", "<|im_start|>assistant\n"), "It is 2.<|im_end|>\n4<|im_end|>\n"),
        (ROLES, ("<|user|>\n", "<|assistant|>\n"), "It is 2.<|end|>\n4<|end|>\n"),
    ],
)
def test_the_responses_and_their_ends_are_learned_and_nothing_else(
    template: str | None, parts: tuple[str, str], shown: str
) -> None:
    tokenizer = tokenizer_with(template)
    assert template_parts(tokenizer) == parts
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    instruction, response = (part_ids(tokenizer, part) for part in parts)
    labels = response_only_labels(ids, instruction, response)
    assert len(labels) == len(ids) and all(label in (IGNORE, own) for label, own in zip(labels, ids))
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == shown


def test_agrees_with_trl_on_an_assistant_only_mask() -> None:
    """`{% generation %}` marks the same tokens, as TRL's `assistant_only_loss` reads them."""
    tokenizer = tokenizer_with(None)
    instruction, response = (part_ids(tokenizer, part) for part in template_parts(tokenizer))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    )
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    labels = response_only_labels(encoded["input_ids"], instruction, response)
    assert [int(label != IGNORE) for label in labels] == list(encoded["assistant_masks"])
    assert sum(encoded["assistant_masks"]) > 4


def test_ids_only() -> None:
    assert response_only_labels([9, 1, 2, 5, 3, 4, 6, 7, 1, 2, 8], [1, 2], [3, 4]) == [
        IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 6, 7, IGNORE, IGNORE, IGNORE
    ]  # fmt: skip
    # A marker cut off at the end is no marker; what is said up to there is learned.
    assert response_only_labels([3, 4, 6, 1], [1, 2], [3, 4]) == [IGNORE, IGNORE, 6, 1]


@pytest.mark.parametrize("ids", [[1, 2, 5, 6], [1, 2, 5, 3, 4], [1, 2, 3], [5]])
def test_a_row_that_would_be_hidden_whole_is_refused(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="hides all"):
        response_only_labels(ids, [1, 2], [3, 4])


def test_data_set(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(None)
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    cut = whole[:8]  # before the response
    data = Dataset.from_dict({"input_ids": [whole, cut, whole]})
    with pytest.raises(ConfigError, match=r"row 1: .*hidden='drop'"):
        mask_responses(data, tokenizer)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        masked = mask_responses(data, tokenizer, hidden="drop")
    assert len(masked) == 2 and "1 of 3 rows" in caplog.text
    assert masked[1]["input_ids"] == whole and sum(label != IGNORE for label in masked[1]["labels"]) > 2
    with pytest.raises(ConfigError, match="every token of every row"):
        mask_responses(data, tokenizer, "### User:", "### Nobody:", hidden="drop")
    with pytest.raises(ConfigError, match="go together"):
        mask_responses(data, tokenizer, response_part="x")


def test_templates_without_marks_are_refused() -> None:
    no_marks = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="pass instruction_part"):
        template_parts(tokenizer_with(no_marks))
    with pytest.raises(ConfigError, match="as it is"):
        template_parts(tokenizer_with("{% for m in messages %}{{ m['content'] | lower }}{% endfor %}"))
    with pytest.raises(ConfigError, match="no tokens"):
        part_ids(tokenizer_with(None), "")
