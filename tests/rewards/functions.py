"""Reward functions for workers, in a module without torch so that workers start quickly."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


async def later(completions: list[str], **kwargs: Any) -> list[float | None]:
    await asyncio.sleep(0.01)
    return [None, *(0.5 for _ in completions[1:])]


def contract(**kwargs: Any) -> list[float | None]:
    """Tells what it was passed, by what it logs."""
    kwargs["log_extra"]("seen", [f"{c}/{p}" for c, p in zip(kwargs["completions"], kwargs["prompts"])])
    kwargs["log_extra"]("ids", kwargs["completion_ids"])
    kwargs["log_metric"]("step", float(kwargs["trainer_state"].global_step))
    kwargs["log_extra"]("names", [",".join(sorted(kwargs))] * len(kwargs["completions"]))
    return [None if a == "skip" else float(a) for a in kwargs["answer"]]


def history(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """The number of log entries; 100 for each that is not where it belongs. Does to its own copy what it likes."""
    if "exit" in completions:
        os._exit(3)
    entries = getattr(trainer_state, "log_history", None)
    if entries is None:
        return [-1.0] * len(completions)
    wrong = sum(entry["loss"] != i + trainer_state.shift for i, entry in enumerate(entries))
    found = len(entries) + 100.0 * wrong
    entries.clear()
    return [found] * len(completions)


def pids(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(os.getpid())] * len(completions)


def environment(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
    log_extra("torch", ["torch" in sys.modules] * len(completions))
    log_extra("gpus", [os.environ.get("CUDA_VISIBLE_DEVICES")] * len(completions))
    log_extra("main", [sys.modules["__main__"].__dict__.get("__file__")] * len(completions))
    return [float(os.getsid(0) == os.getpid())] * len(completions)


def faulty(completions: list[str], **kwargs: Any) -> list[float]:
    """Does to the process what a completion says."""
    for text in completions:
        if text == "raise":
            raise ValueError("bad digit")
        if text == "hang":
            time.sleep(3600)
        if text == "spin":
            while True:
                pass
        if text == "exit":
            os._exit(3)
        if text == "sysexit":
            sys.exit(4)
        if text == "segfault":
            ctypes.string_at(0)
        if text == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "memory":
            raise MemoryError
    return [{"nan": float("nan"), "inf": float("inf"), "text": "1.0"}.get(c, float(len(c))) for c in completions]  # type: ignore[misc]


def short(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def spawns_and_hangs(completions: list[str], folder: list[str], **kwargs: Any) -> list[float]:
    """A child, one in its own session, and an orphaned grandchild in its own session; then it hangs."""
    sleep = "import time; time.sleep(3600)"
    started = [
        subprocess.Popen([sys.executable, "-c", sleep]).pid,
        subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True).pid,
    ]
    orphan = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True).pid)"
    )
    read, write = os.pipe()
    subprocess.run([sys.executable, "-c", orphan], stdout=write, check=True)
    started.append(int(os.read(read, 20)))
    with open(f"{folder[0]}/pids", "w") as file:
        file.write(" ".join(map(str, started)))
    time.sleep(3600)
    return []
