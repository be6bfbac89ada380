"""Generations drawn beside training on a GPU: the run without it to the last bit, whatever the other stream does."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pronghorn
from pronghorn import FastLanguageModel, GRPOConfig, GRPOTrainer
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.rollouts import Rollout
from pronghorn.kernels.low_rank import low_rank
from pronghorn.rollout import base
from pronghorn.rollout.native.capture import Capture
from pronghorn.rollout.native.prefill import Prefill
from tests.gpu.test_determinism import _switch_back as _switch_back  # a fixture of every test here, too
from tests.grpo.support import adapter_weights, fill_lora, letters, prompts
from tests.grpo.test_held import Stuck
from tests.grpo.test_sigterm import At
from tests.invariant.test_resume import history

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
PROMPTS = [[0, *range(40, 40 + n)] for n in (3, 17, 30)]
WAITS = ("sampling/scoring_wait", "sampling/generation_wait")


def loaded(load_in_4bit: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, tokenizer = FastLanguageModel.from_pretrained(str(TINY), max_seq_length=256, load_in_4bit=load_in_4bit)
    return FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=3407), tokenizer


def build(folder: Path, load_in_4bit: bool = True, **settings: Any) -> GRPOTrainer:
    model, tokenizer = loaded(load_in_4bit)
    args = GRPOConfig(
        output_dir=str(folder), max_steps=8, save_strategy="no", learning_rate=1e-3, per_device_train_batch_size=8,
        num_generations=8, max_completion_length=64, optim="paged_adamw_8bit", logging_steps=1, log_completions=True,
        log_completions_steps=1000, report_to="none", full_determinism=True, bf16=True, seed=3, disable_tqdm=True,
        rollout_staleness=1, **settings,
    )  # fmt: skip
    return GRPOTrainer(model, letters, args, prompts(), processing_class=tokenizer)


@pytest.mark.parametrize(
    "settings", [{}, {"load_in_4bit": False}, {"steps_per_generation": 2, "top_p": 0.9, "beta": 0.04}], ids=str
)
def test_the_overlapped_run_is_the_sequential_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    walked, captured, walk, capture = set(), set(), Prefill.__call__, Capture.__call__

    def walking(*args: Any) -> torch.Tensor:
        walked.add(threading.current_thread().name)
        return walk(*args)

    def capturing(*args: Any) -> Any:
        captured.add(threading.current_thread().name)
        return capture(*args)

    monkeypatch.setattr(Prefill, "__call__", walking)
    monkeypatch.setattr(Capture, "__call__", capturing)
    made = {}
    for name in ("sequential", "overlapped"):
        made[name] = build(tmp_path / name, rollout_overlap=name == "overlapped", **settings)
        made[name].train()
    assert walked == {"MainThread", "pronghorn-sampling"} and captured == {"MainThread"}
    expected = adapter_weights(made["sequential"].model)
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(made["overlapped"].model).items())
    logs = [
        [{k: v for k, v in record.items() if k not in WAITS} for record in history(tmp_path / name)] for name in made
    ]
    assert logs[0] == logs[1]
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in made]
    assert samples[0] == samples[1] != ""
    assert not [t for t in threading.enumerate() if t.name.startswith("pronghorn-s")]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_drawing_is_what_it_is_alone_whatever_trains_meanwhile(load_in_4bit: bool) -> None:
    """Few rows are scored and trained on beside it: they ask for the workspaces that a decode step asks for."""
    model, tokenizer = loaded(load_in_4bit)
    fill_lora(model)
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=8, max_tokens=120, seed=1, ignore_eos=True)
    expected = [o.outputs for o in engine.generate(PROMPTS, params)]
    masters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in masters]
    batch = pack([Rollout([0, 7, 8], list(range(40, 48)), [0.0] * 8)] * 2, "cuda")
    for _ in range(3):
        drawing, said = engine.ready(PROMPTS, params, 1.0), []
        thread = threading.Thread(target=lambda d=drawing, s=said: s.extend(d()))
        thread.start()
        drawing.wait_begun()
        model.train()
        steps = 0
        while thread.is_alive() or not steps:
            score(model, batch)[0].sum().backward()
            with torch.no_grad():
                torch._foreach_mul_(masters, 1.01)
            model.zero_grad()
            steps += 1
        thread.join()
        assert [o.outputs for o in said] == expected, f"after {steps} steps beside it"
        with torch.no_grad():
            torch._foreach_copy_(masters, kept)
    assert [o.outputs for o in engine.generate(PROMPTS, params)] == expected
    engine.release()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_drawing_that_was_stopped_is_drawn_again_by_its_own_policy(load_in_4bit: bool) -> None:
    """By the engine that began it and by a fresh one, while the policy has moved on."""
    model, tokenizer = loaded(load_in_4bit)
    fill_lora(model)
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=8, max_tokens=120, seed=1, ignore_eos=True)
    expected = [o.outputs for o in engine.generate(PROMPTS, params)]
    drawing, looks = engine.ready(PROMPTS, params, 1.0), []
    look = drawing._look  # type: ignore[attr-defined]

    def looking(*args: int) -> None:
        looks.append(args)
        if len(looks) == 3:
            drawing.stop(keep=True)
        look(*args)

    drawing._look = looking  # type: ignore[attr-defined]
    with pytest.raises(base.DrawingStopped) as stopped:
        drawing()
    assert stopped.value.policy is not None and 0 < looks[-1][2] < len(PROMPTS) * 8 * 120
    fill_lora(model, seed=9)
    now = [o.outputs for o in engine.generate(PROMPTS, params)]
    assert now != expected
    for drawer in (engine, base.create("native", model, tokenizer)):
        again = drawer.ready(PROMPTS, params, 1.0, stopped.value.policy)
        assert [o.outputs for o in again()] == expected
        assert [o.outputs for o in drawer.generate(PROMPTS, params)] == now
        drawer.release()


def test_a_run_that_is_stopped_amid_a_drawing_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", rollout_overlap=True)
    whole.train()
    cut = build(tmp_path / "cut", rollout_overlap=True)
    cut.add_callback(At("on_step_begin", 3))
    stuck = Stuck(cut, 3, at=1)
    with pytest.raises(SystemExit):
        cut.train()
    assert stuck.stopped == [True]
    resumed = build(tmp_path / "cut", rollout_overlap=True)
    resumed.train(resume_from_checkpoint=True)
    expected = adapter_weights(whole.model)
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(resumed.model).items())
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1] != ""


def test_streams_share_no_workspace_of_the_adapters_product() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    a_RI = torch.randn(32, 4096, device="cuda", generator=generator).bfloat16()
    xs = [torch.randn(8, 4096, device="cuda", generator=generator).bfloat16() for _ in range(2)]
    alone = [low_rank(x, a_RI) for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(300):
        for x, stream, own in zip(xs, streams, found):
            with torch.cuda.stream(stream):
                own.append(low_rank(x, a_RI))
    torch.cuda.synchronize()
    for own, expected in zip(found, alone):
        assert all(torch.equal(y, expected) for y in own)
