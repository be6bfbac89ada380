"""Defaults and checks of ``FastLanguageModel.get_peft_model``. Values follow PEFT's LoraConfig where it has them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError, reject_unknown

CHECKPOINTING = ("auto", "memory", "off", "unsloth", True, False)
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraDefaults:
    """What ``get_peft_model`` takes, besides the model.

    Where it differs from PEFT: ``r`` is 16 (PEFT: 8), ``lora_alpha`` 16 (PEFT: 8) and ``target_modules`` all seven
    projections (PEFT: q and v), the values that fine-tuning guides for this flow use.
    """

    r: int = 16
    target_modules: Any = ALL_LINEARS
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    use_gradient_checkpointing: bool | str = "auto"
    random_state: int = 3407
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    init_lora_weights: Any = True
    loftq_config: Any = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int] | None = None
    exclude_modules: Any = None
    task_type: str = "CAUSAL_LM"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"get_peft_model: r={self.r} is out of range; give a rank of 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"get_peft_model: lora_dropout={self.lora_dropout} is out of range; give [0, 1)")
        if self.use_gradient_checkpointing not in CHECKPOINTING:
            raise ConfigError(
                f"get_peft_model: use_gradient_checkpointing={self.use_gradient_checkpointing!r} is unknown; "
                f"give one of {', '.join(map(repr, CHECKPOINTING))}"
            )
        if self.loftq_config:
            raise ConfigError("get_peft_model: loftq_config would change the frozen base; leave it out")

    @classmethod
    def of(cls, **given: Any) -> LoraDefaults:
        """Build from keyword arguments; an unknown one raises with the nearest known name."""
        reject_unknown("get_peft_model", given, [f.name for f in fields(cls)])
        return cls(**given)
