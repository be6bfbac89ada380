"""The learning study's larger model: its problems and their splits, its documents, its schedule, a run in small."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks import pretrain
from benchmarks.mixture import SHARES, Solved, gsm8k_rows, mixed_dataset
from benchmarks.pretrain import Schedule
from benchmarks.pretrain_data import Batches, Documents, chat, response, tokenizer_texts
from pronghorn import FastLanguageModel, SamplingParams
from pronghorn.config.errors import ConfigError
from pronghorn.data.answers import number_matches
from pronghorn.data.chat import encode_chat
from pronghorn.sft.masks import IGNORE


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in GSM8K's form; the answers carry its calculator's notes."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 400), ("test", 40)):
        rows = [
            {
                "question": f"In {split} {i}, Ada buys {i} pens at ${i + 2} each. What does she pay? ",
                "answer": f"She pays {i}*{i + 2} = $<<{i}*{i + 2}={i * (i + 2)}>>{i * (i + 2)}.\n#### {i * (i + 2):,}",
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def documents(gsm8k: str) -> Documents:
    rows = gsm8k_rows(gsm8k, "sft")
    return Documents(pretrain.train_tokenizer(tokenizer_texts(rows, 2000), 768), rows)


def test_nothing_that_is_pretrained_on_is_trained_on_or_held_out(gsm8k: str) -> None:
    parts = {split: {row.question for row in gsm8k_rows(gsm8k, split)} for split in ("sft", "grpo", "dev", "heldout")}
    assert len(set.union(*parts.values())) == sum(len(part) for part in parts.values()) == 440
    assert len(parts["heldout"]) == 40 and all("test" in question for question in parts["heldout"])
    assert len(parts["sft"]) > 300
    for split in ("grpo", "heldout"):
        for row in mixed_dataset(split, 60, gsm8k):
            assert row["kind"] != "gsm8k" or row["question"] in parts[split]


def test_a_solution_is_one_line_without_the_calculator_s_notes(gsm8k: str) -> None:
    solved = next(row for row in gsm8k_rows(gsm8k, "heldout") if "test 39," in row.question)
    assert solved == Solved("gsm8k", "In test 39, Ada buys 39 pens at $41 each. What does she pay?",
                            "She pays 39*41 = $1599.", "1,599")  # fmt: skip


def test_a_mixture_has_its_shares_and_no_problem_twice(gsm8k: str) -> None:
    data = mixed_dataset("heldout", 80, gsm8k, seed=3)
    counts = {kind: sum(row["kind"] == kind for row in data) for kind in SHARES}
    assert counts == {"words": 12, "chains": 48, "gsm8k": 20} and len(set(data["question"])) == 80
    assert data["question"] == mixed_dataset("heldout", 80, gsm8k, seed=3)["question"]
    assert data["question"] != mixed_dataset("heldout", 80, gsm8k, seed=4)["question"]
    with pytest.raises(ConfigError, match=r"count=400 asks for 100 of GSM8K's problems and split='heldout' has 40"):
        mixed_dataset("heldout", 400, gsm8k)


def test_documents_are_chats_as_the_template_writes_them(documents: Documents) -> None:
    rng = random.Random(0)
    drawn = [documents.draw(rng) for _ in range(300)]
    for solved, (ids, labels) in zip(drawn, documents.encode(drawn, rng)):
        prompt = encode_chat(documents.tokenizer, chat(solved.question))
        assert ids[: len(prompt)].tolist() == prompt
        said = documents.tokenizer.decode(ids[len(prompt) :])
        assert said.endswith("<|eot_id|>") and number_matches(said.removesuffix("<|eot_id|>"), solved.answer)
        begins = len(documents.head) if solved.kind == "gsm8k" else len(prompt)
        assert (labels[:begins] == IGNORE).all() and (labels[begins:] == ids[begins:]).all()
    assert {solved.kind for solved in drawn} == set(SHARES)
    tagged = sum("<answer>" in response(solved, rng) for solved in drawn)
    assert 250 < tagged < 290


def test_batches_are_full_and_the_same_at_every_read(documents: Documents) -> None:
    data = Batches(documents, tokens=1000, count=3, seed=0)
    batch = data[1]
    assert all(tensor.shape == (1, 1000) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert all(torch.equal(batch[name], tensor) for name, tensor in data[1].items())
    assert not torch.equal(batch["input_ids"], data[2]["input_ids"])
    begins = batch["position_ids"][0] == 0
    assert (batch["input_ids"][0][begins] == documents.head[0]).all() and begins.sum() > 4
    assert len(list(data)) == 3


def test_the_schedule_warms_up_stays_and_goes_down_to_nothing() -> None:
    schedule = Schedule(1.0, warmup=10, steps=100, decay=0.2)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and set(rates[9:80]) == {1.0} and rates[90] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.05)
    schedule.shorten(200)
    assert (schedule.steps, schedule.decay_from) == (100, 80)
    schedule.begin_end(40)
    assert (schedule.steps, schedule.decay_from) == (50, 40)
    schedule.begin_end(45)
    assert (schedule.steps, schedule.decay_from) == (50, 40), "it goes down already"
    again = Schedule(1.0, warmup=10, steps=50, decay=0.2, decay_from=40)
    assert [again.rate(step) for step in range(50)] == [schedule.rate(step) for step in range(50)]


def run(out: Path, gsm8k: str, options: str) -> None:
    sizes = "--device cpu --hidden 64 --head-dim 32 --layers 2 --vocab 600 --tokens-per-step 1024 --problems 6"
    pretrain.main(["--out", str(out), "--gsm8k", gsm8k, *f"{sizes} {options}".split()])


def test_a_run_in_small_gives_a_model_that_the_flow_loads(gsm8k: str, tmp_path: Path) -> None:
    out = tmp_path / "small-model"
    run(out, gsm8k, "--steps 60 --lr 0.01 --warmup 5 --seconds 60 --target 1e-9 --check-every 60")
    record = json.loads((out / "pretraining.json").read_text())
    assert 31 <= record["steps"] <= 60 and record["tokens"] == record["steps"] * 1024
    losses = dict(record["losses"])
    assert losses[25] < losses[10] - 0.3
    assert [step for step, _ in record["sampled_accuracy"]] == [record["steps"]]
    assert f"{record['parameters']:,} parameters" in (out / "README.md").read_text()
    model, tokenizer = FastLanguageModel.from_pretrained(str(out), max_seq_length=256, load_in_4bit=False)
    assert tokenizer.chat_template and len(tokenizer) == 600
    (found,) = model.fast_generate([chat("1 + 1?")], sampling_params=SamplingParams(max_tokens=4, seed=0))
    assert len(found.outputs[0].token_ids) >= 1


def test_the_end_begins_where_the_target_is_reached(
    gsm8k: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.Check, "__call__", lambda self, model: 0.5)
    run(tmp_path, gsm8k, "--steps 40 --target 0.5 --check-every 8")
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert (record["decay_from"], record["steps"]) == (8, 10)
    assert record["sampled_accuracy"] == [[8, 0.5], [10, 0.5]]


def test_a_loss_that_is_no_number_ends_it(gsm8k: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--lr below"):
        run(tmp_path, gsm8k, "--steps 60 --lr inf")
