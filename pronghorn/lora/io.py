"""Adapters on disk: plain PEFT folders, written whole, and checked against the model before they are loaded."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType, set_peft_model_state_dict
from peft.config import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config.adapters import LoraHandle
from ..config.errors import ConfigError
from ..weights.folder import whole_folder
from .active import adapter_names, live_names, set_active, wrappers
from .config import register

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Ways of starting an adapter that leave the base weights as they are.
SAFE_INITS = (True, False, "gaussian", "orthogonal", "eva")
_OWN_FILES = (CONFIG, WEIGHTS, "README.md")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
_ATTRIBUTE = "pronghorn_adapters"
_ids = itertools.count(1)


@dataclass(frozen=True)
class Loaded:
    """A loaded adapter and what its files looked like: name, size, modification time in ns."""

    handle: LoraHandle
    files: tuple[tuple[str, int, int], ...]


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a PEFT adapter, at most with its tokenizer, and nothing that a new one would destroy.

    A trainer's checkpoint holds an adapter too, beside an optimizer that must not be lost.
    """
    return (folder / CONFIG).is_file() and all(
        path.name in (*_OWN_FILES, *_TOKENIZER_FILES) for path in folder.iterdir()
    )


def save_lora(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the live adapter to ``folder`` as plain PEFT: adapter_config.json, adapter_model.safetensors, a card.

    Weights are saved as the float32 masters. The folder appears whole; an earlier adapter folder is replaced, and
    tokenizer files in it stay.

    Raises:
        ConfigError: no adapter, several live ones, or ``folder`` holds something else.
    """
    names = live_names(model)
    if len(names) != 1:
        raise ConfigError(f"save_lora: several adapters are active ({', '.join(names)}); activate the one to save")
    name = names[0]
    # Only what an adapter can hold: building the whole state dict would pack every 4-bit weight.
    state = {
        key: value
        for key, value in model.named_parameters(remove_duplicate=False)
        if "lora_" in key or "modules_to_save" in key or key.endswith(".bias")
    }
    with whole_folder(folder, replaceable=is_adapter_folder) as building:
        model.save_pretrained(building, selected_adapters=[name], save_embedding_layers=False, state_dict=state)
        if name != "default":  # PEFT puts any other name into a folder of its own
            for path in (building / name).iterdir():
                path.rename(building / path.name)
            shutil.rmtree(building / name)
        for path in (Path(folder).expanduser() / kept for kept in _TOKENIZER_FILES):
            if path.is_file():
                shutil.copy2(path, building / path.name)


def load_lora(model: Any, folder: str | os.PathLike[str], max_rank: int | None = None) -> LoraHandle:
    """Load a PEFT LoRA folder beside the live adapter, for inference: never trainable, never saved by ``save_lora``.

    The same unchanged folder gives the same handle; a changed one is loaded anew and its old handle ends.

    Args:
        model: a PEFT model made by ``get_peft_model``.
        max_rank: the largest rank accepted; by default what the model was loaded with (``max_lora_rank``).

    Raises:
        ConfigError: no such folder, not LoRA, or ranks or shapes that do not fit this model.
    """
    path = Path(folder).expanduser().resolve()
    config = _read_config(path)
    live = live_names(model)
    files = _stat(path)
    known: dict[str, Loaded] = model.__dict__.setdefault(_ATTRIBUTE, {})
    earlier = known.get(str(path))
    if earlier is not None and earlier.files == files and earlier.handle.name in adapter_names(model):
        return earlier.handle
    tensors = _read_tensors(path / WEIGHTS)
    _check_rank(path, config, _max_rank(model) if max_rank is None else max_rank)
    _check_shapes(path, model, tensors)
    number = next(_ids)
    handle = LoraHandle(name=f"loaded{number}", path=str(path), id=number)
    _add(model, handle, config, tensors, live)
    if earlier is not None and earlier.handle.name in adapter_names(model):
        model.delete_adapter(earlier.handle.name)
    known[str(path)] = Loaded(handle, files)
    return handle


def _read_config(path: Path) -> LoraConfig:
    if not path.is_dir():
        raise ConfigError(f"load_lora: folder={str(path)!r} does not exist")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ConfigError(f"load_lora: folder={str(path)!r} has no {name}; give a folder that save_lora wrote")
    config = PeftConfig.from_pretrained(str(path))
    if config.peft_type != PeftType.LORA:
        raise ConfigError(f"load_lora: folder={str(path)!r} holds a {config.peft_type} adapter; only LoRA loads")
    if config.init_lora_weights not in SAFE_INITS:
        raise ConfigError(
            f"load_lora: folder={str(path)!r} has init_lora_weights={config.init_lora_weights!r}, which changes the "
            "base weights; convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.bias != "none":
        raise ConfigError(
            f"load_lora: folder={str(path)!r} has bias={config.bias!r}, which would change the base model"
        )
    config.init_lora_weights = True
    config.inference_mode = True
    return register(config)


def _stat(path: Path) -> tuple[tuple[str, int, int], ...]:
    stats = [(name, (path / name).stat()) for name in (CONFIG, WEIGHTS)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as shard:
            return {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ConfigError(f"load_lora: file={str(path)!r} is damaged: {error}") from error


def _max_rank(model: Any) -> int | None:
    """``max_lora_rank`` of a model that Pronghorn loaded (read as an attribute: ``models`` lies above ``lora``)."""
    state = getattr(model.get_base_model(), "pronghorn_state", None)
    return None if state is None else int(state.max_lora_rank)


def _check_rank(path: Path, config: LoraConfig, max_rank: int | None) -> None:
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if max_rank is not None and rank > max_rank:
        raise ConfigError(
            f"load_lora: folder={str(path)!r} has rank {rank}, over max_lora_rank={max_rank}; "
            f"load the model with max_lora_rank={rank} or more"
        )


def _check_shapes(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Every LoRA tensor must name a linear (or embedding) of this model with fitting sizes."""
    modules = dict(model.named_modules())
    seen = 0
    for key, value in tensors.items():
        name, _, part = key.partition(".lora_")
        if not part:
            continue
        module = modules.get(name)
        if module is None:
            raise ConfigError(
                f"load_lora: folder={str(path)!r} adapts {name.removeprefix('base_model.model.')!r}, which this model "
                "does not have; it was trained on another model"
            )
        seen += 1
        if part.startswith("embedding"):
            continue  # PEFT checks these when it loads them
        base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
        size, of = (value.shape[-1], base.in_features) if part.startswith("A") else (value.shape[0], base.out_features)
        if part.startswith(("A", "B.weight")) and size != of:
            raise ConfigError(
                f"load_lora: folder={str(path)!r}: {key} has shape {tuple(value.shape)}, but "
                f"{name.removeprefix('base_model.model.')} takes {base.in_features} and gives {base.out_features} "
                "features; it was trained on another model"
            )
    if not seen:
        raise ConfigError(f"load_lora: folder={str(path)!r} holds no LoRA tensors")


def _add(model: Any, handle: LoraHandle, config: LoraConfig, tensors: dict[str, torch.Tensor], live: list[str]) -> None:
    """Add the adapter, fill it, and leave the live one active and trainable as it was."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    training = model.training
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.random.fork_rng(devices=[]):  # the random start is overwritten, and must not move the user's RNG
            model.add_adapter(handle.name, config)
        result = set_peft_model_state_dict(model, tensors, adapter_name=handle.name)
        missing = [key for key in result.missing_keys if handle.name in key.split(".")]
        if result.unexpected_keys or missing:
            raise ConfigError(
                f"load_lora: folder={handle.path!r} does not match its own adapter_config.json; "
                f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}"
            )
    except BaseException:
        if handle.name in adapter_names(model):
            model.delete_adapter(handle.name)
        raise
    finally:
        for wrapper in wrappers(model):
            set_active(wrapper, live)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(_was_trainable(name, trainable))
        for name, module in model.named_modules():
            module.training = modes.get(name, training)


def _was_trainable(name: str, trainable: dict[str, bool]) -> bool:
    """``requires_grad`` before the load; a parameter that a new wrapper moved is found under its old name."""
    for old in (name, name.replace(".base_layer.", "."), name.replace(".original_module.", ".")):
        if old in trainable:
            return trainable[old]
    return False
