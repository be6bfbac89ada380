"""NaN and inf in, NaN and inf reported: no mask, chunk, kernel or packing hides a broken number, and none leaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from benchmarks.equal_models import EqualModels, equal_models, gradients, loss_of, use_plan
from pronghorn.grpo.batch import pack
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.rollouts import Rollout
from pronghorn.models import unwrap
from tests.grpo.support import config
from tests.helpers import tiny_config, tiny_tokenizer

VOCABULARY = 384
BROKEN = 7
"""A token whose embedding, or whose row of the head, is made NaN or inf; no test draws it by chance."""


def made(dtype: torch.dtype = torch.float32, device: str = "cpu", nf4: bool = False, **overrides: Any) -> EqualModels:
    torch.manual_seed(0)
    return equal_models(LlamaForCausalLM(tiny_config(**overrides)).to(device), dtype, nf4, r=4)


def batch(lengths: list[int], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Rows padded on the right; the first three tokens of each are no labels."""
    ids = torch.randint(10, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {k: t.to(device) for k, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def loss(models: EqualModels, rows: dict[str, torch.Tensor], **changes: torch.Tensor) -> torch.Tensor:
    """Ours, detached."""
    return loss_of(models.ours, {**rows, **changes}).detach()


def put(ids: torch.Tensor, row: int, at: int) -> torch.Tensor:
    changed = ids.clone()
    changed[row, at] = BROKEN
    return changed


@torch.no_grad()
def check_inputs(models: EqualModels, rows: dict[str, torch.Tensor], value: float) -> None:
    """A broken embedding shows wherever a label sees it, and nowhere else."""
    base, lengths = unwrap(models.ours), rows["attention_mask"].sum(-1).tolist()
    base.model.embed_tokens.weight.data[BROKEN] = value
    ids = rows["input_ids"]
    assert loss(models, rows).isfinite()  # nothing uses it
    for row, length in enumerate(lengths):
        for at in {0, 2, length // 2, length - 2}:  # before the labels, among them, the last that predicts
            assert loss(models, rows, input_ids=put(ids, row, at)).isnan(), (row, at)
        if length < ids.shape[1]:  # padding is no token
            assert loss(models, rows, input_ids=put(ids, row, length)).isfinite(), row
    hidden = rows["labels"].clone()
    hidden[0] = -100  # a row without labels adds nothing to the loss, whatever is in it
    assert loss(models, rows, input_ids=put(ids, 0, 0), labels=hidden).isfinite()


@torch.no_grad()
def check_weights(models: EqualModels, rows: dict[str, torch.Tensor]) -> None:
    """One NaN in the head's row of a token that is no target, or in one adapter, shows."""
    base = unwrap(models.ours)
    for weight in (base.lm_head.weight, *(p for n, p in base.named_parameters() if "layers.1.mlp.down_proj.lora" in n)):
        kept = weight.data[BROKEN % weight.shape[0], 1].clone()
        weight.data[BROKEN % weight.shape[0], 1] = float("nan")
        assert loss(models, rows).isnan()
        weight.data[BROKEN % weight.shape[0], 1] = kept
        assert loss(models, rows).isfinite()


def check_gradients(models: EqualModels, rows: dict[str, torch.Tensor], plan: Any) -> None:
    """A loss that overflows in backward gives a gradient norm that is not finite, as on HF + PEFT."""
    use_plan(models.ours, plan)
    for model, autocast in ((models.ours, None), (models.peer, models.autocast)):
        for scale, finite in ((1.0, True), (float("inf"), False)):
            model.zero_grad()
            (loss_of(model, rows, autocast) * scale).backward()
            norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            assert bool(norm.isfinite()) == finite, (type(model), scale, norm)
    base = unwrap(models.ours)
    base.model.embed_tokens.weight.data[BROKEN] = float("nan")
    (found,) = gradients(models.ours, [{**rows, "input_ids": put(rows["input_ids"], 0, 0)}])
    assert all(g.isnan().any() for g in found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_embedding_shows_in_the_loss(value: float) -> None:
    check_inputs(made(), batch([21, 9, 40]), value)


def test_a_broken_weight_shows_in_the_loss() -> None:
    check_weights(made(nf4=True), batch([21, 9, 40]))


@pytest.mark.parametrize("plan", ["off", "memory"])
@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_a_broken_gradient_shows_in_its_norm(nf4: bool, plan: str) -> None:
    check_gradients(made(nf4=nf4), batch([21, 9, 40]), plan)


def test_a_norm_beyond_float32_is_inf() -> None:
    """Finite gradients of 1e30 have a norm that float32 does not hold: inf, and no NaN."""
    models = made()
    (loss_of(models.ours, batch([21, 9])) * 1e32).backward()
    trained = [p for p in models.ours.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert torch.nn.utils.clip_grad_norm_(trained, 1.0).isposinf()


def grpo_step(models: EqualModels, folder: Path, advantage: float, device: str = "cpu", prompt: int = 10) -> Any:
    """(loss, gradient norm) of a group of three behind one prompt, the second with this advantage."""
    rollouts = [
        Rollout([prompt, 11, 12], [20 + i, 30, 40 + i], [-5.0] * 3, advantage=advantage if i == 1 else 0.5)
        for i in range(3)
    ]
    step = LossStep(config(folder), models.ours)
    models.ours.zero_grad()
    value = step(pack(rollouts, device, step.dtype), window_of(rollouts), Metrics())
    value.backward()
    trained = [p for p in models.ours.parameters() if p.requires_grad]
    return value.detach(), torch.nn.utils.clip_grad_norm_(trained, 1.0)


def check_grpo(models: EqualModels, folder: Path, device: str = "cpu") -> None:
    value, norm = grpo_step(models, folder, -0.5, device)
    assert value.isfinite() and norm.isfinite()
    for advantage in (float("nan"), float("inf")):
        value, norm = grpo_step(models, folder, advantage, device)
        assert not value.isfinite() and not norm.isfinite()
    unwrap(models.ours).model.embed_tokens.weight.data[BROKEN] = float("nan")
    value, norm = grpo_step(models, folder, -0.5, device, prompt=BROKEN)
    assert value.isnan() and norm.isnan()


def test_grpo_shows_them_too(tmp_path: Path) -> None:
    check_grpo(made(), tmp_path)


@pytest.mark.parametrize("broken", [False, True])
def test_the_trainer_reports_them(tmp_path: Path, broken: bool) -> None:
    """TRL's trainer logs NaN for the loss and the norm of a step that has one (transformers filters losses by default,
    which the setting turns off; the norm it never filters)."""
    model = made().ours
    unwrap(model).pronghorn_state.tokenizer = tiny_tokenizer()
    unwrap(model).model.embed_tokens.weight.data[BROKEN] = float("nan")
    rows = [{"input_ids": [10 + i, 11, 12, 13]} for i in range(3)]
    rows += [{"input_ids": [10, BROKEN if broken else 11, 12, 13]}]
    args = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, bf16=False, logging_nan_inf_filter=False, use_cpu=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, processing_class=tiny_tokenizer(), train_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert math.isnan(float(log["loss"])) == math.isnan(float(log["grad_norm"])) == broken
