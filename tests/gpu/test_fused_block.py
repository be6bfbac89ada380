"""The fused decoder layer in bfloat16 on a GPU: no further from float64 than the layer's own modules are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn.lora.config import register
from pronghorn.models.attention import PackedAttention
from pronghorn.models.fused_block import Saving, fused_block
from pronghorn.models.keep import Keep
from pronghorn.models.llama import block
from pronghorn.models.parts import read_parts
from pronghorn.quant.linear4bit import Linear4bit

LENGTHS = [257, 64, 700]


def layer_under_lora(head_dim: int) -> tuple[Any, Any]:
    """A one-layer Llama in bf16 with 4-bit projections and LoRA (nonzero B) on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1280, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        head_dim=head_dim, vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).requires_grad_(False)
    layer = model.model.layers[0]
    for parent in (layer.self_attn, layer.mlp):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Linear4bit.from_linear(child))
    wrapped = get_peft_model(model, register(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped.train(), layer


def in_float64(model: Any) -> Any:
    """The same layer in float64, its 4-bit weights dequantized."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="cuda")
                plain.weight = torch.nn.Parameter(child.nf4.dequantize(torch.bfloat16).double(), requires_grad=False)
                setattr(module, name, plain)
    return twin.double()


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bf16_is_as_close_to_float64_as_the_modules_are(keep: Keep, head_dim: int) -> None:
    model, layer = layer_under_lora(head_dim)
    T = sum(LENGTHS)
    hidden = torch.randn(T, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).cuda()
    attention = PackedAttention(LENGTHS, "cuda")
    probe = torch.randn(T, 512, device="cuda", dtype=torch.bfloat16)

    def run(one: Any, h: torch.Tensor, how: str) -> list[torch.Tensor]:
        stack = one.get_base_model().model
        cos, sin = stack.rotary_emb(h, position_ids=positions[None])
        rope = (cos[0].to(h.dtype), sin[0].to(h.dtype))
        own = stack.layers[0]
        if how == "fused":
            parts = read_parts(own, "silu")
            assert not isinstance(parts, str), parts
            out = fused_block(parts, parts.rounded(h.dtype), h, rope, attention, Saving(keep))
        else:
            out = block(own, h, rope, attention)
        trained = [p for p in own.parameters() if p.requires_grad]
        return [out, *torch.autograd.grad((out * probe.to(out.dtype)).sum(), [h, *trained])]

    wide = in_float64(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = run(wide, hidden.detach().double().requires_grad_(), "modules")
    fused, modules = run(model, hidden, "fused"), run(model, hidden, "modules")
    for got, theirs, exact in zip(fused, modules, truth):
        assert torch.isfinite(got).all()
        assert error(got, exact) <= max(1.1 * error(theirs, exact), 4e-3)


def test_nothing_but_the_input_is_kept_and_no_run_differs() -> None:
    """Recomputing keeps one [T, D] and x A^T of the projections; 10 runs give the same bits (a race would not)."""
    model, layer = layer_under_lora(64)
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    groups = parts.rounded(torch.bfloat16)
    T = 4096
    hidden = torch.randn(T, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cos, sin = model.get_base_model().model.rotary_emb(hidden, position_ids=torch.arange(T, device="cuda")[None])
    attention = PackedAttention([T], "cuda")
    fused_block(
        parts, parts.rounded(hidden.dtype), hidden, (cos[0], sin[0]), attention, Saving(Keep.INPUT)
    )  # compile first
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = fused_block(parts, groups, hidden, (cos[0], sin[0]), attention, Saving(Keep.INPUT))
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    lows = T * 7 * 16 * 2
    assert kept <= lows + hidden.nbytes // 16, f"{kept} bytes kept besides input and output"
    del out
    first: list[torch.Tensor] | None = None
    trained = [p for p in layer.parameters() if p.requires_grad]
    for _ in range(10):
        out = fused_block(parts, groups, hidden, (cos[0], sin[0]), attention, Saving(Keep.INPUT))
        got = [out.detach(), *torch.autograd.grad(out.float().square().sum(), [hidden, *trained])]
        if first is None:
            first = got
        # attention's own backward may add in any order, so the gradients before it are held to rounding
        assert torch.equal(got[0], first[0])
        for a, b in zip(got[1:], first[1:]):
            assert error(a, b.double()) < 2e-3
