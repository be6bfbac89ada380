"""GSM8K: loading from paths, the mapping, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.data.gsm8k import (
    SYSTEM_PROMPT,
    XML_COT_FORMAT,
    as_prompts,
    extract_hash_answer,
    get_gsm8k_questions,
    load_gsm8k,
)
from pronghorn.data.synthetic import arithmetic_dataset

ROWS = [
    {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "What does it cost?", "answer": "It costs $1,000.\n#### 1,000"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        rows = [json.dumps({**row, "question": f"{split}: {row['question']}"}) for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_folder_file_and_split(folder: Path) -> None:
    assert load_gsm8k(str(folder), "test")["question"][0] == "test: How many?"
    assert load_gsm8k(str(folder))["question"][0] == "train: How many?"
    assert load_gsm8k(str(folder / "test.jsonl"))["question"][1] == "test: What does it cost?"


def test_mapping(folder: Path) -> None:
    data = get_gsm8k_questions("train", str(folder))
    assert data[1] == {
        "question": "train: What does it cost?",
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": "train: What does it cost?"},
        ],
        "answer": "1,000",
    }
    assert as_prompts(load_gsm8k(str(folder)), "Be brief.")[0]["prompt"][0]["content"] == "Be brief."


def test_synthetic_problems_go_through_the_same_mapping() -> None:
    row = as_prompts(arithmetic_dataset("grpo", 3))[0]
    assert row["answer"].isdigit() and row["prompt"][1]["content"] == row["question"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("x\n#### 42", "42"), ("####42 ", "42"), ("no mark", None), ("#### 1,234\n", "1,234"), ("a #### b #### c", "b")],
)
def test_extract_hash_answer(text: str, answer: str | None) -> None:
    assert extract_hash_answer(text) == answer


def test_the_prompt_and_the_format_are_the_demos() -> None:
    assert SYSTEM_PROMPT == (
        "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
    )
    assert XML_COT_FORMAT.format(reasoning="r", answer="a") == (
        "<reasoning>\nr\n</reasoning>\n<answer>\na\n</answer>\n"
    )


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*valid\.jsonl"):
        load_gsm8k(str(folder), "valid")
    with pytest.raises(ConfigError, match="is not there"):
        load_gsm8k(str(folder / "absent"))
    with pytest.raises(ConfigError, match="no file"):
        load_gsm8k(str(folder / "absent.jsonl"))
    (folder / "other.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    with pytest.raises(ConfigError, match=r"lacks answer \(its columns: question, solution\)"):
        load_gsm8k(str(folder / "other.jsonl"))
