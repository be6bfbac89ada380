"""What the tiny model is taught to say: the right steps, in the asked tags or in GSM8K's plain style.

The model that ships should have something left for GRPO to teach, so its training data follow the asked format often
but not always: how often depends on the person in the problem and on its template, from 0.1 to 0.9. Greedy decoding
then answers about half of the problems in tags, and sampling gives both formats to most prompts.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

from torch.utils.data import Dataset

from pronghorn.data.chat import encode_chat
from pronghorn.data.gsm8k import SYSTEM_PROMPT, XML_COT_FORMAT
from pronghorn.data.synthetic import Problem, draw
from pronghorn.data.templates import NAMES, TEMPLATES
from pronghorn.sft.masks import part_ids, response_only_labels
from pronghorn.sft.parts import template_parts


def _ranks(keys: list[str]) -> dict[str, float]:
    """Evenly spaced numbers from 0 to 1, in an order that a hash shuffles."""
    order = sorted(keys, key=lambda key: hashlib.blake2b(f"format-{key}".encode()).hexdigest())
    return {key: rank / (len(order) - 1) for rank, key in enumerate(order)}


_NAME_RANK = _ranks(list(NAMES))
_TEMPLATE_RANK = _ranks([template.id for template in TEMPLATES])


def tag_probability(problem: Problem) -> float:
    """How often a response to this problem uses the tags, 0.1 to 0.9, symmetric around a half."""
    lean = (_NAME_RANK[problem.name] + _TEMPLATE_RANK[problem.template]) / 2 - 0.5
    return 0.5 + min(0.4, max(-0.4, 1.2 * lean))


def response(problem: Problem, rng: random.Random) -> str:
    """One response: in tags (a few with a slip in the format) or the steps and `#### N`. The number is always right."""
    if rng.random() >= tag_probability(problem):
        return f"{problem.reasoning}\n#### {problem.result}"
    text = XML_COT_FORMAT.format(reasoning=problem.reasoning, answer=problem.result)
    slip = rng.random()
    if slip < 0.12:
        return text.rstrip("\n")
    if slip < 0.14:
        return text.replace("</reasoning>\n", "")
    if slip < 0.16:
        return text.replace("\n</answer>\n", "")
    if slip < 0.18:
        return text + "That is the answer.\n"
    return text


def chat(problem: Problem) -> list[dict[str, str]]:
    """The prompt: the system prompt and the question."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem.question}]


class Responses(Dataset):
    """`count` training examples, made when they are read: example i is the same in every process and every run.

    Each has `input_ids` (prompt, response, end of turn) and response-only `labels`.
    """

    def __init__(self, tokenizer: Any, count: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.count = count
        self.seed = seed
        instruction, reply = template_parts(tokenizer)
        self.instruction_ids, self.response_ids = part_ids(tokenizer, instruction), part_ids(tokenizer, reply)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = random.Random(f"tiny-{self.seed}-{index}")
        problem = draw("sft", rng)
        # The template trims contents, which would cost the response its last line break: so the response is appended.
        said = self.tokenizer(response(problem, rng), add_special_tokens=False)["input_ids"]
        ids = [*encode_chat(self.tokenizer, chat(problem)), *said, self.tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": response_only_labels(ids, self.instruction_ids, self.response_ids)}
