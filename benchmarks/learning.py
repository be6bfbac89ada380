"""What is learned, by step and by second: Pronghorn's GRPO beside TRL's own, from equal weights, adapters, data, seeds.

    python -m benchmarks.learning [--preset shipped|shipped-gpu|larger] [--model FOLDER] [--device cpu]
        [--data synthetic|mixed|gsm8k|FILE] [--steps 50] [--seeds 0,1,2] [--problems 300] [--output docs/study]

TRL's side is ``trl.GRPOTrainer`` on transformers + PEFT, which generates by ``model.generate``; settings are one
mapping for both. The two sides are two processes that take turns, step by step: only one computes at any time, and both
see the same load of the machine. A step's seconds are those of its turn (generation, rewards, forward, backward,
optimizer, logging), with the GPU waited for; held-out accuracy is measured between turns, with one engine for both
sides (TRL's adapter is copied into a Pronghorn model for it), and its time does not count. Seeds run one after another.

Writes ``<output>/learning-<device>.json`` (every step of every run) and ``.png``, and
``<results>/<device>/learning.json`` (the summary, as the other benchmarks); a model that is not the shipped one has its
name in theirs, ``learning-<model>-<device>``. The JSON is written at every step, so a study that is cut off has its
finished seeds, with their numbers and plot, and the steps of the one that was running under "unfinished"; ``--budget``
stops it in time by itself.

Presets (an option that is given counts in their place):

- ``shipped``: the quickstart's settings on the CPU, as the study of ``docs/learning.md``.
- ``shipped-gpu``: the shipped model on a GPU, 20 steps of 16 prompts.
- ``larger``: what ``python -m benchmarks.pretrain`` made, on a GPU: 20 steps of 16 prompts of its own mixture, a
  quarter of them GSM8K's. ``--gsm8k FOLDER`` where there is no hub.

To choose settings: ``--only pronghorn --split dev`` runs one side, on problems that are not the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning_sides import SIDES, serve
from benchmarks.learning_study import TINY, Study
from benchmarks.results import RESULTS, current_commit, gpu_folder

ROOT = Path(__file__).resolve().parent.parent

_GPU = {"device": "cuda", "steps": 20, "prompts": 16, "eval_every": 5, "learning_rate": 6e-4}
PRESETS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "shipped-gpu": _GPU,
    "larger": {
        **_GPU, "model": str(ROOT / "outputs" / "arithmetic-55m"), "data": "mixed", "lora_rank": 32, "problems": 480,
        "train_problems": 1600,
    },
}  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="shipped")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", default="synthetic", help="synthetic, mixed, gsm8k (the hub's), a folder or .jsonl")
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="of --data mixed: a folder with its .jsonl files")
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
    parser.add_argument("--split", choices=("heldout", "dev"), default="heldout", help="that they are of")
    parser.add_argument("--train-problems", type=int, default=1500)
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--threads", type=int, default=1, help="of each side, on the CPU")
    parser.add_argument("--budget", type=float, help="seconds after which no further step or seed begins")
    parser.add_argument("--add", action="store_true", help="to the seeds that the file has, of the same settings")
    parser.add_argument("--only", choices=tuple(SIDES), help="one side alone")
    parser.add_argument("--output", default=str(ROOT / "docs" / "study"))
    parser.add_argument("--results", default=str(RESULTS), help="folder that gets <device>/learning*.json")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    parser.set_defaults(**PRESETS[parser.parse_known_args(given)[0].preset])
    return parser.parse_args(given)


class Sides:
    """The sides' processes, each of which runs seed after seed, and the lines to them."""

    def __init__(self, options: dict[str, Any]) -> None:
        context = mp.get_context("spawn")
        self.names = [name for name in SIDES if options["only"] in (None, name)]
        self.lines, self.workers = {}, {}
        for name in self.names:
            self.lines[name], theirs = context.Pipe()
            self.workers[name] = context.Process(target=serve, args=(theirs, name, options), daemon=True)
            self.workers[name].start()
            theirs.close()  # so that a side that ends closes the line

    def say(self, name: str, what: Any) -> None:
        try:
            self.lines[name].send(what)
        except BrokenPipeError:
            self._gone(name)

    def hear(self, name: str) -> Any:
        try:
            return self.lines[name].recv()
        except (EOFError, ConnectionResetError):
            return self._gone(name)

    def close(self) -> None:
        for name in self.names:
            self.say(name, None)
        for worker in self.workers.values():
            worker.join()

    def stop(self) -> None:
        """End them wherever they are."""
        for worker in self.workers.values():
            worker.terminate()

    def _gone(self, name: str) -> None:
        self.workers[name].join()
        raise RuntimeError(f"the side {name!r} ended with exit code {self.workers[name].exitcode}; see what it printed")


def take_turns(sides: Sides, seed: int, folder: Path, study: Study, deadline: float) -> bool:
    """One run of each side with ``seed``: a record a step (step 0 holds the accuracy before training).

    Returns False where the deadline came first.
    """
    for name in sides.names:  # they load at the same time
        sides.say(name, (seed, str(folder / name)))
    for name in sides.names:
        sides.hear(name)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sides.names}
    running = list(sides.names)
    while running:
        for name in list(running):
            sides.say(name, "go")
            record = sides.hear(name)
            if record is None:
                running.remove(name)
                continue
            records[name].append(record)
            if "accuracy" in record or record["step"] <= 5:
                print(f"seed {seed} {name:10s} {json.dumps(record)}", flush=True)
        if running:
            study.running(seed, records)
            if time.monotonic() > deadline:
                return False
    study.finished(seed, records)
    return True


def run_seeds(sides: Sides, seeds: list[int], study: Study, runs: Path, budget: float | None) -> None:
    """Seed after seed, while there is time for one."""
    begun = time.monotonic()
    deadline = begun + (float("inf") if budget is None else budget)
    shortest = 0.0
    for done, seed in enumerate(seeds):
        started = time.monotonic()
        # The first seed compiles kernels; those after it take less.
        if done and started + 0.9 * shortest > deadline:
            print(f"--budget {budget}: no time for seed {seed}, {done} of {len(seeds)} seeds are done", flush=True)
            return
        if not take_turns(sides, seed, runs / str(seed), study, deadline):
            print(f"--budget {budget}: stopped within seed {seed}, {done} of {len(seeds)} are done", flush=True)
            return
        took = time.monotonic() - started
        shortest = min(shortest or took, took)
        print(f"seed {seed}: {took:.0f} s with loading and evaluations", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    options = vars(arguments(given))
    commit = options.pop("commit") or current_commit()
    device, machine = "cpu", platform.processor() or "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the sides are ended with us
    sides = Sides(options)  # they import while we do
    try:
        if options["device"] == "cuda":
            import torch

            machine = torch.cuda.get_device_name()
            device = gpu_folder(machine)
        study = Study(options, device, machine, commit)
        seeds = [int(seed) for seed in options["seeds"].split(",")]
        with tempfile.TemporaryDirectory() as runs:
            run_seeds(sides, seeds, study, Path(runs), options["budget"])
        if "unfinished" not in study.found:
            sides.close()
    finally:
        sides.stop()
    print(json.dumps(study.found.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
