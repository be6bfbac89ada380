"""The prompt once for its completions, or once for each: equal log-probabilities, losses and LoRA gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.grpo.batch import PackedRollouts, pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.old_policy import comparable
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import config, pronghorn_model
from tests.grpo.trl_oracle import in_float64
from tests.helpers import perturb

SHAPES: dict[str, list[tuple[int, int]]] = {  # (which prompt, completion tokens)
    "one group": [(0, 5), (0, 9), (0, 2)],
    "two groups and a single": [(0, 5), (0, 3), (1, 4), (2, 6), (2, 1), (2, 8)],
    "mixed up": [(0, 5), (1, 4), (2, 2), (0, 3), (2, 7), (1, 1), (0, 1)],
    "empty and one-token completions": [(0, 0), (0, 1), (0, 6), (1, 0), (2, 1), (2, 1)],
    "prompt of one token": [(3, 5), (3, 2), (3, 1)],
    "single rollouts": [(0, 4), (1, 2), (3, 3)],
}
PROMPTS = [7, 12, 3, 1]


def rollouts(shape: str, seed: int = 0) -> list[Rollout]:
    """Random ids, advantages and sampler log-probabilities, some NaN as an engine gives where it cannot score."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(6, 384, (n,), generator=generator).tolist() for n in PROMPTS]
    made = []
    for prompt, n in SHAPES[shape]:
        ids = torch.randint(6, 384, (n,), generator=generator).tolist()
        logps = (-5 + torch.randn(n, generator=generator)).tolist()
        if n > 3:
            logps[1] = float("nan")
        advantage = float(torch.randn((), generator=generator))
        made.append(Rollout(list(prompts[prompt]), ids, logps, advantage=advantage))
    return made


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def steps(folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[Any, LossStep]:
    """A tiny Llama under LoRA; in float64 throughout where ``dtype`` says so."""
    model = pronghorn_model(dtype).train()
    if dtype == torch.float64:
        in_float64(model)
    step = LossStep(config(folder, **settings), model)
    perturb(model)  # away from the reference policy, which is the one that the step was made with
    return model, step


def both(made: list[Rollout], step: LossStep) -> list[PackedRollouts]:
    return [pack(made, "cpu", step.dtype, shared_prefix=shared) for shared in (True, False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_plain_layout(tmp_path: Path, shape: str) -> None:
    model, step = steps(tmp_path, torch.float32)
    made = rollouts(shape)
    found = []
    for batch in both(made, step):
        metrics = Metrics()
        loss = step(batch, window_of(made), metrics)
        found.append((loss.detach(), gradients(model, loss), metrics.flush()))
    (loss, ours, log), (plain_loss, plain, plain_log) = found
    assert relative(loss, plain_loss) < 1e-5 and len(ours) == len(plain) == 28
    for name in plain:
        assert relative(ours[name], plain[name]) < 1e-5, name
    assert max(g.abs().max() for g in plain.values()) > 1e-5
    assert log.keys() == plain_log.keys()
    for name, value in plain_log.items():
        assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_float64_agrees_to_its_own_rounding(tmp_path: Path, loss_type: str) -> None:
    model, step = steps(tmp_path, torch.float64, loss_type=loss_type, beta=0.04)
    made = rollouts("mixed up")
    step.annotate(made, rows_at_once=3)
    results = [gradients(model, step(batch, window_of(made), Metrics())) for batch in both(made, step)]
    for name, plain in results[1].items():  # rotary angles are float32, the same in both
        assert relative(results[0][name], plain) < 1e-11, name


def test_the_prompt_is_computed_once() -> None:
    made = rollouts("two groups and a single")
    shared, plain = (pack(made, "cpu", shared_prefix=s) for s in (True, False))
    assert plain.row_lengths == [11, 9, 15, 8, 3, 10] and set(plain.prefix) == {None}
    assert shared.row_lengths == [7, 4, 2, 15, 3, 5, 7]  # a last token is no input; one token leaves no row
    assert shared.prefix == [None, 0, 0, None, None, 4, 4]
    assert shared.positions_T[:13].tolist() == [*range(7), *range(7, 11), *range(7, 9)]
    assert shared.source_N[:8].tolist() == [6, 7, 8, 9, 10, 6, 11, 12]
    for name in ("targets_N", "row_N", "advantages_B", "sampler_logps_N"):
        torch.testing.assert_close(getattr(shared, name), getattr(plain, name), equal_nan=True)
    assert shared.rows == plain.rows == 6 and shared.tokens == plain.tokens == 27


@pytest.mark.parametrize("shared", [True, False])
def test_order_and_micro_batches_do_not_matter(tmp_path: Path, shared: bool) -> None:
    model, step = steps(tmp_path, torch.float64)
    made = rollouts("mixed up")
    window = window_of(made)

    def total(parts: list[list[Rollout]]) -> dict[str, torch.Tensor]:
        packed = [pack(part, "cpu", step.dtype, shared) for part in parts]
        loss = torch.stack([step(batch, window, Metrics()) for batch in packed]).sum()
        return gradients(model, loss)

    whole = total([made])
    for parts in ([made[::-1]], [made[:2], made[2:5], made[5:]], [[r] for r in made]):
        again = total(parts)
        for name in whole:
            assert relative(again[name], whole[name]) < 1e-11, name


def test_annotations_go_to_their_own_rollouts(tmp_path: Path) -> None:
    """Whatever the split, each rollout gets the log-probabilities of its own tokens."""
    settings = {"beta": 0.1, "num_iterations": 2}
    model, step = steps(tmp_path, torch.float64, **settings)
    assert step.needs_old
    made = rollouts("mixed up")
    for rows_at_once in (7, 3, 1):
        for r in made:
            r.old_logps = r.ref_logps = None
        step.annotate(made, rows_at_once)
        for r in made:
            alone = score(model, pack([r], "cpu", torch.float64, shared_prefix=False))[0].detach()
            torch.testing.assert_close(r.old_logps, alone, rtol=1e-10, atol=1e-10)
            assert r.ref_logps is not None and not torch.allclose(r.ref_logps, alone, atol=1e-6)


def test_what_is_not_scored_is_not_computed(tmp_path: Path) -> None:
    model, step = steps(tmp_path, torch.float64)
    made = rollouts("two groups and a single")
    made[0].scored = made[2].scored = False
    batch = pack(made, "cpu", torch.float64)
    assert sum(batch.row_lengths) == len(batch.input_ids_T) == (7 + 2) + (3 + 5 + 7)
    assert batch.row_N.unique().tolist() == [1, 3, 4, 5] and batch.rows == 6
    plain = pack(made, "cpu", torch.float64, shared_prefix=False)
    ours, theirs = (gradients(model, step(b, window_of(made), Metrics())) for b in (batch, plain))
    for name in theirs:
        assert relative(ours[name], theirs[name]) < 1e-11, name


def test_a_batch_without_scored_tokens_has_a_loss_of_zero(tmp_path: Path) -> None:
    model, step = steps(tmp_path, torch.float32)
    made = rollouts("one group")
    for r in made:
        r.scored = False
    loss = step(step.pack(made), window_of(made), Metrics())
    assert loss.item() == 0.0
    assert all(not g.any() for g in gradients(model, loss).values())


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout 0: the prompt has no tokens"):
        pack([Rollout([], [1, 2], [0.0, 0.0])], "cpu")


def test_a_batch_knows_whether_the_sampler_scored_all_of_it() -> None:
    known = Rollout([7, 8], [9, 10], [-1.0, -2.0])
    unknown = Rollout([7, 8], [9, 10], [-1.0, math.nan])
    stale = Rollout([7, 8], [9, 10], [-1.0, -2.0], age=1)
    for made, complete in (([known], True), ([known, unknown], False), ([stale, known], False)):
        batch = pack(made, "cpu")
        assert batch.complete == complete
        gap = comparable(batch, batch.sampler_logps_N) - batch.sampler_logps_N
        assert bool(gap.isnan().any()) != complete
