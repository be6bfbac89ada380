"""Many steps of GRPO end with the memory of step 20: nothing grows, no process, file or thread is left over.

    python -m benchmarks.soak                                  # 1,000 steps of the shipped model, on a CPU
    python -m benchmarks.soak --everything                     # with all that has threads and processes of its own
    python -m benchmarks.soak --model FOLDER --steps 200       # on a GPU: 4-bit base, LoRA, paged 8-bit AdamW

The whole of a run takes part: rollouts, sync and async rewards, checkpoints with rotation, evaluation, samples on disk.
``--everything`` draws generations ahead on a thread, scores them in worker processes, replays groups and follows a
curriculum. Memory is looked at as a step ends: resident memory of the process and of its children, and on a GPU what
torch has allocated once the step's own is gone. The process ends with 1 and says what grew where the last look within
the run, or the one behind it, is over ``--tolerance`` above step 20.
``--json FILE`` gets the numbers of every step that was looked at.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from benchmarks.brevity import brevity
from pronghorn import FastLanguageModel, GRPOConfig, GRPOTrainer
from pronghorn.data.gsm8k import as_prompts
from pronghorn.data.synthetic import arithmetic_dataset
from pronghorn.recipes.quickstart import shipped_model
from pronghorn.rewards.gsm8k import FIVE_REWARDS

EVERY = 20
"""Steps between two looks, the first of which is the one that the end is compared with."""


@dataclass(frozen=True)
class Usage:
    """What the process holds: ``rss``, ``gpu`` and its children's ``children_rss`` in bytes; files, threads and child
    processes by number.

    Children that ended and were not waited for count too.
    """

    step: int
    seconds: float
    rss: int
    gpu: int
    files: int
    threads: int
    children: int
    children_rss: int = 0

    @classmethod
    def now(cls, step: int, seconds: float) -> Usage:
        process = psutil.Process()
        gc.collect()  # what waits for the collector is not leaked
        children = process.children(recursive=True)
        return cls(
            step=step,
            seconds=round(seconds, 2),
            rss=process.memory_info().rss,
            gpu=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
            files=process.num_fds(),
            threads=process.num_threads(),
            children=len(children),
            children_rss=sum(map(_resident, children)),
        )


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return 0


class Watch(TrainerCallback):
    """Looks at the process every ``EVERY`` steps."""

    def __init__(self) -> None:
        self.begun, self.seen = time.monotonic(), list[Usage]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the step before is logged and saved now, its gradients are gone
        if state.global_step and state.global_step % EVERY == 0:
            for thread in threading.enumerate():  # what draws or scores ahead is done, or its thread would be counted
                if thread.name in ("pronghorn-sampling", "pronghorn-scoring"):
                    thread.join()
            self.look(state.global_step)

    def look(self, step: int) -> None:
        self.seen.append(Usage.now(step, time.monotonic() - self.begun))
        usage = self.seen[-1]
        print(
            f"step {usage.step:5d}  {usage.seconds:7.1f} s  rss {usage.rss / 2**20:8.1f} MiB  "
            f"gpu {usage.gpu / 2**20:9.1f} MiB  files {usage.files}  "
            f"threads {usage.threads}  children {usage.children}",
            flush=True,
        )


EVERYTHING: dict[str, Any] = {
    "rollout_staleness": 1, "rollout_overlap": True, "reward_workers": 1, "curriculum": True, "replay_buffer_size": 8,
    "outcome_reward": "correctness_reward_func", "logging_steps": EVERY,
}  # fmt: skip
"""All that has threads, processes or a state of its own. Workers are small, so a log history that grew with every step,
which they are given, would be most of what they hold."""


def settings(folder: str, steps: int, length: int, gpu: bool, **further: Any) -> GRPOConfig:
    """Light on a CPU; the flow's own on a GPU."""
    given = {"logging_steps": 1, **further}
    return GRPOConfig(
        output_dir=folder, max_steps=steps, learning_rate=5e-6, optim="paged_adamw_8bit" if gpu else "adamw_torch",
        per_device_train_batch_size=6, num_generations=6, max_completion_length=length, max_grad_norm=0.1,
        bf16=gpu, save_strategy="steps", save_steps=10, save_total_limit=2, log_completions=True,
        log_completions_steps=10_000_000, eval_strategy="steps", eval_steps=10, per_device_eval_batch_size=2,
        num_generations_eval=2, disable_tqdm=True, report_to="none", **given,
    )  # fmt: skip


def soak(model_name: str, steps: int, folder: str, length: int, everything: bool = False) -> list[Usage]:
    """Train ``steps`` steps and say what was held at every look, the last one behind the run.

    Args:
        length: most tokens of a completion.
        everything: with :data:`EVERYTHING`.
    """
    gpu = torch.cuda.is_available()
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=512, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=32 if gpu else 8, lora_alpha=32, random_state=3407)
    watch = Watch()
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[*FIVE_REWARDS, brevity],
        args=settings(folder, steps, length, gpu, **(EVERYTHING if everything else {})),
        train_dataset=as_prompts(arithmetic_dataset("grpo", 512)),
        eval_dataset=as_prompts(arithmetic_dataset("heldout", 2)),
        callbacks=[watch],
    )
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(type(callback))
            break
    trainer.train()
    watch.look(steps)
    return watch.seen


def growth(seen: list[Usage], tolerance: float) -> list[str]:
    """What the last two looks hold more of than the first did, in words; empty where all is flat.

    Two, since the last one comes behind the run: it does not see what the run's end has given back.
    """
    first = asdict(seen[0])
    last = {name: max(getattr(usage, name) for usage in seen[-2:]) for name in first}
    found = [
        f"{name} grew by {last[name] / max(first[name], 1) - 1:.2%} from step {first['step']}"
        for name in ("rss", "gpu", "children_rss")
        if last[name] > first[name] * (1 + tolerance)
    ]
    return found + [
        f"{name}: {first[name]} at step {first['step']}, {last[name]} later"
        for name in ("files", "threads", "children")
        if last[name] > first[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(shipped_model()), help="folder of a model; default the shipped one")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--length", type=int, default=None, help="most tokens of a completion; default 48, on a GPU 200"
    )
    parser.add_argument("--everything", action="store_true", help="also threads and processes beside the training")
    parser.add_argument("--tolerance", type=float, default=0.02, help="most growth of memory, as a share")
    parser.add_argument("--json", default=None, help="file that gets the numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        length = args.length or (200 if torch.cuda.is_available() else 48)
        seen = soak(args.model, args.steps, folder, length, args.everything)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(usage) for usage in seen], indent=1) + "\n")
    grown = growth(seen, args.tolerance)
    names = sorted(thread.name for thread in threading.enumerate())
    print("\n".join(grown) if grown else f"flat over {args.steps} steps (threads: {', '.join(names)})")
    raise SystemExit(1 if grown else 0)


if __name__ == "__main__":
    main()
