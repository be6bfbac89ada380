"""``GRPOConfig``: TRL's, with what GRPO scripts still pass, and nothing taken in silence that would have no effect."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from ..config.errors import ConfigError, reject_unknown
from ..config.watch import WatchConfig
from ..rewards.policy import POLICIES
from .advantages import AGGREGATIONS, SCALES
from .combinations import advice, check_combinations, check_finite
from .correction import MODES
from .losses import LEVELS, LOSSES
from .rollout_config import RolloutFields, check_rollouts
from .sampling_config import SamplingFields
from .translate import batch_line, before_checks, plain

# Fields of TRL and transformers that this trainer does not act on, with the values that mean "off".
_ONLY: dict[str, tuple[Any, ...]] = {
    "loss_type": tuple(LOSSES),
    "importance_sampling_level": LEVELS,
    "vllm_importance_sampling_mode": tuple(MODES),
    "reward_on_error": POLICIES,
    "scale_rewards": SCALES,
    "multi_objective_aggregation": AGGREGATIONS,
    "router_aux_loss_coef": (None, 0.0),
    "cast_lm_head_to_fp32": (False,),
    "cache_implementation": (None,),
    "use_transformers_continuous_batching": (False,),
    "use_transformers_paged": (False,),
    "transformers_continuous_batching_config": (None,),
    "pad_to_multiple_of": (None,),
    "ds3_gather_for_generation": (True,),
    "log_multimodal": (True,),
    "log_completions_hub_repo": (None,),
    "vllm_structured_outputs_regex": (None,),
    "use_liger_kernel": (False,),
    "neftune_noise_alpha": (None,),
    "label_smoothing_factor": (0.0, 0),
    "fp16_full_eval": (False,),
    "bf16_full_eval": (False,),
    "torch_compile": (False,),
    "deepspeed": (None,),
    "fsdp": (None, False, "", []),
}


@dataclass
class GRPOConfig(RolloutFields, SamplingFields, TRLGRPOConfig):
    """Settings of :class:`pronghorn.grpo.trainer.GRPOTrainer`: every field of TRL's ``GRPOConfig``, those of
    :class:`~pronghorn.grpo.sampling_config.SamplingFields` and :class:`~pronghorn.grpo.rollout_config.RolloutFields`,
    and those below.

    Defaults are TRL's. One differs in effect: the correction for the mismatch of sampler and trainer
    (``vllm_importance_sampling_*``), which TRL applies under ``use_vllm`` only, always applies here.

    What older scripts pass is put in today's terms, one printed line each, kept in ``translations``: ``warmup_ratio``
    becomes ``warmup_steps`` below 1; a ``per_device_train_batch_size`` that TRL would refuse counts prompts instead of
    completions; ``use_vllm=True`` is served by Pronghorn's engine; without a GPU, bf16 and fp16 become float32 and
    bitsandbytes' AdamW becomes torch's. Initialising from an already translated config changes nothing.

    Attributes:
        max_prompt_length: longest prompt in tokens; a longer one loses its first tokens. None sets no limit (TRL 1.x
            dropped this field).
        warmup_ratio: fraction of the steps that warm up; None after it moved to ``warmup_steps``.
        rollout_engine: ``"native"``, or the name of another registered engine such as ``"vllm"``.
        overwrite_output_dir: start anew in an output folder that holds checkpoints of an earlier run; they are deleted
            when training starts. By default such a folder is refused.
        log_completions_steps: with ``log_completions``, print the sample table every so many optimizer steps (TRL
            prints one at every log); ``completions.jsonl`` gets the samples of every log.
        reward_workers: 0 calls reward functions in this process, as TRL does; n gives each of them n worker processes,
            which may hang, crash or run out of memory without taking the run down (``docs/rewards.md``). Functions
            wrapped by ``pronghorn.rewards.isolated`` have their own settings.
        reward_timeout: seconds that a worker's call on a batch may take; None is 60. Needs ``reward_workers``.
        reward_on_error: of a completion whose reward function fails: ``"raise"``, ``"nan"`` (it gets no advantage) or
            ``"zero"`` (0.0 from this function).
        watch: thresholds of the warnings about a run that does not learn, where they differ from
            :class:`pronghorn.config.watch.WatchConfig`'s; ``{"enabled": False}`` for none.
        max_consecutive_skipped_steps: a step whose gradients are NaN or inf is skipped and its batch kept under
            ``output_dir/skipped``; after so many in a row the run stops.
        translations: the lines printed so far.

    Raises:
        ConfigError: an unknown field (with the nearest name), a value out of range, a setting of TRL's that this
            trainer does not act on, or a combination in which a setting has no effect (``combinations.py``).
    """

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; longer ones are truncated from the left."}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Fraction of the steps that warm up; becomes warmup_steps below 1."}
    )
    rollout_engine: str = field(default="native", metadata={"help": "Which engine samples: native or vllm."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete an earlier run's checkpoints in output_dir when training starts."}
    )
    log_completions_steps: int = field(
        default=10, metadata={"help": "Print the sample table every so many steps, where log_completions is on."}
    )
    reward_workers: int = field(
        default=0, metadata={"help": "Worker processes of each reward function; 0 calls it in the process."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a reward function may take on a batch in a worker; None is 60."}
    )
    reward_on_error: str = field(
        default="raise", metadata={"help": "What a failing row becomes: raise, nan (no advantage) or zero."}
    )
    watch: dict[str, Any] | None = field(
        default=None, metadata={"help": "Thresholds of the warnings about a run that does not learn, by name."}
    )
    max_consecutive_skipped_steps: int = field(
        default=3, metadata={"help": "Stop after so many steps in a row whose gradients are NaN or inf."}
    )
    translations: list[str] | None = field(
        default=None, metadata={"help": "Lines that earlier initialisations of this config printed."}
    )

    def __new__(cls, *args: Any, **given: Any) -> GRPOConfig:
        # dataclass's own __init__ would raise a TypeError without the nearest name
        reject_unknown("GRPOConfig", given, [f.name for f in fields(cls) if f.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_finite(self)
        lines = before_checks(self)
        super().__post_init__()
        self._refuse_what_has_no_effect()
        WatchConfig.of(self.watch)
        check_rollouts(self)
        self.check_sampling()
        check_combinations(self)
        said = list(self.translations or [])
        for line in [*lines, *advice(self), batch_line(self)]:
            if line not in said:
                print(f"Pronghorn: {line}")
                said.append(line)
        self.translations = said

    def _refuse_what_has_no_effect(self) -> None:
        for name, fine in _ONLY.items():
            value = plain(getattr(self, name))
            if value not in fine:
                raise ConfigError(
                    f"GRPOConfig: {name}={value!r} is not supported yet; give {' or '.join(map(repr, fine))}"
                )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(
                f"GRPOConfig: max_completion_length={self.max_completion_length} is out of range; give 1 or more"
            )
        if self.log_completions_steps < 1:
            raise ConfigError(
                f"GRPOConfig: log_completions_steps={self.log_completions_steps} is out of range; give 1 or more"
            )
        if self.max_consecutive_skipped_steps < 1:
            raise ConfigError(
                f"GRPOConfig: max_consecutive_skipped_steps={self.max_consecutive_skipped_steps} is out of range; give "
                "1 (stop at the first) or more"
            )
        if not self.temperature > 0:
            raise ConfigError(f"GRPOConfig: temperature={self.temperature} gives no spread to learn from; give > 0")
        if self.reward_workers < 0:
            raise ConfigError(f"GRPOConfig: reward_workers={self.reward_workers} is out of range; give 0 or more")
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ConfigError(f"GRPOConfig: reward_timeout={self.reward_timeout} is out of range; give seconds above 0")
        if self.world_size > 1:
            raise ConfigError(f"GRPOConfig: {self.world_size} processes; Pronghorn trains in one process on one GPU")

    @property
    def place_model_on_device(self) -> bool:
        """False: the model stays where the loader put it."""
        return False
