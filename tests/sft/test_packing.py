"""Packed rows: the same loss and the same gradients as one row at a time, whoever computes them."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from pronghorn import models
from pronghorn.config.errors import ConfigError
from pronghorn.sft.collator import PackingCollator
from pronghorn.sft.masks import IGNORE
from pronghorn.sft.packing import bins, concatenate
from tests.helpers import tiny_config

Examples = list[dict[str, list[int]]]


@pytest.fixture
def examples() -> Examples:
    rng = random.Random(0)
    rows = []
    for length in (5, 1, 9, 3, 12):
        ids = [rng.randrange(6, 384) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [i if rng.random() < 0.6 else IGNORE for i in ids]})
    return rows


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


def row_by_row(model: LlamaForCausalLM, examples: Examples) -> torch.Tensor:
    """Mean loss over all labelled tokens by plain transformers, each example alone."""
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        targets = torch.tensor(example["labels"][1:], dtype=torch.int64)
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        count += int((targets != IGNORE).sum())
    return total / count


def gradients(model: LlamaForCausalLM, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_fields(examples: Examples) -> None:
    packed = concatenate(examples)
    assert {key: list(value.shape) for key, value in packed.items()} == dict.fromkeys(packed, [1, 30])
    assert all(value.dtype == torch.int64 for value in packed.values())
    assert packed["input_ids"][0].tolist() == [i for e in examples for i in e["input_ids"]]
    assert packed["position_ids"][0].tolist() == [p for e in examples for p in range(len(e["input_ids"]))]
    starts = [0, 5, 6, 15, 18]
    assert packed["labels"][0, starts].tolist() == [IGNORE] * 5
    assert packed["labels"][0, 1:5].tolist() == examples[0]["labels"][1:]


def test_labels_default_to_the_ids(examples: Examples) -> None:
    labels = concatenate([{"input_ids": e["input_ids"]} for e in examples])["labels"][0].tolist()
    assert labels == [i for e in examples for i in [IGNORE, *e["input_ids"][1:]]]


@pytest.mark.parametrize("path", ["pronghorn", "transformers"])
def test_packed_equals_row_by_row(model: LlamaForCausalLM, examples: Examples, path: str) -> None:
    expected = row_by_row(model, examples)
    expected_grads = gradients(model, expected)
    packed = concatenate(examples)
    if path == "pronghorn":
        models.attach(model)
    # transformers tells packed rows apart only without a cache, which it makes by default.
    loss = model(**packed, num_items_in_batch=(packed["labels"] != IGNORE).sum(), use_cache=False).loss
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(model, loss), expected_grads):
        assert_close(got, want, rtol=1e-4, atol=1e-6)
    # The oracle can tell: positions that do not start again mix the rows.
    mixed = {**packed, "position_ids": torch.arange(30)[None]}
    assert abs((model(**mixed, use_cache=False).loss - expected).item()) > 1e-3


def test_the_order_of_the_rows_changes_nothing(model: LlamaForCausalLM, examples: Examples) -> None:
    models.attach(model)
    with torch.no_grad():
        assert_close(model(**concatenate(examples)).loss, model(**concatenate(examples[::-1])).loss)


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (2, 3), (1, 6)])
def test_trainer_weighs_tokens_however_the_batch_is_cut(
    model: LlamaForCausalLM, examples: Examples, batch: int, accumulation: int, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    """One SGD step by `transformers.Trainer` moves the weights by lr times the gradient of the token mean."""
    examples = [*examples, {"input_ids": [7, 8, 9, 10], "labels": [IGNORE, 8, 9, IGNORE]}]
    before = [p.detach().clone() for p in model.parameters()]
    expected = gradients(model, row_by_row(model, examples))
    models.attach(model)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch, max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=examples, data_collator=PackingCollator()).train()
    for old, new, grad in zip(before, model.parameters(), expected):
        assert_close(new.detach(), old - 0.1 * grad, rtol=1e-5, atol=1e-6)


def test_bins_hold_each_example_once_within_capacity() -> None:
    rng = random.Random(1)
    lengths = [rng.randrange(1, 100) for _ in range(300)]
    rows = bins(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128 + 1
    assert bins(lengths, 128) == rows
    assert bins([], 8) == [] and bins([3, 5, 5, 3], 8) == [[1, 0], [2, 3]]


def test_what_is_refused(examples: Examples) -> None:
    with pytest.raises(ConfigError, match="capacity=8 is less than the 12 tokens of example 4"):
        bins([len(e["input_ids"]) for e in examples], 8)
    with pytest.raises(ConfigError, match="examples is empty"):
        concatenate([])
    with pytest.raises(ConfigError, match="example 1 has no tokens"):
        concatenate([examples[0], {"input_ids": []}])
    with pytest.raises(ConfigError, match="example 0 has 2 input_ids but 1 labels"):
        concatenate([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ConfigError, match="max_tokens=29 is less than the 30 tokens of a batch of 5"):
        PackingCollator(max_tokens=29)(examples)
    assert PackingCollator(max_tokens=30)(examples)["input_ids"].shape == (1, 30)
