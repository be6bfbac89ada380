"""``full_determinism=True`` on a GPU: a run equals itself, and resumed it equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pronghorn
from pronghorn import FastLanguageModel, GRPOConfig, GRPOTrainer
from tests.grpo.support import adapter_weights, letters, prompts
from tests.invariant.test_resume import history

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
STEPS, STOP = 6, 3


@pytest.fixture(autouse=True)
def _switch_back() -> Iterator[None]:
    """The switch is the process's: other tests run without it."""
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def build(folder: Path, **settings: Any) -> GRPOTrainer:
    torch.manual_seed(0)
    model, tokenizer = FastLanguageModel.from_pretrained(str(TINY), max_seq_length=256, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=3407)
    args = GRPOConfig(
        output_dir=str(folder), max_steps=STEPS, save_strategy="steps", save_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=8, num_generations=8, max_completion_length=32, steps_per_generation=2,
        optim="paged_adamw_8bit", logging_steps=1, log_completions=True, log_completions_steps=1000, report_to="none",
        full_determinism=True, bf16=True, seed=3, disable_tqdm=True, **settings,
    )  # fmt: skip
    return GRPOTrainer(model, letters, args, prompts(), processing_class=tokenizer)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "beta": 0.04}], ids=str)
def test_resumed_is_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    assert torch.are_deterministic_algorithms_enabled()
    again = build(tmp_path / "again", **settings)
    again.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in range(STOP + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{later}")
    torch.cuda.manual_seed(99)
    cut = build(tmp_path / "cut", **settings)
    cut.train(resume_from_checkpoint=True)
    expected = adapter_weights(whole.model)
    for made, name in ((again, "again"), (cut, "cut")):
        assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(made.model).items()), name
        assert history(tmp_path / name) == history(tmp_path / "whole"), name
