"""LoraLinear against plain PEFT on plain transformers, in float32: values, gradients, merging, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.lora.layer import LoraLinear
from pronghorn.models import unwrap
from pronghorn.quant.linear4bit import Linear4bit
from tests.helpers import perturb, relative_error, tiny_llama

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "some-layers": {"layers_to_transform": [1]},
}


def ours(folder: Path, load_in_4bit: bool, dtype: Any = None, **options: Any) -> Any:
    model, _ = from_pretrained(LoadConfig(str(folder), load_in_4bit=load_in_4bit, dtype=dtype))
    model = get_peft_model(model, r=4, lora_alpha=8, **options)
    perturb(model)
    return model


def plain_peft(model: Any, folder: Path, save: Path) -> Any:
    """The same adapter by plain PEFT over plain transformers; 4-bit bases are dequantized into it."""
    model.save_pretrained(save, save_embedding_layers=False)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in unwrap(model).named_modules():
        if isinstance(module, Linear4bit):
            target = base.get_submodule(name.replace(".base_layer", ""))
            target.weight.data = module.nf4.dequantize(torch.float32)
    return peft.PeftModel.from_pretrained(base, save, is_trainable=True)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "4bit"])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_equal_plain_peft(tmp_path: Path, name: str, load_in_4bit: bool) -> None:
    folder = tiny_llama(tmp_path, attention_bias=True, hidden_size=60, head_dim=16)
    model = ours(folder, load_in_4bit, **SETTINGS[name])
    reference = plain_peft(model, folder, tmp_path / "adapter")
    ids = torch.randint(0, 384, (2, 9))
    grads = []
    for each in (model, reference):
        each.train()
        torch.manual_seed(5)  # both draw the same dropout masks
        out = each(input_ids=ids).logits
        (out.float() ** 2).mean().backward()
        grads.append((out, {n: p.grad for n, p in each.named_parameters() if p.requires_grad}))
    (got, got_grads), (expected, expected_grads) = grads
    assert relative_error(got, expected) <= 1e-5
    assert got_grads.keys() == expected_grads.keys()
    assert got_grads
    for key, grad in expected_grads.items():
        assert grad is not None and relative_error(got_grads[key], grad) <= 1e-5, key


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_every_projection_is_ours_and_masters_are_float32(tmp_path: Path, load_in_4bit: bool) -> None:
    model = ours(tiny_llama(tmp_path), load_in_4bit)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14
    assert all(type(layer) is LoraLinear for layer in layers)
    assert all(isinstance(layer.base_layer, Linear4bit) == load_in_4bit for layer in layers)
    trainable = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert set(trainable.values()) == {torch.float32}


def test_a_16bit_base_keeps_float32_masters_and_rounds_them_to_the_inputs_dtype() -> None:
    base = torch.nn.Linear(24, 40).to(torch.bfloat16)
    from pronghorn.lora.config import register

    config = register(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, a.bfloat16().float()), "drawn in float32, not rounded on the way"
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    expected = base(x) + torch.nn.functional.linear(x @ a.bfloat16().T, b.bfloat16()) * 2.0
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_float64_base_has_float64_masters(tmp_path: Path) -> None:
    model = ours(tiny_llama(tmp_path), False, dtype="float64")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}


def test_merge_and_unmerge_of_a_16bit_base(tmp_path: Path) -> None:
    model = ours(tiny_llama(tmp_path), False).eval()
    ids = torch.randint(0, 384, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        model.merge_adapter()
        assert relative_error(model(ids).logits, before) <= 1e-5
        weight = unwrap(model).model.layers[0].self_attn.q_proj.base_layer.weight.clone()
        model.unmerge_adapter()
        assert not torch.equal(weight, unwrap(model).model.layers[0].self_attn.q_proj.base_layer.weight)
        assert relative_error(model(ids).logits, before) <= 1e-5


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merge_into_4_bits_is_refused_with_the_remedy(tmp_path: Path, call: str) -> None:
    model = ours(tiny_llama(tmp_path), True)
    with pytest.raises(ConfigError, match="save_pretrained_merged"):
        getattr(model, call)()


def test_disabling_gives_the_base_and_several_adapters_add_up(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    model = ours(folder, False).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 384, (1, 6))
    with torch.no_grad():
        with model.disable_adapter():
            assert relative_error(model(ids).logits, plain(ids).logits) <= 1e-6
        layer = unwrap(model).model.layers[0].self_attn.q_proj
        x = torch.randn(3, 64)
        first = layer.lora_delta("default", x)
        model.add_adapter("other", model.peft_config["default"])
        torch.nn.init.normal_(layer.lora_B["other"].weight)
        model.base_model.set_adapter(["default", "other"])
        expected = layer.base_layer(x) + first + layer.lora_delta("other", x)
        assert relative_error(layer(x), expected) <= 1e-6
        assert layer.lora_delta("other", x).abs().max() > 0


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_deep_copy_runs_its_own_weights(tmp_path: Path, load_in_4bit: bool) -> None:
    model = ours(tiny_llama(tmp_path), load_in_4bit).eval()
    ids = torch.randint(0, 384, (1, 6))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(twin(ids).logits, before)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert torch.equal(twin(ids).logits, before)
        assert not torch.equal(model(ids).logits, before)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert torch.equal(twin(ids).logits, model(ids).logits)
    twin_ids = {id(p) for p in twin.parameters()}
    assert not twin_ids & {id(p) for p in model.parameters()}


def test_loftq_and_other_variants_are_refused(tmp_path: Path) -> None:
    model, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path))))
    with pytest.raises(ConfigError, match="init_lora_weights='pissa'"):
        get_peft_model(model, init_lora_weights="pissa")
