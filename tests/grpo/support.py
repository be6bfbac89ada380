"""Models, an engine and rewards small enough to run GRPO in a test within a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from pronghorn.config.adapters import LIVE
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.batch import pack
from pronghorn.grpo.config import GRPOConfig
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.rollouts import Rollout
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.lora.config import register
from pronghorn.models import attach
from pronghorn.models.modes import inference
from pronghorn.models.state import ATTRIBUTE, ModelState
from pronghorn.rollout.base import CompletionOutput, RequestOutput
from tests.helpers import tiny_config, tiny_tokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random tiny Llama, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides)).to(dtype)


def lora(r: int = 4, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")


def fill_lora(model: Any, seed: int = 1) -> None:
    """Give every A and B entries of a fixed size: fresh ones have B = 0, where gradients to A vanish."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise.to(parameter.dtype) * 0.05)


def pronghorn_model(dtype: torch.dtype = torch.float32, seed: int = 0, dropout: float = 0.0, **overrides: Any) -> Any:
    """A tiny Llama under LoRA with Pronghorn's forward, LoRA masters in ``dtype``."""
    base = llama(dtype, seed, **overrides)
    setattr(base, ATTRIBUTE, ModelState(max_seq_length=256, compute_dtype=dtype, tokenizer=tiny_tokenizer()))
    attach(base)
    model = get_peft_model(base, register(lora(dropout=dropout)), autocast_adapter_dtype=False)
    fill_lora(model)
    return model


class FakeEngine:
    """Draws random letters; their log-probabilities are the model's own, so the sampler mismatch is nil.

    Samples depend on the request's seed alone. ``shift`` is added to every log-probability, to fake a mismatch.
    """

    def __init__(self, model: Any, tokenizer: Any, shift: float = 0.0) -> None:
        self.model, self.tokenizer, self.shift = model, tokenizer, shift
        self.calls: list[int] = []

    def generate(
        self, prompts: Sequence[Any], params: Any, adapter: Any = LIVE, progress: Any = None
    ) -> list[RequestOutput]:
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.calls.append(len(prompts))
        with inference(self.model):
            return [self._one(list(ids), p) for ids, p in zip(prompts, params)]

    def _one(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        generator = torch.Generator().manual_seed(params.seed)
        drawn = []
        for _ in range(params.n):
            length = int(torch.randint(1, params.max_tokens + 1, (1,), generator=generator))
            tokens = torch.randint(6, 384, (length,), generator=generator).tolist()
            if length < params.max_tokens:
                tokens[-1] = self.tokenizer.eos_token_id
            drawn.append(tokens)
        batch = pack([Rollout(ids, tokens, [0.0] * len(tokens)) for tokens in drawn], "cpu")
        with torch.no_grad():
            logps = score(self.model, batch, params.temperature)[0].split([len(t) for t in drawn])
        outputs = []
        for i, tokens in enumerate(drawn):
            policy = (logps[i].double() + self.shift).tolist()
            reason = "stop" if tokens[-1] == self.tokenizer.eos_token_id else "length"
            outputs.append(
                CompletionOutput(i, self.tokenizer.decode(tokens), tokens, policy, policy, sum(policy), reason)
            )
        return RequestOutput("0", None, ids, outputs)

    def release(self) -> None:
        """Nothing is kept."""

    def policy_changed(self) -> None:
        """Nothing is kept."""

    def rest(self, keep_share: float) -> bool:
        """Nothing is kept."""
        return False

    def check_exact(self) -> None:
        """It asks the trainer's own forward."""


def letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward with spread: the share of vowels."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch in "aeiou" for ch in text) / max(len(text), 1) for text in texts]


def prompts(n: int = 12) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"What is {i} plus {i + 1}?" for i in range(n)], "answer": [2 * i + 1 for i in range(n)]}
    )


def config(folder: Path, **overrides: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12,
        "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3, "bf16": False,
    }  # fmt: skip
    return GRPOConfig(**{**settings, **overrides})


def trainer(
    folder: Path, model: Any = None, rewards: Any = letters, data: Any = None, engine: Any = None, **overrides: Any
) -> GRPOTrainer:
    """A trainer on the fake engine; ``overrides`` are fields of the config."""
    model = pronghorn_model() if model is None else model
    data = prompts() if data is None else data
    eval_data = overrides.pop("eval_dataset", None)
    callbacks, accuracy_eval = overrides.pop("callbacks", None), overrides.pop("accuracy_eval", None)
    reward_tokenizers = overrides.pop("reward_processing_classes", None)
    made = GRPOTrainer(
        model,
        rewards,
        config(folder, **overrides),
        data,
        eval_data,
        callbacks=callbacks,
        processing_class=tiny_tokenizer(),
        accuracy_eval=accuracy_eval,
        reward_processing_classes=reward_tokenizers,
    )
    made.sampling._engine = FakeEngine(model, made.processing_class) if engine is None else engine
    return made


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
