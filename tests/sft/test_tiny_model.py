"""The model that ships: what it must be on paper, and that it does what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pronghorn.data.answers import number_matches
from pronghorn.data.chat import encode_chat
from pronghorn.data.gsm8k import SYSTEM_PROMPT
from pronghorn.data.synthetic import problems
from pronghorn.rewards.gsm8k import extract_xml_answer

FOLDER = Path(__file__).parents[2] / "pronghorn" / "assets" / "tiny-arithmetic"


def test_size_and_dtype() -> None:
    files = list(FOLDER.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    parameters = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                tensor = tensors.get_tensor(name)
                assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), name
                parameters += tensor.numel()
    assert 1_000_000 <= parameters <= 4_500_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((FOLDER / "evaluation.json").read_text())["parameters"] == parameters


def test_card_says_what_was_measured() -> None:
    card = (FOLDER / "README.md").read_text()
    report = json.loads((FOLDER / "evaluation.json").read_text())
    assert report["problems"] >= 500
    for said in (str(report["accuracy"]), str(report["number"]), f"{report['steps']} steps", "examples/tiny/train.py"):
        assert said in card


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, int]]:
    """Greedy answers of plain transformers to 60 problems of the dev split, which training never saw."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    asked = problems("dev", 60, seed=2)
    chats = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": p.question}] for p in asked]
    padded = tokenizer.pad({"input_ids": [encode_chat(tokenizer, chat) for chat in chats]}, return_tensors="pt")
    out = model.generate(**padded, max_new_tokens=100, do_sample=False)
    texts = tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(text, p.result) for text, p in zip(texts, asked)]


def test_it_answers_in_the_format_often_and_rightly_sometimes(answers: list[tuple[str, int]]) -> None:
    tagged = sum("<answer>" in text for text, _ in answers) / 60
    in_tags = sum("<answer>" in text and extract_xml_answer(text) == str(n) for text, n in answers) / 60
    number = sum(number_matches(text, n) for text, n in answers) / 60
    assert 0.25 <= tagged <= 0.8  # often, and GRPO has something to teach
    assert 0.15 <= in_tags <= 0.7
    assert number >= 0.5
    report = json.loads((FOLDER / "evaluation.json").read_text())
    assert abs(number - report["number"]) < 0.2 and abs(in_tags - report["accuracy"]) < 0.25
