"""Optimizer steps of several micro-batches, and generations of several steps, against ``trl.GRPOTrainer``'s own steps.

Both trainers' ``training_step`` runs in float64 from the same completions, shuffled as TRL shuffles them. Where
docs/losses.md says that the two differ, they differ by the factor that it gives, and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.test_trl_loss import TOLERANCE, gradients, move, same_advantages, sampled
from tests.grpo.trl_oracle import GROUP, PROMPTS, case, our_trainer, trl_trainer
from tests.helpers import relative_error

ROWS = [{"prompt": text} for text in ("a", "b") for _ in range(GROUP)]


@dataclass(frozen=True)
class Cut:
    """How six completions a generation become micro-batches and optimizer steps."""

    micro_batch: int
    accumulation: int
    per_generation: int

    @property
    def generations(self) -> int:
        return max(1, self.accumulation // self.per_generation)

    @property
    def steps(self) -> int:
        return max(1, self.per_generation // self.accumulation)

    @property
    def settings(self) -> dict[str, int]:
        return {
            "per_device_train_batch_size": self.micro_batch, "gradient_accumulation_steps": self.accumulation,
            "steps_per_generation": self.per_generation,
        }  # fmt: skip


CUTS = {
    "a step is a generation": Cut(micro_batch=2, accumulation=3, per_generation=3),
    "three steps a generation": Cut(micro_batch=2, accumulation=1, per_generation=3),
    "two steps of three a generation": Cut(micro_batch=1, accumulation=3, per_generation=6),
    "a step spans two generations": Cut(micro_batch=6, accumulation=2, per_generation=1),
}


@dataclass
class Micro:
    """TRL's share of one micro-batch: its loss and gradients, its tokens, and the tokens of its generation."""

    loss: float
    gradients: dict[str, torch.Tensor]
    tokens: int
    generation_tokens: int


def pair(tmp_path: Path, cut: Cut, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Both trainers, their generations fixed, ours in the order into which TRL has shuffled its own."""
    trl = trl_trainer(tmp_path, True, **cut.settings, **settings)
    ours = our_trainer(tmp_path, **cut.settings, **settings)
    given = [case(seed) for seed in range(cut.generations)]
    fixed = [sampled(ours, one) for one in given]
    theirs, mine = trl._generate_and_score_completions, ours._generate
    trl.generated = 0
    trl.rows = {}  # completion to its advantage, in TRL's order

    def their_generation(rows: list[dict[str, Any]]) -> dict[str, Any]:
        trl.fixed = fixed[trl.generated]
        trl.generated += 1
        batch: dict[str, Any] = theirs(rows)
        return batch

    def our_generation(rows: list[dict[str, Any]], group: int, mode: str, index: int) -> list[Rollout]:
        ours.sampling._engine.fixed = fixed[index]
        ours.sampling.encoder = lambda prompts: (given[index]["prompts"], 0)
        rollouts = {tuple(r.completion_ids): r for r in mine(rows, group, mode, index)}
        ordered = [rollouts[ids] for ids in trl.rows if ids in rollouts]
        same_advantages(ours, ordered, torch.stack([trl.rows[tuple(r.completion_ids)] for r in ordered]))
        assert len(ordered) == len(rows)
        return ordered

    trl._generate_and_score_completions, ours._generate = their_generation, our_generation
    return trl, ours


def their_step(trl: Any, cut: Cut) -> list[Micro]:
    """The micro-batches of TRL's next optimizer step, each with gradients of its own."""
    found = []
    compute = trl.compute_loss
    seen: list[dict[str, torch.Tensor]] = []

    def watched(model: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append(inputs)
        return compute(model, inputs, **kwargs)

    trl.compute_loss = watched
    for _ in range(cut.accumulation):
        trl.model.zero_grad()
        loss = trl.training_step(trl.model, [dict(row) for row in ROWS], None)
        inputs = seen[-1]
        for batch in trl._buffered_inputs:
            for ids, mask, advantage in zip(batch["completion_ids"], batch["completion_mask"], batch["advantages"]):
                trl.rows[tuple(ids[mask.bool()].tolist())] = advantage
        found.append(
            Micro(
                loss.item(),
                gradients(trl.model),
                int(inputs["completion_mask"].sum()),
                int(inputs["num_items_in_batch"]),
            )
        )
    trl.compute_loss = compute
    return found


def our_step(ours: Any, cut: Cut) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of our next optimizer step."""
    ours.model.zero_grad()
    ours._step_rows, ours._window = [ROWS] * cut.accumulation, None
    losses = [ours.training_step(ours.model, None) for _ in range(cut.accumulation)]
    return sum(loss.item() for loss in losses), gradients(ours.model)


def factors(loss_type: str, cut: Cut, micros: list[Micro]) -> list[float]:
    """What docs/losses.md says of each micro-batch's share: ours over TRL's.

    TRL divides by the micro-batch's tokens and by the accumulation (``bnpo``), or by the generation's tokens spread
    evenly over its micro-batches (``dapo``, ``cispo``, ``vespo``); ours by the tokens of the step.
    """
    tokens = sum(micro.tokens for micro in micros)
    if loss_type == "bnpo":
        return [micro.tokens * cut.accumulation / tokens for micro in micros]
    if loss_type in ("dapo", "cispo", "vespo"):
        spread = [torch.tensor(float(m.generation_tokens)) * cut.accumulation / cut.per_generation for m in micros]
        return [float(divisor) / tokens for divisor in spread]  # float32, as TRL's divisor is
    return [1.0] * len(micros)


def same_everywhere(loss_type: str, cut: Cut) -> bool:
    """Whether docs/losses.md says that TRL's optimizer step is ours."""
    if loss_type == "bnpo":
        return cut.accumulation == 1
    if loss_type in ("dapo", "cispo", "vespo"):
        return cut.accumulation == cut.per_generation
    return True


@pytest.mark.parametrize("cut", list(CUTS.values()), ids=list(CUTS))
@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_optimizer_steps(tmp_path: Path, loss_type: str, cut: Cut) -> None:
    """Each step of one generation, or one step of two generations; the policy moves between steps."""
    settings: dict[str, Any] = {"loss_type": loss_type, "beta": 0.04}
    if loss_type == "vespo":
        settings["vllm_importance_sampling_mode"] = "token_truncate"
    trl, ours = pair(tmp_path, cut, settings)
    for step in range(cut.steps):
        micros = their_step(trl, cut)
        loss, mine = our_step(ours, cut)
        shares = factors(loss_type, cut, micros)
        assert loss == pytest.approx(sum(f * m.loss for f, m in zip(shares, micros)), rel=TOLERANCE, abs=TOLERANCE)
        assert len(mine) == 28
        for name, gradient in mine.items():
            expected = sum(f * m.gradients[name] for f, m in zip(shares, micros))
            assert relative_error(gradient, torch.as_tensor(expected)) < TOLERANCE, name
        differs = max(relative_error(mine[n], torch.stack([m.gradients[n] for m in micros]).sum(0)) for n in mine)
        if same_everywhere(loss_type, cut):
            assert differs < TOLERANCE
        else:  # else the factors would be of nothing
            assert differs > 1e-3, differs
        move(trl.model, 0.02, seed=step)
        move(ours.model, 0.02, seed=step)


def test_the_cuts_are_of_one_generation() -> None:
    for cut in CUTS.values():
        assert cut.micro_batch * cut.per_generation == GROUP * PROMPTS
