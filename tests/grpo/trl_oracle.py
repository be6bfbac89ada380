"""TRL's own GRPOTrainer on a tiny model in float64, fed the completions of a test instead of generating.

TRL's pipeline runs whole: rewards, advantages, old and reference log-probabilities, sampler correction, loss. Only on
the test's own instances, what transformers and TRL compute in float32 whatever the model's dtype is done in float64:
RMSNorm, rotary angles, and the scoring of the head.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from pronghorn.rollout.base import CompletionOutput, RequestOutput
from tests.grpo.support import FakeEngine, fill_lora, llama, lora, pronghorn_model, trainer
from tests.helpers import tiny_tokenizer

GROUP, PROMPTS, LIMIT = 3, 2, 9


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def _rope(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids.double().unsqueeze(-1) * self.inv_freq.double()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def in_float64(model: Any) -> Any:
    """Make this instance's norms and rotary angles compute in float64."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(_norm, module)
        elif isinstance(module, LlamaRotaryEmbedding):
            module.forward = MethodType(_rope, module)
    return model


def _score64(
    self: Any, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
    logps = torch.log_softmax(logits / self.temperature, dim=-1)
    chosen = logps.gather(-1, input_ids[:, -logits_to_keep:].unsqueeze(-1)).squeeze(-1)
    return chosen, -(logps.exp() * logps).sum(-1), None


def first(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids[0] % 7) for ids in completion_ids]


def second(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Abstains now and then."""
    return [None if ids[-1] % 3 == 0 else len(ids) / 10 for ids in completion_ids]


def case(seed: int = 0) -> dict[str, list]:
    """Prompts of unlike length, completions of unlike length (one cut off), and sampler log-prob noise."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(6, 384, (n,), generator=generator).tolist() for n in (5, 8)]
    lengths = torch.randint(2, LIMIT, (PROMPTS * GROUP,), generator=generator).tolist()
    lengths[1] = LIMIT
    ids = [torch.randint(6, 384, (n,), generator=generator).tolist() for n in lengths]
    for i, completion in enumerate(ids):
        if i != 1:
            completion[-1] = 5
    noise = [(torch.randn(n, generator=generator, dtype=torch.float64) * 0.4).tolist() for n in lengths]
    return {"prompts": prompts, "ids": ids, "noise": noise}


def trl_trainer(folder: Path, correct: bool, reference: str = "base", **settings: Any) -> Any:
    """TRL's trainer with a rollout function that returns what ``made.fixed`` holds.

    ``reference``: "base" is the model without its adapter, TRL's for a fresh one; "copy" the adapter as it was.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|end_of_text|>"
    made: Any = None

    def fixed(prompts: list, _: Any) -> dict[str, list]:
        return made.fixed

    settings = {"per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP, **settings}
    args = TRLConfig(
        output_dir=str(folder / "trl"), max_completion_length=LIMIT, report_to="none", bf16=False,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    model = get_peft_model(llama(torch.float64), lora(), autocast_adapter_dtype=False)
    fill_lora(model)
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    made = TRLTrainer(in_float64(model), [first, second], args, data, processing_class=tokenizer, rollout_func=fixed)
    if reference == "base" and "ref" in model.peft_config:
        model.delete_adapter("ref")
    made._get_per_token_logps_and_entropies = MethodType(_score64, made)
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    if correct:  # what use_vllm=True switches on, without vLLM
        made.use_vllm, made._last_loaded_step = True, made.state.global_step
    made.model.train()
    return made


class FixedEngine(FakeEngine):
    """Returns a test's completions."""

    fixed: dict[str, list]

    def generate(self, prompts: Any, params: Any, adapter: Any = None, progress: Any = None) -> list[RequestOutput]:
        rows = list(zip(self.fixed["completion_ids"], self.fixed["logprobs"]))
        return [
            RequestOutput(
                str(p),
                None,
                self.fixed["prompt_ids"][p * GROUP],
                [
                    CompletionOutput(g, "", ids, logps, logps, 0.0, "stop" if ids[-1] == 5 else "length")
                    for g, (ids, logps) in enumerate(rows[p * GROUP : (p + 1) * GROUP])
                ],
            )
            for p in range(PROMPTS)
        ]


def our_trainer(folder: Path, reference: str = "base", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Ours; for ``reference="base"`` the adapter is fresh when the trainer is made, and filled after."""
    model = pronghorn_model(dtype)
    if dtype == torch.float64:
        in_float64(model)
    if reference == "base":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
    settings = {"per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP, **settings}
    made = trainer(folder / "ours", model, [first, second], max_completion_length=LIMIT, **settings)
    if reference == "base":
        fill_lora(model)
    made.sampling._engine = FixedEngine(model, made.processing_class)
    made.model.train()
    return made
