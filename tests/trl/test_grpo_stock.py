"""TRL's own ``GRPOTrainer`` on Pronghorn's engine (``PatchFastRL(mode="stock")``): no vLLM, no copy, TRL's numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.grpo_trainer as trl_grpo
from datasets import Dataset

from pronghorn import FastLanguageModel, PatchFastRL
from pronghorn.config.errors import ConfigError
from pronghorn.grpo.trl_adapter import unpatch
from pronghorn.grpo.trl_generation import PronghornGeneration, probe
from tests.trl.support import PLAIN_SETTINGS, fast, plain


@pytest.fixture(autouse=True)
def _stock() -> Iterator[None]:
    PatchFastRL("GRPO", FastLanguageModel, mode="stock")
    yield
    unpatch()


def digits(completions: list[Any], **kwargs: Any) -> list[float]:
    return [sum(ch.isdigit() for ch in c[0]["content"]) / (1 + len(c[0]["content"])) for c in completions]


def trainer(model: Any, tokenizer: Any, folder: Path, **args: Any) -> Any:
    rows = [{"prompt": [{"role": "user", "content": f"Tom has {i} apples and buys 7. How many?"}]} for i in range(8)]
    settings: dict[str, Any] = {
        **PLAIN_SETTINGS, "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 12, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.6,
        "learning_rate": 1.0, **args,
    }  # fmt: skip
    return trl.GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=digits, train_dataset=Dataset.from_list(rows),
        args=trl.GRPOConfig(output_dir=str(folder), **settings),
    )  # fmt: skip


def logits_of(model: Any, ids: list[int], completion: list[int]) -> torch.Tensor:
    """Logits before each completion token, by plain transformers in evaluation mode: ``[len(completion), V]``."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1].float()


PROMPT = [0, 12, 45, 78, 200, 33]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_trls_own_trainer_trains_on_the_weights_that_it_samples_from(tmp_path: Path, load_in_4bit: bool) -> None:
    assert importlib.util.find_spec("vllm") is None
    model, tokenizer = fast(load_in_4bit, lora_dropout=0.1)
    made = trainer(model, tokenizer, tmp_path)
    assert type(made) is trl_grpo.GRPOTrainer and type(made).__module__ == "trl.trainer.grpo_trainer"
    assert isinstance(made.vllm_generation, PronghornGeneration)
    torch.manual_seed(5)
    before = made.vllm_generation.generate([PROMPT] * 4, None, 4)
    made.train()
    torch.manual_seed(5)
    _, ids, logps, tokens = made.vllm_generation.generate([PROMPT] * 4, None, 4)
    assert model.training, "the model is left in the mode that it was in"
    # the step is seen, and what is returned is the trained model's own, without dropout
    assert (ids, logps) != (before[1], before[2])
    reference = plain(model, tmp_path / "adapter")
    for completion, each, drawn in zip(ids, logps, tokens):
        assert drawn == [[token] for token in completion]
        wanted = torch.log_softmax(logits_of(reference, PROMPT, completion), -1)
        wanted = wanted.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor([lp for (lp,) in each]), wanted, rtol=0, atol=2e-5)


def test_the_sampler_and_trls_trainer_agree_so_the_correction_is_one(tmp_path: Path) -> None:
    model, tokenizer = fast()
    made = trainer(model, tokenizer, tmp_path, temperature=0.7, vllm_importance_sampling_mode="token_truncate")
    made.train()
    for log in made.state.log_history[:2]:
        assert log["sampling/sampling_logp_difference/mean"] < 1e-5
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)


def test_with_top_p_the_ratio_is_the_kept_mass_as_trl_with_vllm_has_it(tmp_path: Path) -> None:
    """vLLM's ``processed_logprobs`` are of the renormalised distribution, and TRL divides its own by them."""
    model, tokenizer = fast()
    made = trainer(model, tokenizer, tmp_path, top_p=0.6, max_steps=1, vllm_importance_sampling_mode="token_truncate")
    reference = plain(model, tmp_path / "adapter")
    seen: list[Any] = []
    served = made.vllm_generation.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(served(*args, **kwargs))
        return seen[-1]

    made.vllm_generation.generate = spy
    made.train()
    ratios = []
    for prompt, completion, logps in zip(*seen[0][:3]):
        p = torch.softmax(logits_of(reference, prompt, completion), -1)
        ordered, order = p.sort(-1, descending=True)
        kept = (ordered.cumsum(-1) - ordered) < 0.6  # the smallest set whose mass reaches top_p
        mass = (ordered * kept).sum(-1)
        chosen = p.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        assert bool(kept.gather(-1, (order == torch.tensor(completion)[:, None]).int().argmax(-1, True)).all())
        torch.testing.assert_close(torch.tensor([lp for (lp,) in logps]), (chosen / mass).log(), rtol=0, atol=5e-5)
        ratios.append(mass)
    log = made.state.log_history[0]
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-5)
    assert 0.6 < log["sampling/importance_sampling_ratio/mean"] < 0.99


def test_runs_repeat_with_their_seed_and_differ_without(tmp_path: Path) -> None:
    logs = []
    for seed in (1, 1, 2):
        model, tokenizer = fast()
        made = trainer(model, tokenizer, tmp_path, seed=seed)
        made.train()
        logs.append(
            [(log["reward"], log["completions/mean_length"], log["loss"]) for log in made.state.log_history[:2]]
        )
    assert logs[0] == logs[1] != logs[2]


def test_unequal_prompts_get_one_completion_each_in_order(tmp_path: Path) -> None:
    model, tokenizer = fast()
    made = trainer(model, tokenizer, tmp_path, vllm_enable_sleep_mode=True)
    prompts = [PROMPT, PROMPT, PROMPT[:3], PROMPT]
    given, ids, _, _ = made.vllm_generation.generate(prompts, [None] * 4, 1)
    assert given == prompts and len(ids) == 4 and all(0 < len(completion) <= 12 for completion in ids)
    assert made.vllm_generation.engine.cache is None  # sleep mode gave it back
    assert made.vllm_generation.llm.llm_engine.model_config.max_model_len == 256


@pytest.mark.parametrize(
    "args, message",
    [
        ({"vllm_mode": "server"}, "vllm_mode='server'.*'colocate'"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a\\+'"),
        ({"vllm_max_model_length": 10_000}, "vllm_max_model_length=10000.*at most 256"),
        ({"generation_kwargs": {"presence_penalty": 3.0}}, "presence_penalty=3.0.*-2, 2"),
        ({"generation_kwargs": {"n": 4}}, "num_generations"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    model, tokenizer = fast()
    with pytest.raises(ConfigError, match=message):
        trainer(model, tokenizer, tmp_path, **args)


def test_images_and_prompts_without_room_are_refused(tmp_path: Path) -> None:
    model, tokenizer = fast()
    made = trainer(model, tokenizer, tmp_path, vllm_max_model_length=8)
    with pytest.raises(ConfigError, match="images"):
        made.vllm_generation.generate([PROMPT], [["picture"]], 1)
    with pytest.raises(ConfigError, match="vllm_max_model_length=8"):
        made.vllm_generation.generate([PROMPT + PROMPT], None, 1)
    (completion,) = made.vllm_generation.generate([PROMPT], None, 1)[1]
    assert len(completion) <= 2


def test_a_plain_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model, tokenizer = fast()
    with pytest.raises(ConfigError, match="FastLanguageModel.from_pretrained"):
        trainer(plain(model, tmp_path / "adapter"), tokenizer, tmp_path)


def test_one_symbol_changes_and_is_given_back() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    assert trl_grpo.VLLMGeneration is PronghornGeneration
    assert trl.GRPOTrainer is trl_grpo.GRPOTrainer and trl.trainer.rloo_trainer.VLLMGeneration is VLLMGeneration
    PatchFastRL("GRPO", FastLanguageModel, mode="stock")
    PatchFastRL("GRPO", FastLanguageModel)  # native gives the symbol back
    assert trl_grpo.VLLMGeneration is VLLMGeneration and trl.GRPOTrainer is not trl_grpo.GRPOTrainer
    PatchFastRL("GRPO", FastLanguageModel, mode="stock")  # and stock the names
    assert trl.GRPOTrainer is trl_grpo.GRPOTrainer is trl.trainer.GRPOTrainer
    unpatch()
    assert trl_grpo.VLLMGeneration is VLLMGeneration


def test_another_trl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    probe(VLLMGeneration)

    class Grown(VLLMGeneration):
        def __init__(self, model: Any, accelerator: Any, processing_class: Any, lookahead: int = 0) -> None: ...

    class Moved(VLLMGeneration):
        def generate(self, prompt_ids: Any, images: Any, num_generations: int, profiler: Any = None) -> Any: ...

    with pytest.raises(ConfigError, match="__init__ differs in lookahead.*1.15 or 1.16"):
        probe(Grown)
    with pytest.raises(ConfigError, match="generate differs in prompt_ids, prompts"):
        probe(Moved)
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", Grown)
    with pytest.raises(ConfigError, match="not TRL's own"):
        PatchFastRL("GRPO", FastLanguageModel, mode="stock")
