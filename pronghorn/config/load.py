"""Defaults and checks of ``FastLanguageModel.from_pretrained``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError, reject_unknown


@dataclass(frozen=True)
class LoadConfig:
    """What ``from_pretrained`` takes.

    Attributes:
        model_name: hub name or folder.
        max_seq_length: longest prompt + completion in tokens; None takes the model's own maximum.
        dtype: compute dtype, a torch dtype or its name; None picks bfloat16, float16 or float32 by what the device has.
        load_in_4bit: NF4 base weights with double quantization (QLoRA, arXiv:2305.14314).
        full_finetuning: train every weight; needs 16-bit weights.
        num_labels: load as a sequence classifier with so many scores a sequence, as TRL's RewardTrainer trains with 1;
            the ``score`` head is drawn from ``random_state`` where the files have none. None loads the language model.
        fast_inference: allocate the rollout engine at load instead of at first use.
        max_lora_rank: the largest rank that ``get_peft_model`` accepts.
        gpu_memory_utilization: most of the GPU's memory that KV cache and weights may fill, in (0, 1].
        compile_ahead: compile the kernels of rollouts and training steps side by side, in threads, before their first
            launch, where they would compile one by one.
        device_map: ``"auto"`` (the one chosen device), a device such as ``"cuda:1"``, or ``"cpu"``.
    """

    model_name: str
    max_seq_length: int | None = 2048
    dtype: Any = None
    load_in_4bit: bool = True
    load_in_8bit: bool = False
    full_finetuning: bool = False
    num_labels: int | None = None
    fast_inference: bool = False
    max_lora_rank: int = 64
    gpu_memory_utilization: float = 0.6
    compile_ahead: bool = True
    device_map: Any = "auto"
    token: str | bool | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    use_gradient_checkpointing: bool | str = "auto"
    random_state: int = 3407

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            raise ConfigError(
                "from_pretrained: load_in_8bit=True is not offered; use load_in_4bit=True (NF4) or "
                "load_in_4bit=False (16-bit weights)"
            )
        if self.load_in_4bit and self.full_finetuning:
            raise ConfigError(
                "from_pretrained: full_finetuning=True cannot train load_in_4bit=True weights, which are frozen codes; "
                "pass load_in_4bit=False, or full_finetuning=False and add LoRA"
            )
        if self.num_labels is not None and self.num_labels < 1:
            raise ConfigError(f"from_pretrained: num_labels={self.num_labels} is out of range; give 1 or more, or None")
        if self.num_labels is not None and self.fast_inference:
            raise ConfigError(
                f"from_pretrained: fast_inference=True with num_labels={self.num_labels}: a classifier generates "
                "nothing; leave one of them out"
            )
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise ConfigError(f"from_pretrained: max_seq_length={self.max_seq_length} is too small; give 2 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"from_pretrained: gpu_memory_utilization={self.gpu_memory_utilization} is out of range; give (0, 1]"
            )
        if self.max_lora_rank < 1:
            raise ConfigError(f"from_pretrained: max_lora_rank={self.max_lora_rank} is out of range; give 1 or more")

    @classmethod
    def of(cls, **given: Any) -> LoadConfig:
        """Build from keyword arguments; an unknown one raises with the nearest known name."""
        reject_unknown("from_pretrained", given, [f.name for f in fields(cls)])
        return cls(**given)
