"""Settings of ``pronghorn.plan``: a training step that is foreseen, not run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .lora import ALL_LINEARS, CHECKPOINTING


@dataclass(frozen=True)
class PlanSettings:
    """What ``plan`` takes, besides the model.

    Attributes:
        batch_size, seq_length: rows of a micro-batch and tokens of each.
        gpu: a card of the table ("H200", "4090"), or None for the GPU of this machine.
        memory_gb: use at most this much of it, in GB of 2^30 bytes.
        host_memory_gb: main memory that offloading may count on; None takes what is available here, or 128 GB beside a
            card that is only named.
        use_gradient_checkpointing: as in ``get_peft_model``.
        load_in_4bit, full_finetuning: as in ``from_pretrained``; r, target_modules: as in ``get_peft_model``. A live
            model answers these itself.
        optimizer: transformers' name of it.
    """

    batch_size: int = 1
    seq_length: int = 2048
    gpu: str | None = None
    memory_gb: float | None = None
    host_memory_gb: float | None = None
    use_gradient_checkpointing: bool | str = "auto"
    load_in_4bit: bool = True
    full_finetuning: bool = False
    r: int = 16
    target_modules: Any = ALL_LINEARS
    optimizer: str = "paged_adamw_8bit"
    trust_remote_code: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_length", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"plan: {name}={value!r} is out of range; give a whole number of 1 or more")
        for name in ("memory_gb", "host_memory_gb"):
            value, least = getattr(self, name), 0 if name == "host_memory_gb" else 1e-9
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < least):
                raise ConfigError(f"plan: {name}={value!r} is out of range; give GB of 2^30 bytes, or None for all")
        if self.use_gradient_checkpointing not in CHECKPOINTING:
            raise ConfigError(
                f"plan: use_gradient_checkpointing={self.use_gradient_checkpointing!r} is unknown; "
                f"give one of {', '.join(map(repr, CHECKPOINTING))}"
            )
        if self.load_in_4bit and self.full_finetuning:
            raise ConfigError("plan: full_finetuning=True cannot train 4-bit weights; pass load_in_4bit=False with it")
