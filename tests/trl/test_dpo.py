"""TRL's ``DPOTrainer`` as it is, on a Pronghorn model: TRL's own numbers on transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.trl.support import PLAIN_SETTINGS, assert_same_training, fast, plain, trained

NAMES = (
    "loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy",
)  # fmt: skip


def pairs(count: int = 12) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Tom has {i} apples" + " and buys 7 more" * (i % 3) + "?"}],
                "chosen": [{"role": "assistant", "content": f"{i} + 7 = {i + 7}"}],
                "rejected": [{"role": "assistant", "content": f"{i} + 7 is much, namely {i + 8}" * (1 + i % 2)}],
            }
            for i in range(count)
        ]
    )


def trainer(model: Any, tokenizer: Any, folder: Path, **args: Any) -> DPOTrainer:
    settings = {**PLAIN_SETTINGS, "max_steps": 2, "max_length": 256, **args}
    return DPOTrainer(
        model=model, processing_class=tokenizer, train_dataset=pairs(),
        args=DPOConfig(output_dir=str(folder), **settings),
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "weighted": {"use_weighting": True, "learning_rate": 20.0},  # its weights are small
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["32-bit", "4-bit"])
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_metrics_are_trls_on_transformers(tmp_path: Path, case: str, load_in_4bit: bool) -> None:
    if load_in_4bit and case not in ("sigmoid", "weighted"):
        pytest.skip("the base's bits do not meet this setting")
    model, tokenizer = fast(load_in_4bit)
    reference, before = plain(model, tmp_path / "adapter"), trained(model)
    ours = trainer(model, tokenizer, tmp_path / "ours", **CASES[case])
    theirs = trainer(reference, tokenizer, tmp_path / "theirs", **CASES[case])
    ours.train()
    theirs.train()
    assert_same_training(ours, theirs, NAMES, before)
