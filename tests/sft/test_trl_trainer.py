"""TRL's ``SFTTrainer`` as it is, on a Pronghorn model: TRL's own numbers on transformers and PEFT, and no logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTConfig, SFTTrainer

import pronghorn
from pronghorn import FastLanguageModel
from pronghorn.models import unwrap
from tests.trl.support import fast

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
VOCABULARY, HIDDEN = 850, 192


def chats(count: int = 24) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Tom has {i} apples" + " and buys 7 more" * (i % 4) + "?"}],
                "completion": [{"role": "assistant", "content": f"{i} + 7 = {i + 7}"}],
            }
            for i in range(count)
        ]
    )


def plain(model: Any, folder: Path) -> Any:
    """The same model and adapter in plain transformers and PEFT."""
    model.save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def trainer(model: Any, tokenizer: Any, folder: Path, data: Dataset | None = None, **args: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.02,
        "max_length": 256, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, **args,
    }  # fmt: skip
    return SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=data or chats(), eval_dataset=chats(5),
        args=SFTConfig(output_dir=str(folder), **settings),
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "whole-sequence": {"completion_only_loss": False},
    "dft": {"loss_type": "dft"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_metrics_and_weights_are_trls_on_transformers(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = fast()
    reference = plain(model, tmp_path / "adapter")
    capsys.readouterr()
    ours = trainer(model, tokenizer, tmp_path / "ours", **CASES[case])
    ours.train()
    evaluated = ours.evaluate()
    assert "slower" not in capsys.readouterr().out
    theirs = trainer(reference, tokenizer, tmp_path / "theirs", **CASES[case])
    theirs.train()
    wanted = theirs.evaluate()
    for step in range(3):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            expected = theirs.state.log_history[step][name]
            assert ours.state.log_history[step][name] == pytest.approx(expected, rel=1e-5), (step, name)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert evaluated[name] == pytest.approx(wanted[name], rel=1e-5), name
    weights = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-5, msg=name)


class Widest(TorchDispatchMode):
    """The most logits that any operation gave out at once."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.shape[-1:] == (VOCABULARY,) and t.shape != (HIDDEN, VOCABULARY):
                self.logits = max(self.logits, t.numel())
        return out


@pytest.mark.parametrize("packing", [False, True])
def test_no_logits_of_the_batch_ever_exist(tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.kernels import head

    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 128 * VOCABULARY)
    model, tokenizer = fast()
    made = trainer(
        model, tokenizer, tmp_path, chats(48), packing=packing, max_steps=1, completion_only_loss=False,
        per_device_train_batch_size=4 if packing else 16,
    )  # fmt: skip
    tokens = next(iter(made.get_train_dataloader()))["input_ids"].numel()
    assert tokens > 4 * 128
    with Widest() as widest:
        made.train()
    assert 0 < widest.logits <= 128 * VOCABULARY


def test_4_bit_adapters_stay_float32_masters_and_full_fine_tuning_is_answered_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = fast(load_in_4bit=True)
    made = trainer(model, tokenizer, tmp_path, max_steps=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    made.train()
    whole, tokenizer = FastLanguageModel.from_pretrained(
        str(TINY), max_seq_length=256, load_in_4bit=False, full_finetuning=True
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    logs = []
    for each, name in ((whole, "ours"), (reference, "theirs")):
        made = trainer(each, tokenizer, tmp_path / name, max_steps=2)
        made.train()
        logs.append([(log["loss"], log["grad_norm"], log["mean_token_accuracy"]) for log in made.state.log_history[:2]])
    assert logs[0] == [pytest.approx(step, rel=1e-5) for step in logs[1]]
    assert "TRL's own head" not in capsys.readouterr().out


def test_what_cannot_be_answered_goes_trls_way_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = fast()
    made = trainer(model, tokenizer, tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    capsys.readouterr()
    fast_loss = made.compute_loss(model, dict(batch))
    assert capsys.readouterr().out == ""
    slow_loss = made.compute_loss(model, {**batch, "output_hidden_states": True})
    torch.testing.assert_close(slow_loss, fast_loss, rtol=1e-5, atol=0)
    assert "slower, because of output_hidden_states=True" in capsys.readouterr().out
    made.compute_loss(model, {**batch, "output_hidden_states": True})
    assert capsys.readouterr().out == ""  # once


def test_other_questions_than_sft_trainers_are_trls_to_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """DPO and the like ask at other temperatures or for other statistics, which are bound in TRL's forward."""
    from trl.trainer.utils import add_fused_lm_head

    model, _ = fast()
    ids = torch.randint(6, VOCABULARY, (2, 9))
    add_fused_lm_head(unwrap(model), temperature=0.5, outputs=("log_probs", "entropy", "is_top1"))
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert "temperature=0.5" in capsys.readouterr().out
    log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1] / 0.5, dim=-1)
    wanted = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, wanted, rtol=1e-4, atol=1e-4)


def test_scores_of_left_padded_and_unlabelled_rows() -> None:
    model, _ = fast()
    model.eval()
    ids = torch.randint(6, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = labels[1, 2] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, token_scores=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1], -1)
    shown = labels[:, 1:] != -100
    wanted = log_p.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    assert torch.equal(out.label_mask, shown)
    assert torch.equal(out.is_top1[shown], log_p.argmax(-1)[shown] == labels[:, 1:][shown])
    torch.testing.assert_close(out.log_probs, wanted.masked_fill(~shown, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.entropy, (-(log_p.exp() * log_p).sum(-1)).masked_fill(~shown, 0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(out.loss, -wanted[shown].mean(), rtol=1e-5, atol=1e-5)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), token_scores=True)
    (nothing.log_probs.sum() + nothing.loss).backward()
    assert float(nothing.loss) == 0


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_an_adapter_that_trl_adds_itself_is_right_and_said_to_be_slower(
    tmp_path: Path, task: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type=task)
    ours, tokenizer = FastLanguageModel.from_pretrained(str(TINY), max_seq_length=256, load_in_4bit=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    losses = []
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        made = SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=chats(), peft_config=lora,
            args=SFTConfig(str(tmp_path / name), max_steps=2, logging_steps=1, bf16=False, use_cpu=True, report_to=[]),
        )  # fmt: skip
        made.train()
        losses.append([log["loss"] for log in made.state.log_history[:2]])
        assert ("because of Linear in place of" in capsys.readouterr().out) == (name == "ours")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_run_goes_on_exactly_and_its_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model, tokenizer = fast()
        made = trainer(model, tokenizer, tmp_path, **saving)
        made.train(resume_from_checkpoint=resume)
        runs.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(parameter, runs[1][name]) for name, parameter in runs[0].items())
    made.save_model(str(tmp_path / "final"))
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    plain_model = peft.PeftModel.from_pretrained(base, tmp_path / "final").eval()
    ids = torch.randint(6, VOCABULARY, (1, 9))
    assert torch.equal(plain_model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
