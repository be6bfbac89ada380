"""Gradients and loss curves of Pronghorn and of HF + PEFT, from equal weights, adapters and data, beside float32.

    python -m benchmarks.training_accuracy [--model FOLDER] [--quants bf16,nf4] [--steps 50] [--device cuda]

``training-accuracy/gradients/<quant>``: relative errors of every LoRA gradient to float32, ours and the peer's (under
autocast, as trainers run it; ``hf-float32-adapters`` is PEFT without autocast, which multiplies adapters in float32).

``training-accuracy/curve/<quant>``: ``--steps`` of AdamW (float32 states, clipping) on synthetic word problems. After
each step the loss of a fixed held-out batch is taken, which the order of the data moves only through what was learned.
``loss_<step>`` is that curve; ``held_max_diff`` and ``held_mean_diff`` are its distance from the peer's, and
``train_...`` those of the training loss. Noise is what reseeding the order of the data does to the peer: the mean over
three other orders of the same distances. ``hf-float32`` is the peer computing in float32.

``--device cpu`` runs the same in float32 as a smoke test, and writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import pronghorn
from benchmarks.equal_models import (
    Batch,
    Compared,
    EqualModels,
    adapters_of,
    equal_models,
    gradients,
    loss_of,
    relative_errors,
    use_plan,
)
from benchmarks.results import Results, arguments, current_commit, start
from pronghorn.data.chat import encode_chat
from pronghorn.data.synthetic import problems

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
RESEEDS = 3


@dataclass(frozen=True)
class Curve:
    """Losses of a run: of each step's batch before the step, and of the held-out batch after it."""

    train: list[float]
    held: list[float]


def answered(tokenizer: Any, split: str, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """``count`` word problems of one split as ids of the chat's prompt, and of GSM8K's answer with the end of turn."""
    rows = []
    for problem in problems(split, count, seed):
        prompt = encode_chat(tokenizer, [{"role": "user", "content": problem.question}])
        answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
        rows.append((list(prompt), [*answer, tokenizer.eos_token_id]))
    return rows


def padded(rows: Sequence[tuple[list[int], list[int]]], device: str) -> Batch:
    """Rows side by side, padded on the right; answers alone are labels."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {k: t.to(device) for k, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def batches_of(rows: Sequence[Any], size: int, order: int, device: str) -> list[Batch]:
    """All rows once, in the order that the seed ``order`` shuffles them into."""
    shuffled = list(rows)
    random.Random(order).shuffle(shuffled)
    return [padded(shuffled[i : i + size], device) for i in range(0, len(shuffled), size)]


def train(model: Any, batches: Sequence[Batch], held: Batch, lr: float, autocast: torch.dtype | None) -> Curve:
    """A step of AdamW on each batch, gradients clipped to 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses, after = [], []
    for batch in batches:
        loss = loss_of(model, batch, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        with torch.no_grad():
            after.append(float(loss_of(model, held, autocast)))
    return Curve(losses, after)


def distances(a: Curve, b: Curve) -> dict[str, float]:
    """Largest and mean absolute difference of two runs' losses."""
    found = {}
    for name, ours, theirs in (("held", a.held, b.held), ("train", a.train, b.train)):
        off = [abs(x - y) for x, y in zip(ours, theirs, strict=True)]
        found[f"{name}_max_diff"], found[f"{name}_mean_diff"] = max(off), fmean(off)
    return found


def curves(models: EqualModels, rows: Sequence[Any], held: Batch, size: int, lr: float) -> dict[str, Curve]:
    """Runs from the adapters that the models have now: ours, the peer, the peer in float32, and reseeded peers."""
    device = str(held["input_ids"].device)
    adapters = adapters_of(models.truth)
    first = batches_of(rows, size, 0, device)

    def run(model: Any, batches: Sequence[Batch], autocast: torch.dtype | None) -> Curve:
        models.load(adapters)
        return train(model, batches, held, lr, autocast)

    found = {
        "pronghorn": run(models.ours, first, None),
        "hf": run(models.peer, first, models.autocast),
        "hf-float32": run(models.truth, first, None),
    }
    for order in range(1, RESEEDS + 1):
        found[f"hf-order-{order}"] = run(models.peer, batches_of(rows, size, order, device), models.autocast)
    return found


def noise(found: dict[str, Curve]) -> dict[str, float]:
    """How far the peer is from itself under another order of the data: the mean over the orders of each distance."""
    each = [distances(found[f"hf-order-{order}"], found["hf"]) for order in range(1, RESEEDS + 1)]
    return {name: fmean(one[name] for one in each) for name in each[0]}


def measure(results: Results, args: Any, quant: str) -> None:
    """Gradients under adapters whose B is not 0, then the curves from B = 0, where a training run begins."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    models = equal_models(plain, dtype, quant == "nf4", r=args.rank)
    use_plan(models.ours, args.checkpointing)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = answered(tokenizer, "sft", args.steps * args.batch, seed=0)
    held = padded(answered(tokenizer, "dev", 32, seed=0), args.device)

    some = batches_of(rows, args.batch, 0, args.device)[:4]
    truth = gradients(models.truth, some)
    peer = relative_errors(gradients(models.peer, some, models.autocast), truth)
    for name, got in (
        ("pronghorn", gradients(models.ours, some)),
        ("hf-float32-adapters", gradients(models.peer, some)),
    ):
        summary = Compared(relative_errors(got, truth), peer).summary()
        results.add(f"training-accuracy/gradients/{quant}", name, **summary)

    models.load({name: torch.zeros_like(p) for name, p in adapters_of(models.truth).items() if "lora_B" in name})
    found = curves(models, rows, held, args.batch, args.lr)
    case = f"training-accuracy/curve/{quant}"
    for name, curve in found.items():
        results.add(case, name, **{f"loss_{step:02d}": value for step, value in enumerate(curve.held, 1)})
    reseeded = noise(found)
    results.add(case, "hf-reseeded", **reseeded)
    for name in ("pronghorn", "hf-float32"):
        results.add(case, name, **distances(found[name], found["hf"]))
    results.add(case, "pronghorn-to-float32", **distances(found["pronghorn"], found["hf-float32"]))
    within = distances(found["pronghorn"], found["hf"])["held_max_diff"] <= reseeded["held_max_diff"]
    print(f"{case}: {'within' if within else 'OUTSIDE'} the noise of reseeding", flush=True)


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(TINY), help="a folder in transformers' format; default: the shipped one")
    parser.add_argument("--quants", default="bf16,nf4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", default="auto")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    peers = ("transformers", "peft")
    if args.device == "cpu":
        results = Results("training_accuracy", peers, args.commit or current_commit())
    else:
        results = start("training_accuracy", peers, args)
    for quant in args.quants.split(","):
        measure(results, args, quant)
    if args.device != "cpu":
        results.write(args.out)


if __name__ == "__main__":
    main()
