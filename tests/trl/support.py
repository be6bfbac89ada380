"""One tiny model twice: Pronghorn's, and the same weights and adapter in plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import pronghorn
from pronghorn import FastLanguageModel
from pronghorn.models import unwrap
from pronghorn.quant.linear4bit import Linear4bit
from tests.helpers import perturb, relative_error

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
VOCABULARY = 850
PLAIN_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.02, "bf16": False,
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e6, "seed": 7,
}  # fmt: skip


def fast(load_in_4bit: bool = False, **options: Any) -> tuple[Any, Any]:
    """The shipped model with LoRA whose B is not zero, in float32 (or NF4) on the CPU."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(TINY), max_seq_length=256, load_in_4bit=load_in_4bit)
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    perturb(model)
    return model, tokenizer


def plain(model: Any, folder: Path) -> Any:
    """The weights of ``model`` (4-bit ones dequantized to float32) and its adapter, in plain transformers and PEFT."""
    model.save_lora(str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    copy_dequantized(unwrap(model), base)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


@torch.no_grad()
def copy_dequantized(source: Any, target: Any) -> None:
    """Give the linears of ``target`` the float32 values of the 4-bit ones of ``source``."""
    for name, module in source.named_modules():
        if isinstance(module, Linear4bit):
            place = name.replace(".base_layer", "")
            target.get_submodule(place).weight.copy_(module.nf4.dequantize(torch.float32))


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights that train, by PEFT's names."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(
    ours: Any, theirs: Any, names: tuple[str, ...], before: dict[str, torch.Tensor], rel: float = 1e-5
) -> None:
    """Equal numbers in every log, and equal weights after training by plain SGD: so equal gradients at every step.

    Args:
        before: the weights that train, as both sides had them.
        rel: due to float32 sums in another order; numbers under 0.01 are compared by 0.01 of it.
    """
    logs = [log for log in theirs.state.log_history if "loss" in log]
    assert len(logs) == theirs.state.max_steps
    for step, wanted in enumerate(logs):
        for name in names:
            got = ours.state.log_history[step][name]
            assert abs(got - wanted[name]) <= rel * max(abs(wanted[name]), 1e-2), (step, name, got, wanted[name])
    weights = trained(theirs.model)
    assert set(weights) == set(before)
    for name, got in trained(ours.model).items():
        moved_ours, moved_theirs = got - before[name], weights[name] - before[name]
        assert float(moved_theirs.abs().max()) > 1e-5, f"{name} did not train, so nothing was compared"
        assert relative_error(moved_ours, moved_theirs) < 1e-3, name
