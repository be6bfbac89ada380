"""What a prompt may be and what may be said of its sampling: ids, template variables, generation_kwargs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.grpo.support import trainer
from tests.helpers import tiny_tokenizer


def test_prompts_as_token_ids_pass_as_they_are(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(prompts)
        assert all(isinstance(text, str) for text in completions)
        return [float(i) for i in range(len(prompts))]

    data = Dataset.from_dict({"prompt": [[0, 9 + i, 11, 12] for i in range(4)]})
    made = trainer(tmp_path, data=data, rewards=reward, max_steps=1, log_completions=True)
    made.train()
    assert made.position.buffer[0].prompt_ids == seen[0] and seen[0] in data["prompt"]


def test_template_variables_reach_the_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{{ mood }}"
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(4)])
    made = trainer(tmp_path, data=data, chat_template_kwargs={"mood": "calm"}, max_steps=1)
    made.sampling.encoder.tokenizer = tokenizer
    made.train()
    assert made.processing_class.decode(made.position.buffer[0].prompt_ids).endswith("calm")


def test_generation_kwargs_override_the_fields(tmp_path: Path) -> None:
    made = trainer(tmp_path, generation_kwargs={"max_tokens": 3, "stop": ["x"], "min_tokens": 2}, max_steps=1)
    params = made.sampling.params(4, 7)
    assert (params.max_tokens, params.stop, params.n, params.seed) == (3, ("x",), 4, 7)
    assert made.sampling.params(1, 7, max_tokens=1).min_tokens == 1  # what is left of several turns
    made.train()
    assert max(len(r.completion_ids) for r in made.position.buffer) <= 3
