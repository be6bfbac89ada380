"""Adapters on disk: plain PEFT both ways, written whole, checked before they load, never trainable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pronghorn.api import add_methods
from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.lora.active import adapter
from pronghorn.lora.io import load_lora, save_lora
from pronghorn.quant import linear4bit
from tests.helpers import perturb, relative_error, tiny_llama

IDS = torch.arange(3, 12).unsqueeze(0)


def make(folder: Path, load_in_4bit: bool = False, **options: Any) -> Any:
    base, _ = from_pretrained(LoadConfig(str(folder), load_in_4bit=load_in_4bit, max_lora_rank=options.pop("most", 64)))
    model = get_peft_model(base, **{"r": 4, **options}).eval()
    perturb(model)
    return model


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(IDS).logits.clone()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]},
     {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, {"target_modules": "all-linear"}],
    ids=["plain", "rslora", "dora", "modules-to-save", "embeddings", "all-linear"],
)  # fmt: skip
def test_round_trip_through_plain_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_llama(tmp_path)
    model = make(folder, **options)
    save_lora(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert relative_error(answer(plain), answer(model)) <= 1e-6
    plain.save_pretrained(tmp_path / "theirs")
    other = make(folder)
    perturb(other, seed=4)
    with adapter(other, load_lora(other, tmp_path / "theirs")):
        assert relative_error(answer(other), answer(model)) <= 1e-6


def test_a_4bit_model_saves_float32_masters_and_loads_its_own_adapter(tmp_path: Path) -> None:
    model = make(tiny_llama(tmp_path), load_in_4bit=True)
    save_lora(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert len(saved) == 28
    before = answer(model)
    perturb(model, seed=3)
    with adapter(model, load_lora(model, tmp_path / "adapter")):
        assert torch.allclose(answer(model), before, rtol=0, atol=1e-6)


def test_pefts_own_save_copies_no_4bit_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers save by it at each checkpoint; the whole state dict would hold every layer's codes once more."""
    model = make(tiny_llama(tmp_path), load_in_4bit=True)
    peft.PeftModel.save_pretrained(model, tmp_path / "whole")
    add_methods(model)

    def packed(*_: Any) -> None:
        raise AssertionError("a 4-bit weight was packed")

    monkeypatch.setattr(linear4bit, "to_bnb", packed)
    model.save_pretrained(tmp_path / "adapter")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "adapter" / n).read_bytes() for n in names)
    with pytest.raises(AssertionError, match="packed"):
        model.state_dict()


def test_a_loaded_adapter_is_not_trained_not_saved_and_not_loaded_twice(tmp_path: Path) -> None:
    model = make(tiny_llama(tmp_path)).train()
    save_lora(model, tmp_path / "adapter")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    rng = torch.random.get_rng_state()
    handle = load_lora(model, tmp_path / "adapter")
    assert torch.equal(torch.random.get_rng_state(), rng), "loading must not move the user's generator"
    assert load_lora(model, str(tmp_path / "adapter")) == handle
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.training
    assert all(m.training for m in model.modules())
    with adapter(model, handle):
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    first = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    perturb(model, seed=5)
    save_lora(model, tmp_path / "again")
    assert not any(handle.name in key for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))
    assert any(
        not torch.equal(v, first[k]) for k, v in load_file(tmp_path / "again" / "adapter_model.safetensors").items()
    )


def test_a_changed_folder_is_loaded_anew_and_the_old_handle_ends(tmp_path: Path) -> None:
    model = make(tiny_llama(tmp_path))
    save_lora(model, tmp_path / "adapter")
    old = load_lora(model, tmp_path / "adapter")
    perturb(model, seed=6)
    save_lora(model, tmp_path / "adapter")
    new = load_lora(model, tmp_path / "adapter")
    assert new != old
    with adapter(model, new):
        got = answer(model)
    assert torch.allclose(got, answer(model), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="loaded anew"), adapter(model, old):
        pass
    assert len(model.peft_config) == 2, "the old weights are freed"


def test_an_adapter_on_other_modules_goes_beside_a_4bit_live_one(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    wide = make(folder, load_in_4bit=True, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    save_lora(wide, tmp_path / "wide")
    narrow = make(folder, load_in_4bit=True, target_modules=["q_proj"])
    before = answer(narrow)
    handle = load_lora(narrow, tmp_path / "wide")
    assert torch.equal(answer(narrow), before)
    with adapter(narrow, handle):
        assert torch.allclose(answer(narrow), answer(wide), rtol=0, atol=1e-5)
    assert {n.split(".")[-4] for n, p in narrow.named_parameters() if p.requires_grad} == {"q_proj"}
    save_lora(narrow, tmp_path / "narrow")
    assert len(load_file(tmp_path / "narrow" / "adapter_model.safetensors")) == 4


def test_bad_adapters_are_named_before_anything_changes(tmp_path: Path) -> None:
    model = make(tiny_llama(tmp_path))
    other = make(tiny_llama(tmp_path, name="bigger", hidden_size=128))
    deeper = make(tiny_llama(tmp_path, name="deeper-model", num_hidden_layers=3))
    high = make(tiny_llama(tmp_path, name="same"), r=128, most=128)
    for name, source in {"other": other, "deeper": deeper, "high": high, "good": model}.items():
        save_lora(source, tmp_path / name)
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "good" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    for field, value in {"bias": "all", "init_lora_weights": "pissa"}.items():
        (tmp_path / field).mkdir()
        (tmp_path / field / "adapter_model.safetensors").write_bytes(b"")
        (tmp_path / field / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    wrong = {
        "absent": "does not exist", "empty": "has no adapter_config.json", "other": "trained on another model",
        "deeper": "'model.layers.2.*does not have", "high": "rank 128, over max_lora_rank=64", "good": "damaged",
        "bias": "bias='all'", "init_lora_weights": "changes the base",
    }  # fmt: skip
    names = {n for n, _ in model.named_parameters()}
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            load_lora(model, tmp_path / name)
    assert {n for n, _ in model.named_parameters()} == names
    assert list(model.peft_config) == ["default"]


def test_saving_is_whole_and_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tiny_llama(tmp_path))
    target = tmp_path / "adapter"
    save_lora(model, target)
    first = (target / "adapter_model.safetensors").read_bytes()
    (target / "tokenizer.json").write_text("{}")
    perturb(model)
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_lora(model, target)
    assert (target / "adapter_model.safetensors").read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["adapter", "tiny-llama"]
    monkeypatch.undo()
    save_lora(model, target)
    assert (target / "adapter_model.safetensors").read_bytes() != first
    assert (target / "tokenizer.json").exists(), "the tokenizer saved beside it stays"
    (target / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="already holds other files"):
        save_lora(model, target)
    base, _ = from_pretrained(LoadConfig(str(tmp_path / "tiny-llama")))
    with pytest.raises(ConfigError, match="call get_peft_model first"):
        save_lora(base, tmp_path / "none")
