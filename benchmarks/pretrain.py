"""The larger model of the learning study, from random weights: a Llama of 55M parameters, its tokenizer, its record.

    python -m benchmarks.pretrain --gsm8k FOLDER [--out outputs/arithmetic-55m] [--seconds 80]

It learns worked solutions of word problems, chains of steps and GSM8K (``benchmarks/mixture.py``) by the recipe of the
shipped model (``examples/tiny``): packed rows, Pronghorn's layers, 16-bit weights under float32 masters on a GPU. It is
left with something to gain: as soon as sampling solves ``--target`` of 256 problems of the split "dev", the learning
rate goes down to nothing and training ends. ``--seconds`` bounds the time of the steps, whatever the machine. The
record (``pretraining.json`` beside the weights) has the steps that were taken: the same run again is ``--steps`` and
``--decay-from`` as they stand there, with ``--target 0`` and no ``--seconds``.

In miniature, on a CPU in under a minute:
``--device cpu --hidden 64 --head-dim 32 --layers 2 --vocab 512 --tokens-per-step 2048 --steps 30 --target 0``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.mixture import gsm8k_rows, mixed_dataset
from benchmarks.pretrain_data import Batches, Documents, chat, tokenizer_texts
from pronghorn import models
from pronghorn.data.answers import number_matches
from pronghorn.data.gsm8k import extract_hash_answer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "tiny"))
from evaluate import complete
from optimizer import MasterAdamW
from tokenizer import train_tokenizer
from train import build_model, write_model

OUT = Path(__file__).resolve().parent.parent / "outputs" / "arithmetic-55m"
LOG_EVERY = 25
MEASURED = (10, 30)
"""Steps between which the rate is measured that ``--seconds`` goes by: the first ones compile kernels."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="a folder with its .jsonl files, or the hub's name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--steps", type=int, default=1500, help="at most")
    parser.add_argument("--seconds", type=float, help="at most, of training steps")
    parser.add_argument("--target", type=float, default=0.3, help="sampled accuracy that begins the end; 0: never")
    parser.add_argument("--check-every", type=int, default=150, help="steps between looks at the accuracy")
    parser.add_argument("--decay", type=float, default=0.2, help="share of the steps in which the rate goes down")
    parser.add_argument("--decay-from", type=int, help="step at which it begins to, in place of that share")
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes that make the data (default: 8 on a GPU, 0 on the CPU)")
    parser.add_argument("--problems", type=int, default=256, help="of a look at the accuracy")
    return parser.parse_args(given)


class Schedule:
    """Warm-up, a plateau, and a straight line to nothing, whose beginning can be moved while it goes on."""

    def __init__(self, peak: float, warmup: int, steps: int, decay: float, decay_from: int | None = None) -> None:
        self.peak, self.warmup, self.decay = peak, warmup, decay
        self.steps = steps
        self.decay_from = round(steps * (1 - decay)) if decay_from is None else decay_from

    def rate(self, step: int) -> float:
        """Of the step with this number, from 0."""
        if step >= self.decay_from:
            return self.peak * (self.steps - step) / (self.steps - self.decay_from)
        return self.peak * min(1.0, (step + 1) / self.warmup)

    def shorten(self, steps: int) -> None:
        """End after so many steps, if that is sooner."""
        if steps < self.steps:
            self.steps, self.decay_from = steps, round(steps * (1 - self.decay))

    def begin_end(self, step: int) -> None:
        """Go down from here on, for as long as such a run would have."""
        if step < self.decay_from:
            self.decay_from = step
            self.steps = min(self.steps, step + max(1, round(step * self.decay / (1 - self.decay))))


class Check:
    """Sampled accuracy, in whatever format, on problems of words and chains that nothing is trained on."""

    def __init__(self, tokenizer: Any, gsm8k: str, count: int) -> None:
        mixed = mixed_dataset("dev", math.ceil(count / 0.75), gsm8k)
        rows = [row for row in mixed if row["kind"] != "gsm8k"][:count]
        self.tokenizer = tokenizer
        self.chats = [chat(row["question"]) for row in rows]
        self.answers = [extract_hash_answer(row["answer"]) or "" for row in rows]

    def __call__(self, model: Any) -> float:
        how = {"max_new_tokens": 128, "do_sample": True, "temperature": 1.0, "top_k": 0}
        texts = complete(model, self.tokenizer, self.chats, batch=256, **how)
        return sum(number_matches(text, answer) for text, answer in zip(texts, self.answers)) / len(texts)


def train(model: Any, data: Batches, check: Check, options: argparse.Namespace) -> dict[str, Any]:
    """Train in place; what the record says of it. Raises SystemExit where the loss is no number."""
    cuda = options.device == "cuda"
    workers = options.workers if options.workers is not None else (8 if cuda else 0)
    loader = DataLoader(data, batch_size=None, num_workers=workers, pin_memory=cuda)
    schedule = Schedule(options.lr, options.warmup, options.steps, options.decay, options.decay_from)
    optimizer = MasterAdamW(model.parameters(), lr=options.lr)
    losses: list[tuple[int, float]] = []
    checks: list[tuple[int, float]] = []
    begun = measured = time.perf_counter()
    checking = 0.0  # seconds, which are not those of steps
    step = 0
    for batch in loader:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        # Positions and labels stay on the host, where rows are told apart; one copy takes what the GPU needs of them.
        batch["input_ids"] = batch["input_ids"].to(options.device, non_blocking=True)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % LOG_EVERY == 0 or step in MEASURED or step == schedule.steps:
            losses.append((step, round(loss.item(), 4)))  # waits for the GPU
            now = time.perf_counter() - begun - checking
            print(f"step {step} loss {losses[-1][1]} {step * data.tokens / now:,.0f} tokens/s {now:.1f} s", flush=True)
            if not math.isfinite(losses[-1][1]):
                raise SystemExit(f"the loss is {losses[-1][1]} at step {step}; give --lr below {options.lr}")
        if step == MEASURED[0]:
            measured = time.perf_counter()
        if step == MEASURED[1] and options.seconds is not None:
            each = (time.perf_counter() - measured) / (MEASURED[1] - MEASURED[0])
            schedule.shorten(step + max(1, int((options.seconds - now) / each)))
            print(f"{each * 1000:.1f} ms a step: {schedule.steps} steps", flush=True)
        if step == schedule.steps or (step % options.check_every == 0 and step < schedule.decay_from):
            asked = time.perf_counter()
            checks.append((step, round(check(model), 4)))
            checking += time.perf_counter() - asked
            print(f"step {step} sampled accuracy {checks[-1][1]}", flush=True)
            if options.target and checks[-1][1] >= options.target:
                schedule.begin_end(step)
        if step == schedule.steps:
            break
    seconds = time.perf_counter() - begun - checking
    return {
        "steps": step, "decay_from": schedule.decay_from, "tokens": step * data.tokens, "seconds": round(seconds, 1),
        "tokens_per_s": round(step * data.tokens / seconds), "losses": losses, "sampled_accuracy": checks,
    }  # fmt: skip


CARD = """---
library_name: transformers
tags: [arithmetic, grpo]
---
# {name}

A Llama of {parameters:,} parameters, trained from random weights for {steps:,} steps of {tokens_per_step:,} tokens on
worked solutions of arithmetic problems made by Pronghorn and of GSM8K's training file (MIT), for Pronghorn's learning
study. Supervised only; it knows nothing else. See `pretraining.json`.
"""


def main(given: Sequence[str] | None = None) -> None:
    begun = time.perf_counter()
    options = arguments(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's processes are forked
    torch.manual_seed(options.seed)
    gsm8k = gsm8k_rows(options.gsm8k, "sft")
    tokenizer = train_tokenizer(tokenizer_texts(gsm8k), options.vocab)
    model = build_model(tokenizer, options.hidden, options.layers, options.head_dim)
    model.to(device=options.device, dtype=torch.float32 if options.device == "cpu" else torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    documents = Documents(tokenizer, gsm8k)
    check = Check(tokenizer, options.gsm8k, options.problems)
    data = Batches(documents, options.tokens_per_step, options.steps, options.seed)
    setup = time.perf_counter() - begun
    print(f"{parameters / 1e6:.1f}M parameters, {len(tokenizer)} tokens, {setup:.1f} s to here", flush=True)
    models.attach(model)
    found = train(model, data, check, options)
    models.detach(model)
    options.out.mkdir(parents=True, exist_ok=True)
    write_model(model, tokenizer, options.out)
    record = {
        "name": options.out.name, "parameters": parameters, "vocabulary": len(tokenizer), "layers": options.layers,
        "hidden": options.hidden, "seed": options.seed, "lr": options.lr, "warmup": options.warmup,
        "tokens_per_step": options.tokens_per_step, "gsm8k_solutions": len(documents.gsm8k),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", **found,
    }  # fmt: skip
    (options.out / "README.md").write_text(CARD.format(**record))
    (options.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}, {time.perf_counter() - begun:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
