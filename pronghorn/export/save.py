"""``save_pretrained_merged``: a model folder that appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..config.errors import ConfigError, nearest
from ..lora.active import adapter_names, live_names
from ..lora.io import is_adapter_folder, save_lora
from ..models import Source, is_classifier, spec_for, state_of, unwrap
from ..weights.folder import check_target, whole_folder
from . import card
from .changes import Changes
from .merge import Merge, find_untied_head, write_4bit, write_16bit
from .original import original_of, tied_head

METHODS = ("merged_16bit", "merged_4bit", "lora")


def save_merged(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    save_method: str = "merged_16bit",
    base: str | None = None,
    dequantize_base: bool = False,
) -> None:
    """Save ``model`` with its live adapter to ``folder``, with tokenizer, configs and a model card.

    Args:
        model: a Pronghorn model, with an adapter, fully fine-tuned, or as loaded.
        tokenizer: saved beside it.
        folder: new, empty, or an earlier export, which is replaced once the new one is whole.
        save_method: "merged_16bit": merged into the 16-bit original, shard by shard, in the original's dtype and files.
            "merged_4bit": that, quantized again, in the format that transformers loads with bitsandbytes.
            "lora": the adapter alone, plain PEFT.
        base, dequantize_base: what to merge into where the model was loaded already quantized.

    Raises:
        ConfigError: an unknown method, a folder with other files, or a source that is missing or changed; before
            anything is written.
    """
    if save_method not in METHODS:
        close = nearest(str(save_method), METHODS)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"save_method={save_method!r} is unknown; {hint}known: {', '.join(METHODS)}")
    check_target(folder, _replaceable)
    if save_method == "lora":
        _save_adapter(model, tokenizer, folder)
        return
    if is_classifier(model):
        raise ConfigError(
            f"save_method={save_method!r} merges language models; save a classifier's adapter and head with 'lora' "
            "(plain PEFT reads them), or the whole with model.merge_and_unload().save_pretrained(folder)"
        )
    source = state_of(model).source
    original = original_of(model, base, dequantize_base)
    changes = Changes(model)
    assert source is not None
    _check_names(original, changes, tied_head(unwrap(model)))
    merge = Merge(original, changes, find_untied_head(original, changes, tied_head(unwrap(model))))
    settings: dict[str, Any] = {"tie_word_embeddings": False} if merge.untied_head else {}
    with whole_folder(folder, _replaceable) as building:
        if save_method == "merged_4bit":
            settings["quantization_config"] = _write_4bit(model, merge, building)
        else:
            write_16bit(merge, building)
        card.write_config(original.folder, building, **settings)
        for path in original.folder.glob("*.py"):  # a model with code of its own
            shutil.copy2(path, building / path.name)
        _finish(model, tokenizer, building, original.folder, source, save_method, original.note)


def _replaceable(folder: Path) -> bool:
    return card.is_export(folder) or is_adapter_folder(folder)


def _save_adapter(model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    source = state_of(model).source
    assert source is not None
    with whole_folder(folder, _replaceable) as building:
        save_lora(model, building)
        tokenizer.save_pretrained(building)
        card.write_card(building, source, "lora", training_of(model), "")
        card.write_record(building, source, "lora", training_of(model), "")


def _finish(
    model: nn.Module, tokenizer: Any, building: Path, original: Path, source: Source, method: str, note: str
) -> None:
    """Everything beside the weights; the record last, as it lists the rest."""
    card.write_generation_config(original, building, unwrap(model), getattr(tokenizer, "pad_token_id", None))
    if tokenizer is not None:
        tokenizer.save_pretrained(building)
    card.write_card(building, source, method, training_of(model), note)
    card.write_record(building, source, method, training_of(model), note)


def training_of(model: Any) -> str:
    """One phrase on what was trained, for the card."""
    if not adapter_names(model):
        return "full fine-tuning" if state_of(model).full_finetuning else "none, the weights as loaded"
    return " + ".join(_describe(model.peft_config[name]) for name in live_names(model))


def _describe(config: Any) -> str:
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets = config.target_modules
    where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return f"{kind} of rank {config.r}, alpha {config.lora_alpha}, on {where}"


def _check_names(original: Any, changes: Changes, tied: tuple[str, ...]) -> None:
    """Every weight that training changed must have its place in the original's files."""
    held = {entry.name for shard in original.shards for entry in original.entries(shard)}
    for name in sorted(changes.names() - held - set(tied)):
        raise ConfigError(
            f"save_pretrained_merged: {name} was trained, but {str(original.folder)!r} has no such tensor"
        )


def _write_4bit(model: nn.Module, merge: Merge, folder: Path) -> dict[str, Any]:
    """Write the merge in NF4 and return its ``quantization_config``."""
    base = unwrap(model)
    spec = spec_for(base.config)
    entries = {e.name: e for shard in merge.original.shards for e in merge.original.entries(shard)}
    quantized = {n for n in entries if n.endswith(".weight") and spec.is_projection(n.removesuffix(".weight"))}
    write_4bit(merge, folder, quantized, base.device)
    dtypes = {entries[name].dtype for name in quantized}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.bfloat16
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    return dict(config.to_dict())
