"""TRL's ``RLOOTrainer`` as it is, on a Pronghorn model: TRL's own numbers on transformers and PEFT.

Both generate by ``model.generate``, from torch's generator at the same seed, so equal logits draw equal tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from tests.trl.support import PLAIN_SETTINGS, assert_same_training, fast, plain, trained

NAMES = ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "num_tokens")


def digits(completions: list[Any], **kwargs: Any) -> list[float]:
    return [sum(ch.isdigit() for ch in c[0]["content"]) / (1 + len(c[0]["content"])) for c in completions]


def trainer(model: Any, tokenizer: Any, folder: Path, **args: Any) -> RLOOTrainer:
    rows = [{"prompt": [{"role": "user", "content": f"Tom has {i} apples and buys 7. How many?"}]} for i in range(8)]
    settings = {
        **PLAIN_SETTINGS, "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 10, **args,
    }  # fmt: skip
    return RLOOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=digits, train_dataset=Dataset.from_list(rows),
        args=RLOOConfig(output_dir=str(folder), **settings),
    )  # fmt: skip


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["32-bit", "4-bit"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_losses_gradients_and_metrics_are_trls_on_transformers(
    tmp_path: Path, load_in_4bit: bool, checkpointing: bool
) -> None:
    """``recomputed`` on Pronghorn's side alone: transformers' ``generate`` on a checkpointed model in training mode
    answers wrong, so it cannot be the oracle there; Pronghorn's is right in any mode."""
    model, tokenizer = fast(load_in_4bit, use_gradient_checkpointing=True)
    reference, before = plain(model, tmp_path / "adapter"), trained(model)
    ours = trainer(model, tokenizer, tmp_path / "ours", gradient_checkpointing=checkpointing)
    ours.train()
    theirs = trainer(reference, tokenizer, tmp_path / "theirs", gradient_checkpointing=False)
    theirs.train()
    assert_same_training(ours, theirs, NAMES, before, rel=2e-5)
