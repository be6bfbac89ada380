"""SFT's step does not depend on how its examples are laid out: accumulated, batched, padded or packed, one gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pronghorn import FastLanguageModel
from pronghorn.sft.collator import PackingCollator
from tests.helpers import perturb, tiny_llama

LENGTHS = (3, 17, 9, 30, 5, 12, 2, 21)


def examples() -> Dataset:
    """Eight rows of unlike length; a third of each, one token at least, is not learned, as a prompt is not."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(6, 384, (n,), generator=generator).tolist() for n in LENGTHS]
    hidden = [max(1, n // 3) for n in LENGTHS]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * first + row[first:] for row, first in zip(ids, hidden)]}
    )


def trainer(kind: str, model: Any, tokenizer: Any, folder: Path, batch: int, accumulation: int) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "bf16": False, "remove_unused_columns": kind.startswith("trl"), "disable_tqdm": True,
    }  # fmt: skip
    shared = {"model": model, "processing_class": tokenizer, "train_dataset": examples()}
    if kind == "trl":
        return SFTTrainer(args=SFTConfig(max_length=64, **settings), **shared)
    if kind == "trl-packed":
        return SFTTrainer(args=SFTConfig(max_length=40, packing=True, **settings), **shared)
    if kind == "trl-padding-free":
        return SFTTrainer(args=SFTConfig(max_length=None, padding_free=True, **settings), **shared)
    collator = PackingCollator() if kind == "trainer-packed" else transformers.DataCollatorForSeq2Seq(tokenizer)
    return transformers.Trainer(args=transformers.TrainingArguments(**settings), data_collator=collator, **shared)


def first_step(folder: Path, kind: str, batch: int, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The logged loss and the gradients with which the first optimizer step would be made."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, dtype="float64"
    )
    model = FastLanguageModel.get_peft_model(model, r=3)
    perturb(model)
    gradients: dict[str, torch.Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    made = trainer(kind, model, tokenizer, folder / "out", batch, accumulation)
    made.add_callback(Keep())
    made.train()
    return made.state.log_history[0]["loss"], gradients


@pytest.mark.parametrize(
    ("kind", "batch", "accumulation"),
    [
        ("trl", 1, 8), ("trl", 2, 4), ("trl", 8, 1), ("trl-packed", 8, 1), ("trl-padding-free", 4, 2),
        ("trainer", 1, 8), ("trainer-packed", 8, 1), ("trainer-packed", 4, 2),
    ],
)  # fmt: skip
def test_one_gradient_whatever_the_layout(
    tmp_path: Path, kind: str, batch: int, accumulation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama(tmp_path, extra_tokens=("<|finetune_right_pad_id|>",))
    wanted_loss, wanted = first_step(folder, "trainer", 8, 1)
    loss, gradients = first_step(folder, kind, batch, accumulation)
    assert "slower" not in capsys.readouterr().out
    assert loss == pytest.approx(wanted_loss, rel=1e-6)  # the trainer adds losses up in float32
    assert gradients.keys() == wanted.keys() and len(wanted) == 28
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert max(g.abs().max() for g in wanted.values()) > 1e-3


def test_the_step_is_transformers_own(tmp_path: Path) -> None:
    """The reference that the layouts above are compared with: the mean over all labels of plain transformers."""
    folder = tiny_llama(tmp_path, extra_tokens=("<|finetune_right_pad_id|>",))
    loss, gradients = first_step(folder, "trainer", 1, 8)
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=False, dtype="float64")
    model = FastLanguageModel.get_peft_model(model, r=3)
    perturb(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in examples():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]  # without labels: transformers' own walk
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-6)  # its norms compute in float32
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
