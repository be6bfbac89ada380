"""TRL's ``SFTTrainer`` on a 4-bit Pronghorn model, against transformers + PEFT on the same weights dequantized.

The 32-bit model, packing, losses and what TRL's head is asked: ``tests/sft/test_trl_trainer.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, SFTTrainer

from tests.sft.test_trl_trainer import chats
from tests.trl.support import PLAIN_SETTINGS, assert_same_training, fast, plain, trained


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["32-bit", "4-bit"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_losses_gradients_and_metrics_are_trls_on_transformers(
    tmp_path: Path, packing: bool, load_in_4bit: bool
) -> None:
    model, tokenizer = fast(load_in_4bit)
    reference, before = plain(model, tmp_path / "adapter"), trained(model)

    def trainer(each: Any, name: str) -> SFTTrainer:
        settings = {**PLAIN_SETTINGS, "max_steps": 3, "max_length": 256, "packing": packing}
        return SFTTrainer(
            model=each, processing_class=tokenizer, train_dataset=chats(48),
            args=SFTConfig(output_dir=str(tmp_path / name), **settings),
        )  # fmt: skip

    ours, theirs = trainer(model, "ours"), trainer(reference, "theirs")
    ours.train()
    theirs.train()
    assert_same_training(ours, theirs, ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"), before)
