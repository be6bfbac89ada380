"""The public API as scripts use it: load, adapt, train with the blog's settings, try, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import pronghorn
from pronghorn import ConfigError, FastLanguageModel, PatchFastRL, SamplingParams
from pronghorn.grpo.trl_adapter import unpatch
from tests.helpers import perturb, tiny_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    settings = {"max_seq_length": 128, "load_in_4bit": True, "max_lora_rank": 8, **options}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **settings)
    return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=TARGETS), tokenizer


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, **options)


def test_the_model_stays_a_transformers_model_under_peft(folder: Path) -> None:
    model, _ = load(folder)
    assert isinstance(model, PeftModel)
    assert isinstance(model.get_base_model(), PreTrainedModel)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"weight"}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("fast_inference", [True, False])
def test_lora_request_chooses_live_base_or_loaded(folder: Path, tmp_path: Path, fast_inference: bool) -> None:
    """The engine may have been made before PEFT wrapped the model; every choice must still reach it."""
    model, tokenizer = load(folder, fast_inference=fast_inference)
    ids = [[5, 9, 11, 20]]

    def say(**options: Any) -> list[int]:
        return model.fast_generate(ids, greedy(), **options)[0].outputs[0].token_ids

    base = say(lora_request=None)
    assert say() == base  # B is zero
    perturb(model, 0.5)
    live = say()
    assert live != base
    model.save_lora(str(tmp_path / "adapter"))
    handle = model.load_lora(str(tmp_path / "adapter"))
    assert say(lora_request=handle) == live
    perturb(model, 0.5)
    assert say(lora_request=handle) == live  # the saved one, not the live one
    assert say() not in (live, base)
    assert say(lora_request=None) == base
    with pytest.raises(ConfigError, match="lora_request='x' is a str"):
        say(lora_request="x")


def test_fast_generate_takes_strings_ids_chats_and_vllms_params(folder: Path) -> None:
    model, tokenizer = load(folder)
    chat = [{"role": "user", "content": "2 + 2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    outputs = [model.fast_generate(prompts, greedy())[0] for prompts in ([chat], [text], [ids], chat, text)]
    assert {tuple(o.prompt_token_ids) for o in outputs} == {tuple(ids)}
    assert {tuple(o.outputs[0].token_ids) for o in outputs} == {tuple(outputs[0].outputs[0].token_ids)}

    class VLLMParams:  # the attributes that a vllm.SamplingParams has and that matter
        def __init__(self, **given: Any) -> None:
            self.temperature, self.max_tokens, self.n, self.ignore_eos, self.presence_penalty = 0.0, 8, 1, True, 0.0
            self.__dict__.update(given)

    assert model.fast_generate([ids], VLLMParams())[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    with pytest.raises(ConfigError, match="allowed_token_ids=.7."):
        model.fast_generate([ids], VLLMParams(allowed_token_ids=[7]))
    changed = model.fast_generate([ids], VLLMParams(presence_penalty=2.0))[0].outputs[0].token_ids
    assert changed != outputs[0].outputs[0].token_ids
    with_logprobs = model.fast_generate([ids], greedy(logprobs=2))[0].outputs[0]
    assert with_logprobs.finish_reason == "length"
    assert with_logprobs.token_ids[0] in with_logprobs.logprobs[0]


def test_the_blogs_script_runs_as_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PatchFastRL("GRPO", FastLanguageModel)
    try:
        from trl import GRPOConfig, GRPOTrainer

        assert trl.GRPOTrainer is pronghorn.GRPOTrainer is trl.trainer.GRPOTrainer
        model, tokenizer = load(folder)
        args = GRPOConfig(
            use_vllm=True, learning_rate=5e-6, adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.1, warmup_ratio=0.1,
            lr_scheduler_type="cosine", optim="paged_adamw_8bit", logging_steps=1, bf16=True,
            per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=6, max_prompt_length=16,
            max_completion_length=12, max_steps=2, save_steps=250, max_grad_norm=0.1, report_to="none",
            output_dir=str(tmp_path / "outputs"),
        )  # fmt: skip
        said = capsys.readouterr().out
        for line in ("use_vllm=True", "warmup_ratio=0.1", "max_prompt_length=16", "1 prompts x 6 completions"):
            assert line in said
        chat = [{"role": "user", "content": "how many apples"}]
        data = Dataset.from_list([{"prompt": chat, "answer": "3"}] * 4)

        def reward(completions: Any, answer: list[str], **_: Any) -> list[float]:
            assert answer == ["3"] * 6
            return [float(len(c[0]["content"])) for c in completions]

        trainer = GRPOTrainer(
            model=model, processing_class=tokenizer, reward_funcs=[reward], args=args, train_dataset=data
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer.train()
        assert trainer.state.global_step == 2
        moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
        assert any("lora_B" in n for n in moved)
        assert len(model.fast_generate(["calculate 11111 * 111"], greedy())[0].outputs[0].token_ids) == 8
        model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method="merged_16bit")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not hasattr(merged.config, "quantization_config")
    finally:
        unpatch()
    assert trl.GRPOTrainer is not pronghorn.GRPOTrainer


def test_bad_input_is_refused_before_long_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_lenght.*did you mean 'max_seq_length'"):
        FastLanguageModel.from_pretrained(str(folder), max_seq_lenght=128)
    with pytest.raises(ConfigError, match="full_finetuning=True cannot train load_in_4bit"):
        FastLanguageModel.from_pretrained(str(folder), load_in_4bit=True, full_finetuning=True)
    with pytest.raises(ConfigError, match="load_in_8bit"):
        FastLanguageModel.from_pretrained(str(folder), load_in_8bit=True)
    with pytest.raises(ConfigError, match="no such folder"):
        FastLanguageModel.from_pretrained(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="device_map='cuda:0'"):
        FastLanguageModel.from_pretrained(str(folder), device_map="cuda:0")
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, max_lora_rank=8)
    with pytest.raises(ConfigError, match="r=16 is over max_lora_rank=8"):
        FastLanguageModel.get_peft_model(model, r=16)
    with pytest.raises(ConfigError, match="'lora_alhpa'.*did you mean 'lora_alpha'"):
        FastLanguageModel.get_peft_model(model, r=4, lora_alhpa=8)
    with pytest.raises(ConfigError, match="algorithm='PPO'"):
        PatchFastRL("PPO", FastLanguageModel)
