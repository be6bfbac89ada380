"""TRL's ``RewardTrainer`` as it is, on a Pronghorn classifier (``num_labels=1``): TRL's own numbers on transformers and
PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from pronghorn import FastLanguageModel, SamplingParams
from pronghorn.config.errors import ConfigError
from pronghorn.models import unwrap
from tests.helpers import perturb, tiny_llama
from tests.trl.support import PLAIN_SETTINGS, TINY, VOCABULARY, assert_same_training, copy_dequantized, trained

NAMES = ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens")


def scorer(load_in_4bit: bool = False, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(TINY), max_seq_length=256, load_in_4bit=load_in_4bit, num_labels=1
    )
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    perturb(model)
    return model, tokenizer


def plain(model: Any, folder: Path) -> Any:
    """The same base, adapter and head in plain transformers and PEFT."""
    model.save_lora(str(folder))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = model.config.pad_token_id
    copy_dequantized(unwrap(model), base)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def pairs(count: int = 12) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Tom has {i} apples and buys 7 more?"}],
                "chosen": [{"role": "assistant", "content": f"{i} + 7 = {i + 7}"}],
                "rejected": [{"role": "assistant", "content": f"{i} + 7 is much, namely {i + 8}" * (1 + i % 2)}],
            }
            for i in range(count)
        ]
    )


def trainer(model: Any, tokenizer: Any, folder: Path, **args: Any) -> RewardTrainer:
    settings = {**PLAIN_SETTINGS, "max_steps": 3, "max_length": 256, **args}
    return RewardTrainer(
        model=model, processing_class=tokenizer, train_dataset=pairs(),
        args=RewardConfig(output_dir=str(folder), **settings),
    )  # fmt: skip


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["32-bit", "4-bit"])
@pytest.mark.parametrize("args", [{}, {"center_rewards_coefficient": 0.1}], ids=["plain", "centered"])
def test_losses_gradients_and_metrics_are_trls_on_transformers(
    tmp_path: Path, load_in_4bit: bool, args: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = scorer(load_in_4bit)
    reference, before = plain(model, tmp_path / "adapter"), trained(model)
    assert any("score" in name for name in before), "the head trains"
    ours = trainer(model, tokenizer, tmp_path / "ours", **args)
    capsys.readouterr()
    ours.train()
    assert "slower" not in capsys.readouterr().out, "the packed walk ran"
    theirs = trainer(reference, tokenizer, tmp_path / "theirs", **args)
    theirs.train()
    # scores are raw sums of hidden states, and each step's update carries their rounding on
    assert_same_training(ours, theirs, NAMES, before, rel=5e-5)


def test_full_fine_tuning_from_the_same_head(tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(TINY), max_seq_length=256, load_in_4bit=False, full_finetuning=True, num_labels=1
    )
    model.save_pretrained(tmp_path / "start")
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float32)
    before = trained(model)
    ours = trainer(model, tokenizer, tmp_path / "ours", learning_rate=0.05)
    theirs = trainer(reference, tokenizer, tmp_path / "theirs", learning_rate=0.05)
    ours.train()
    theirs.train()
    # scores are raw sums of hidden states, and each step's update carries their rounding on
    assert_same_training(ours, theirs, NAMES, before, rel=5e-5)
    model.save_pretrained(tmp_path / "end")
    tokenizer.save_pretrained(tmp_path / "end")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "end"), load_in_4bit=False, num_labels=1)
    assert torch.equal(again.score.weight, model.score.weight)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_transformers_at_the_last_real_token(tmp_path: Path, side: str) -> None:
    model, _ = scorer()
    reference = plain(model, tmp_path / "adapter").eval()
    model.eval()
    pad = model.config.pad_token_id
    ids = torch.randint(6, VOCABULARY, (3, 9))
    ids[ids == pad] = 7
    mask = torch.ones_like(ids)
    hidden = slice(0, 4) if side == "left" else slice(5, 9)
    ids[1, hidden], mask[1, hidden] = pad, 0
    labels = torch.tensor([0.5, -1.0, 2.0])
    for given in ({"attention_mask": mask}, {"attention_mask": mask, "labels": labels}, {}):
        got, wanted = model(input_ids=ids, **given), reference(input_ids=ids, **given)
        if given or side == "right":
            torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        if "labels" in given:
            torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)


def test_an_end_that_is_also_the_padding_is_passed_over_as_transformers_does(tmp_path: Path) -> None:
    model, tokenizer = scorer()
    reference = plain(model, tmp_path / "adapter").eval()
    model.eval()
    model.config.pad_token_id = reference.config.pad_token_id = tokenizer.eos_token_id
    ids = torch.randint(6, VOCABULARY, (2, 6))
    ids[:, -1] = tokenizer.eos_token_id
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, reference(input_ids=ids).logits,
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert model(inputs_embeds=torch.zeros(1, 3, 192)).logits.shape == (1, 1)  # transformers' own


def test_what_a_classifier_cannot_do_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model, tokenizer = scorer()
    with pytest.raises(ConfigError, match="generates none"):
        model.fast_generate(["hello"], SamplingParams(max_tokens=2))
    with pytest.raises(ConfigError, match="'lora'"):
        model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    with pytest.raises(ConfigError, match="num_labels=0"):
        FastLanguageModel.from_pretrained(str(TINY), num_labels=0)
    with pytest.raises(ConfigError, match="fast_inference=True with num_labels=1"):
        FastLanguageModel.from_pretrained(str(TINY), num_labels=1, fast_inference=True)
    language, tokenizer = FastLanguageModel.from_pretrained(str(TINY), load_in_4bit=False)
    with pytest.raises(ValueError, match="num_labels"):  # TRL's own message names the setting that loads one
        trainer(FastLanguageModel.get_peft_model(language, r=4), tokenizer, tmp_path)
    whole, _ = FastLanguageModel.from_pretrained(str(TINY), load_in_4bit=False, num_labels=1)
    whole.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification; pass num_labels="):
        FastLanguageModel.from_pretrained(str(tmp_path / "saved"), load_in_4bit=False)


def test_heads_repeat_with_random_state_and_an_untied_head_is_not_needed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)  # its files hold lm_head.weight
    heads = [
        FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, num_labels=3, random_state=seed)[0]
        for seed in (1, 1, 2)
    ]
    assert heads[0].score.weight.shape == (3, 64)
    assert torch.equal(heads[0].score.weight, heads[1].score.weight)
    assert not torch.equal(heads[0].score.weight, heads[2].score.weight)
