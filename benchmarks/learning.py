"""What is learned, by step and by second: Pronghorn's GRPO beside TRL's own, from equal weights, adapters, data, seeds.

    python -m benchmarks.learning [--model FOLDER] [--device cpu] [--data synthetic|gsm8k|FILE] [--steps 50]
        [--seeds 0,1,2] [--problems 300] [--output docs/study]

TRL's side is ``trl.GRPOTrainer`` on transformers + PEFT, which generates by ``model.generate``; settings are one
mapping for both. The two sides are two processes that take turns, step by step: only one computes at any time, and both
see the same load of the machine. A step's seconds are those of its turn (generation, rewards, forward, backward,
optimizer, logging); held-out accuracy is measured between turns, with one engine for both sides (TRL's adapter is
copied into a Pronghorn model for it), and its time does not count.

Writes ``<output>/learning-<device>.json`` (every step of every run) and ``.png``, and
``benchmarks/results/<device>/learning.json`` (the summary, as the other benchmarks).

A larger model on a GPU: ``--model FOLDER --device cuda --data gsm8k --lora-rank 32 --learning-rate 1e-5 --prompts 16
--generations 8 --max-completion-length 300 --steps 300 --eval-every 50``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
from pathlib import Path
from typing import Any

import pronghorn
from benchmarks.learning_plots import draw
from benchmarks.learning_sides import SIDES
from benchmarks.learning_summary import summarize, write_results
from benchmarks.results import current_commit

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"
ROOT = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", default="synthetic", help="synthetic, gsm8k (the hub's), or a folder or .jsonl of it")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--max-completion-length", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--format-weight", type=float, default=0.2, help="of the four format rewards beside 1")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--problems", type=int, default=300, help="held out")
    parser.add_argument("--train-problems", type=int, default=1500)
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--threads", type=int, default=1, help="of each side, on the CPU")
    parser.add_argument("--output", default=str(ROOT.parent / "docs" / "study"))
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    return parser.parse_args()


def take_turns(options: dict[str, Any], seed: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """One run of each side with ``seed``; their records, one a step (step 0 holds the accuracy before training)."""
    context = mp.get_context("spawn")
    lines, workers = {}, {}
    for name, side in SIDES.items():
        ours, theirs = context.Pipe()
        workers[name] = context.Process(target=side, args=(theirs, options, seed, str(folder / name)), daemon=True)
        workers[name].start()
        lines[name] = ours
        lines[name].recv()  # loaded; the next side loads alone
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    running = list(SIDES)
    while running:
        for name in list(running):
            lines[name].send("go")
            record = lines[name].recv()
            if record is None:
                running.remove(name)
                continue
            records[name].append(record)
            if "accuracy" in record or record["step"] <= 5:
                print(f"seed {seed} {name:10s} {json.dumps(record)}", flush=True)
    for worker in workers.values():
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a side ended with exit code {worker.exitcode}")
    return records


def main() -> None:
    options = vars(arguments())
    commit = options.pop("commit") or current_commit()
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    device = "cpu"
    if options["device"] == "cuda":
        import torch

        device = torch.cuda.get_device_name().lower().replace(" ", "-")
    runs = []
    path = output / f"learning-{device}.json"
    for seed in (int(s) for s in options["seeds"].split(",")):
        records = take_turns(options, seed, output / "runs" / str(seed))
        runs.append({"seed": seed, "sides": records})
        settings = {**options, "model": Path(options["model"]).name, "machine": platform.processor() or device}
        del settings["output"]
        study = {
            "settings": settings, "device": device, "commit": commit, "runs": runs, **summarize(runs)
        }  # fmt: skip
        path.write_text(json.dumps(study, indent=1) + "\n")  # after each seed: a cut-off study is not lost
        draw(study, path.with_suffix(".png"))
    write_results(study, ROOT / "results" / device / "learning.json")
    print(json.dumps(study["summary"], indent=1))


if __name__ == "__main__":
    main()
