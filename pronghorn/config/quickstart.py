"""Settings of ``pronghorn quickstart``."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True)
class QuickstartConfig:
    """The quickstart's choices; everything else is GRPOConfig's own default.

    Attributes:
        output_dir: where summary, report, adapter and merged model go.
        steps: optimizer steps.
        seed: of the adapter, the training problems and the samples.
        prompts_per_step, num_generations: their product is the completions of a step.
        learning_rate: of LoRA on a model of a few million weights: far above the 5e-6 of an 8B model.
            On the dev split 8e-4 unlearned arithmetic (docs/log.md).
        lora_rank: rank and alpha.
        format_weight: of each of the four format rewards against 1 of correctness. At 1, a wrong answer in the tags
            earns more than a right one without them, and arithmetic is unlearned while the format is learned.
        problems: held-out problems, never trained on; the interval of 500 at one half is 4.4 points each way.
        sample_every: steps between tables of sample completions.
        load_in_4bit: NF4 base, as the flow on a GPU has it.
    """

    output_dir: str = "outputs/quickstart"
    steps: int = 50
    seed: int = 0
    prompts_per_step: int = 8
    num_generations: int = 8
    learning_rate: float = 3e-4
    lora_rank: int = 16
    format_weight: float = 0.2
    problems: int = 500
    train_problems: int = 1500
    max_completion_length: int = 128
    sample_every: int = 10
    load_in_4bit: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "lora_rank", "problems", "train_problems", "sample_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"quickstart: {name}={getattr(self, name)} is out of range; give 1 or more")
        if self.num_generations < 2:
            raise ConfigError(f"quickstart: num_generations={self.num_generations} makes no group; give 2 or more")
