"""Merged exports against PEFT's own merge in plain transformers, and what they may be merged into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.export import save_merged
from pronghorn.export.verify import verify_merged
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.lora.io import load_lora, save_lora
from tests.helpers import perturb, relative_error, tiny_llama

PROMPTS: list[Any] = ["hi there", "Tom has 3 apples", [0, 9, 30, 12], [{"role": "user", "content": "2 + 2?"}]]
IDS = torch.arange(3, 60).reshape(3, 19)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias-all": {"bias": "all"},
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "only-embedding": {"modules_to_save": ["embed_tokens"]},
}


def trained(folder: Path, load_in_4bit: bool = False, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = from_pretrained(LoadConfig(str(folder), load_in_4bit=load_in_4bit))
    model = get_peft_model(model, r=4, **options)
    perturb(model)
    return model, tokenizer


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "4bit"])
@pytest.mark.parametrize("name", CASES)
def test_a_merge_equals_pefts_own_in_plain_transformers(
    tmp_path: Path, name: str, load_in_4bit: bool, tied: bool
) -> None:
    folder = tiny_llama(
        tmp_path, dtype=torch.bfloat16, max_shard_size="60KB", attention_bias=True, hidden_size=60, head_dim=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model, tokenizer = trained(folder, load_in_4bit, **CASES[name])
    save_lora(model, tmp_path / "adapter")
    save_merged(model, tokenizer, tmp_path / "merged")
    check = verify_merged(tmp_path / "merged", str(folder), tmp_path / "adapter", PROMPTS, max_new_tokens=12)
    assert check.matches, check.describe()
    assert check.merge_error <= 1e-5
    assert check.rounding <= 0.02 < 0.1 <= check.adapter_effect
    before, after = tensors(folder), tensors(tmp_path / "merged")
    added = set(after) - set(before)
    assert added == (
        {"lm_head.weight"} if tied and name in ("modules-to-save", "embeddings", "only-embedding") else set()
    )
    assert {v.dtype for v in after.values()} == {torch.bfloat16}
    assert [p.name for p in sorted(folder.glob("*.safetensors"))] == [
        p.name for p in sorted((tmp_path / "merged").glob("*.safetensors"))
    ]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in after.values())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == (tied and not added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_originals_dtype_stays_and_the_folder_is_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_llama(tmp_path, dtype=dtype, extra_tokens=("<|pad|>",))
    model, tokenizer = trained(folder, load_in_4bit=True)
    save_lora(model, tmp_path / "adapter")
    save_merged(model, tokenizer, tmp_path / "merged")
    check = verify_merged(tmp_path / "merged", str(folder), tmp_path / "adapter", PROMPTS, max_new_tokens=8)
    assert check.matches
    assert check.rounding <= (1e-5 if dtype == torch.float32 else 5e-3)
    assert {v.dtype for v in tensors(tmp_path / "merged").values()} == {dtype}
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 4, 5]
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.pad_token == "<|pad|>"
    assert again.chat_template == tokenizer.chat_template
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(folder) in card and "LoRA of rank 4" in card and "merged in float32" in card
    record = json.loads((tmp_path / "merged" / "pronghorn_export.json").read_text())
    assert sorted(record["files"]) == sorted(p.name for p in (tmp_path / "merged").iterdir())
    reloaded, _ = from_pretrained(LoadConfig(str(tmp_path / "merged"), load_in_4bit=False))
    with torch.no_grad():
        assert relative_error(reloaded(IDS).logits, plain_logits(tmp_path / "merged")) <= 1e-6


def test_verify_sees_a_merge_without_effect_and_a_damaged_one(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    model, tokenizer = trained(folder)
    save_lora(model, tmp_path / "adapter")
    good = tmp_path / "merged"
    save_merged(model, tokenizer, good)
    assert verify_merged(good, str(folder), tmp_path / "adapter", PROMPTS, 4).matches
    idle = verify_merged(folder, str(folder), tmp_path / "adapter", PROMPTS, 4)
    assert not idle.matches
    assert "DOES NOT MATCH" in idle.describe()
    weights = load_file(good / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1.05}, good / "model.safetensors", metadata={"format": "pt"})
    assert not verify_merged(good, str(folder), tmp_path / "adapter", PROMPTS, 4).matches
    with pytest.raises(ConfigError, match="prompts is empty"):
        verify_merged(good, str(folder), tmp_path / "adapter", [])


def test_a_loaded_adapter_is_not_merged(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    model, tokenizer = trained(folder)
    save_lora(model, tmp_path / "old")
    perturb(model, seed=8)
    save_merged(model, tokenizer, tmp_path / "without")
    load_lora(model, tmp_path / "old")
    save_merged(model, tokenizer, tmp_path / "with")
    for name, value in tensors(tmp_path / "without").items():
        assert torch.equal(tensors(tmp_path / "with")[name], value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fully_fine_tuned_model_keeps_the_files_of_its_source(tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, max_shard_size="60KB", tie_word_embeddings=tied)
    model, tokenizer = from_pretrained(LoadConfig(str(folder), load_in_4bit=False, full_finetuning=True))
    perturb(model)
    save_merged(model, tokenizer, tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    assert after.keys() == tensors(folder).keys()
    for name, value in after.items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name


def test_4bit_export_is_the_merged_16bit_model_quantized_by_bitsandbytes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, max_shard_size="60KB", hidden_size=60, head_dim=16)
    model, tokenizer = trained(folder, load_in_4bit=True)
    save_merged(model, tokenizer, tmp_path / "merged")
    save_merged(model, tokenizer, tmp_path / "nf4", save_method="merged_4bit")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, quantization_config=quantization
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16)
    assert type(ours.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        if "quant_state" not in name:
            assert torch.equal(mine[name], value), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    again, _ = from_pretrained(LoadConfig(str(tmp_path / "nf4")))
    assert again.pronghorn_state.source.prequantized


def test_an_already_quantized_base_needs_its_original_or_a_clear_wish(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, max_shard_size="60KB", attention_bias=True)
    base, tokenizer = from_pretrained(LoadConfig(str(folder)))
    base.save_pretrained(tmp_path / "nf4", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "nf4")
    model, tokenizer = trained(tmp_path / "nf4", load_in_4bit=True)
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="pass base=<the 16-bit model>, or dequantize_base=True"):
        save_merged(model, tokenizer, tmp_path / "merged")
    with pytest.raises(ConfigError, match="is quantized too"):
        save_merged(model, tokenizer, tmp_path / "merged", base=str(tmp_path / "nf4"))
    other = tiny_llama(tmp_path, name="other", hidden_size=128, attention_bias=True)
    with pytest.raises(ConfigError, match="does not fit"):
        save_merged(model, tokenizer, tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()
    save_merged(model, tokenizer, tmp_path / "merged", base=str(folder))
    assert verify_merged(tmp_path / "merged", str(folder), tmp_path / "adapter", PROMPTS, 8).matches
    assert "merged into the 16-bit" in (tmp_path / "merged" / "README.md").read_text()

    save_merged(model, tokenizer, tmp_path / "dequantized", dequantize_base=True)
    assert "dequantize_base=True" in (tmp_path / "dequantized" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    assert tensors(tmp_path / "dequantized").keys() == tensors(folder).keys()
    model.eval()
    with torch.no_grad():
        live = model(IDS).logits
    assert relative_error(plain_logits(tmp_path / "dequantized"), live) <= 0.02


def test_a_source_that_changed_or_went_away_raises_before_any_write(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, max_shard_size="100KB")
    model, tokenizer = trained(folder)
    with pytest.raises(ConfigError, match="leave it out"):
        save_merged(model, tokenizer, tmp_path / "merged", dequantize_base=True)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shard = sorted(folder.glob("*.safetensors"))[2]
    kept = shard.read_bytes()
    for damaged in (kept[:-1] + bytes([kept[-1] ^ 1]), kept[:-8]):
        shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match="changed since|truncated"):
            save_merged(model, tokenizer, tmp_path / "merged")
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="is gone; put it back, or pass base"):
        save_merged(model, tokenizer, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved"]
    save_merged(model, tokenizer, tmp_path / "merged", base=str(moved))
    assert (tmp_path / "merged" / "config.json").exists()


def test_a_broken_adapter_is_not_exported(tmp_path: Path) -> None:
    model, tokenizer = trained(tiny_llama(tmp_path))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        save_merged(model, tokenizer, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-llama"]
