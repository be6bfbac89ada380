"""A tokenizer whose template knows tools, a calculator, and an engine that says what a script tells it to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl.chat_template_utils import qwen2_5_chat_template

from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.batch import pack
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.rollouts import Rollout
from pronghorn.models.modes import inference
from pronghorn.models.state import state_of
from pronghorn.rollout.base import CompletionOutput, RequestOutput
from tests.grpo.support import FakeEngine, pronghorn_model
from tests.helpers import tiny_tokenizer

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'


def tool_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = qwen2_5_chat_template
    return tokenizer


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


def questions(n: int = 4) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+4?"}]} for i in range(n)])


def tool_model(dtype: torch.dtype = torch.float32, length: int = 1024, **overrides: Any) -> Any:
    """A tiny Llama with room for what a tool template writes."""
    model = pronghorn_model(dtype, max_position_embeddings=length, **overrides)
    state_of(model).max_seq_length = length
    state_of(model).tokenizer = tool_tokenizer()
    return model


Script = Callable[[str, int], str]
"""``script(text so far, which sample)``: what the policy says next; without ``<|im_end|>`` it was cut off."""


class ScriptedEngine(FakeEngine):
    """Says what the script says, with the model's own log-probabilities of it."""

    def __init__(self, model: Any, tokenizer: Any, script: Script) -> None:
        super().__init__(model, tokenizer)
        self.script = script
        self.seeds: list[tuple[int, int]] = []
        self.prompts: list[list[int]] = []

    def generate(self, prompts: Sequence[Any], params: Any, *args: Any, **kwargs: Any) -> list[RequestOutput]:
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.calls.append(len(prompts))
        self.seeds += [(p.seed, p.n) for p in params]
        self.prompts += [list(ids) for ids in prompts]
        with inference(self.model):
            return [self._scripted(list(ids), p) for ids, p in zip(prompts, params)]

    def _scripted(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        text = self.tokenizer.decode(prompt)
        outputs = []
        for i in range(params.n):
            said = self.tokenizer(self.script(text, i), add_special_tokens=False)["input_ids"][: params.max_tokens]
            batch = pack([Rollout(prompt, said, [0.0] * len(said))], "cpu", torch.float64)
            with torch.no_grad():
                logps = score(self.model, batch, params.temperature)[0].double().tolist()
            reason = "stop" if said[-1] == self.tokenizer.eos_token_id else "length"
            outputs.append(CompletionOutput(i, "", said, logps, logps, sum(logps), reason))
        return RequestOutput("0", None, prompt, outputs)
