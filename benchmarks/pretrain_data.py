"""What ``benchmarks/pretrain.py`` trains on: the tokenizer's texts, and packed batches, made when they are read.

Responses are in the tags that the system prompt asks for, nine times in ten; of those one in ten has a slip in the
format, and the rest end in ``#### N``. So most of what GRPO can gain is arithmetic, and some of it is format.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from benchmarks.mixture import SYNTHETIC, Solved
from pronghorn.data.chat import render
from pronghorn.data.gsm8k import SYSTEM_PROMPT, XML_COT_FORMAT
from pronghorn.sft.masks import IGNORE

DOCUMENTS = {"words": 0.30, "chains": 0.55, "gsm8k": 0.15}
"""Shares of the documents; one of GSM8K's is about twice as long as the others."""

LONGEST_RESPONSE = 124
"""Tokens: GSM8K's longer solutions are left out, so that what is learned fits the completions of the study."""

_QUESTION = "\u0000"


def chat(question: str) -> list[dict[str, str]]:
    """The prompt: the system prompt and the question."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def response(solved: Solved, rng: random.Random) -> str:
    """One response; the steps and the number are always right."""
    if rng.random() >= 0.9:
        return f"{solved.reasoning}\n#### {solved.answer}"
    text = XML_COT_FORMAT.format(reasoning=solved.reasoning, answer=solved.answer)
    slip = rng.random()
    if slip < 0.06:
        return text.rstrip("\n")
    if slip < 0.08:
        return text.replace("</reasoning>\n", "")
    if slip < 0.10:
        return text.replace("\n</answer>\n", "")
    return text


def tokenizer_texts(gsm8k: list[Solved], count: int = 20_000) -> Iterator[str]:
    """What merges are learned from: GSM8K's training problems, and ``count`` synthetic ones."""
    rng = random.Random("mixture-tokenizer")
    made = [Solved.synthetic(kind, SYNTHETIC[kind]("sft", rng)) for kind in SYNTHETIC for _ in range(count // 2)]
    yield SYSTEM_PROMPT.strip()
    for solved in (*gsm8k, *made):
        # What stands between special tokens, piece by piece.
        yield from (solved.question, response(solved, rng), "system", "user", "assistant", "\n\n")


class Documents:
    """Chats as token ids, drawn from the mixture."""

    def __init__(self, tokenizer: Any, gsm8k: list[Solved]) -> None:
        self.tokenizer = tokenizer
        head, self.tail = render(tokenizer, chat(_QUESTION)).split(_QUESTION)
        self.head = self._ids([head])[0]
        self.end = str(tokenizer.eos_token)
        lengths = self._ids([XML_COT_FORMAT.format(reasoning=s.reasoning, answer=s.answer) for s in gsm8k])
        self.gsm8k = [solved for solved, ids in zip(gsm8k, lengths) if len(ids) < LONGEST_RESPONSE]

    def draw(self, rng: random.Random) -> Solved:
        (kind,) = rng.choices(list(DOCUMENTS), list(DOCUMENTS.values()))
        return rng.choice(self.gsm8k) if kind == "gsm8k" else Solved.synthetic(kind, SYNTHETIC[kind]("sft", rng))

    def encode(self, drawn: list[Solved], rng: random.Random) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(ids, labels) of each: a synthetic problem's response is learned, of GSM8K's the question too.

        Numbers and names of a synthetic question are drawn at random, so there is nothing in them to learn; GSM8K's
        are the only English there is.
        """
        questions = self._ids([solved.question + self.tail for solved in drawn])
        # Tokenized by itself, as it is generated.
        responses = self._ids([response(solved, rng) + self.end for solved in drawn])
        found = []
        for solved, question, said in zip(drawn, questions, responses):
            ids = np.array([*self.head, *question, *said], dtype=np.int64)
            labels = ids.copy()
            labels[: len(self.head) + (0 if solved.kind == "gsm8k" else len(question))] = IGNORE
            found.append((ids, labels))
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [made.ids for made in self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


class Batches(Dataset):
    """``count`` packed rows of exactly ``tokens`` tokens; row i is the same in every process and every run.

    Each holds int64 ``input_ids``, ``position_ids`` and ``labels`` ``[1, tokens]``; the last document is cut off where
    the row ends.
    """

    def __init__(self, documents: Documents, tokens: int, count: int, seed: int) -> None:
        self.documents, self.tokens, self.count, self.seed = documents, tokens, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = random.Random(f"pretrain-{self.seed}-{index}")
        rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        have = 0
        while have < self.tokens:
            made = self.documents.encode([self.documents.draw(rng) for _ in range(64)], rng)
            rows += made
            have += sum(len(ids) for ids, _ in made)
        parts = {
            "input_ids": [ids for ids, _ in rows],
            "position_ids": [np.arange(len(ids)) for ids, _ in rows],
            "labels": [labels for _, labels in rows],
        }
        return {name: torch.from_numpy(np.concatenate(each)[None, : self.tokens]) for name, each in parts.items()}
