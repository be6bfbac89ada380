"""SFT in bfloat16 on a GPU: base weights and every slower kind of adapter, no further from float32 than HF and PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import pronghorn
from pronghorn import FastLanguageModel
from pronghorn.lora.config import register
from pronghorn.lora.masters import keep_masters
from pronghorn.models import attach

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(**overrides: Any) -> Any:
    """A Llama whose weights are bfloat16 numbers, in float32, on the GPU."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1003, "pad_token_id": 0, **overrides,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    for parameter in model.parameters():
        parameter.data = (parameter.data + torch.randn_like(parameter) * 0.02).bfloat16().float()
    return model.cuda()


def batch() -> dict[str, torch.Tensor]:
    """Three rows of unlike length, padded on the right; the first token of each is no label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1003, (3, 300), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 120:] = mask[2, 257:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {name: t.cuda() for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    loss = model(**batch()).loss
    loss.backward()
    return float(loss), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def assert_no_further(ours: Any, theirs: Any, truth: Any, slack: float = 1.05) -> None:
    (loss, got), (peer_loss, peer), (true_loss, true) = (gradients(model) for model in (ours, theirs, truth))
    assert abs(loss - true_loss) <= abs(peer_loss - true_loss) + 2e-3
    assert got.keys() == true.keys() and got
    size = sum(t.square().sum() for t in true.values()).sqrt()
    errors = [
        float(sum((each[name] - true[name]).square().sum() for name in true).sqrt() / size) for each in (got, peer)
    ]
    assert errors[0] <= slack * errors[1] + 1e-4, errors
    for name in true:
        own = [float((each[name] - true[name]).norm() / true[name].norm().clamp_min(1e-12)) for each in (got, peer)]
        assert own[0] <= 1.25 * slack * own[1] + 5e-3, (name, own)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": True},
    ],
    ids=["llama", "biases", "gelu", "tied"],
)
def test_base_weights_train(overrides: dict[str, Any]) -> None:
    truth = base(**overrides)
    theirs = copy.deepcopy(truth).bfloat16()
    ours = copy.deepcopy(theirs)
    attach(ours)
    assert_no_further(ours, theirs, truth)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
    ],
    ids=["lora", "rslora", "dora", "bias", "saved", "embeddings-and-head", "dora-head"],
)
def test_adapters_train(lora: dict[str, Any]) -> None:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": LINEARS, "init_lora_weights": False, **lora}
    plain = base(attention_bias="bias" in lora).requires_grad_(False)
    half = copy.deepcopy(plain).bfloat16()
    fast = copy.deepcopy(half)
    attach(fast)
    models = []
    for model, config in ((fast, register), (half, lambda c: c), (plain, lambda c: c)):
        torch.manual_seed(2)
        models.append(peft.get_peft_model(model, config(peft.LoraConfig(**settings))))
    ours, theirs, truth = models
    keep_masters(ours)
    for model in (theirs, truth):  # the same masters
        model.load_state_dict(ours.state_dict())
    # As PEFT's users run float32 adapters over a 16-bit base.
    theirs.forward = torch.autocast("cuda", torch.bfloat16)(theirs.forward)
    # A head under DoRA is one weight here, rounded once more than PEFT's two products are.
    merged = lora.get("use_dora") and lora.get("target_modules") == ["lm_head"]
    assert_no_further(ours, theirs, truth, slack=1.5 if merged else 1.05)


@pytest.mark.parametrize("packing", [False, True])
def test_trls_trainer_learns_as_on_transformers(tmp_path: Path, packing: bool) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tom has {i} apples" + " and buys 7 more" * (i % 4) + "?"}],
            "completion": [{"role": "assistant", "content": f"{i} + 7 = {i + 7}"}],
        }
        for i in range(64)
    ]
    curves = []
    for load_in_4bit, kind in ((False, "ours"), (True, "ours"), (False, "theirs")):
        model, tokenizer = FastLanguageModel.from_pretrained(str(TINY), max_seq_length=256, load_in_4bit=load_in_4bit)
        if kind == "ours":
            model = FastLanguageModel.get_peft_model(model, r=8)
        else:
            torch.manual_seed(3407)
            plain = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).cuda()
            model = peft.get_peft_model(plain, peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
        args = SFTConfig(
            str(tmp_path), max_steps=20, per_device_train_batch_size=8, packing=packing, max_length=256,
            learning_rate=2e-3, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, bf16=True,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), args=args)
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    ours, four_bit, theirs = curves
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert sum(ours[-5:]) == pytest.approx(sum(theirs[-5:]), rel=0.2)
    assert four_bit[-1] < 0.6 * four_bit[0]
