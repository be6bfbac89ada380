"""float16 on a GPU under accelerate's loss scaler, as TRL's ``SFTTrainer(fp16=True)`` trains on cards without bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import pronghorn
from pronghorn import FastLanguageModel

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"


def chats() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Tom has {i} apples and buys 7 more. How many?"}],
                "completion": [{"role": "assistant", "content": f"{i} + 7 = {i + 7}"}],
            }
            for i in range(64)
        ]
    )


def trainer(folder: Path, dtype: torch.dtype, load_in_4bit: bool, **options: Any) -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(TINY), max_seq_length=128, load_in_4bit=load_in_4bit, dtype=dtype
    )
    model = FastLanguageModel.get_peft_model(model, r=8, **options)
    args = SFTConfig(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=1,
        fp16=dtype == torch.float16, bf16=False, report_to=[], save_strategy="no", max_length=128, disable_tqdm=True,
    )  # fmt: skip
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=chats(), args=args)


def losses(made: Any) -> list[float]:
    return [log["loss"] for log in made.state.log_history if "loss" in log]


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.01}], ids=str)
@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "nf4"])
def test_the_loss_falls_as_in_float32(tmp_path: Path, load_in_4bit: bool, options: dict[str, Any]) -> None:
    curves = []
    for dtype in (torch.float16, torch.float32):
        made = trainer(tmp_path, dtype, load_in_4bit, **options)
        made.train()
        assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
        assert (made.accelerator.scaler is not None) == (dtype == torch.float16)
        curves.append(losses(made))
    half, full = curves
    assert full[-1] < 0.6 * full[0]
    assert half[0] == pytest.approx(full[0], rel=0.01)
    assert half[-1] < 0.7 * half[0]
    # The scaler may skip a step or two until its scale fits; the last losses are those of a curve that flattens. With
    # dropout the masks differ, and the layers' own modules sum adapter gradients in 16 bits, so that it skips more.
    assert sum(half[-5:]) == pytest.approx(sum(full[-5:]), rel=0.75 if "lora_dropout" in options else 0.25)


class Overflow(transformers.TrainerCallback):
    """Before step 5 the scale is set so high that the gradients overflow; keeps what that step did."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.before: dict[str, torch.Tensor] = {}
        self.unchanged: bool | None = None
        self.scales: list[float] = []

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            self.trainer.accelerator.scaler.update(2.0**70)
            self.before = self._weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.scales.append(self.trainer.accelerator.scaler.get_scale())
        if state.global_step == 6:
            self.unchanged = all(torch.equal(p, self.before[n]) for n, p in self._weights().items())
            self.trainer.accelerator.scaler.update(2.0**12)


def test_a_step_that_overflows_is_skipped_and_the_scale_falls(tmp_path: Path) -> None:
    made = trainer(tmp_path, torch.float16, True)
    watch = Overflow()
    watch.trainer = made
    made.add_callback(watch)
    made.train()
    assert watch.unchanged
    assert watch.scales[5] == 2.0**69
    norms = [log["grad_norm"] for log in made.state.log_history if "grad_norm" in log]
    assert not torch.isfinite(torch.tensor(float(norms[5])))  # reported
    assert all(p.isfinite().all() for p in made.model.parameters() if p.requires_grad)
    assert losses(made)[-1] < losses(made)[0]


def test_full_fine_tuning_in_float16_is_refused() -> None:
    with pytest.raises(pronghorn.ConfigError, match="loss scaler refuses"):
        FastLanguageModel.from_pretrained(str(TINY), load_in_4bit=False, full_finetuning=True, dtype=torch.float16)
