"""The reference policy: the policy as the trainer got it, whatever trains, moved by syncs, kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from trl.trainer.callbacks import SyncRefModelCallback

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.reference import FILE, Reference, is_fresh
from pronghorn.grpo.rollouts import Rollout
from pronghorn.loader import from_pretrained
from tests.grpo.support import FakeEngine, adapter_weights, pronghorn_model, trainer
from tests.helpers import tiny_llama

ROLLOUT = Rollout([7, 8, 9], [30, 31, 32, 5], [0.0] * 4)


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return score(model, pack([ROLLOUT], "cpu"))[0]


def fresh_model() -> Any:
    model = pronghorn_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    return model


def shift(model: Any, size: float = 0.05) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size)


def full_model(tmp_path: Path) -> Any:
    folder = tiny_llama(tmp_path)
    model, _ = from_pretrained(
        LoadConfig.of(model_name=str(folder), load_in_4bit=False, full_finetuning=True, max_seq_length=256,
                      dtype=torch.float32)
    )  # fmt: skip
    return model


def test_a_fresh_adapter_needs_no_copy() -> None:
    model = fresh_model()
    before = logps(model)
    reference = Reference(model)
    assert is_fresh(model) and reference.nbytes == 0 and "base model" in str(reference)
    shift(model)
    with reference.acting():
        torch.testing.assert_close(logps(model), before, rtol=1e-6, atol=1e-6)
    assert (logps(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["adapter", "moves", "full"])
def test_a_frozen_copy_is_the_policy_as_it_was(tmp_path: Path, kind: str) -> None:
    model = full_model(tmp_path) if kind == "full" else pronghorn_model() if kind == "adapter" else fresh_model()
    before = logps(model)
    reference = Reference(model, moves=kind == "moves")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert reference.nbytes == sum(p.nbytes for p in trained) > 0
    assert f"{reference.nbytes / 1e6:,.1f} MB" in str(reference)
    shift(model)
    now, weights = logps(model), [p.detach().clone() for p in trained]
    places = [p.data_ptr() for p in trained]
    with reference.acting():
        assert torch.equal(logps(model), before)
    assert torch.equal(logps(model), now) and [p.data_ptr() for p in trained] == places
    assert all(torch.equal(p, w) for p, w in zip(trained, weights))
    with pytest.raises(KeyError), reference.acting():
        raise KeyError
    assert torch.equal(logps(model), now)  # after an error too


def test_sync_is_trls() -> None:
    """TRL's callback on a whole second model, over two syncs; ours on the copy of what trains."""
    ours, theirs = pronghorn_model(), pronghorn_model(seed=0)
    twin = pronghorn_model()
    reference = Reference(ours, moves=True)
    for _ in range(2):
        shift(ours)
        shift(theirs)
        reference.sync(0.6)
        SyncRefModelCallback._sync_target_model(theirs, twin, 0.6)
        with reference.acting():
            mine = adapter_weights(ours)
        for name, weight in adapter_weights(twin).items():
            torch.testing.assert_close(mine[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps, syncs", [(1, 4), (2, 2), (3, 1), (5, 0)])
def test_it_moves_every_so_many_optimizer_steps(tmp_path: Path, steps: int, syncs: int) -> None:
    made = trainer(
        tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=steps, ref_model_mixup_alpha=1.0, max_steps=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    seen: list[int] = []
    sync = made.loss_step.reference.sync
    made.loss_step.reference.sync = lambda alpha: (seen.append(made.state.global_step), sync(alpha))[1]  # type: ignore
    made.train()
    assert seen == [s for s in range(1, 5) if s % steps == 0] and len(seen) == syncs
    if steps <= 2:  # with alpha 1 the last sync, at step 4, made it the policy itself
        now = logps(made.model)
        with made.loss_step.reference.acting():
            assert torch.equal(logps(made.model), now)


def test_kl_is_zero_at_first_and_grows(tmp_path: Path) -> None:
    """An adapter that was trained before is its own reference, as in TRL."""
    made = trainer(tmp_path, beta=0.1, max_steps=3)
    made.train()
    kl = [log["kl"] for log in made.state.log_history if "kl" in log]
    assert abs(kl[0]) < 1e-6 < 1e-4 < kl[-1]


def test_full_fine_tuning_has_a_reference_and_resumes(tmp_path: Path) -> None:
    def make() -> Any:
        model = full_model(tmp_path)
        made = trainer(
            tmp_path / "run", model, beta=0.1, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=1e-3,
            engine=FakeEngine(model, None),
        )  # fmt: skip
        made.sampling._engine.tokenizer = made.processing_class
        return made

    whole = make()
    start = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    assert whole.state.log_history[-2]["kl"] > 1e-4
    saved = load_file(str(tmp_path / "run" / "checkpoint-2" / FILE))
    assert all(torch.equal(saved[n], start[n]) for n in saved) and len(saved) == len(start)
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ends = dict(whole.model.named_parameters())
    assert all(torch.equal(p, ends[n]) for n, p in again.model.named_parameters())
    assert isinstance(again.model, LlamaForCausalLM)


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = pronghorn_model()
    with pytest.raises(ConfigError, match="has no reference.safetensors.*sync_ref_model"):
        Reference(model, moves=True).load(tmp_path)
    reference = Reference(model)
    reference.load(tmp_path)  # that run's adapter was fresh: its reference is the base model
    assert reference.nbytes == 0
    Reference(model).save(tmp_path)
    other = Reference(pronghorn_model(hidden_size=32, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ConfigError, match="does not fit what trains here"):
        other.load(tmp_path)
