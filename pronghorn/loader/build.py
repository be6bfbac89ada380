"""The transformers model on the meta device, and what its weight files must hold to fill it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from ..config.errors import ConfigError
from ..models import ModelSpec
from ..quant.bnb import SUFFIXES, is_quantized
from ..quant.linear4bit import Linear4bit
from ..weights.shards import Entry, Shard


@dataclass
class Plan:
    """How the files fill the model.

    Attributes:
        quantized: names of the weights that the files hold in bitsandbytes' 4-bit format.
        parts: for each of these, the names of the tensors it consists of.
        tied: names that no file holds because they share another's tensor.
        ignored: names in the files that transformers, too, passes over.
        fresh: names that no file holds and that are drawn anew: a classifier's head.
    """

    quantized: set[str] = field(default_factory=set)
    parts: dict[str, set[str]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)


_HEADS = {"score.weight", "lm_head.weight"}
"""A classifier's head, which a language model's files do not hold, and a language model's, which it does not need."""


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool, num_labels: int | None = None) -> Any:
    """The ``*ForCausalLM`` of ``config`` on the meta device: no memory, no initialization.

    With ``num_labels`` it is the ``*ForSequenceClassification``.
    """
    auto: Any = AutoModelForCausalLM
    if num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code)


def plan_fill(model: nn.Module, shards: list[Shard], folder: Path, classifier: bool = False) -> Plan:
    """Compare the files with the empty model, before anything is read.

    A ``classifier`` may be filled from a language model's files: its own head is then fresh, theirs ignored.

    Raises:
        ConfigError: a missing tensor (by name), one of the wrong shape, one that does not belong to the model, or one
            that two files hold.
    """
    held: dict[str, Entry] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in held:
                raise ConfigError(f"folder={str(folder)!r}: two files hold {entry.name!r}; remove the stale ones")
            held[entry.name] = entry
    expected = dict(model.state_dict())
    plan = Plan()
    for name in expected:
        if is_quantized(name, held):
            plan.quantized.add(name)
            plan.parts[name] = {part for part in (name, *(f"{name}.{s}" for s in SUFFIXES)) if part in held}
    of_quantized = set().union(*plan.parts.values()) if plan.parts else set()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    missing = {name for name in expected if name not in held}
    plan.tied = {name for pair in tied.items() for name in pair if name in missing and (set(pair) - missing)}
    missing -= plan.tied
    if classifier:
        plan.fresh = missing & _HEADS
        missing -= plan.fresh
    if missing:
        first = sorted(missing)[0]
        raise ConfigError(
            f"folder={str(folder)!r} is partial: {first!r} is in none of its files ({len(missing)} of {len(expected)} "
            "tensors missing); copy or download it again"
        )
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq"]
    passed_over = _HEADS if classifier else set()
    for name in sorted(set(held) - set(expected) - of_quantized):
        if name not in passed_over and not any(re.search(pattern, name) for pattern in patterns):
            raise ConfigError(
                f"folder={str(folder)!r} holds {name!r}, which {type(model).__name__} has no place for; "
                "config.json does not describe these weights"
            )
        plan.ignored.add(name)
    for name in set(expected) - plan.quantized - plan.tied - plan.fresh:
        if tuple(held[name].shape) != tuple(expected[name].shape):
            raise ConfigError(
                f"folder={str(folder)!r}: {name!r} has shape {tuple(held[name].shape)}, config.json asks for "
                f"{tuple(expected[name].shape)}"
            )
        if not held[name].dtype.is_floating_point or held[name].dtype.itemsize < 2:
            raise ConfigError(
                f"folder={str(folder)!r}: {name!r} is {held[name].dtype}, neither 16 or 32 bits nor NF4; give the "
                "16-bit checkpoint"
            )
    return plan


def put_linear4bit(model: Any, spec: ModelSpec, plan: Plan, prequantized: bool, dtype: torch.dtype) -> int:
    """Replace linears of the empty model by empty :class:`Linear4bit`; return how many.

    All projections of the family, or, where the files are quantized already, exactly the linears that are.
    """
    count = 0
    for name, module in list(model.named_modules()):
        wanted = f"{name}.weight" in plan.quantized if prequantized else spec.is_projection(name)
        if not wanted:
            continue
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"{name}: a {type(module).__name__} is held in 4 bits; only linear layers can be")
        parent, _, leaf = name.rpartition(".")
        new = Linear4bit(module.in_features, module.out_features, module.bias is not None, dtype, "meta")
        setattr(model.get_submodule(parent), leaf, new)
        count += 1
    return count


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What ``config.quantization_config`` says of a 4-bit model, so that ``save_pretrained`` writes what transformers
    loads. Nothing else is set on the model: ``is_loaded_in_4bit`` would make TRL cast the LoRA masters to bfloat16,
    and a quantizer object would make Trainer refuse what PEFT does not know."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
