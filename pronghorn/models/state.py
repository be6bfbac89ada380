"""What Pronghorn remembers about a model it loaded, kept as one attribute of the transformers model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from .tree import unwrap

ATTRIBUTE = "pronghorn_state"


@dataclass(frozen=True)
class Source:
    """Where the weights came from, exactly enough that export can prove they are still the same.

    Attributes:
        name: what the user asked for (hub name or folder).
        folder: the local folder that holds the files.
        revision: the hub commit, or None for a plain folder.
        shards: safetensors file name to fingerprint (the loader defines it).
        prequantized: the files hold 4-bit weights, so there is no 16-bit original.
    """

    name: str
    folder: str
    revision: str | None
    shards: dict[str, str]
    prequantized: bool = False


@dataclass
class ModelState:
    """Settings of one loaded model, its tokenizer, and the rollout engine that serves it once there is one."""

    max_seq_length: int
    compute_dtype: torch.dtype
    source: Source | None = None
    load_in_4bit: bool = False
    full_finetuning: bool = False
    fast_inference: bool = False
    max_lora_rank: int = 64
    gpu_memory_utilization: float = 0.6
    use_gradient_checkpointing: bool | str = "auto"
    compile_ahead: bool = False
    tokenizer: Any = None
    engine: Any = None
    engine_name: str = ""
    warmed: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)  # walks, and under which adapters

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        """A copied model gets its own settings and no engine: an engine belongs to the weights that it reads."""
        apart = ("engine", "engine_name", "tokenizer")
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return ModelState(**copy.deepcopy(kept, memo), tokenizer=self.tokenizer)


def state_of(model: nn.Module) -> ModelState:
    """The state of ``model`` or of the model it wraps.

    Raises:
        ConfigError: the model was not loaded by ``FastLanguageModel.from_pretrained``.
    """
    state = getattr(unwrap(model), ATTRIBUTE, None)
    if not isinstance(state, ModelState):
        raise ConfigError(
            f"model={type(model).__name__} was not loaded by Pronghorn; load it with FastLanguageModel.from_pretrained"
        )
    return state
