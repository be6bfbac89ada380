"""The vLLM engine against a stand-in for the vllm package: what it is asked, and what is made of its answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pronghorn.config.adapters import LoraHandle
from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.models.state import Source, state_of
from pronghorn.rollout import base
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class FakeLLM:
    options: dict[str, Any]
    calls: list[tuple] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def generate(self, prompts, params, lora_request=None, use_tqdm=True):
        adapter = lora_request and sorted(p.name for p in Path(lora_request.lora_path).iterdir())
        self.calls.append((prompts, params, lora_request, adapter))
        answers = []
        for row, (prompt, p) in enumerate(zip(prompts, params)):
            step = {5: SimpleNamespace(logprob=-0.5, rank=1, decoded_token="x")}
            done = [
                SimpleNamespace(
                    index=i,
                    text="xx",
                    token_ids=(5, 5),
                    logprobs=[step, step],
                    finish_reason="length",
                    stop_reason=None,
                )
                for i in range(p.n)
            ]
            answers.append(
                SimpleNamespace(
                    request_id=str(row), prompt=None, prompt_token_ids=prompt["prompt_token_ids"], outputs=done
                )
            )
        return answers

    def sleep(self, level):
        self.log.append(f"sleep {level}")

    def wake_up(self):
        self.log.append("wake")

    def reset_prefix_cache(self):
        self.log.append("reset")


@pytest.fixture
def fake(monkeypatch):
    """A vllm package whose LLM is :class:`FakeLLM`; gives the list of LLMs made."""
    made: list[FakeLLM] = []

    def llm(**options):
        made.append(FakeLLM(options))
        return made[-1]

    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams, request.LoRARequest = llm, lambda **kw: SimpleNamespace(**kw), LoRARequest
    for name, module in {"vllm": package, "vllm.lora": lora, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def model_and_tokenizer(tmp_path):
    folder = tiny_llama(tmp_path)
    model, tokenizer = load(folder)
    state_of(model).source = Source(str(folder), str(folder), None, {})
    return model, tokenizer


def test_without_vllm_the_remedy_is_named(model_and_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm, or use the native engine"):
        base.create("vllm", *model_and_tokenizer)


def test_the_live_adapter_is_saved_anew_for_each_policy(model_and_tokenizer, fake):
    model, tokenizer = model_and_tokenizer
    model = with_lora(model)
    engine = base.create("vllm", model, tokenizer, max_num_seqs=8)
    options = fake[0].options
    assert options["model"] == state_of(model).source.folder
    assert (options["dtype"], options["max_model_len"], options["max_num_seqs"]) == ("float32", 256, 8)
    assert options["logprobs_mode"] == "processed_logprobs" and options["max_lora_rank"] == 64
    seen: list[tuple] = []
    (out,) = engine.generate([[1, 2]], SamplingParams(n=2, stop="a"), progress=lambda *a: seen.append(a))
    assert out.prompt_token_ids == [1, 2] and seen == [(2, 2, 4)]
    first = out.outputs[1]
    assert (first.token_ids, first.token_logprobs, first.cumulative_logprob) == ([5, 5], [-0.5, -0.5], -1.0)
    assert first.policy_logprobs == first.token_logprobs and first.logprobs is None
    engine.generate([[1, 2]], SamplingParams(logprobs=1))
    engine.policy_changed()
    engine.generate([[1, 2]], SamplingParams())
    handle = LoraHandle("other", fake[0].calls[-1][2].lora_path, 1)
    engine.generate([[1, 2]], SamplingParams(), adapter=handle)
    engine.generate([[1, 2]], SamplingParams(), adapter=None)
    requests = [call[2] for call in fake[0].calls]
    assert requests[0] is requests[1] and requests[2].lora_int_id != requests[0].lora_int_id
    assert len({r.lora_int_id for r in requests[1:4]}) == 3 and requests[4] is None
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(fake[0].calls[2][3])
    params = fake[0].calls[0][1][0]
    assert (params.n, params.stop, params.logprobs) == (2, ["a"], 0)


def test_sleep_and_wake(model_and_tokenizer, fake):
    engine = base.create("vllm", *model_and_tokenizer)
    engine.generate([[1]], SamplingParams())
    engine.release()
    engine.release()
    engine.generate([[1]], SamplingParams())
    assert fake[0].log == ["sleep 1", "wake"]
    assert engine.rest(0.0) is False and fake[0].log == ["sleep 1", "wake"]


def test_it_cannot_be_exact(model_and_tokenizer, fake):
    with pytest.raises(ConfigError, match="cannot be exact: its kernels are not the trainer's; use 'native'"):
        base.create("vllm", *model_and_tokenizer).check_exact()


def test_what_it_cannot_do_is_refused(model_and_tokenizer, fake):
    engine = base.create("vllm", *model_and_tokenizer)
    with pytest.raises(ConfigError, match="top_p=0.9 with the engine 'vllm'"):
        engine.generate([[1]], SamplingParams(top_p=0.9))
    with pytest.raises(ConfigError, match=r"prompts\[0\] has 0 tokens"):
        engine.generate([[]], SamplingParams())
    engine.policy_changed()
    with pytest.raises(ConfigError, match="cannot follow full_finetuning"):
        engine.generate([[1]], SamplingParams())
