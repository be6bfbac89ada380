"""A training process that can be killed: forked ready to run, it resumes where a whole checkpoint stands."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pronghorn.grpo.checkpoint import clean, whole_checkpoints
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.rewards import isolated
from pronghorn.rollout.base import create
from tests.grpo.support import config, letters, prompts, pronghorn_model
from tests.helpers import tiny_tokenizer

STEPS = 6
READY, OPERATIONS = "ready", "operations"
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

# Children are forked from a process that has imported all this and has trained nothing.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.victim"])
tiny_tokenizer()  # made once, for all children
gc.freeze()  # the collection that begins each training need not go through what the imports made


def many_vowels(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 or 0, so that some groups have no spread: the replay buffer and the curriculum have work."""
    return [float(sum(ch in "aeiou" for ch in text) > 0.12 * len(text)) for text in completions]


many_vowels.__module__ = "__main__"  # carried by value: a worker that imported this module would import torch

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "rollout_staleness": 1, "rollout_overlap": True, "curriculum": True, "replay_buffer_size": 3,
        "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4,
    },
}  # fmt: skip
"""What the victim trains with: TRL's defaults, or all that has threads, processes or a state of its own."""


def made(folder: Path, configuration: str = "plain", **overrides: Any) -> GRPOTrainer:
    """A trainer with the native engine; dropout draws from torch's generator, so a lost state of it would show."""
    settings: dict[str, Any] = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "log_completions": True,
        "log_completions_steps": 1000, "steps_per_generation": 2, **CONFIGURATIONS[configuration], **overrides,
    }  # fmt: skip
    model = pronghorn_model(dropout=0.2)
    everything = configuration == "everything"
    trainer = GRPOTrainer(
        model,
        isolated(many_vowels) if everything else letters,
        config(folder, **settings),
        prompts(),
        prompts(2) if everything else None,
        processing_class=tiny_tokenizer(),
    )
    trainer.sampling._engine = create("native", model, trainer.processing_class, max_seq_length=256)
    return trainer


class _Operations:
    """Counts what the process changes in the file system, and kills it before operation ``kill_at``."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count = kill_at, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event not in _CHANGES and not writes:
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_evaluation(trainer: GRPOTrainer, batch: int) -> None:
    """Kill the process within that evaluation batch, once it is sampled and scored."""
    step = trainer.prediction_step
    seen: list[None] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(None)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.prediction_step = watched  # type: ignore[method-assign]


def run(
    folder: str,
    kill_at: int | None = None,
    kill_in_evaluation: int | None = None,
    file_limit: int | None = None,
    **overrides: Any,
) -> None:
    """Train in this process. ``folder/ready`` appears when training begins, ``folder/operations`` when it has ended.

    Args:
        kill_at: number of the change to the file system before which the process kills itself.
        kill_in_evaluation: number of the evaluation batch in which the process kills itself.
        file_limit: most bytes of a file that it writes from then on.
    """
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # as any new process: nothing may depend on it
    path = Path(folder)
    path.mkdir(exist_ok=True)
    with (path / "log.txt").open("a") as log, redirect_stdout(log):
        os.dup2(log.fileno(), 2)  # what a child in trouble says stays out of the test's output, and is kept
        trainer = made(path / "run", **overrides)
        clean(path / "run")
        resume = bool(whole_checkpoints(path / "run"))
        if kill_in_evaluation is not None:
            _kill_in_evaluation(trainer, kill_in_evaluation)
        operations = _Operations(kill_at)
        sys.addaudithook(operations)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        (path / READY).write_text("")
        trainer.train(resume_from_checkpoint=resume)
        (path / OPERATIONS).write_text(str(operations.count))


def start(folder: Path, **options: Any) -> BaseProcess:
    """A child that runs :func:`run`."""
    (folder / READY).unlink(missing_ok=True)
    process = _context.Process(target=run, args=(str(folder),), kwargs=options)
    process.start()
    return process
