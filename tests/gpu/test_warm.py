"""After the warm-up no training step, rollout or scoring of it compiles anything on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.shared_prefix import rollouts
from pronghorn import FastLanguageModel, GRPOConfig, SamplingParams
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.metrics import Metrics
from pronghorn.optim import PagedAdamW8bit
from pronghorn.rollout.warmup import warm_up
from tests.helpers import tiny_llama


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The specializations that a launch did not find in memory, whether or not they lay in the cache on disk."""
    import triton

    found: list[str] = []

    def seen(*, repr: str, **_: Any) -> None:
        found.append(repr)

    triton.knobs.runtime.jit_cache_hook = seen
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_llama(
        tmp_path_factory.mktemp("warm"), hidden_size=512, intermediate_size=1280, num_hidden_layers=2, vocab_size=16384
    )
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=2048,
        dtype=torch.bfloat16,
        fast_inference=True,
        max_lora_rank=16,
        compile_ahead=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    assert warm_up(model) is None  # get_peft_model began it, and nothing is begun twice
    return model


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "pronghorn-warm":
            thread.join()


@pytest.mark.parametrize("shape", [(2, 2048), (3, 77), (1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["memory", "off"])
def test_supervised_steps_find_their_kernels(warmed: Any, shape: tuple[int, int], mode: str) -> None:
    from pronghorn.models import checkpointing

    wait()
    checkpointing.set_mode(warmed, mode)
    trained = [p for p in warmed.parameters() if p.requires_grad]
    optimizer = PagedAdamW8bit(trained, lr=1e-4)
    ids = torch.randint(5, 16000, shape, device="cuda")
    with compiled() as found:
        warmed(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert found == []


@pytest.mark.parametrize("temperature_and_top_p", [(1.0, 1.0), (0.8, 0.95), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("completions", [1, 6, 20, 40])
def test_rollouts_find_their_kernels(warmed: Any, temperature_and_top_p: tuple[float, float], completions: int) -> None:
    wait()
    temperature, top_p = temperature_and_top_p
    params = SamplingParams(n=completions, temperature=temperature, top_p=top_p, max_tokens=20, ignore_eos=True)
    with compiled() as found:
        warmed.fast_generate([[0, *range(40, 300)], [0, 50, 51]], sampling_params=params)
    assert found == []


@pytest.mark.parametrize("length", [7, 400, 700])  # 700: too many keys to copy prompts for backward
def test_scoring_finds_its_kernels(warmed: Any, length: int) -> None:
    wait()
    config = GRPOConfig(
        output_dir="unused", num_generations=6, per_device_train_batch_size=6, max_completion_length=length,
        report_to="none", bf16=True, beta=0.1,
    )  # fmt: skip
    step = LossStep(config, warmed)
    made = rollouts(2, 130, 6, length)
    with compiled() as found:
        step.annotate(made, 12)
        step(step.pack(made), window_of(made), Metrics()).backward()
    assert found == []
    warmed.zero_grad(set_to_none=True)
