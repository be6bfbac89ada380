"""A tiny model that has learned to call a calculator, sampled by the native engine, trained by GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trl.chat_template_utils as templates

from pronghorn.grpo.batch import pack
from pronghorn.grpo.history import History
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.tool_template import ToolTemplate
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.models.state import state_of
from tests.grpo.support import adapter_weights, config
from tests.grpo.tool_support import CALL, add, questions, tool_model, tool_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def short_tokenizer() -> Any:
    """A template of few tokens, parsed as Qwen's is."""
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = templates.qwen2_5_chat_template
    templates.add_response_schema(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def teach(model: Any, tokenizer: Any, steps: int = 150) -> None:
    """Overfit one conversation of call, answer and reply; only what the policy says is scored."""
    template = ToolTemplate(tokenizer, {})
    prompt = tokenizer.apply_chat_template(
        questions()[0]["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    history = History(prompt)
    for said in (f"{CALL}<|im_end|>", "7<|im_end|>"):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        history.sampled(ids, [0.0] * len(ids), truncated=False)
        if said.startswith("<tool_call>"):
            history.wrote(template.suffix_ids([{"role": "tool", "name": "add", "content": "7"}]))
    batch = pack([history.rollout()], "cpu")
    base = [p for n, p in model.named_parameters() if "lora_" not in n and "norm" not in n]
    for parameter in base:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(base, lr=1e-2, weight_decay=0.0)
    loss = torch.tensor(9.0)
    while steps and loss > 0.002:
        steps -= 1
        loss = -score(model, batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in base:
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    assert loss.item() < 0.002


def test_a_model_calls_the_calculator_reads_it_and_is_trained(tmp_path: Path) -> None:
    tokenizer = short_tokenizer()
    model = tool_model(length=256, num_hidden_layers=1)
    state_of(model).tokenizer = tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teach(model, tokenizer)
    seen: list[Any] = []

    def right(completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(messages[-1]["content"].strip() == "7") - 0.1 * i for i, messages in enumerate(completions)]

    args = config(
        tmp_path, max_completion_length=150, max_steps=2, per_device_train_batch_size=4, log_completions=True,
        learning_rate=1e-3,
    )  # fmt: skip
    data = questions(1)
    made = GRPOTrainer(model, right, args, data, processing_class=tokenizer, tools=[add])
    before = adapter_weights(model)
    made.train()
    whole = [c for c in seen if [m["role"] for m in c] == ["assistant", "tool", "assistant"]]
    assert len(whole) >= 4 and all(c[1]["content"] == "7" for c in whole)  # of 8 completions
    logs = made.state.log_history[:2]
    assert all(log["tools/call_frequency"] > 0.4 for log in logs)
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-3 for log in logs)
    assert any(not torch.equal(w, before[n]) for n, w in adapter_weights(model).items())
    for r in made.position.buffer:
        text = tokenizer.decode(r.completion_ids)
        masked = tokenizer.decode([t for t, m in zip(r.completion_ids, r.tool_mask or []) if not m])
        assert masked == ("<|im_start|>tool\n7<|im_end|><|im_start|>assistant\n" if "tool\n7" in text else "")
