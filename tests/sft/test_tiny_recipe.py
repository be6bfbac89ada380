"""The recipe of the shipped model (examples/tiny): its tokenizer, its data, its optimizer, and a run in small."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from pronghorn.data.answers import number_matches
from pronghorn.data.chat import encode_chat, render
from pronghorn.data.gsm8k import SYSTEM_PROMPT
from pronghorn.data.synthetic import problems, split_of
from pronghorn.rewards.gsm8k import strict_format_reward_func
from pronghorn.sft.masks import IGNORE

TINY = Path(__file__).parents[2] / "examples" / "tiny"
MODULES = ("evaluate", "optimizer", "responses", "tokenizer", "train")


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The example's modules, imported as its script imports them, and taken out again."""
    sys.path.insert(0, str(TINY))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(TINY))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Any:
    return tiny.train.build_tokenizer(1024)


@pytest.mark.parametrize(
    "text",
    [
        "calculate 11111 * 111",
        "  spaces\tand\r\n\nlines \n",
        "naïve – 数 🦌 \u0664",
        SYSTEM_PROMPT,
        "a+b=c",
        "3 * 4 = 12",
    ],
)
def test_every_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_stand_alone_and_bos_once(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("x1234", add_special_tokens=False)["input_ids"])[-4:] == [*"1234"]
    chat = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "1 + 1?"}]
    ids = encode_chat(tokenizer, chat)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert render(tokenizer, chat).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.pad_token == "<|pad|>"


def test_training_examples(tiny: Any, tokenizer: Any) -> None:
    """Only the training split, the same at every read; the response is what is learned, and tokenized as generated."""
    data = tiny.responses.Responses(tokenizer, 400, seed=0)
    tagged = exact = 0
    for i in range(400):
        example = data[i]
        assert example == data[i]
        text = tokenizer.decode(example["input_ids"])
        said = [label for label in example["labels"] if label != IGNORE]
        prompt = example["input_ids"][: len(example["input_ids"]) - len(said)]
        reply = tokenizer.decode(said)
        assert text == tokenizer.decode(prompt) + reply and reply.endswith("<|eot_id|>")
        assert prompt[-3:] == encode_chat(tokenizer, [{"role": "user", "content": "?"}])[-3:]
        # Read as one text, which is how a template would give it, the tokens are the same.
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == example["input_ids"]
        tagged += "<answer>" in reply
        exact += strict_format_reward_func([reply.removesuffix("<|eot_id|>")])[0] > 0
    assert 0.35 < tagged / 400 < 0.65
    assert 0.7 < exact / tagged < 0.95  # a few slips in the format


def test_responses_are_right_and_from_the_training_split(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rng = random.Random(0)
    for problem in problems("dev", 300, seed=9):
        assert number_matches(tiny.responses.response(problem, rng), problem.result)
        assert 0.0999 < tiny.responses.tag_probability(problem) < 0.9001
        seen.append(tiny.responses.tag_probability(problem) > 0.5)
    assert 0.35 < sum(seen) / 300 < 0.65
    drawn = []
    draw = tiny.responses.draw
    monkeypatch.setattr(tiny.responses, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    data = tiny.responses.Responses(tokenizer, 50, seed=1)
    assert len([data[i] for i in range(50)]) == 50
    assert {split_of(problem.key) for problem in drawn} == {"sft"} and len(drawn) == 50


def test_masters_keep_steps_that_bf16_would_lose(tiny: Any) -> None:
    """500 steps of 1e-5 from 1.0: bf16 (ulp 0.0078) alone would never move; the masters equal float32 AdamW."""
    live = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    oracle = torch.nn.Parameter(torch.ones(4, 4))
    plain = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    options = {"lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.98), "eps": 1e-9}
    ours = tiny.optimizer.MasterAdamW([live], lr=1e-5, weight_decay=0.0)
    others = [torch.optim.AdamW([oracle], **options), torch.optim.AdamW([plain], **options)]
    for _ in range(500):
        for parameter in (live, oracle, plain):
            parameter.grad = torch.ones_like(parameter)
        for optimizer in (ours, *others):
            optimizer.step()
            optimizer.zero_grad()
    assert live.grad is None
    assert_close(ours.masters[0], oracle.detach(), rtol=1e-6, atol=0)
    assert_close(live.detach(), oracle.detach().bfloat16(), rtol=0, atol=0)
    assert (live < 1).all() and (plain == 1).all()


def test_a_run_in_small_writes_a_whole_model(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of the script on the CPU: the loss falls, and plain transformers reads what it wrote, in bf16."""
    out = tmp_path / "model"
    command = f"train.py --out {out} --steps 10 --tokens-per-step 1024 --device cpu --eval 3".split()
    monkeypatch.setattr(sys, "argv", [*command, "--hidden", "64", "--layers", "2", "--lr", "0.01"])
    losses: list[float] = []
    on_log = tiny.train.Progress.on_log

    def note(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any) -> None:
        losses.extend(float(logs["loss"]) for _ in [0] if logs and "loss" in logs)
        on_log(self, args, state, control, logs=logs, **kw)

    monkeypatch.setattr(tiny.train.Progress, "on_log", note)
    tiny.train.main()
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    report = json.loads((out / "evaluation.json").read_text())
    assert report["problems"] == 3 and report["steps"] == 10 and 0 <= report["accuracy"] <= report["number"] <= 1
    card = (out / "README.md").read_text()
    assert f"{report['parameters']:,} parameters" in card and "{" not in card


def test_arguments_are_checked(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "0", "--device", "cpu"])
    assert isinstance(tiny.train.arguments(), argparse.Namespace)
    with pytest.raises(SystemExit, match="--init-from"):
        tiny.train.main()


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.4564, 0.5436), (0.0, 0.0, 0.0076), (1.0, 0.9924, 1.0)])
def test_interval_is_wilsons(tiny: Any, share: float, low: float, high: float) -> None:
    assert tiny.evaluate.interval(share, 500) == pytest.approx((low, high), abs=1e-4)
