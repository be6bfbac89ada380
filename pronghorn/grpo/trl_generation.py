"""TRL's ``VLLMGeneration`` by interface, over Pronghorn's engine: TRL's own GRPOTrainer samples with its own weights.

TRL (1.15, 1.16) makes one ``VLLMGeneration`` where ``use_vllm=True``, calls ``sync_weights()`` when the step moved and
``generate(...)`` for every batch, and asks nothing else of vLLM. The engine reads the trainer's own modules, so there
is nothing to synchronise, and vLLM need not be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from ..config.errors import ConfigError
from ..config.sampling import SamplingParams
from ..models.state import state_of
from ..rollout import base as rollout
from .seeds import request_seed

Generated = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]


class PronghornGeneration:
    """What TRL's ``GRPOTrainer`` takes for its ``VLLMGeneration``.

    Arguments are ``VLLMGeneration``'s. Those of a vLLM server or of several GPUs are refused. The model's own
    ``gpu_memory_utilization`` holds, of which one line says so where the given one differs. ``enable_sleep_mode`` gives
    the KV cache's memory back after each generation. ``max_num_seqs``, ``model_impl`` and ``trust_remote_code`` change
    nothing.

    Raises:
        ConfigError: a model that Pronghorn did not load, or a setting that cannot be honoured.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        mode: str = "colocate",
        structured_outputs_regex: str | None = None,
        server_base_url: str | None = None,
        server_host: str = "0.0.0.0",
        server_port: int = 8000,
        server_timeout: float = 240.0,
        group_port: int = 51216,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = 0.0,
        max_completion_length: int = 16,
        logprobs: int | None = 0,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        state = state_of(model)
        limit = state.max_seq_length
        refused = {
            "vllm_mode": (mode, mode == "colocate", "give 'colocate': Pronghorn samples in the trainer's process"),
            "vllm_tensor_parallel_size": (tensor_parallel_size, tensor_parallel_size == 1, "give 1"),
            "vllm_structured_outputs_regex": (structured_outputs_regex, structured_outputs_regex is None, "give None"),
            "vllm_max_model_length": (
                max_model_length,
                max_model_length is None or max_model_length <= limit,
                f"give at most {limit}, or load the model with a larger max_seq_length",
            ),
            "logprobs": (logprobs, logprobs == 0, "give 0, the log-probability of the drawn token"),
            "num_processes": (accelerator.num_processes, accelerator.num_processes == 1, "Pronghorn trains in one"),
        }
        for name, (value, fine, remedy) in refused.items():
            if not fine:
                raise ConfigError(f"PatchFastRL(mode='stock'): {name}={value!r} cannot be served; {remedy}")
        self.model, self.processing_class = model, processing_class
        self.max_model_length = max_model_length or limit
        self.enable_sleep_mode = enable_sleep_mode
        self.fields: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p or 0.0,
            "repetition_penalty": repetition_penalty,
            "max_tokens": max_completion_length,
            **(generation_kwargs or {}),
        }
        if self.fields.pop("n", 1) != 1:
            raise ConfigError("GRPOConfig: generation_kwargs['n'] is num_generations' business; leave it out")
        self._params(1, 0, self.max_model_length)  # a bad setting raises now, not at the first step
        # TRL's tool loop reads the longest context from here.
        model_config = SimpleNamespace(max_model_len=self.max_model_length)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=model_config))
        if gpu_memory_utilization != state.gpu_memory_utilization:
            print(
                f"Pronghorn: vllm_gpu_memory_utilization={gpu_memory_utilization} -> {state.gpu_memory_utilization}, "
                "what the model was loaded with: its weights are the sampler's",
                flush=True,
            )

    @property
    def engine(self) -> rollout.Engine:
        """The engine of the trainer's model, over the wrappers that it has now."""
        return rollout.engine_of(self.model, state_of(self.model).tokenizer or self.processing_class)

    def sync_weights(self) -> None:
        """Nothing moves: the engine reads the trained weights. Keys and values of the old ones are forgotten."""
        self.engine.policy_changed()

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Generated:
        """One completion for each prompt, in order; equal neighbours share their prefill.

        Seeds come from torch's generator, which ``set_seed`` fixes and TRL's checkpoints keep. The drawing has no
        dropout, whatever mode the model is in.

        Args:
            prompts: token ids, ``num_generations`` times each where TRL samples groups.
            images: None.
            num_generations: not needed: what is equal is seen from the prompts.
            profiler: a context manager around the generation.

        Returns:
            ``(prompt_ids, completion_ids, logprobs, token_ids)`` as ``VLLMGeneration`` returns: the log-probability of
            each token under the distribution that it was drawn from (vLLM's ``processed_logprobs``), in a list of one.

        Raises:
            ConfigError: images, or a prompt that leaves no room for a token.
        """
        if images is not None and any(image is not None for image in images):
            raise ConfigError("PatchFastRL(mode='stock'): images cannot be served; Pronghorn samples text models")
        runs = _runs(prompts)
        seed = int(torch.randint(2**31 - 1, (1,)))
        params = []
        for place, (ids, count) in enumerate(runs):
            params.append(self._params(count, request_seed(seed, place), self.max_model_length - len(ids)))
        with profiler or nullcontext():
            requests = self.engine.generate([ids for ids, _ in runs], params)
        if self.enable_sleep_mode:
            self.engine.release()
        outputs = [output for request in requests for output in request.outputs]
        if len(outputs) != len(prompts):
            raise RuntimeError(f"the rollout engine gave {len(outputs)} completions for {len(prompts)} asked for")
        drawn = [list(output.token_ids) for output in outputs]
        logps = [[[logp] for logp in output.token_logprobs] for output in outputs]
        return [list(p) for p in prompts], drawn, logps, [[[token] for token in tokens] for tokens in drawn]

    def _params(self, count: int, seed: int, room: int) -> SamplingParams:
        if room < 1:
            raise ConfigError(
                f"a prompt leaves no room for a token under vllm_max_model_length={self.max_model_length}; shorten "
                "the prompts, or load the model with a larger max_seq_length"
            )
        most = self.fields["max_tokens"]
        return SamplingParams.from_any(
            {"seed": seed, **self.fields, "n": count, "max_tokens": room if most is None else min(most, room)}
        )


def _runs(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Each run of equal neighbours as ``(prompt, how many)``."""
    runs: list[tuple[list[int], int]] = []
    for ids in prompts:
        if runs and runs[-1][0] == list(ids):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((list(ids), 1))
    return runs


def probe(theirs: Any) -> None:
    """Compare TRL's ``VLLMGeneration`` with what is served here.

    Raises:
        ConfigError: an argument or method that this Pronghorn does not know, with the versions that it does.
    """
    for method in ("__init__", "generate", "sync_weights"):
        if not callable(getattr(theirs, method, None)):
            raise ConfigError(f"{_REFUSAL}: its VLLMGeneration has no {method}; {_REMEDY}")
        asked = list(inspect.signature(getattr(theirs, method)).parameters)
        served = list(inspect.signature(getattr(PronghornGeneration, method)).parameters)
        # __init__ is called by keyword, and one that TRL dropped is never passed
        differs = set(asked) - set(served) if method == "__init__" else set(asked) ^ set(served)
        if differs:
            raise ConfigError(f"{_REFUSAL}: VLLMGeneration.{method} differs in {', '.join(sorted(differs))}; {_REMEDY}")


_REFUSAL = "PatchFastRL(mode='stock'): this TRL is not one that Pronghorn's engine can serve"
_REMEDY = "use TRL 1.15 or 1.16, or mode='native'"
