"""The fields of ``GRPOConfig`` that say which prompts and which rollouts an optimizer step gets; all off by default."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config.errors import ConfigError


@dataclass
class SamplingFields:
    """Settings beyond TRL's; ``docs/sampling.md`` says what each does and what it costs.

    Attributes:
        dynamic_sampling: replace groups without spread by groups of further prompts, until the batch is full (DAPO,
            arXiv:2503.14476, section 3.2).
        dynamic_sampling_max_rounds: most refills of one generation; what is then missing stays filled by flat groups,
            counted and said.
        outcome_reward: the reward function whose spread dynamic sampling and the replay buffer look at, and whose value
            the curriculum counts as solved; None takes the weighted sum.
        replay_buffer_size: groups with spread of earlier generations that may stand in for flat ones; 0 is off.
        replay_max_age: generations after which a kept group is forgotten.
        curriculum: draw prompts by their measured solve rate, those near 1/2 most often.
        curriculum_solved_at: from which outcome reward on a completion counts as solved.
        curriculum_floor: share of the draws that go by no preference, in (0, 1], so that no prompt is lost for good.
        rollout_staleness: generations that are sampled ahead, so that their rewards are computed while earlier ones
            are trained on; 0 is on policy.
        rollout_overlap: draw what is sampled ahead on a thread of its own while earlier generations are trained on,
            by the policy as it was before: the same run, bit for bit, as without it. Needs ``rollout_staleness``.
    """

    dynamic_sampling: bool = field(
        default=False, metadata={"help": "Replace groups without spread by groups of further prompts (DAPO)."}
    )
    dynamic_sampling_max_rounds: int = field(
        default=10, metadata={"help": "Most refills of one generation; then flat groups stay."}
    )
    outcome_reward: str | None = field(
        default=None, metadata={"help": "Reward function that says whether a group has spread; None: weighted sum."}
    )
    replay_buffer_size: int = field(
        default=0, metadata={"help": "Groups of earlier generations that may replace flat ones; 0 is off."}
    )
    replay_max_age: int = field(
        default=4, metadata={"help": "Generations after which a group in the replay buffer is forgotten."}
    )
    curriculum: bool = field(
        default=False, metadata={"help": "Draw prompts by their measured solve rate, near 1/2 most often."}
    )
    curriculum_solved_at: float = field(
        default=1.0, metadata={"help": "Outcome reward from which on a completion counts as solved."}
    )
    curriculum_floor: float = field(
        default=0.1, metadata={"help": "Share of the curriculum's draws that go by no preference."}
    )
    rollout_staleness: int = field(
        default=0, metadata={"help": "Generations sampled ahead, scored while earlier ones train; 0 is on policy."}
    )

    rollout_overlap: bool = field(
        default=False, metadata={"help": "Draw generations that are sampled ahead while earlier ones train."}
    )

    def check_sampling(self) -> None:
        """Raise ``ConfigError`` for a value out of range."""
        checks = {
            "dynamic_sampling_max_rounds": (self.dynamic_sampling_max_rounds >= 1, "give 1 or more"),
            "replay_buffer_size": (self.replay_buffer_size >= 0, "give a number of groups, or 0 for none"),
            "replay_max_age": (self.replay_max_age >= 1, "give 1 or more generations"),
            "curriculum_floor": (0 < self.curriculum_floor <= 1, "give a share in (0, 1]"),
            "rollout_staleness": (self.rollout_staleness >= 0, "give 0 or a number of generations"),
        }
        for name, (fine, remedy) in checks.items():
            if not fine:
                raise ConfigError(f"GRPOConfig: {name}={getattr(self, name)!r} is out of range; {remedy}")
        if self.rollout_overlap and not self.rollout_staleness:
            raise ConfigError(
                "GRPOConfig: rollout_overlap=True with rollout_staleness=0, where nothing is sampled ahead; set "
                "rollout_staleness=1, or leave rollout_overlap out"
            )

    @property
    def chooses_prompts(self) -> bool:
        """Whether prompts come from the trainer's own stream instead of the data loader's rows."""
        return self.dynamic_sampling or self.curriculum or self.rollout_staleness > 0
