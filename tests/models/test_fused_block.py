"""The fused decoder layer against the one that calls its sub-modules: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.lora.config import register
from pronghorn.models.attention import PackedAttention
from pronghorn.models.fused_block import fused_block, read_parts
from pronghorn.models.keep import Keep
from pronghorn.models.llama import block
from pronghorn.quant.linear4bit import Linear4bit
from tests.models.test_attach import make, relative

LENGTHS = [7, 1, 12]


def adapted(nf4: bool = False, **lora: Any) -> Any:
    """A tiny Llama under LoRA with nonzero B; its projections in 4 bits if asked."""
    model = make()
    if nf4:
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(parent, name, Linear4bit.from_linear(child, torch.float32))
    model.requires_grad_(False)
    wrapped = get_peft_model(model, register(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **lora)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def inputs(model: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], PackedAttention]:
    hidden = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cos, sin = model.get_base_model().model.rotary_emb(hidden, position_ids=positions[None])
    return hidden, (cos[0], sin[0]), PackedAttention(LENGTHS, "cpu")


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("nf4", [False, True], ids=["float32", "nf4"])
def test_values_and_gradients_equal_the_plain_block(keep: Keep, nf4: bool) -> None:
    model = adapted(nf4)
    layer = model.get_base_model().model.layers[1]
    hidden, rope, attention = inputs(model)
    trained = [p for name, p in layer.named_parameters() if "lora" in name]
    plain = block(layer, hidden, rope, attention)
    probe = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * probe).sum(), [hidden, *trained])
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str), parts
    fused = fused_block(parts, hidden, rope, attention, keep)
    assert relative(fused.detach(), plain.detach()) < 1e-6
    for got, want in zip(torch.autograd.grad((fused * probe).sum(), [hidden, *trained]), expected):
        assert relative(got, want) < 2e-6


def test_a_partial_adapter_and_a_first_layer_without_input_gradient() -> None:
    model = adapted(exclude_modules=["k_proj", "down_proj"])
    layer = model.get_base_model().model.layers[0]
    hidden, rope, attention = inputs(model)
    hidden = hidden.detach()
    trained = [p for name, p in layer.named_parameters() if "lora" in name]
    expected = torch.autograd.grad(block(layer, hidden, rope, attention).square().sum(), trained)
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    got = torch.autograd.grad(fused_block(parts, hidden, rope, attention, Keep.INPUT).square().sum(), trained)
    for a, b in zip(got, expected):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize(
    ("lora", "reason"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "DoRA"), ({"bias": "all"}, None)],
)
def test_what_cannot_be_fused_says_why(lora: dict[str, Any], reason: str | None) -> None:
    layer = adapted(**lora).get_base_model().model.layers[0]
    parts = read_parts(layer, "silu")
    if reason is None:  # a Llama without biases has none to train
        assert not isinstance(parts, str)
    else:
        assert isinstance(parts, str) and reason in parts


def test_a_hook_keeps_the_sub_modules_in_use() -> None:
    layer = adapted().get_base_model().model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert "hook" in str(read_parts(layer, "silu"))
    handle.remove()
    assert not isinstance(read_parts(layer, "silu"), str)
    layer.input_layernorm.weight.requires_grad_(True)
    assert "norm" in str(read_parts(layer, "silu"))
