"""One Llama three times, with the same weights and adapters: Pronghorn's, plain HF + PEFT's, and the float32 truth.

Base weights are numbers of the 16-bit dtype (in 4 bits: what NF4 dequantizes to, which is exact in every copy), so all
that tells the copies apart is how they compute. LoRA A and B are the same float32 masters in each.

The peer runs as ``transformers.Trainer`` and TRL run ``bf16=True``: under autocast, where PEFT's float32 A and B are
rounded to bfloat16 for their products, as Pronghorn rounds them. Without autocast PEFT casts the layer's input up and
multiplies adapters in float32; :func:`gradients` measures that as well where ``autocast`` is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pronghorn.lora.config import register
from pronghorn.models import attach, unwrap
from pronghorn.models.checkpointing import LAYER_PLAN, STEP_PLAN, forget, set_plans
from pronghorn.models.plan import LayerPlan, TrainingPlan
from pronghorn.models.state import ATTRIBUTE, ModelState
from pronghorn.models.tree import layers
from pronghorn.quant.linear4bit import Linear4bit

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EqualModels:
    """Three PEFT models in training mode, whose parameters that train have the same names and values.

    ``ours`` and ``peer`` compute in ``dtype``, ``truth`` in float32.
    """

    ours: Any
    peer: Any
    truth: Any
    dtype: torch.dtype

    @property
    def autocast(self) -> torch.dtype | None:
        """What the peer's forward runs under; None where it computes in float32 anyway."""
        return None if self.dtype == torch.float32 else self.dtype

    def load(self, adapters: Mapping[str, torch.Tensor]) -> None:
        """Give every copy these A and B, by the names of :func:`adapters_of`."""
        for model in (self.ours, self.peer, self.truth):
            for name, parameter in model.named_parameters():
                if name in adapters:
                    parameter.data.copy_(adapters[name])
                    parameter.grad = None


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal_models(
    plain: Any, dtype: torch.dtype, nf4: bool = False, r: int = 16, b_std: float = 0.05, seed: int = 0
) -> EqualModels:
    """Three copies of ``plain`` (a float32 Llama, which is used up and becomes the truth) under LoRA on all linears.

    Args:
        plain: on the device where the copies shall be; its weights are rounded to numbers of ``dtype``.
        dtype: what ours and the peer compute in.
        nf4: quantize the projections; ours holds 4 bits, the others the dequantized weights.
        r: LoRA's rank; alpha is ``2 r``.
        b_std: standard deviation of B. PEFT's own start, 0, would hide A's gradients.
        seed: draws A and B.
    """
    plain.requires_grad_(False)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype).float()
    quantized: dict[str, Linear4bit] = {}
    if nf4:
        for name, module in plain.model.layers.named_modules():
            if isinstance(module, nn.Linear):
                quantized[name] = Linear4bit.from_linear(copy.deepcopy(module).to(dtype), dtype)
                module.weight.data = quantized[name].nf4.dequantize(dtype).float()
    ours, peer = _rounded(plain, dtype), _rounded(plain, dtype)
    for name, module in quantized.items():
        parent, _, leaf = name.rpartition(".")
        setattr(ours.model.layers.get_submodule(parent), leaf, module)
    setattr(ours, ATTRIBUTE, ModelState(plain.config.max_position_embeddings, dtype, load_in_4bit=nf4))
    settings: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    made = [get_peft_model(ours, register(LoraConfig(**settings)))]
    made += [get_peft_model(model, LoraConfig(**settings)) for model in (peer, plain)]
    attach(made[0])
    models = EqualModels(made[0].train(), made[1].train(), made[2].train(), dtype)
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, held in adapters_of(models.truth).items():
        std = b_std if "lora_B" in name else held.shape[1] ** -0.5
        drawn[name] = torch.randn(held.shape, generator=generator) * std
    models.load(drawn)
    return models


def _rounded(plain: Any, dtype: torch.dtype) -> Any:
    """A copy in ``dtype`` whose rotary frequencies stay float32, as those of a loaded model do."""
    model = copy.deepcopy(plain).to(dtype)
    model.model.rotary_emb.load_state_dict(plain.model.rotary_emb.state_dict())
    for name, buffer in plain.model.rotary_emb.named_buffers():
        setattr(model.model.rotary_emb, name, buffer.clone())
    return model


def use_plan(model: Any, plan: str | LayerPlan | TrainingPlan) -> None:
    """Let ``model`` keep for backward what ``plan`` says: a ``use_gradient_checkpointing``, all layers' or the step's.

    The first is planned anew for each size of step; the others hold whatever the step.
    """
    base = unwrap(model)
    if isinstance(plan, str):
        getattr(base, ATTRIBUTE).use_gradient_checkpointing = plan
        attach(model)
        return
    forget(model)
    if isinstance(plan, LayerPlan):
        set_plans(layers(base), plan)
        return
    for layer, own in zip(layers(base), plan.layers, strict=True):
        layer.__dict__[LAYER_PLAN], layer.__dict__[STEP_PLAN] = own, plan


def packed_rows(lengths: Sequence[int], vocabulary: int, device: str, seed: int = 0) -> Batch:
    """Random rows packed into ``[1, T]``, told apart by ``position_ids``; the first token of each row is no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {k: t.to(device) for k, t in (("input_ids", ids), ("position_ids", positions), ("labels", labels))}


def loss_of(model: Any, batch: Batch, autocast: torch.dtype | None = None) -> torch.Tensor:
    """The mean cross-entropy of the batch's labels."""
    device = batch["input_ids"].device.type
    with nullcontext() if autocast is None else torch.autocast(device, autocast):
        loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def gradients(model: Any, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> list[Gradients]:
    """The gradient of every parameter that trains, in float64, for each batch by itself."""
    found = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss_of(model, batch, autocast).backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def relative_errors(got: Sequence[Gradients], truth: Sequence[Gradients]) -> dict[str, float]:
    """By name: the root mean square over batches of ``|got - truth| / |truth|`` (Frobenius norms).

    Raises:
        ValueError: a gradient that one of them lacks.
    """
    squares: dict[str, float] = {}
    for own, exact in zip(got, truth, strict=True):
        if own.keys() != exact.keys():
            raise ValueError(f"gradients differ in name: {sorted(own.keys() ^ exact.keys())[:4]}")
        for name, wanted in exact.items():
            off = float((own[name] - wanted).norm() / wanted.norm())
            squares[name] = squares.get(name, 0.0) + off * off / len(truth)
    return {name: square**0.5 for name, square in squares.items()}


@dataclass(frozen=True)
class Compared:
    """Relative errors of ours and the peer's to the truth, matrix by matrix."""

    ours: dict[str, float]
    peer: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        return {name: self.ours[name] / max(self.peer[name], 1e-12) for name in self.peer}

    def summary(self) -> dict[str, float]:
        """Root mean squares over matrices, their ratio, the ratio's median and worst, and how many lie over 1.01."""
        ratios = sorted(self.ratios.values())
        ours, peer = ((sum(e * e for e in errors.values()) / len(errors)) ** 0.5 for errors in (self.ours, self.peer))
        return {
            "rms_error": ours,
            "peer_rms_error": peer,
            "rms_ratio": ours / max(peer, 1e-12),
            "median_ratio": ratios[len(ratios) // 2],
            "worst_ratio": ratios[-1],
            "over_1_01": float(sum(r > 1.01 for r in ratios)),
            "matrices": float(len(ratios)),
        }
