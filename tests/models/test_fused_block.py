"""The fused decoder layer against the one that calls its sub-modules: values and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.lora import projection
from pronghorn.lora.config import register
from pronghorn.lora.held import HeldWeights
from pronghorn.lora.rounded import Rounded
from pronghorn.models.attention import PackedAttention
from pronghorn.models.fused_block import Saving, fused_block
from pronghorn.models.keep import Keep
from pronghorn.models.llama import block
from pronghorn.models.parts import Held, held_weights, read_parts
from pronghorn.quant.linear4bit import Linear4bit
from tests.models.test_attach import make, relative

LENGTHS = [7, 1, 12]


def adapted(nf4: bool = False, r: int = 4, **lora: Any) -> Any:
    """A tiny Llama under LoRA with nonzero B; its projections in 4 bits if asked."""
    model = make()
    if nf4:
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(parent, name, Linear4bit.from_linear(child, torch.float32))
    model.requires_grad_(False)
    wrapped = get_peft_model(model, register(LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", **lora)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def inputs(model: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], PackedAttention]:
    hidden = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cos, sin = model.get_base_model().model.rotary_emb(hidden, position_ids=positions[None])
    return hidden, (cos[0], sin[0]), PackedAttention(LENGTHS, "cpu")


SAVINGS = {
    **{keep.value: Saving(keep) for keep in Keep},
    **{f"{keep.value}-tiled": Saving(keep, mlp_rows=6) for keep in Keep},
    "one-row-tiles": Saving(Keep.CORE, mlp_rows=1),
    "a-tile-over-all": Saving(Keep.ATTENTION, mlp_rows=64),
}


@pytest.mark.parametrize("saving", SAVINGS.values(), ids=SAVINGS)
@pytest.mark.parametrize("rank", [4, 8])  # 4: ranks that fill no 16 bytes stand beside no weight
@pytest.mark.parametrize(("nf4", "held"), [(False, False), (True, False), (True, True)], ids=["float32", "nf4", "held"])
def test_values_and_gradients_equal_the_plain_block(saving: Saving, nf4: bool, held: bool, rank: int) -> None:
    model = adapted(nf4, rank)
    layer = model.get_base_model().model.layers[1]
    hidden, rope, attention = inputs(model)
    trained = [p for name, p in layer.named_parameters() if "lora" in name]
    plain = block(layer, hidden, rope, attention)
    probe = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * probe).sum(), [hidden, *trained])
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str), parts
    if held:
        saving = replace(saving, held=held_weights(parts.rounded(torch.float32), torch.float32))
    fused = fused_block(parts, parts.rounded(hidden.dtype), hidden, rope, attention, saving)
    assert relative(fused.detach(), plain.detach()) < 1e-6
    for got, want in zip(torch.autograd.grad((fused * probe).sum(), [hidden, *trained]), expected):
        assert relative(got, want) < 2e-6


@pytest.mark.parametrize(
    ("nf4", "rank", "held"), [(False, 4, False), (True, 4, False), (True, 8, False), (True, 4, True), (True, 8, True)]
)
def test_a_partial_adapter_and_a_first_layer_without_input_gradient(nf4: bool, rank: int, held: bool) -> None:
    model = adapted(nf4, rank, exclude_modules=["k_proj", "down_proj", "up_proj"])
    layer = model.get_base_model().model.layers[0]
    hidden, rope, attention = inputs(model)
    hidden = hidden.detach()
    trained = [p for name, p in layer.named_parameters() if "lora" in name]
    expected = torch.autograd.grad(block(layer, hidden, rope, attention).square().sum(), trained)
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    groups = parts.rounded(hidden.dtype)
    saving = Saving(Keep.INPUT, held=held_weights(groups, hidden.dtype) if held else Held())
    got = torch.autograd.grad(
        fused_block(parts, groups, hidden, rope, attention, saving).square().sum(),
        trained,
    )
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


def test_what_was_kept_serves_one_backward() -> None:
    model = adapted()
    hidden, rope, attention = inputs(model)
    parts = read_parts(model.get_base_model().model.layers[0], "silu")
    assert not isinstance(parts, str)
    out = fused_block(parts, parts.rounded(hidden.dtype), hidden, rope, attention, Saving(Keep.ALL)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.backward()


def test_4_bit_neighbours_are_multiplied_at_once_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(nf4=True, r=8)
    parts = read_parts(model.get_base_model().model.layers[0], "silu")
    assert not isinstance(parts, str)
    group = parts.rounded(torch.float32).qkv
    whole = torch.cat([p.weight(torch.float32) for p in group.members])
    adapters = torch.block_diag(*(b * p.scaling for b, p in zip(group.bs_Or, group.members) if b is not None))
    for most, count in ((whole.numel(), 1), (whole.numel() - 1, 2), (1, 3)):
        monkeypatch.setattr(projection, "STACK", most)
        for wide in (False, True):
            found = list(projection.pieces(group, torch.float32, wide))
            assert len(found) == count
            assert torch.equal(torch.cat([piece.weight_OI for piece in found]), whole)
            assert [p.columns.start for p in found] == [0, *(p.columns.stop for p in found[:-1])]
            tails = [piece.wide_OK for piece in found]
            if wide:
                both = torch.cat([t for t in tails if t is not None])
                assert torch.equal(both, torch.cat([whole, adapters], dim=1))
            else:
                assert tails == [None] * count


def test_held_weights_follow_the_masters_and_the_4_bit_ones() -> None:
    model = adapted(nf4=True, r=8)
    layer = model.get_base_model().model.layers[0]
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    rounded = Rounded(parts.members, torch.float32)
    held = HeldWeights(rounded.groups[0], torch.float32)
    before = held.table.clone()
    with torch.no_grad():
        for p in parts.projections[:3]:
            assert p.a_rI is not None and p.b_Or is not None
            p.a_rI.mul_(2)
            p.b_Or.mul_(-1)
    rounded.refresh()
    held.refresh(rounded.groups[0])
    O, I = held.outputs, held.inputs  # noqa: E741
    assert torch.equal(held.table[:O, :I], before[:O, :I])
    assert torch.equal(held.table[:O, I:], -before[:O, I:])
    assert torch.equal(held.table[O:, :I], 2 * before[O:, :I])
