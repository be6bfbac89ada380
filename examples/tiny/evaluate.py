"""Held-out accuracy of a model by greedy decoding, in both senses: the number in the tags, and in whatever format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from responses import chat

from pronghorn.data.answers import number_matches
from pronghorn.data.chat import encode_chat
from pronghorn.data.synthetic import Problem
from pronghorn.rewards.gsm8k import correctness_reward_func, soft_format_reward_func, strict_format_reward_func


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` problems."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def greedy(model: Any, tokenizer: Any, problems: Sequence[Problem], batch: int, max_new_tokens: int = 112) -> list[str]:
    """The model's greedy responses, special tokens left out."""
    chats = [chat(problem) for problem in problems]
    return complete(model, tokenizer, chats, batch, max_new_tokens=max_new_tokens, do_sample=False)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, chats: Sequence[Any], batch: int, **how: Any) -> list[str]:
    """One response to each chat by transformers' `generate` (`how` goes there), special tokens left out."""
    training = model.training
    model.eval()
    prompts = [encode_chat(tokenizer, messages) for messages in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_tensors="pt").to(model.device)
        out = model.generate(**padded, **how)
        said = tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, said):
            texts[i] = text
    model.train(training)
    return texts


def evaluate(model: Any, tokenizer: Any, problems: Sequence[Problem], batch: int = 250) -> dict[str, Any]:
    """Shares of the problems: `accuracy` (the rewards' correctness), `number`, and the two format rewards earned."""
    texts = greedy(model, tokenizer, problems, batch)
    count = len(problems)
    # Without tags the reward takes the whole text for the answer: that is not an answer in the tags.
    rewards = correctness_reward_func(None, texts, [str(p.result) for p in problems])
    right = [reward if "<answer>" in text else 0.0 for reward, text in zip(rewards, texts)]
    share = {
        "accuracy": sum(r > 0 for r in right) / count,
        "number": sum(number_matches(t, p.result) for t, p in zip(texts, problems)) / count,
        "soft_format": sum(r > 0 for r in soft_format_reward_func(texts)) / count,
        "strict_format": sum(r > 0 for r in strict_format_reward_func(texts)) / count,
    }
    result: dict[str, Any] = {"problems": count, **{name: round(value, 4) for name, value in share.items()}}
    for name in ("accuracy", "number"):
        result[f"{name}_interval"] = [round(bound, 4) for bound in interval(share[name], count)]
    for steps, prefix in ((1, "one"), (2, "two")):
        rows = [i for i, p in enumerate(problems) if p.template.startswith(prefix)]
        if rows:
            result[f"number_{steps}_step"] = round(
                sum(number_matches(texts[i], problems[i].result) for i in rows) / len(rows), 4
            )
    result["samples"] = [{"question": problems[i].question, "response": texts[i]} for i in range(min(3, count))]
    return result
