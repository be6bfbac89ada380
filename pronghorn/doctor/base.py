"""What a check is, and how checks and their probes are run without one of them holding the others up."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
PROBE_TIMEOUT_S = 120.0
CHECK_TIMEOUT_S = 180.0
_PROBE_START = "import importlib, sys; sys.path.append(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn`` where work goes on but something will be slower or may surprise; ``fail`` where it
            cannot work.
        detail: what was found.
        remedy: the command, or the act, that mends it; None where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


Checker = Callable[[], list[Check]]
Answer = dict[str, Any]  # what a probe printed


class ProbeError(RuntimeError):
    """A probe did not end well; the text says how."""


def worst(checks: list[Check]) -> Status:
    """``fail`` if any failed, else ``warn`` if any warned, else ``ok``."""
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "ok"


def run_all(checkers: Mapping[str, Checker], timeout_s: float = CHECK_TIMEOUT_S) -> Iterator[Check]:
    """Run every checker at once, each in a thread, and yield their lines in the order given.

    A checker that raises, or does not answer within ``timeout_s`` seconds of the start, gives a ``fail`` line of its
    name. The threads are daemons: one that hangs for good does not keep the process alive.
    """
    boxes: dict[str, queue.Queue[list[Check]]] = {name: queue.Queue(1) for name in checkers}
    deadline = time.monotonic() + timeout_s
    for name, checker in checkers.items():
        threading.Thread(target=_run_one, args=(name, checker, boxes[name]), daemon=True).start()
    for name, box in boxes.items():
        try:
            yield from box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            yield Check(name, "fail", f"no answer within {timeout_s:.0f} s", "run `pronghorn doctor` again")


def _run_one(name: str, checker: Checker, box: queue.Queue[list[Check]]) -> None:
    try:
        box.put(checker())
    except ProbeError as error:
        box.put([Check(name, "fail", str(error), "run `pronghorn doctor` again, or mend what the message names")])
    except Exception as error:  # noqa: BLE001 - the one boundary: whatever a broken machine raises becomes a fail line
        box.put(
            [
                Check(
                    name,
                    "fail",
                    f"{type(error).__name__}: {error}",
                    "mend what the message names, or report it as a bug",
                )
            ]
        )


def probe(name: str, timeout_s: float = PROBE_TIMEOUT_S, environment: Mapping[str, str] | None = None) -> Answer:
    """Run ``pronghorn.doctor.probes.<name>`` in a fresh interpreter and return the JSON object that it printed last.

    Raises:
        ProbeError: it crashed (with the last line of its error output), hung, or printed no JSON.
    """
    # -P: nothing in the working folder stands in for a library.
    command = [sys.executable, "-P", "-c", _PROBE_START, str(_PACKAGE_PARENT), f"pronghorn.doctor.probes.{name}"]
    env = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout_s:.0f} s from `python -m {command[-1]}`") from None
    if done.returncode < 0:
        died = signal.Signals(-done.returncode).name
        raise ProbeError(f"`python -m {command[-1]}` was killed by {died}")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ProbeError(errors[-1] if errors else f"exit status {done.returncode} and no output")
    try:
        answer = json.loads(lines[-1])
    except json.JSONDecodeError as error:
        raise ProbeError(f"no JSON in the probe's last line {lines[-1]!r}: {error}") from None
    if not isinstance(answer, dict):
        raise ProbeError(f"the probe printed {lines[-1]!r}, not an object")
    return answer


def command_output(command: list[str], timeout_s: float = 15.0) -> str | None:
    """What ``command`` printed, or None where there is no such program.

    Raises:
        ProbeError: it failed (with its message) or hung.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise ProbeError(f"`{' '.join(command)}` gave no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ProbeError(f"`{' '.join(command)}` ended with status {done.returncode}: {message}")
    return done.stdout


def gib(count: float) -> str:
    """Bytes as text: ``12.3 GiB``."""
    return f"{count / 1024**3:.1f} GiB"
